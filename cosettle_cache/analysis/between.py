"""Separability between clips: distances of their middle frames at the same place, over all pairs of clips.

Middle frames come in block by block, so that never more than two blocks are held; sums that add up go out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cosettle_cache.analysis.definitions import (
    Definition,
    Distances,
    Spread,
    diameters,
    effective_rank,
    scaled,
)

#: Float16 or float32; converted a few places at a time.
Middles = Float[Tensor, "clip place dim"]
Others = Float[Tensor, "_ place dim"]

#: Places whose pairs of clips are compared at once.
_PLACES = 7


@dataclass(frozen=True, slots=True, eq=False)
class MiddleSums:
    """Sums over the middle frames of `n_clips` clips: their tokens place by place, their outer products."""

    n_clips: int
    places: Float64[np.ndarray, "place dim"]
    products: Float64[np.ndarray, "dim dim"]

    def __add__(self, other: MiddleSums) -> MiddleSums:
        return MiddleSums(
            self.n_clips + other.n_clips, self.places + other.places, self.products + other.products
        )

    @classmethod
    def of(cls, middles: Middles) -> MiddleSums:
        """Return the sums over some clips."""
        wide = middles.double()
        tokens = wide.flatten(0, 1)
        return cls(len(middles), wide.sum(0).numpy(), (tokens.T @ tokens).numpy())

    @classmethod
    def zero(cls, n_places: int, dim: int) -> MiddleSums:
        """Return the sums over nothing."""
        return cls(0, np.zeros((n_places, dim)), np.zeros((dim, dim)))

    @property
    def mean_places(self) -> Float64[Tensor, "place dim"]:
        """The mean token of every place."""
        return torch.from_numpy(self.places / self.n_clips)


@dataclass(frozen=True, slots=True)
class BlockPair:
    """Two blocks of clips, or one with itself, whose middle frames are compared; clips by number."""

    number: int
    first: range
    second: range

    @property
    def alone(self) -> bool:
        """Whether these are the pairs within one block."""
        return self.first == self.second


def block_pairs(n_clips: int, size: int) -> Iterator[BlockPair]:
    """Yield the pairs of blocks of `size` clips; every two clips meet once."""
    blocks = [range(start, min(start + size, n_clips)) for start in range(0, n_clips, size)]
    pairs = [(first, second) for number, first in enumerate(blocks) for second in blocks[number:]]
    for number, (first, second) in enumerate(pairs):
        yield BlockPair(number, first, second)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What two blocks give: distances summed over pairs of clips, and how far clips are from the centres.

    The latter by `make_spreads`, of the clips of a block that was compared with itself, else empty.
    """

    distances: Float64[np.ndarray, " place"]
    spreads: tuple[Distances, ...]


def make_spreads(sums: MiddleSums, definitions: Sequence[Definition]) -> tuple[Spread, ...]:
    """Return how each definition looks at clips around the mean of all: all places, and those drawn."""
    places = sums.mean_places
    both = [(Spread.about(places, item.whole), Spread.about(places, item)) for item in definitions]
    return tuple(chain.from_iterable(both))


def compare(first: Middles, second: Others | None, spreads: Sequence[Spread]) -> Comparison:
    """Compare two blocks of clips, or with `second` None one with itself."""
    distances = [
        _sum_distances(first[:, places], None if second is None else second[:, places])
        for places in _slices(first.shape[1], _PLACES)
    ]
    found = () if second is not None else tuple(item.distances(first.float()) for item in spreads)
    return Comparison(np.concatenate(distances), found)


def _sum_distances(first: Middles, second: Others | None) -> Float64[np.ndarray, " place"]:
    one = first.float().transpose(0, 1).contiguous()
    other = one if second is None else second.float().transpose(0, 1).contiguous()
    distances = torch.cdist(one, other)
    if second is None:
        distances = distances.triu(1)
    summed: Float64[np.ndarray, " place"] = distances.sum(dim=(1, 2), dtype=torch.float64).numpy()
    return summed


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


@dataclass(frozen=True, slots=True)
class InterFigures:
    """All clips under one definition: mean distance, diameters (90, 95, 100 % of the tokens), quotients.

    `effective_rank` is a share of the dimensions. What a definition does not know is None.
    """

    inter_distance: float
    effective_rank: float
    inter_diameter_90: float | None = None
    inter_diameter_95: float | None = None
    inter_diameter_100: float | None = None
    d_inter_90: float | None = None
    d_inter_95: float | None = None
    d_inter_100: float | None = None


def inter_figures(
    definitions: Sequence[Definition], sums: MiddleSums, comparisons: Sequence[Comparison]
) -> list[InterFigures]:
    """Return the figures of all clips; `comparisons` of every `block_pairs`, with `make_spreads`."""
    n_pairs = sums.n_clips * (sums.n_clips - 1) / 2
    by_place = np.sum([item.distances for item in comparisons], axis=0) / n_pairs
    alone = [item.spreads for item in comparisons if item.spreads]
    spreads = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
    rank = effective_rank(sums.products)
    return [
        _inter_figures(item, by_place, spreads[2 * number], spreads[2 * number + 1], rank)
        for number, item in enumerate(definitions)
    ]


def _inter_figures(
    definition: Definition,
    by_place: Float64[np.ndarray, " place"],
    whole: Distances,
    drawn: Distances,
    rank: float,
) -> InterFigures:
    index = definition.drawn(len(by_place))
    distance = float((by_place if index is None else by_place[index.numpy()]).mean())
    known = {f"inter_diameter_{item}": value for item, value in diameters(whole, definition.whole).items()}
    for percent, diameter in diameters(drawn, definition).items():
        known[f"d_inter_{percent}"] = scaled(distance, diameter)
    return InterFigures(distance, rank, **known)
