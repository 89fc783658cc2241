"""Consistency within one clip: how far tokens move, in diameters of the clip, and cycle accuracy.

The tokens of a clip come in block by block, twice if they do not fit into memory; one `ClipFigures` per
definition goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from cosettle_cache.analysis.definitions import (
    CUT_FRAMES,
    SMALLEST_DIAMETER,
    WALK_TEMPERATURE,
    WALK_WINDOW,
    WALKS,
    Definition,
    Spread,
    diameters,
)
from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics.cycle import cycle_accuracy, cycle_transition, pool_tokens
from cosettle_cache.search.correspondence import find_correspondence
from cosettle_cache.search.masked import unit_tokens

Block = Float32[Tensor, "frame row col dim"]
Tokens = Float32[Tensor, "pair token dim"]

#: Tokens per block: 8 frames of the released grid, whose distances to the next stay in a CPU's caches.
BLOCK_TOKENS = 8 * 196


def block_slices(n_frames: int, n_tokens: int) -> list[slice]:
    """Return the frames of each block of a clip whose frames have so many tokens."""
    size = max(1, BLOCK_TOKENS // n_tokens)
    return [slice(start, min(start + size, n_frames)) for start in range(0, n_frames, size)]


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


def measure_clip(
    blocks: Iterable[Block], n_frames: int, definitions: Sequence[Definition]
) -> tuple[tuple[ClipFigures, ...], Float32[Tensor, "row col dim"]]:
    """Return the figures of one clip, in the order of the definitions, and its middle frame.

    `blocks` gives the frames in order, every time it is iterated. Raises `InputError` for tokens that are not
    finite and for a grid too small for walks.
    """
    movement = _Movement(n_frames, definitions)
    for block in blocks:
        movement.add(block)
    spreads = [Spread.about(movement.place_sums / n_frames, item.whole) for item in definitions]
    distances = [[spread.distances(block.flatten(1, 2)) for spread in spreads] for block in blocks]
    figures = []
    for number, (item, found) in enumerate(zip(definitions, zip(*distances, strict=True), strict=True)):
        distance = movement.totals[number] / movement.counts[number]
        known = {}
        for percent, diameter in diameters(np.concatenate(found), item.whole).items():
            known[f"intra_diameter_{percent}"] = diameter
            known[f"d_intra_{percent}"] = distance / (diameter + SMALLEST_DIAMETER)
        figures.append(ClipFigures(distance, _cycle_accuracy(movement.stops, n_frames, item), **known))
    return tuple(figures), movement.stops[n_frames // 2]


class _Movement:
    """The first pass over a clip.

    By definition `totals` and `counts` of the distances between corresponding tokens of neighbouring frames;
    `stops` are the middle frame and those of the walks; `place_sums` add up the tokens of each place.
    """

    place_sums: Float64[Tensor, "place dim"]

    def __init__(self, n_frames: int, definitions: Sequence[Definition]) -> None:
        self._matches = [find_correspondence(item.correspondence) for item in definitions]
        self.totals, self.counts = [0.0] * len(definitions), [0] * len(definitions)
        self._first, self._end = CUT_FRAMES, n_frames - CUT_FRAMES
        self._kept = {n_frames // 2, *(int(share * n_frames) for walk in WALKS for share in walk)}
        self.stops: dict[int, Float32[Tensor, "row col dim"]] = {}
        self._last: Tokens | None = None
        self._n_seen = 0

    def add(self, block: Block) -> None:
        """Take the next frames of the clip."""
        summed = block.sum(0).flatten(0, 1)
        # What is not finite stays so in a sum.
        if not summed.isfinite().all():
            raise InputError("tokens that are not finite", hint="extract this clip again into another store")
        self.place_sums = self.place_sums + summed if self._n_seen else summed.double()
        for number, frame in enumerate(block, start=self._n_seen):
            if number in self._kept:
                self.stops[number] = frame.clone()
        start, end = (min(max(edge - self._n_seen, 0), len(block)) for edge in (self._first, self._end))
        inside = block[start:end].flatten(1, 2)
        if len(inside):
            self._compare(inside)
            self._last = inside[-1:].clone()
        self._n_seen += len(block)

    def _compare(self, frames: Tokens) -> None:
        if self._last is not None:
            self._add_pairs(self._last, frames[:1])
        if len(frames) > 1:
            self._add_pairs(frames[:-1], frames[1:])

    def _add_pairs(self, frames: Tokens, after: Tokens) -> None:
        for number, match in enumerate(self._matches):
            first, second = match(frames, after)
            moved = torch.linalg.vector_norm(first - second, dim=-1)
            self.totals[number] += moved.sum(dtype=torch.float64).item()
            self.counts[number] += moved.numel()


def _cycle_accuracy(
    frames: dict[int, Float32[Tensor, "row col dim"]], n_frames: int, definition: Definition
) -> float:
    """Return the share of walks that come back."""
    walks = [torch.stack([frames[int(share * n_frames)] for share in walk]) for walk in WALKS]
    stops = torch.stack(walks)
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
