"""`cosettle-cache track`: points through stored tokens, and the TAP-Vid figures."""

from __future__ import annotations

import json
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
    DryRun,
    Json,
    Quiet,
    interruptible,
    open_features,
    pick_device,
    store_title,
)
from cosettle_cache.config import TrackSettings
from cosettle_cache.console import Talk, human_seconds
from cosettle_cache.errors import ExitCode, UncleanError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cosettle_cache.datasets.tracks import Queries
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.track import TrackReport

_DEFAULT = TrackSettings()
#: Stands in for the task where points of one's own are tracked.
FREE = "points"


class Task(StrEnum):
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


class Pictures(StrEnum):
    """Which videos get pictures."""

    NONE = "none"
    FIRST = "first"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Request:
    """What is tracked: the store, the queries of one's own if there are any, and where results go."""

    task: str
    store: FeatureStore
    queries: Mapping[str, Queries] | None
    data_root: Path | None
    projections: tuple[Path, ...]
    pictures: str
    out: Path


def track(
    features: Annotated[str, typer.Option(help="A frames store, local or at a URL.")],
    task: Annotated[Task | None, typer.Option(help="Data with true tracks; TAP-Vid's figures.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Own points instead: CSV or Parquet of video_id, frame, x, y.")
    ] = None,
    projection: Annotated[
        list[Path] | None, typer.Option(help="Projection beside the raw tokens; repeatable.")
    ] = None,
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
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tracks, pictures, scores.")] = None,
    pictures: Annotated[Pictures, typer.Option(help="Of no, one or all videos.")] = Pictures.FIRST,
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
    settings = TrackSettings(
        query_mode.value, query_stride, radius, temperature, occlusion.value, cycle_radius, min_cosine
    )
    talk = Talk(quiet=quiet)
    if (task is None) == (queries is None):
        raise UsageError(
            "which points?", wanted="--task sprites, --task tapvid or --queries FILE, one of them"
        )
    store = open_features(features, cache_dir, cache_size)
    request = _request(task, queries, store, data_root, tuple(projection or ()), pictures.value, out)
    if dry_run:
        talk.result(json.dumps(_plan(request, settings), indent=2))
        return int(ExitCode.DONE)
    return _track(request, settings, pick_device(device), talk, as_json)


def _request(
    task: Task | None,
    queries: Path | None,
    store: FeatureStore,
    data_root: Path | None,
    projections: tuple[Path, ...],
    pictures: str,
    out: Path | None,
) -> Request:
    from cosettle_cache.cli.data import media_root
    from cosettle_cache.datasets.tracks import read_queries
    from cosettle_cache.track import check_store

    check_store(store)
    name = task.value if task else FREE
    datasets = {video.dataset for video in store.manifest}
    if task is Task.SPRITES and datasets != {name}:
        raise UsageError(
            f"{store.path} holds no sprites clips", wanted="a store of them", found=", ".join(datasets)
        )
    own = None if queries is None else read_queries(queries, store.manifest)
    needs_media = own is None or pictures != "none"
    root = media_root(store.manifest, data_root) if needs_media else None
    out = out or Path("runs") / f"track-{name}-{store_title(store.path)}"
    return Request(name, store, own, root, projections, pictures, out)


def _plan(request: Request, settings: TrackSettings) -> dict[str, object]:
    from cosettle_cache.cli.heads import load_heads
    from cosettle_cache.tracker import check_settings

    check_settings(settings)
    videos = request.queries if request.queries is not None else request.store.video_ids
    return {
        "task": request.task,
        "videos": len(videos),
        "tokens": ["raw", *(name for name, _ in load_heads(request.projections, request.store))],
        "settings": asdict(settings),
        "pictures": request.pictures,
        "out": str(request.out),
    }


def _track(request: Request, settings: TrackSettings, device: str, talk: Talk, as_json: bool) -> int:
    from cosettle_cache import results
    from cosettle_cache.cli.heads import load_heads
    from cosettle_cache.track import track_store

    projections = load_heads(request.projections, request.store)
    results.remove_scores(request.out)
    talk.note(f"settings: {json.dumps(asdict(settings))}")
    with interruptible(talk, "video") as stop:
        report = track_store(
            request.store,
            request.data_root,
            settings,
            request.out,
            task=request.task,
            queries=request.queries,
            projections=projections,
            pictures=request.pictures,
            device=device,
            progress=talk.progress("track"),
            stop=stop,
        )
    if report.scores:
        results.write_scores(request.out, report.scores, complete=not (report.interrupted or report.error))
    _print(report, request, talk, as_json)
    return _end(report, request.store.failures)


def _print(report: TrackReport, request: Request, talk: Talk, as_json: bool) -> None:
    from cosettle_cache.results import score_table, summary_json

    counts = {"videos_failed": len(report.failures), "queries": report.n_queries, "frames": report.n_frames}
    if as_json:
        talk.result(json.dumps({"out": str(request.out), **counts, **summary_json(report.scores)}, indent=2))
        return
    if report.scores:
        header, rows = score_table(report.scores)
        mode = json.loads(report.scores[0].protocol_json)["query_mode"]
        talk.table(f"{report.scores[0].dataset}, queries {mode}, percent at 256x256", header, rows)
    talk.result(
        f"{report.n_queries} queries through {report.n_frames} frames in {human_seconds(report.seconds)}"
    )
    talk.result(f"tracks{', pictures' if request.pictures != 'none' else ''} and scores: {request.out}")


def _end(report: TrackReport, store_failures: Mapping[str, str]) -> int:
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    failures = {**store_failures, **report.failures}
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)
