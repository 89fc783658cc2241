"""What the affinity explorer knows: exact neighbours of every patch of a first frame, and small tokens.

A store and kinds of tokens come in; per video and kind of tokens come neighbour lists by the search that
`propagate` uses, and 8-bit tokens from which a browser computes whole affinity maps, with the error it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int16, UInt16
from torch import Tensor

from cosettle_cache.core.types import Grid
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.search.affinity import unit_tokens
from cosettle_cache.search.search import make_ranker
from cosettle_cache.store import FeatureStore

#: Neighbours listed per patch, as many as the protocol cosettle follows.
TOP_K = 7

#: Components of small tokens are multiples of this: cosines are then right to about 0.005 in the mean.
STEP = 1 / 64

#: Frames per video, the first included, and what the explorer may take in the page: fewer frames where they
#: are large. Measured on ViT-Tiny tokens: 92 bytes for the 192 components of a token, 20 for its neighbours.
MAX_FRAMES = 7
BUDGET_BYTES = 8_000_000
_COMPONENT_BYTES, _LIST_BYTES = 0.48, 20
_BASE64 = 4 / 3

#: Patches whose maps are compared with exact cosines.
_CHECKED = 64

ClipTokens = Float32[Tensor, "frame patch dim"]


@dataclass(frozen=True, slots=True)
class SmallTokens:
    """Unit tokens along their principal directions, strongest first, as multiples of `STEP`.

    One step for all directions keeps dot products best at a given size, as weak directions become runs of
    zeros. `error` is the largest difference to an exact cosine with the first frame, found on patches spread
    over the grid.
    """

    values: Int8[np.ndarray, "frame channel patch"]
    error: float


@dataclass(frozen=True, slots=True)
class ExploredKind:
    """One kind of tokens: for every patch of the first frame its nearest in each later one, best first."""

    name: str
    position: UInt16[np.ndarray, "frame patch k"]
    cosine: Int16[np.ndarray, "frame patch k"]
    small: SmallTokens


@dataclass(frozen=True, slots=True)
class Explored:
    """One video: the chosen frames, the first of all included, and its tokens by kind."""

    video_id: str
    grid: Grid
    frames: tuple[int, ...]
    kinds: tuple[ExploredKind, ...]


#: Cosines are kept in steps of one over this.
COSINE_STEPS = 32767


def chosen_frames(n_frames: int, at_most: int) -> list[int]:
    """Return the first frame and later ones, ever farther apart up to the last."""
    n_later = min(n_frames, at_most, MAX_FRAMES) - 1
    later = np.geomspace(1, n_frames - 1, n_later).tolist() if n_later > 0 else []
    return sorted({0, *map(round, later)})


@torch.inference_mode()
def explore(store: FeatureStore, video_id: str, kinds: Sequence[TokenKind], max_frames: int) -> Explored:
    """Return what there is to explore in one video; `frames` count the encodings of the store.

    Raises `InputError` when the store lacks tokens of the video, `DamagedStoreError` when they are damaged.
    """
    frames = chosen_frames(store.n_frames(video_id), max_frames)
    tokens = torch.stack(list(_read(store, video_id, frames)))
    explored = tuple(_kind(kind.name, kind.apply(tokens)) for kind in kinds)
    return Explored(video_id, store.grid(video_id), tuple(frames), explored)


def _read(store: FeatureStore, video_id: str, frames: Sequence[int]) -> Iterator[Tensor]:
    """Yield the tokens of ascending `frames`, patches row by row; memory does not grow with the video."""
    wanted = set(frames)
    for index, tokens in enumerate(store.stream_tokens(video_id)):
        if index in wanted:
            yield torch.from_numpy(tokens.copy()).flatten(0, 1)
        if index == frames[-1]:
            return


def _kind(name: str, tokens: Float[Tensor, "frame patch dim"]) -> ExploredKind:
    unit = unit_tokens(tokens)
    ranker = make_ranker("auto", unit.device)
    k = min(TOP_K, unit.shape[1])
    ranked = [ranker.rank(unit[0], later[:, None], None, k) for later in unit[1:]]
    position = np.array([index.numpy() for _, index in ranked], np.uint16).reshape(-1, unit.shape[1], k)
    cosine = np.array([(values * COSINE_STEPS).round().numpy() for values, _ in ranked]).astype(np.int16)
    return ExploredKind(name, position, cosine.reshape(position.shape), shrink(unit))


def shrink(unit: ClipTokens) -> SmallTokens:
    """Return `unit` tokens turned to the directions of their uncentred second moment, and rounded."""
    flat = unit.flatten(0, 1).double()
    _, directions = torch.linalg.eigh(flat.T @ flat)
    values = (unit @ directions.flip(1).float() / STEP).round().to(torch.int8)
    error = _largest_error(unit, values * STEP)
    return SmallTokens(values.transpose(1, 2).contiguous().numpy(), error)


def _largest_error(unit: ClipTokens, small: ClipTokens) -> float:
    some = torch.linspace(0, unit.shape[1] - 1, min(_CHECKED, unit.shape[1])).long()
    differences = [
        (unit[0, some] @ exact.T - small[0, some] @ short.T).abs().max()
        for exact, short in zip(unit, small, strict=True)
    ]
    return float(torch.stack(differences).max())


def affordable_frames(grid: Grid, dim: int, n_series: int) -> int:
    """Return how many frames, at least three, of each of `n_series` videos and kinds fit the budget."""
    frame_bytes = _BASE64 * grid.n_tokens * (_COMPONENT_BYTES * dim + _LIST_BYTES)
    return max(3, int(BUDGET_BYTES / (frame_bytes * max(n_series, 1))))
