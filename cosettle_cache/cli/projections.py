"""Projections as commands name them: found, checked against the store's encoder, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_cache.errors import FingerprintError

if TYPE_CHECKING:
    from cosettle_cache.projection import Projection
    from cosettle_cache.store import FeatureStore


def load_projections(paths: Sequence[Path], store: FeatureStore) -> list[tuple[str, Projection]]:
    """Return the projections by name; raise for one of another width or encoder than the store's."""
    from cosettle_cache.projection import load_projection

    for path in paths:
        check_encoder(path, store)
    dim = store.arrays[0].n_channels
    return [(projection_name(path), load_projection(path, dim=dim)) for path in paths]


def check_encoder(path: Path, store: FeatureStore) -> None:
    """Raise `FingerprintError` when our own file says that it was trained on another encoder's tokens."""
    from cosettle_cache.projection import read_provenance

    trained_on = read_provenance(path).get("weights_sha256", store.fingerprint.weights_sha256)
    if trained_on != store.fingerprint.weights_sha256:
        raise FingerprintError(
            f"{path} was trained on tokens of another encoder than {store.path} holds",
            wanted=f"weights {store.fingerprint.weights_sha256[:12]} ({store.fingerprint.backbone})",
            found=f"weights {trained_on[:12]} ({read_provenance(path).get('backbone', 'unknown')})",
        )


def projection_name(path: Path) -> str:
    """`runs/mine/projection.safetensors` is `mine`, any other file goes by its own name."""
    return path.absolute().parent.name if path.stem == "projection" else path.stem
