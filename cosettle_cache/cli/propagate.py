"""`cosettle-cache propagate`: labels of the first frame through stored tokens, and the scores.

What `propagate` works on: a store, made on the way where none is given, and projections.

`cosettle-cache track`: points through stored tokens, and the TAP-Vid figures.

`cosettle-cache score`: what anybody's predictions are worth on a benchmark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Scheduler,
    Weights,
    Workers,
    name_folders,
    open_features,
    parse_bytes,
    store_title,
)
from cosettle_cache.core.cluster import pick_device
from cosettle_cache.core.console import Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, InputError, UncleanError, UsageError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.settings import FITTING_SIZE, TrackSettings
from cosettle_cache.core.types import EvalProtocol, Grid, LabelKind, Score
from cosettle_cache.propagation.protocols import make_protocol

if TYPE_CHECKING:
    from threading import Event

    from cosettle_cache.core.parallel import Run
    from cosettle_cache.extraction.jobs import StoreWish
    from cosettle_cache.heads.projection import Projection
    from cosettle_cache.propagation import PropagationReport
    from cosettle_cache.propagation.track import TrackReport
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.videos.find import Data
    from cosettle_cache.videos.queries import Queries


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of `propagate`, before anything is derived."""

    task: str
    features: str | None
    projections: tuple[Path, ...]
    backbone: str | None
    weights: str | None
    data_root: Path | None
    manifest: Path | None
    out: Path | None
    overlays: str
    search: str
    device: str | None
    precision: str
    memory_limit: str | None
    neighbors: Path | None
    workers: int
    scheduler: str | None
    restart: bool
    cache_dir: Path | None
    cache_size: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """A store, the root of its media, and reasons for the videos that failed on the way to it."""

    store: FeatureStore
    data_root: Path
    failures: dict[str, str]


def check_paths(request: Request) -> None:
    """Raise `InputError` for stores, manifests and projections that are not there."""
    if request.features is not None:
        open_features(request.features, None, request.cache_size)
    for path in (*request.projections, *([request.manifest] if request.manifest else [])):
        if not path.exists():
            raise InputError(f"{path} does not exist", wanted="a file")


def open_inputs(request: Request, protocol: EvalProtocol, talk: Talk) -> Inputs:
    """Return the store that was named, or one made on the way."""
    from cosettle_cache.store import open_store
    from cosettle_cache.store._local import is_url
    from cosettle_cache.videos.find import media_root

    if request.features is None:
        data = _task_data(request, talk)
        path, failures = _make_store(request, protocol, data, talk)
        return Inputs(open_store(path), data.root, failures)
    shared = request.features if is_url(request.features) else str(Path(request.features).absolute())
    features = shared if request.workers or request.scheduler else request.features
    store = open_features(features, request.cache_dir, request.cache_size)
    return Inputs(store, media_root(store.manifest, request.data_root), dict(store.failures))


def _task_data(request: Request, talk: Talk) -> Data:
    from cosettle_cache.videos.find import evaluation_data, manifest_data

    if request.manifest is not None:
        return manifest_data(request.manifest, request.data_root)
    return evaluation_data(request.task, request.data_root, talk)


def _make_store(
    request: Request, protocol: EvalProtocol, data: Data, talk: Talk
) -> tuple[str, dict[str, str]]:
    from cosettle_cache.extraction.jobs import StoreWish, make_store

    wish = StoreWish(
        request.task,
        protocol.size,
        request.backbone,
        request.weights,
        request.data_root,
        request.device,
        request.precision,
        workers=request.workers,
        scheduler=request.scheduler,
        red_std=protocol.red_std,
    )
    try:
        return make_store(wish, data, talk)
    except InputError as error:
        if error.hint is not None and error.hint.startswith("--size "):
            error.hint = f"--set size={FITTING_SIZE}, or a multiple of the patch as HEIGHTxWIDTH"
        raise


def open_projections(request: Request, store: FeatureStore, talk: Talk) -> list[tuple[str, Any]]:
    """Return the projections by name: as asked for, or the one that `train` leaves, if it fits the store."""
    from cosettle_cache.heads.kinds import default_projection, load_heads

    paths = list(request.projections)
    if not paths and request.features is None:
        paths = default_projection(store, talk)
    return load_heads(paths, store)


class Task(StrEnum):
    """What is propagated."""

    DAVIS = "davis"
    VIP = "vip"
    JHMDB = "jhmdb"
    SPRITES = "sprites"
    MASKS = "masks"


class Search(StrEnum):
    """Who ranks the context."""

    AUTO = "auto"
    BF16 = "bf16"
    FAISS = "faiss"
    TORCH = "torch"


def propagate(
    task: Annotated[Task, typer.Option(help="A benchmark, or masks: one's own clips, each with a mask.")],
    features: FramesStoreOrNone = None,
    projection: Projections = None,
    protocol: Annotated[str, typer.Option(help="Preset.")] = "cosettle",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Protocol field, as top_k=10; repeatable.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder of a store made on the way.")] = None,
    weights: Weights = None,
    data_root: DataRoot = None,
    manifest: Annotated[Path | None, typer.Option(help="Videos of a store made on the way.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions, overlays, scores.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove earlier results in --out first.")
    ] = False,
    overlays: Annotated[Drawn, typer.Option(help="Pictures of no, one or all videos.")] = Drawn.FIRST,
    search: Annotated[Search, typer.Option(help="All are exact.")] = Search.AUTO,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes that the search takes, as 500MB.")
    ] = None,
    save_neighbors: Annotated[
        Path | None, typer.Option(help="Folder to keep neighbour lists in, and to take them from.")
    ] = None,
    workers: Workers = 0,
    scheduler: Scheduler = None,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="Of an encoder run on the way.")] = "fp32",
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Propagate first-frame labels, raw and projected, and score them. Finished videos are kept.

    Example: cosettle-cache propagate --task davis --features davis.zarr
    """
    talk = Talk(quiet=quiet)
    chosen = make_protocol(protocol, task=task.value, **_overrides(override or []))
    request = Request(
        task=task.value,
        features=features,
        projections=tuple(projection or ()),
        backbone=backbone,
        weights=weights,
        data_root=data_root,
        manifest=manifest,
        out=out,
        overlays=overlays.value,
        search=search.value,
        device=device,
        precision=precision,
        memory_limit=memory_limit,
        neighbors=save_neighbors,
        workers=workers,
        scheduler=scheduler,
        restart=restart,
        cache_dir=cache_dir,
        cache_size=cache_size,
    )
    if dry_run:
        check_paths(request)
        talk.result(json.dumps({"protocol": chosen.to_json(), **_plain(request)}, indent=2))
        return int(ExitCode.DONE)
    return _propagate(request, chosen, talk, as_json)


def _propagate(request: Request, protocol: EvalProtocol, talk: Talk, as_json: bool) -> int:

    from cosettle_cache.metrics.rows import CHART_FILE, summary_json, write_scores
    from cosettle_cache.propagation.run import write_score_chart

    memory_limit = None if request.memory_limit is None else parse_bytes(request.memory_limit)
    inputs = open_inputs(request, protocol, talk)
    out = request.out or _default_folder(request, protocol, inputs.store.path)
    report = _run(request, inputs, protocol, out, memory_limit, talk)
    failures = {**inputs.failures, **report.failures}
    complete = not (report.interrupted or report.error)
    write_scores(out, report.scores, complete=complete)
    if as_json:
        document = {"complete": complete, "out": str(out), "failures": failures}
        talk.result(json.dumps({**document, **summary_json(report.scores)}, indent=2))
    else:
        _print(report, out, talk)
    if request.overlays != Drawn.NONE:
        write_score_chart(out / CHART_FILE, report.scores)
    return _end(report, failures)


def _end(report: PropagationReport, failures: Mapping[str, str]) -> int:
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)


def _run(
    request: Request, inputs: Inputs, protocol: EvalProtocol, out: Path, memory_limit: int | None, talk: Talk
) -> PropagationReport:
    from cosettle_cache.metrics.rows import remove_scores
    from cosettle_cache.propagation import propagate_store

    projections = open_projections(request, inputs.store, talk)
    talk.note(f"protocol: {json.dumps(protocol.to_json())}")

    def start(n_finished: int) -> None:
        # Figures of an earlier run must not pass for those of a run that fails.
        remove_scores(out)
        if n_finished:
            talk.note(f"{out}: {n_finished} of {len(inputs.store.manifest)} videos are finished already")

    with interruptible(talk, "videos") as stop, _workers(request, stop, talk) as (runner, device):
        return propagate_store(
            inputs.store,
            inputs.data_root,
            protocol,
            out,
            task=request.task,
            projections=projections,
            overlays=request.overlays,
            search=request.search,
            device=device,
            memory_limit=memory_limit,
            neighbors=request.neighbors and request.neighbors.absolute(),
            restart=request.restart,
            runner=runner,
            progress=talk.progress("propagate"),
            stop=stop,
            on_start=start,
        )


@contextmanager
def _workers(request: Request, stop: Event, talk: Talk) -> Iterator[tuple[Run | None, str | None]]:
    """Yield what hands videos to workers (None: this process does all), and the device."""
    if not request.workers and request.scheduler is None:
        yield None, pick_device(request.device)
        return
    from cosettle_cache.core.cluster import connect
    from cosettle_cache.extraction.jobs import check_workers

    gpus = check_workers(request.workers, request.scheduler, request.device)
    # A video keeps all cores of its worker busy: one at a time.
    with connect(
        workers=request.workers, scheduler=request.scheduler, threads=1, gpus=gpus, note=talk.note
    ) as cluster:
        on_gpus = request.device == "cuda" or (request.device is None and cluster.has_gpus())
        yield partial(cluster.run, stop=stop, on_gpus=on_gpus), request.device


def _default_folder(request: Request, protocol: EvalProtocol, store: str) -> Path:
    """Return `runs/TASK-STORE`, with the protocol where it is not the default."""
    plain = make_protocol(task=request.task)
    mark = "" if protocol == plain else "-" + re.sub("[ /:]+", "-", protocol.name)
    return Path("runs") / f"{request.task}-{store_title(store)}{mark}"


def _print(report: PropagationReport, out: Path, talk: Talk) -> None:
    from cosettle_cache.metrics.rows import score_table

    if report.scores:
        header, rows = score_table(report.scores)
        talk.table(f"{report.scores[0].protocol}, {report.scores[0].dataset}: percent", header, rows)
    else:
        talk.note("nothing was scored: no video is annotated beyond its first frame")
    if report.n_reused:
        talk.note(
            f"neighbours of {report.n_reused} videos (each kind of tokens counts) were read, not searched"
        )
    talk.result(
        f"{report.n_frames} frames in {human_seconds(report.seconds.total)}, "
        f"peak memory {human_bytes(report.peak_memory_bytes)}"
    )
    talk.result(f"predictions, overlays and scores: {out}")


def _overrides(pairs: list[str]) -> dict[str, object]:
    kinds = {item.name: str(item.type) for item in fields(EvalProtocol)}
    return dict(_override(pair, kinds) for pair in pairs)


def _override(pair: str, kinds: dict[str, str]) -> tuple[str, object]:
    key, equals, text = pair.partition("=")
    if not equals:
        raise UsageError(f"{pair!r} sets nothing", wanted="FIELD=VALUE, as top_k=10")
    kind = kinds.get(key, "str")
    try:
        if kind == "bool":
            return key, {"true": True, "false": False}[text.lower()]
        return key, {"int": int, "float": float}.get(kind, str)(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{key} cannot be {text!r}", wanted=f"a value of type {kind}") from error


def _plain(request: Request) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(request), default=str))  # type: ignore[no-any-return]


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


class ScoreTask(StrEnum):
    """The benchmarks that have truth to score against."""

    DAVIS = "davis"
    VIP = "vip"
    JHMDB = "jhmdb"
    SPRITES = "sprites"


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What to score: the videos, and the folders of predictions by the names their rows get."""

    task: str
    data: Data
    folders: Mapping[str, Path]
    grid: Grid


def score(
    task: Annotated[ScoreTask, typer.Option(help="Benchmark.")],
    predictions: Annotated[list[Path], typer.Option(help="Folder of results; repeatable.")],
    data_root: DataRoot = None,
    manifest: Annotated[Path | None, typer.Option(help="Videos; default: all found.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet or CSV file of all rows.")] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file of a dot per video.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score what is complete.")] = False,
    grid: Annotated[str, typer.Option(help="Grid that predicted joints count in.")] = "20x20",
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Score masks, parts or joints in a benchmark's own output format.

    Example: cosettle-cache score --task davis --predictions results --data-root /data
    """
    talk = Talk(quiet=quiet)
    request = ScoreRequest(
        task.value, _data(task, manifest, data_root), name_folders(predictions), _grid(grid)
    )
    problems = _problems(request, talk)
    _refuse_incomplete(request, problems, partial=partial)
    if dry_run:
        talk.result(f"{len(request.data.manifest) - len(problems)} videos can be scored")
        return int(ExitCode.DONE)
    for path in filter(None, (out, chart)):
        make_folder(path.parent)
    scores, failures = _score(request, frozenset(problems), talk)
    left_out = {**{video_id: "; ".join(lines) for video_id, lines in problems.items()}, **failures}
    _report(scores, left_out, talk, as_json)
    _write(scores, out, chart, talk)
    if left_out:
        details = [f"{what}: {reason}" for what, reason in left_out.items()]
        raise UncleanError(f"{len(left_out)} videos were not scored", details=details)
    return int(ExitCode.DONE)


def _data(task: ScoreTask, manifest: Path | None, data_root: Path | None) -> Data:
    from cosettle_cache.videos.find import benchmark_data, manifest_data, sprites_data

    if manifest is not None:
        return manifest_data(manifest, data_root)
    return sprites_data("val") if task is ScoreTask.SPRITES else benchmark_data(task.value, data_root)


def _grid(text: str) -> Grid:
    try:
        return Grid.parse(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no grid", wanted="ROWSxCOLS, as 20x20") from error


def _problems(request: ScoreRequest, talk: Talk) -> dict[str, list[str]]:
    """Return by video id what is wrong with its predictions, in any of the folders."""
    from cosettle_cache.propagation.score import find_problems

    problems: dict[str, list[str]] = {}
    for name, folder in request.folders.items():
        progress = talk.progress(f"check {name}")
        data = request.data
        found = find_problems(
            request.task, data.manifest, data.root, folder, grid=request.grid, progress=progress
        )
        for video_id, lines in found.items():
            problems.setdefault(video_id, []).extend(_prefixed(lines, name, len(request.folders)))
        if list(folder.glob("*results-*.csv")):
            talk.note(f"{folder} holds CSV results of another tool: they are not read")
    return problems


def _prefixed(lines: Sequence[str], name: str, n_folders: int) -> list[str]:
    return [f"{name}: {line}" if n_folders > 1 else line for line in lines]


def _refuse_incomplete(
    request: ScoreRequest, problems: Mapping[str, Sequence[str]], *, partial: bool
) -> None:
    """Raise `InputError` that lists everything, unless the rest may be scored and there is one."""
    n_videos = len(request.data.manifest)
    if problems and (not partial or len(problems) == n_videos):
        raise InputError(
            f"{len(problems)} of {n_videos} videos cannot be scored",
            details=[f"{video_id}: {line}" for video_id, lines in problems.items() for line in lines],
            hint="--partial scores the others" if len(problems) < n_videos else None,
        )


def _score(
    request: ScoreRequest, leave_out: frozenset[str], talk: Talk
) -> tuple[list[Score], dict[str, str]]:
    from cosettle_cache.propagation.score import score_predictions

    scores: list[Score] = []
    failures = dict(request.data.failures)
    for name, folder in request.folders.items():
        scoring = score_predictions(
            request.task,
            request.data.manifest,
            request.data.root,
            folder,
            name=name,
            leave_out=leave_out,
            grid=request.grid,
            progress=talk.progress(f"score {name}"),
        )
        scores += scoring.scores
        failures |= {f"{name}/{video_id}": reason for video_id, reason in scoring.failures.items()}
    return scores, failures


def _report(scores: Sequence[Score], left_out: Mapping[str, str], talk: Talk, as_json: bool) -> None:

    from cosettle_cache.metrics.rows import score_table, summary_json

    if as_json:
        document = {"complete": not left_out, "left_out": dict(left_out), **summary_json(scores)}
        talk.result(json.dumps(document, indent=2))
    elif scores:
        talk.table(f"{scores[0].dataset}: percent", *score_table(scores))


def _write(scores: Sequence[Score], out: Path | None, chart: Path | None, talk: Talk) -> None:
    from cosettle_cache.metrics.rows import write_rows
    from cosettle_cache.propagation.run import write_score_chart

    for what, path, write in (("rows", out, write_rows), ("chart", chart, write_score_chart)):
        if path is not None:
            write(path, scores)
            talk.note(f"{what}: {path}")
