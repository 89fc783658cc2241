"""`cosettle-cache propagate`: labels of the first frame through stored tokens, and the scores.

What `propagate` works on: a store, made on the way where none is given, and projections.

`cosettle-cache track`: points through stored tokens, and the TAP-Vid figures.

`cosettle-cache score`: what anybody's predictions are worth on a benchmark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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
    open_features,
)
from cosettle_cache.core.cluster import pick_device
from cosettle_cache.core.console import Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, InputError, UncleanError, UsageError
from cosettle_cache.core.files import store_title
from cosettle_cache.core.settings import FITTING_SIZE, parse_bytes
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.protocols import make_protocol

if TYPE_CHECKING:
    from threading import Event

    from cosettle_cache.core.parallel import Run
    from cosettle_cache.propagation import PropagationReport
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.videos.find import Data


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
    from cosettle_cache.core.cluster import check_workers, connect

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
