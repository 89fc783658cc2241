"""What `propagate` works on: a store, made on the way where none is given, and projections."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_cache.cli.heads import check_encoder, load_heads
from cosettle_cache.cli.options import open_features
from cosettle_cache.config import FramesSettings, digest
from cosettle_cache.console import Talk
from cosettle_cache.errors import FingerprintError, InputError
from cosettle_cache.types import EvalProtocol

if TYPE_CHECKING:
    from cosettle_cache.cli.data import Data
    from cosettle_cache.store import FeatureStore

#: Where `extract` and `train` leave their results when nothing else is said.
DEFAULT_STORE = Path("store.zarr")
DEFAULT_PROJECTION = Path("runs/store/projection.safetensors")
DEFAULT_BACKBONE = "mae_b"
#: A size that fits any patch of 16, for frames whose own size does not.
FITTING_SIZE = "short:480/16"


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
    from cosettle_cache.cli.data import media_root
    from cosettle_cache.store import open_store
    from cosettle_cache.store.storage import is_url

    if request.features is None:
        data = _task_data(request, talk)
        path, failures = _make_store(request, protocol, data, talk)
        return Inputs(open_store(path), data.root, failures)
    shared = request.features if is_url(request.features) else str(Path(request.features).absolute())
    features = shared if request.workers or request.scheduler else request.features
    store = open_features(features, request.cache_dir, request.cache_size)
    return Inputs(store, media_root(store.manifest, request.data_root), dict(store.failures))


def _task_data(request: Request, talk: Talk) -> Data:
    from cosettle_cache.cli.data import evaluation_data, manifest_data

    if request.manifest is not None:
        return manifest_data(request.manifest, request.data_root)
    return evaluation_data(request.task, request.data_root, talk)


def _make_store(
    request: Request, protocol: EvalProtocol, data: Data, talk: Talk
) -> tuple[str, dict[str, str]]:
    from cosettle_cache.cli.jobs import StoreJob, run_job
    from cosettle_cache.manifest import manifest_digest

    backbone, weights, heads = _encoder(request, talk)
    # The same task with other videos, weights or normalisation is another store.
    mark = digest([manifest_digest(data.manifest), weights, heads, protocol.red_std])[:8]
    name = re.sub("[/:]", "-", f"{request.task}-{backbone}-{protocol.size}-{mark}.zarr")
    talk.note(f"no --features given: encoding {data.origin} with {backbone} into {name}")
    job = StoreJob(
        data,
        backbone,
        weights,
        FramesSettings(size=protocol.size),
        str(Path(name).absolute()) if request.workers or request.scheduler else name,
        device=request.device,
        precision=request.precision,
        heads=heads,
        workers=request.workers,
        scheduler=request.scheduler,
        red_std=protocol.red_std,
    )
    try:
        report = run_job(job, talk)
    except InputError as error:
        if error.hint is not None and error.hint.startswith("--size "):
            error.hint = f"--set size={FITTING_SIZE}, or a multiple of the patch as HEIGHTxWIDTH"
        raise
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


def open_projections(request: Request, store: FeatureStore, talk: Talk) -> list[tuple[str, Any]]:
    """Return the projections by name: as asked for, or the one that `train` leaves, if it fits the store."""
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
