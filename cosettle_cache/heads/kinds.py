"""Kinds of tokens that are measured side by side: raw, and through each projection.

Projections with names, or their files, come in; what turns stored tokens into those of each kind goes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import FingerprintError, UsageError
from cosettle_cache.core.files import inside, make_folder
from cosettle_cache.core.hub import parse_name
from cosettle_cache.heads.projection import (
    Projection,
    load_projection,
    projection_sha256,
    read_provenance,
    save_projection,
)
from cosettle_cache.heads.table import split_share

if TYPE_CHECKING:
    from cosettle_cache.store import FeatureStore

#: Name of the tokens as the encoder gave them, beside the projections' names.
RAW = "raw"

#: Where `train` leaves its result when nothing else is said.
DEFAULT_PROJECTION = Path("runs/store/projection.safetensors")


@dataclass(frozen=True, slots=True)
class TokenKind:
    """One kind of tokens: raw (no projection, no digest), or through one projection.

    With a `path` pickling keeps that, and not the tensors.
    """

    name: str
    projection: Projection | None
    sha256: str
    path: Path | None = None

    def width(self, dim: int) -> int:
        """Return the channels of its tokens, of raw ones with `dim`."""
        return dim if self.projection is None else self.projection.width

    def apply(self, tokens: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token width"]:
        """Return the tokens of this kind: raw ones as they are, projected ones in float32."""
        if self.projection is None:
            return tokens
        projected: Tensor = self.projection(tokens.float())
        return projected

    def on(self, device: torch.device) -> TokenKind:
        """Return this kind, its projection moved to a device unless it is there, ready for use."""
        if self.projection is not None:
            there = next(self.projection.eval().parameters()).device
            if there.type != device.type or device.index not in (None, there.index):
                self.projection.to(device)
        return self

    def saved(self, folder: Path) -> TokenKind:
        """Return the same kind with its projection in a file there, for other processes."""
        if self.projection is None:
            return self
        path = make_folder(folder) / f"{self.name}.safetensors"
        save_projection(path, self.projection, {})
        return replace(self, path=Path(f"{path}:{self.projection.share}"))

    def __reduce__(self) -> tuple[object, ...]:
        if self.path is not None:
            return (_load, (self.name, self.sha256, self.path))
        return (TokenKind, (self.name, self.projection, self.sha256))


def _load(name: str, sha256: str, path: Path) -> TokenKind:
    return TokenKind(name, load_projection(path), sha256, path)


def make_kinds(
    projections: Sequence[tuple[str, Projection]],
    dim: int,
    *,
    device: str = "cpu",
    reserved: Sequence[str] = (),
) -> list[TokenKind]:
    """Return raw and then every projection, on `device`; `reserved` names are taken by something else.

    Raises `UsageError` for names that are not each one's own, and for a projection of another width;
    `InputError` for a name that cannot be a folder's (that of `...safetensors` is `..`).
    """
    names = [RAW, *(name for name, _ in projections)]
    if len({*names, *reserved}) < len(names) + len(reserved):
        taken = " and ".join(f"not {name}" for name in (RAW, *reserved))
        raise UsageError(
            "projections need names of their own",
            wanted=f"different names, {taken}",
            found=", ".join(names[1:]),
        )
    for name, projection in projections:
        if inside(Path(), name).name != name:
            raise UsageError("a projection's name is one part of a path", wanted="no slash", found=name)
        if projection.dim != dim:
            raise UsageError(f"{name} does not fit the store", wanted=f"width {dim}", found=projection.dim)
    # Digests first: on a GPU the host would wait for every parameter to come back.
    heads = [TokenKind(name, head, projection_sha256(head)) for name, head in projections]
    return [TokenKind(RAW, None, ""), *(kind.on(torch.device(device)) for kind in heads)]


def load_heads(
    paths: Sequence[Path], store: FeatureStore, *, blended: bool = True
) -> list[tuple[str, Projection]]:
    """Return name and projection of every file, `blended` or whole.

    Raises what `load_projection` does, and `FingerprintError` for one of another encoder.
    """
    for path in paths:
        _check_encoder(path, store)
    dim = store.arrays[0].n_channels
    return [(_head_name(path), load_projection(path, dim=dim, blended=blended)) for path in paths]


def default_projection(store: FeatureStore, talk: Talk) -> list[Path]:
    """Return the projection that `train` leaves, if there is one and it is of the store's encoder."""
    if not DEFAULT_PROJECTION.is_file():
        return []
    try:
        _check_encoder(DEFAULT_PROJECTION, store)
    except FingerprintError:
        talk.note(f"{DEFAULT_PROJECTION} is of another encoder: raw tokens only")
        return []
    talk.note(f"projection: {DEFAULT_PROJECTION}")
    return [DEFAULT_PROJECTION]


def _check_encoder(path: Path, store: FeatureStore) -> None:
    """Raise `FingerprintError` when our own file says that it was trained on another encoder's tokens."""
    origin = read_provenance(path)
    trained_on = origin.get("weights_sha256", store.fingerprint.weights_sha256)
    if trained_on != store.fingerprint.weights_sha256:
        raise FingerprintError(
            f"{path} was trained on tokens of another encoder than {store.path} holds",
            wanted=f"weights {store.fingerprint.weights_sha256[:12]} ({store.fingerprint.backbone})",
            found=f"weights {trained_on[:12]} ({origin.get('backbone', 'unknown')})",
        )


def _head_name(path: Path) -> str:
    """`runs/mine/projection.safetensors` and `mine/checkpoint.pth` are `mine`, others go by their name.

    A share follows.
    """
    file, share = split_share(path)
    if named := parse_name(file):
        file = Path(named.repository, named.file)
    name = file.absolute().parent.name if file.stem in ("projection", "checkpoint") else file.stem
    return name if share == 1 else f"{name}:{share:g}"
