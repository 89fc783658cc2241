"""`cosettle-cache track`: points through stored tokens, and their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
from cosettle_cache.core.cluster import pick_device
from cosettle_cache.core.console import Talk, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, UncleanError, UsageError
from cosettle_cache.core.files import make_folder, store_title
from cosettle_cache.core.settings import FITTING_SIZE, TrackSettings
from cosettle_cache.core.types import LabelKind

if TYPE_CHECKING:
    from cosettle_cache.extraction.jobs import StoreWish
    from cosettle_cache.heads.projection import Projection
    from cosettle_cache.propagation.track import TrackReport
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.videos.find import Data
    from cosettle_cache.videos.queries import Queries


_DEFAULT = TrackSettings()
#: Stands in for the task where points of one's own are tracked.
FREE = "points"


class TrackTask(StrEnum):
    """The data that have true tracks."""

    SPRITES = "sprites"
    TAPVID = "tapvid"


class QueryMode(StrEnum):
    """Which queries a benchmark asks."""

    FIRST = "first"
    STRIDED = "strided"


class Occlusion(StrEnum):
    """How visibility is estimated."""

    CYCLE = "cycle"
    COSINE = "cosine"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class TrackRequest:
    """What was asked of `track`; `wish` is the store to be made where none is given."""

    task: str
    queries: Path | None
    features: str | None
    wish: StoreWish
    projections: tuple[Path, ...]
    pictures: str
    out: Path | None
    cache_dir: Path | None
    cache_size: str


@dataclass(frozen=True, slots=True)
class TrackInputs:
    """What is tracked, opened and checked; `failures` are those of videos that the store lacks."""

    store: FeatureStore
    queries: Mapping[str, Queries] | None
    data_root: Path | None
    heads: list[tuple[str, Projection]]
    out: Path
    failures: Mapping[str, str]


def track(
    task: Annotated[TrackTask | None, typer.Option(help="Data with true tracks; TAP-Vid's figures.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Own points instead: CSV or Parquet of video_id, frame, x, y.")
    ] = None,
    features: FramesStoreOrNone = None,
    projection: Projections = None,
    query_mode: Annotated[
        QueryMode, typer.Option(help="first: each point once; strided: again and again.")
    ] = QueryMode.FIRST,
    query_stride: Annotated[
        int, typer.Option(min=1, help="Frames between, if strided.")
    ] = _DEFAULT.query_stride,
    radius: Annotated[float, typer.Option(help="Of the soft-argmax, in tokens.")] = _DEFAULT.radius,
    temperature: Annotated[float, typer.Option(help="Of the soft-argmax.")] = _DEFAULT.temperature,
    occlusion: Annotated[
        Occlusion, typer.Option(help="Visible: if the way back ends near, by cosine, always.")
    ] = Occlusion.CYCLE,
    cycle_radius: Annotated[float, typer.Option(help="What is near, in tokens.")] = _DEFAULT.cycle_radius,
    min_cosine: Annotated[float, typer.Option(help="Least cosine, for cosine.")] = _DEFAULT.min_cosine,
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
    from cosettle_cache.propagation.track import check_settings

    if (task is None) == (queries is None):
        raise UsageError(
            "which points?", wanted="--task sprites, --task tapvid or --queries FILE, one of them"
        )
    settings = TrackSettings(
        query_mode.value, query_stride, radius, temperature, occlusion.value, cycle_radius, min_cosine
    )
    check_settings(settings)
    talk, name = Talk(quiet=quiet), task.value if task else FREE
    from cosettle_cache.extraction.jobs import StoreWish

    wish = StoreWish(name, size, backbone, weights, data_root, device, precision)
    request = TrackRequest(
        name, queries, features, wish, tuple(projection or ()), pictures.value, out, cache_dir, cache_size
    )
    if dry_run:
        talk.result(json.dumps(_plan(request, settings, talk), indent=2, default=str))
        return int(ExitCode.DONE)
    return _track(request, settings, talk, as_json)


def _plan(request: TrackRequest, settings: TrackSettings, talk: Talk) -> dict[str, object]:
    document: dict[str, object] = {"task": request.task, "settings": asdict(settings)}
    if request.features is None:
        data = _track_data(request)
        return document | {"videos": len(data.manifest), "store_to_make": asdict(request.wish)}
    inputs = _open(request, talk)
    videos = inputs.store.video_ids if inputs.queries is None else inputs.queries
    tokens = ["raw", *(name for name, _ in inputs.heads)]
    return document | {"videos": len(videos), "tokens": tokens, "out": inputs.out}


def _track_data(request: TrackRequest) -> Data:
    from cosettle_cache.videos.find import benchmark_data, sprites_data

    if request.task == TrackTask.SPRITES:
        return sprites_data("val")
    if request.task == FREE or request.wish.data_root is None:
        wanted = "--features STORE" if request.task == FREE else "--data-root FOLDER or --features STORE"
        raise UsageError("where are the videos?", wanted=wanted)
    return benchmark_data(request.task, request.wish.data_root)


def _open(request: TrackRequest, talk: Talk) -> TrackInputs:
    """Open what is there, make the store if none is given, and check that all fits."""
    from cosettle_cache.extraction.jobs import make_store
    from cosettle_cache.heads.kinds import default_projection, load_heads
    from cosettle_cache.propagation.track import check_store
    from cosettle_cache.videos.find import media_root
    from cosettle_cache.videos.queries import read_queries

    features, paths, failures = request.features, request.projections, dict[str, str]()
    if features is None:
        features, failures = make_store(request.wish, _track_data(request), talk)
    store = open_features(features, request.cache_dir, request.cache_size)
    if request.features is None and not paths:
        paths = tuple(default_projection(store, talk))
    check_store(store)
    _check_task(request, store)
    own = None if request.queries is None else read_queries(request.queries, store.manifest)
    needs_media = own is None or request.pictures != "none"
    root = media_root(store.manifest, request.wish.data_root) if needs_media else None
    out = request.out or Path("runs") / f"track-{request.task}-{store_title(store.path)}"
    return TrackInputs(store, own, root, load_heads(paths, store), out, {**store.failures, **failures})


def _check_task(request: TrackRequest, store: FeatureStore) -> None:
    datasets = {video.dataset for video in store.manifest}
    if request.task == TrackTask.SPRITES and datasets != {request.task}:
        found = ", ".join(datasets)
        raise UsageError(f"{store.path} holds no sprites clips", wanted="a store of them", found=found)
    if request.task == TrackTask.TAPVID and not any(
        row.label_kind is LabelKind.TRACKS for row in store.manifest
    ):
        raise UsageError(
            f"no video of {store.path} has tracks",
            wanted="a store of a manifest of the layout tapvid",
            hint="--queries FILE tracks points of your own, without scores",
        )


def _track(request: TrackRequest, settings: TrackSettings, talk: Talk, as_json: bool) -> int:
    from cosettle_cache.metrics.rows import remove_scores, summary_json, write_scores
    from cosettle_cache.propagation.track import track_store

    device = pick_device(request.wish.device)
    inputs = _open(request, talk)
    remove_scores(make_folder(inputs.out))
    talk.note(f"settings: {json.dumps(asdict(settings))}")
    with interruptible(talk, "video") as stop:
        report = track_store(
            inputs.store,
            inputs.data_root,
            settings,
            inputs.out,
            task=request.task,
            queries=inputs.queries,
            projections=inputs.heads,
            pictures=request.pictures,
            device=device,
            progress=talk.progress("track"),
            stop=stop,
        )
    complete = not (report.interrupted or report.error)
    if report.scores:
        write_scores(inputs.out, report.scores, complete=complete)
    failures = {**inputs.failures, **report.failures}
    if as_json:
        counts = {"queries": report.n_queries, "frames": report.n_frames}
        document = {"complete": complete, "out": str(inputs.out), "failures": failures, **counts}
        talk.result(json.dumps({**document, **summary_json(report.scores)}, indent=2))
    else:
        _print_track(report, inputs.out, talk)
    return _end_track(report, failures)


def _print_track(report: TrackReport, out: Path, talk: Talk) -> None:
    from cosettle_cache.metrics.rows import score_table

    if report.scores:
        header, rows = score_table(report.scores)
        mode = json.loads(report.scores[0].protocol_json)["query_mode"]
        talk.table(f"{report.scores[0].dataset}, queries {mode}, percent at 256x256", header, rows)
    talk.result(
        f"{report.n_queries} queries through {report.n_frames} frames in {human_seconds(report.seconds)}"
    )
    talk.result(f"tracks, pictures and scores: {out}")


def _end_track(report: TrackReport, failures: Mapping[str, str]) -> int:
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)
