"""What `propagate` works on: a store, made on the way where none is given, and projections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosettle_cache.cli.options import open_features
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.extraction.on_the_way import FITTING_SIZE, StoreWish, make_store
from cosettle_cache.heads.heads import default_projection, load_heads

if TYPE_CHECKING:
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
    from cosettle_cache.store.storage import is_url
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
    paths = list(request.projections)
    if not paths and request.features is None:
        paths = default_projection(store, talk)
    return load_heads(paths, store)
