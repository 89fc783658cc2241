"""`cosettle-cache track`: points through stored tokens, and their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DataRoot,
    Device,
    Drawn,
    DryRun,
    FramesStoreOrNone,
    Json,
    Projections,
    Quiet,
    Weights,
    open_features,
    store_title,
)
from cosettle_cache.core.cluster import pick_device
from cosettle_cache.core.console import Talk, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, UncleanError, UsageError
from cosettle_cache.core.files import make_folder
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
    pictures: Annotated[Drawn, typer.Option(help="Of no, one or all videos.")] = Drawn.FIRST,
    device: Device = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Track points by their nearest tokens, raw and projected; score them where truth is known.

    Example: cosettle-cache track --task sprites --features sprites.zarr
    """
    from cosettle_cache.extraction.jobs import StoreWish, make_store
    from cosettle_cache.heads.kinds import default_projection, load_heads
    from cosettle_cache.metrics.rows import remove_scores, write_scores
    from cosettle_cache.propagation.track import check_store, track_store
    from cosettle_cache.videos.find import media_root
    from cosettle_cache.videos.queries import read_queries

    if (task is None) == (queries is None):
        wanted = "--task sprites, --task tapvid or --queries FILE, one of them"
        raise UsageError("which points?", wanted=wanted)
    talk, name, paths = Talk(quiet=quiet), task or FREE, projection or []
    plan = {"task": name, "settings": asdict(settings)}
    failures: dict[str, str] = {}
    chosen_device = device if dry_run else pick_device(device)
    made = features is None
    if features is None:
        wish = StoreWish(name, size, backbone, weights, data_root, device, precision)
        data = _find_videos(name, data_root)
        if dry_run:
            return _print_plan(talk, plan | {"videos": len(data.manifest), "store_to_make": asdict(wish)})
        features, failures = make_store(wish, data, talk)
    store = open_features(features, cache_dir, cache_size)
    check_store(store)
    _check_task(name, store)
    heads = load_heads(paths or (default_projection(store, talk) if made else []), store)
    own = None if queries is None else read_queries(queries, store.manifest)
    needs_media = own is None or pictures != Drawn.NONE
    root = media_root(store.manifest, data_root) if needs_media else None
    out = out or Path("runs") / f"track-{name}-{store_title(store.path)}"
    if dry_run:
        videos, tokens = store.video_ids if own is None else own, ["raw", *(head for head, _ in heads)]
        return _print_plan(talk, plan | {"videos": len(videos), "tokens": tokens, "out": out})
    remove_scores(make_folder(out))
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
            device=chosen_device or "cpu",
            progress=talk.progress("track"),
            stop=stop,
        )
    if report.scores:
        write_scores(out, report.scores, complete=not (report.interrupted or report.error))
    failures = {**store.failures, **failures, **report.failures}
    (_print_json if as_json else _print_table)(report, out, failures, talk)
    return _end(report, failures)
