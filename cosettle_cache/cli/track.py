"""`cosettle-cache track`: points through stored tokens, and their scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cosettle_cache.cli.options import (
    Cache,
    DataRoot,
    Device,
    FramesStoreOrNone,
    Mode,
    Projections,
    Weights,
    finish,
)
from cosettle_cache.core.console import Talk, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, UsageError
from cosettle_cache.core.files import store_title
from cosettle_cache.core.settings import FITTING_SIZE, TrackSettings
from cosettle_cache.core.types import LabelKind

if TYPE_CHECKING:
    from cosettle_cache.propagation.track import TrackReport
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.videos.find import Data

#: Stands in for the task where points of one's own are tracked.
FREE = "points"


def track(
    *,
    task: Annotated[
        Literal["sprites", "tapvid"] | None, typer.Option(help="Data with true tracks; TAP-Vid's figures.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Own points instead: CSV or Parquet of video_id, frame, x, y.")
    ] = None,
    features: FramesStoreOrNone = None,
    projection: Projections = None,
    settings: TrackSettings,
    backbone: Annotated[str | None, typer.Option(help="Encoder of a store made on the way.")] = None,
    weights: Weights = None,
    size: Annotated[str, typer.Option(help="Size rule of a store made on the way.")] = FITTING_SIZE,
    precision: Annotated[str, typer.Option(help="Of an encoder run on the way.")] = "fp32",
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tracks, pictures, scores.")] = None,
    pictures: Annotated[
        Literal["none", "first", "all"], typer.Option(help="Of no, one or all videos.")
    ] = "first",
    device: Device = None,
    cache: Cache,
    mode: Mode,
) -> int:
    """Track points by their nearest tokens, raw and projected; score them where truth is known.

    Example: cosettle-cache track --task sprites --features sprites.zarr
    """
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import default_projection, load_heads
    from cosettle_cache.propagation.track import track_store
    from cosettle_cache.videos.find import media_root
    from cosettle_cache.videos.queries import read_queries

    if (task is None) == (queries is None):
        wanted = "--task sprites, --task tapvid or --queries FILE, one of them"
        raise UsageError("which points?", wanted=wanted)
    talk, name = Talk(quiet=mode.quiet), task or FREE
    plan = {"task": name, "settings": asdict(settings)}
    path, failures = features, dict[str, str]()
    if path is None:
        from cosettle_cache.extraction.jobs import StoreWish, make_store

        data = _find_videos(name, data_root)
        wish = StoreWish(name, size, backbone, weights, data_root, device, precision)
        if mode.dry_run:
            talk.json({**plan, "videos": len(data.manifest), "store_to_make": asdict(wish)})
            return ExitCode.DONE
        path, failures = make_store(wish, data, talk)
    store = cache.open(path)
    _check_points(name, store)
    failures = {**store.failures, **failures}
    # Beside a store made on the way, the projection that `train` leaves.
    found = default_projection(store, talk) if features is None and not projection else []
    heads = load_heads(projection or found, store)
    own = None if queries is None else read_queries(queries, store.manifest)
    needs_media = own is None or pictures != "none"
    root = media_root(store.manifest, data_root) if needs_media else None
    out = out or Path("runs") / f"track-{name}-{store_title(store.path)}"
    if mode.dry_run:
        videos = len(store.video_ids if own is None else own)
        tokens = ["raw", *(head for head, _ in heads)]
        talk.json({**plan, "videos": videos, "tokens": tokens, "out": out})
        return ExitCode.DONE
    device = pick_device(device)
    talk.note(f"settings: {json.dumps(asdict(settings))}")
    with interruptible(talk, "video") as stop:
        report = track_store(
            store,
            root,
            settings,
            out,
            task=name,
            queries=own,
            projections=heads,
            pictures=pictures,
            device=device,
            progress=talk.progress("track"),
            stop=stop,
            earlier_failures=failures,
        )
    _print_report(report, out, talk, mode.as_json)
    return finish(report, report.failures)


def _find_videos(task: str, data_root: Path | None) -> Data:
    from cosettle_cache.videos.find import benchmark_data, sprites_data

    if task == "sprites":
        return sprites_data("val")
    if task == FREE or data_root is None:
        wanted = "--features STORE" if task == FREE else "--data-root FOLDER or --features STORE"
        raise UsageError("where are the videos?", wanted=wanted)
    return benchmark_data(task, data_root)


def _check_points(task: str, store: FeatureStore) -> None:
    """Raise unless `store` holds every frame of videos that the task `task` is about."""
    from cosettle_cache.propagation.track import check_store

    check_store(store)
    datasets = {video.dataset for video in store.manifest}
    if task == "sprites" and datasets != {task}:
        found = ", ".join(datasets)
        raise UsageError(f"{store.path} holds no sprites clips", wanted="a store of them", found=found)
    if task == "tapvid" and all(video.label_kind is not LabelKind.TRACKS for video in store.manifest):
        raise UsageError(
            f"no video of {store.path} has tracks",
            wanted="a store of a manifest of the layout tapvid",
            hint="--queries FILE tracks points of your own, without scores",
        )


def _print_report(report: TrackReport, out: Path, talk: Talk, as_json: bool) -> None:
    from cosettle_cache.metrics.rows import score_table, summary_json

    if as_json:
        document = {"complete": report.complete, "out": str(out), "failures": report.failures}
        document |= {"queries": report.n_queries, "frames": report.n_frames, **summary_json(report.scores)}
        talk.json(document)
        return
    if report.scores:
        first = report.scores[0]
        mode = json.loads(first.protocol_json)["query_mode"]
        title = f"{first.provenance.dataset}, queries {mode}, percent at 256x256"
        talk.table(title, *score_table(report.scores))
    took = human_seconds(report.seconds)
    talk.result(f"{report.n_queries} queries through {report.n_frames} frames in {took}")
    talk.result(f"tracks, pictures and scores: {out}")
