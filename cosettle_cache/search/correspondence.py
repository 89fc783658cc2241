"""Which token of a frame is which of the next: the two rules that the closed form and the metrics offer.

Tokens of pairs of frames come in; those that correspond go out side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.types import Grid

Frames = Float[Tensor, "pair token dim"]
Matched = tuple[Float[Tensor, "pair kept dim"], Float[Tensor, "pair kept dim"]]


def match_nearest(first: Frames, second: Frames) -> Matched:
    """Pair each token with its nearest in the other frame and keep the closest half of the pairs.

    Euclidean distance; half the tokens of every pair of frames, rounded down but at least one, closest first.
    Several tokens may share a partner. The released rule (PROTOCOLS 7.7, intra distance).
    """
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab; the first term does not decide which b is nearest to a.
    first_square, second_square = (torch.linalg.vector_norm(x, dim=-1).square() for x in (first, second))
    with exact_float32(first.device.type):
        distance, partner = torch.baddbmm(second_square[:, None], first, second.mT, alpha=-2).min(dim=-1)
    distance += first_square
    n_kept = max(1, first.shape[1] // 2)
    kept = distance.topk(n_kept, dim=-1, largest=False).indices
    return _take(first, kept), _take(second, partner.gather(1, kept))


def match_position(first: Frames, second: Frames) -> Matched:
    """Pair the tokens at the same position, all of them (the paper's rule; PROTOCOLS 7.7)."""
    return first, second


#: How tokens correspond, by the name used in settings.
CORRESPONDENCES: Mapping[str, Callable[[Tensor, Tensor], Matched]] = {
    "nearest": match_nearest,
    "position": match_position,
}


def find_correspondence(name: str) -> Callable[[Tensor, Tensor], Matched]:
    """Return the rule called `name`; raise `UsageError` when there is none."""
    if name not in CORRESPONDENCES:
        raise UsageError("unknown correspondence", wanted=" or ".join(CORRESPONDENCES), found=name)
    return CORRESPONDENCES[name]


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    # Whole rows at once: `gather` would copy number by number.
    rows = index + tokens.shape[1] * torch.arange(len(tokens), device=tokens.device)[:, None]
    taken = tokens.flatten(0, 1).index_select(0, rows.flatten())
    return taken.reshape(*index.shape, tokens.shape[-1])


def choose_places(grids: list[Grid], at_most: int = 14) -> Grid:
    """Return how many rows and columns of places all grids have, up to `at_most` (the released grid) each."""
    rows, cols = min(grid.rows for grid in grids), min(grid.cols for grid in grids)
    return Grid(min(rows, at_most), min(cols, at_most))


def place_index(grid: Grid, places: Grid) -> Int64[np.ndarray, " place"]:
    """Return the tokens of `grid`, counted row by row, at evenly spaced places; all if the two are equal."""
    rows = (2 * np.arange(places.rows) + 1) * grid.rows // (2 * places.rows)
    cols = (2 * np.arange(places.cols) + 1) * grid.cols // (2 * places.cols)
    index: Int64[np.ndarray, " place"] = (rows[:, None] * grid.cols + cols).ravel()
    return index
