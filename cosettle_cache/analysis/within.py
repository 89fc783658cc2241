"""Consistency within one clip: how far tokens move, in diameters of the clip, and whether walks find back.

The tokens of a clip come in block by block, twice if they do not fit into memory; one `ClipFigures` per
definition goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from cosettle_cache.analysis.definitions import (
    CUT_FRAMES,
    WALK_TEMPERATURE,
    WALK_WINDOW,
    WALKS,
    Definition,
    Distances,
    Spread,
    diameters,
    scaled,
)
from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics.cycle import cycle_accuracy, cycle_transition, pool_tokens
from cosettle_cache.search.correspondence import find_correspondence
from cosettle_cache.search.masked import unit_tokens

Block = Float32[Tensor, "frame row col dim"]
Tokens = Float32[Tensor, "pair token dim"]


#: Tokens per block: 8 frames of the released grid, whose distances to the next stay in a CPU's caches.
BLOCK_TOKENS = 8 * 196


def make_blocks(tokens: Float[Tensor, "_ row col dim"], apply: Callable[[Tensor], Tensor]) -> list[Block]:
    """Return a clip in memory as `measure_clip` wants it: blocks of float32 tokens, each made once."""
    size = block_frames(*tokens.shape[1:3])
    starts = range(0, len(tokens), size)
    return [apply(tokens[start : start + size].float()) for start in starts]


def block_frames(rows: int, cols: int) -> int:
    """Return how many frames of a grid make a block."""
    return max(1, BLOCK_TOKENS // (rows * cols))


@dataclass(frozen=True, slots=True)
class ClipFigures:
    """One clip under one definition: mean distance, diameters (90, 95, 100 % of the tokens), their quotients.

    `cycle_accuracy` is the share of walks to another frame and back that end where they started. What a
    definition does not know is None.
    """

    intra_distance: float
    cycle_accuracy: float
    intra_diameter_90: float | None = None
    intra_diameter_95: float | None = None
    intra_diameter_100: float | None = None
    d_intra_90: float | None = None
    d_intra_95: float | None = None
    d_intra_100: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ClipMeasure:
    """What a clip gives: figures in the order of the definitions, and its middle frame."""

    figures: tuple[ClipFigures, ...]
    middle: Float32[Tensor, "row col dim"]


def measure_clip(blocks: Iterable[Block], n_frames: int, definitions: Sequence[Definition]) -> ClipMeasure:
    """Measure one clip; `blocks` gives its frames in order, every time it is iterated.

    Raises `InputError` for tokens that are not finite and for a grid too small for walks.
    """
    movement = _Movement(n_frames, definitions)
    for block in blocks:
        movement.add(block)
    spreads = [Spread.about(movement.places, item.whole) for item in definitions]
    distances: list[list[Distances]] = [[] for _ in definitions]
    for block in blocks:
        for spread, found in zip(spreads, distances, strict=True):
            found.append(spread.distances(block.flatten(1, 2)))
    figures = tuple(
        _figures(item, distance, diameters(np.concatenate(found), item.whole), accuracy)
        for item, distance, found, accuracy in zip(
            definitions, movement.distances, distances, movement.cycle_accuracies(), strict=True
        )
    )
    return ClipMeasure(figures, movement.middle)


def _figures(
    definition: Definition, distance: float, found: Mapping[int, float], accuracy: float
) -> ClipFigures:
    known = {f"intra_diameter_{percent}": value for percent, value in found.items()}
    known |= {f"d_intra_{percent}": scaled(distance, value) for percent, value in found.items()}
    return ClipFigures(intra_distance=distance, cycle_accuracy=accuracy, **known)


class _Movement:
    """The first pass over a clip: neighbouring frames, stops of the walks, the mean token of every place."""

    def __init__(self, n_frames: int, definitions: Sequence[Definition]) -> None:
        self._n_frames, self._definitions = n_frames, definitions
        self._matches = [find_correspondence(item.correspondence) for item in definitions]
        self._totals, self._counts = [0.0] * len(definitions), [0] * len(definitions)
        self._compared = range(CUT_FRAMES, n_frames - CUT_FRAMES)
        self._walks = [(int(start * n_frames), int(turn * n_frames)) for start, turn in WALKS]
        self._kept = {n_frames // 2, *(frame for walk in self._walks for frame in walk)}
        self._stops: dict[int, Float32[Tensor, "row col dim"]] = {}
        self._sum: Float64[Tensor, "place dim"] | None = None
        self._last: Tokens | None = None
        self._n_seen = 0

    def add(self, block: Block) -> None:
        """Take the next frames of the clip."""
        summed = block.sum(0).flatten(0, 1)
        # What is not finite stays so in a sum.
        if not summed.isfinite().all():
            raise InputError("tokens that are not finite", hint="extract this clip again into another store")
        for offset, frame in enumerate(block):
            if self._n_seen + offset in self._kept:
                self._stops[self._n_seen + offset] = frame.clone()
        self._sum = summed.double() if self._sum is None else self._sum + summed
        self._compare(block)
        self._n_seen += len(block)

    def _compare(self, block: Block) -> None:
        start, stop = (min(max(edge - self._n_seen, 0), len(block)) for edge in _edges(self._compared))
        inside = block[start:stop].flatten(1, 2)
        if not len(inside):
            return
        if self._last is not None:
            self._add_pairs(self._last, inside[:1])
        if len(inside) > 1:
            self._add_pairs(inside[:-1], inside[1:])
        self._last = inside[-1:].clone()

    def _add_pairs(self, frames: Tokens, after: Tokens) -> None:
        for number, match in enumerate(self._matches):
            first, second = match(frames, after)
            moved = torch.linalg.vector_norm(first - second, dim=-1)
            self._totals[number] += moved.sum(dtype=torch.float64).item()
            self._counts[number] += moved.numel()

    @property
    def distances(self) -> list[float]:
        """Mean distance of corresponding tokens per definition."""
        return [total / count for total, count in zip(self._totals, self._counts, strict=True)]

    @property
    def places(self) -> Float64[Tensor, "place dim"]:
        """The mean token of every place."""
        assert self._sum is not None
        return self._sum / self._n_frames

    @property
    def middle(self) -> Float32[Tensor, "row col dim"]:
        """The frame that stands for the clip."""
        return self._stops[self._n_frames // 2]

    def cycle_accuracies(self) -> list[float]:
        """Share of walks that come back, per definition."""
        stops = torch.stack([torch.stack([self._stops[frame] for frame in walk]) for walk in self._walks])
        return [_cycle_accuracy(stops, item) for item in self._definitions]


def _edges(frames: range) -> tuple[int, int]:
    return frames.start, frames.stop


def _cycle_accuracy(stops: Float32[Tensor, "walk 2 row col dim"], definition: Definition) -> float:
    rows, cols = (side - side % WALK_WINDOW for side in stops.shape[2:4])
    if not rows or not cols:
        raise InputError(
            "the grid is too small for the walks of the cycle accuracy",
            wanted=f"{WALK_WINDOW}x{WALK_WINDOW} tokens or more",
            found="x".join(map(str, stops.shape[2:4])),
        )
    # A last odd row or column is left out, as average pooling does.
    tokens = stops[:, :, :rows, :cols]
    pooled = pool_tokens(unit_tokens(tokens) if definition.unit_walks else tokens, WALK_WINDOW)
    return cycle_accuracy(cycle_transition(pooled, WALK_TEMPERATURE, walk=(0, 1, 0))).item()
