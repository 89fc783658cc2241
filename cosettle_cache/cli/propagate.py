"""`cosettle-cache propagate`: labels of the first frame through stored tokens, and the scores."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.heads import check_encoder, load_heads
from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DataRoot,
    Device,
    DryRun,
    Json,
    Quiet,
    Weights,
    interruptible,
    open_features,
    pick_device,
    store_title,
)
from cosettle_cache.config import FramesSettings, digest
from cosettle_cache.console import Talk, human_bytes, human_seconds
from cosettle_cache.errors import ExitCode, FingerprintError, InputError, UncleanError, UsageError
from cosettle_cache.protocols import make_protocol
from cosettle_cache.types import EvalProtocol

if TYPE_CHECKING:
    from cosettle_cache.cli.data import Data
    from cosettle_cache.propagate import PropagationReport
    from cosettle_cache.store import FeatureStore

#: Where `extract` and `train` leave their results when nothing else is said.
DEFAULT_STORE = Path("store.zarr")
DEFAULT_PROJECTION = Path("runs/store/projection.safetensors")
DEFAULT_BACKBONE = "mae_b"


class Overlays(StrEnum):
    """Which videos get pictures."""

    NONE = "none"
    FIRST = "first"
    ALL = "all"


class Search(StrEnum):
    """Who ranks the context."""

    AUTO = "auto"
    FAISS = "faiss"
    TORCH = "torch"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of `propagate`, before anything is derived."""

    task: str
    features: str | None
    projections: tuple[Path, ...]
    backbone: str | None
    weights: str | None
    data_root: Path | None
    out: Path | None
    overlays: str
    search: str
    device: str | None
    precision: str
    cache_dir: Path | None
    cache_size: str


def propagate(
    task: Annotated[str, typer.Option(help="davis (any folder in the DAVIS layout) or sprites.")],
    features: Annotated[
        str | None, typer.Option(help="A frames store, local or at a URL; default: made on the way.")
    ] = None,
    projection: Annotated[
        list[Path] | None, typer.Option(help="Projection beside the raw tokens; repeatable.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="Preset.")] = "cosettle",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Protocol field, as top_k=10; repeatable.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder of a store made on the way.")] = None,
    weights: Weights = None,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder for masks, overlays, scores.")] = None,
    overlays: Annotated[Overlays, typer.Option(help="Of no, one or all videos.")] = Overlays.FIRST,
    search: Annotated[Search, typer.Option(help="All are exact.")] = Search.AUTO,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="Of an encoder run on the way.")] = "fp32",
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Propagate first-frame labels, raw and projected, and score them.

    Example: cosettle-cache propagate --task davis --features davis.zarr
    """
    talk = Talk(quiet=quiet)
    chosen = make_protocol(protocol, task=task, **_overrides(override or []))
    request = Request(
        task,
        features,
        tuple(projection or ()),
        backbone,
        weights,
        data_root,
        out,
        overlays,
        search,
        device,
        precision,
        cache_dir,
        cache_size,
    )
    if dry_run:
        _check_paths(request)
        talk.result(json.dumps({"protocol": chosen.to_json(), **_plain(request)}, indent=2))
        return int(ExitCode.DONE)
    return _propagate(request, chosen, talk, as_json)


def _check_paths(request: Request) -> None:
    if request.features is not None:
        open_features(request.features, None, request.cache_size)
    for path in request.projections:
        if not path.exists():
            raise InputError(f"{path} does not exist", wanted="a projection")


def _propagate(request: Request, protocol: EvalProtocol, talk: Talk, as_json: bool) -> int:
    from cosettle_cache import results
    from cosettle_cache.propagate import propagate_store

    store, data_root, failed = _features(request, protocol, talk)
    projections = _projections(request, store, talk)
    out = request.out or Path("runs") / f"{request.task}-{store_title(store.path)}"
    results.remove_scores(out)
    talk.note(f"protocol: {json.dumps(protocol.to_json())}")
    with interruptible(talk, "video") as stop:
        report = propagate_store(
            store,
            data_root,
            protocol,
            out,
            task=request.task,
            projections=projections,
            overlays=request.overlays,
            search=request.search,
            device=pick_device(request.device),
            progress=talk.progress("propagate"),
            stop=stop,
        )
    results.write_scores(out, report.scores, complete=not (report.interrupted or report.error))
    _print(report, out, talk, as_json)
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    failures = {**failed, **report.failures}
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)


def _features(
    request: Request, protocol: EvalProtocol, talk: Talk
) -> tuple[FeatureStore, Path, dict[str, str]]:
    """Return the store, the data root, and the videos that failed on the way."""
    from cosettle_cache.cli.data import media_root
    from cosettle_cache.store import open_store

    if request.features is not None:
        store = open_features(request.features, request.cache_dir, request.cache_size)
        return store, media_root(store.manifest, request.data_root), dict(store.failures)
    data = _task_data(request, talk)
    path, failures = _make_store(request, protocol, data, talk)
    return open_store(path), data.root, failures


def _task_data(request: Request, talk: Talk) -> Data:
    from cosettle_cache.cli.data import davis_data, sprites_data

    return sprites_data("val") if request.task == "sprites" else davis_data(request.data_root, talk)


def _make_store(
    request: Request, protocol: EvalProtocol, data: Data, talk: Talk
) -> tuple[str, dict[str, str]]:
    from cosettle_cache.cli.jobs import StoreJob, run_job
    from cosettle_cache.manifest import manifest_digest

    backbone, weights, heads = _encoder(request, talk)
    # The same task with other videos or weights is another store.
    mark = digest([manifest_digest(data.manifest), weights, heads])[:8]
    name = re.sub("[/:]", "-", f"{request.task}-{backbone}-{protocol.size}-{mark}.zarr")
    talk.note(f"no --features given: encoding {data.origin} with {backbone} into {name}")
    settings = FramesSettings(size=protocol.size)
    job = StoreJob(
        data,
        backbone,
        weights,
        settings,
        name,
        device=request.device,
        precision=request.precision,
        heads=heads,
    )
    report = run_job(job, talk)
    if report.interrupted:
        raise KeyboardInterrupt
    return job.out, {**data.failures, **report.failures}


def _encoder(request: Request, talk: Talk) -> tuple[str, str | None, int | None]:
    """Return name, weights and heads: as asked for, of the store `extract` leaves, or the default."""
    from cosettle_cache.cli.jobs import find_weights
    from cosettle_cache.store import open_store

    if request.backbone is not None or not DEFAULT_STORE.exists():
        return request.backbone or DEFAULT_BACKBONE, find_weights(request.weights, request.data_root), None
    encoder = open_store(DEFAULT_STORE).encoder
    talk.note(f"encoder of {DEFAULT_STORE}: {encoder['name']}, weights {encoder['weights_argument']}")
    weights = find_weights(request.weights or encoder["weights_argument"], request.data_root)
    return encoder["name"], weights, encoder["heads_argument"]


def _projections(request: Request, store: FeatureStore, talk: Talk) -> list[tuple[str, Any]]:
    paths = list(request.projections)
    if not paths and request.features is None and DEFAULT_PROJECTION.is_file():
        paths = _default_projection(store, talk)
    return load_heads(paths, store)


def _default_projection(store: FeatureStore, talk: Talk) -> list[Path]:
    """Return the projection that `train` leaves, if it was trained on tokens of the store's encoder."""
    try:
        check_encoder(DEFAULT_PROJECTION, store)
    except FingerprintError:
        talk.note(f"{DEFAULT_PROJECTION} is of another encoder: raw tokens only")
        return []
    talk.note(f"projection: {DEFAULT_PROJECTION}")
    return [DEFAULT_PROJECTION]


def _print(report: PropagationReport, out: Path, talk: Talk, as_json: bool) -> None:
    from cosettle_cache.results import score_table, summary_json

    if as_json:
        talk.result(json.dumps(summary_json(report.scores), indent=2))
        return
    if report.scores:
        header, rows = score_table(report.scores)
        talk.table(f"{report.scores[0].protocol}, {report.scores[0].dataset}: percent", header, rows)
    else:
        talk.note("nothing was scored: no video is annotated throughout")
    talk.result(
        f"{report.n_frames} frames in {human_seconds(report.seconds.total)}, "
        f"peak memory {human_bytes(report.peak_memory_bytes)}"
    )
    talk.result(f"masks, overlays and scores: {out}")


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
