"""Projections as commands take them: files, their names in tables, and whether they fit a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import FingerprintError

if TYPE_CHECKING:
    from cosettle_cache.heads.projection import Projection
    from cosettle_cache.store import FeatureStore

#: Where `train` leaves its result when nothing else is said.
DEFAULT_PROJECTION = Path("runs/store/projection.safetensors")


def load_heads(paths: Sequence[Path], store: FeatureStore) -> list[tuple[str, Projection]]:
    """Return name and projection of every file.

    Raises `CheckpointError` for what is none or of another width, `FingerprintError` for one of another
    encoder.
    """
    from cosettle_cache.heads.projection import load_projection

    for path in paths:
        check_encoder(path, store)
    dim = store.arrays[0].n_channels
    return [(head_name(path), load_projection(path, dim=dim)) for path in paths]


def default_projection(store: FeatureStore, talk: Talk) -> list[Path]:
    """Return the projection that `train` leaves, if there is one and it is of the store's encoder."""
    if not DEFAULT_PROJECTION.is_file():
        return []
    try:
        check_encoder(DEFAULT_PROJECTION, store)
    except FingerprintError:
        talk.note(f"{DEFAULT_PROJECTION} is of another encoder: raw tokens only")
        return []
    talk.note(f"projection: {DEFAULT_PROJECTION}")
    return [DEFAULT_PROJECTION]


def check_encoder(path: Path, store: FeatureStore) -> None:
    """Raise `FingerprintError` when our own file says that it was trained on another encoder's tokens."""
    from cosettle_cache.heads.projection import read_provenance

    trained_on = read_provenance(path).get("weights_sha256", store.fingerprint.weights_sha256)
    if trained_on != store.fingerprint.weights_sha256:
        raise FingerprintError(
            f"{path} was trained on tokens of another encoder than {store.path} holds",
            wanted=f"weights {store.fingerprint.weights_sha256[:12]} ({store.fingerprint.backbone})",
            found=f"weights {trained_on[:12]} ({read_provenance(path).get('backbone', 'unknown')})",
        )


def head_name(path: Path) -> str:
    """`runs/mine/projection.safetensors` is `mine`, any other file goes by its own name."""
    return path.absolute().parent.name if path.stem == "projection" else path.stem
