"""Consistency within one clip: how far tokens move, in diameters of the clip, and cycle accuracy.

The tokens of a clip come in block by block, twice if they do not fit into memory; one `ClipFigures` per
definition goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
#: The middle frame of a clip and those where walks start and turn, by number.
Stops = dict[int, Float32[Tensor, "row col dim"]]

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
    blocks: Callable[[], Iterable[Block]], n_frames: int, definitions: Sequence[Definition]
) -> tuple[tuple[ClipFigures, ...], Float32[Tensor, "row col dim"]]:
    """Return the figures of one clip, in the order of the definitions, and its middle frame.

    `blocks` gives the frames in order and is called twice. Raises `InputError` for tokens that are not finite
    and for a grid too small for walks.
    """
    place_sums, stops, moved = _first_pass(blocks(), n_frames, definitions)
    spreads = [Spread.about(place_sums / n_frames, item.whole) for item in definitions]
    distances = [[spread.distances(block.flatten(1, 2)) for spread in spreads] for block in blocks()]
    figures = []
    for item, distance, *found in zip(definitions, moved, *distances, strict=True):
        known = {}
        for percent, diameter in diameters(np.concatenate(found), item.whole).items():
            known[f"intra_diameter_{percent}"] = diameter
            known[f"d_intra_{percent}"] = distance / (diameter + SMALLEST_DIAMETER)
        figures.append(ClipFigures(distance, _cycle_accuracy(stops, n_frames, item), **known))
    return tuple(figures), stops[n_frames // 2]


def _first_pass(
    blocks: Iterable[Block], n_frames: int, definitions: Sequence[Definition]
) -> tuple[Float64[Tensor, "place dim"], Stops, list[float]]:
    """Return the sum of the tokens of each place, the middle frame and those of the walks by number, and by
    definition the mean distance between corresponding tokens of neighbouring frames.
    """
    matches = [find_correspondence(item.correspondence) for item in definitions]
    totals, counts = [0.0] * len(matches), [0] * len(matches)
    kept = {n_frames // 2, *(int(share * n_frames) for walk in WALKS for share in walk)}
    stops, sums, last, n_seen = Stops(), torch.zeros((), dtype=torch.float64), None, 0
    for block in blocks:
        summed = block.sum(0).flatten(0, 1)
        # What is not finite stays so in a sum.
        if not summed.isfinite().all():
            raise InputError("tokens that are not finite", hint="extract this clip again into another store")
        sums = sums + summed.double()
        stops |= {number: frame.clone() for number, frame in enumerate(block, start=n_seen) if number in kept}
        start, end = (min(max(edge - n_seen, 0), len(block)) for edge in (CUT_FRAMES, n_frames - CUT_FRAMES))
        inside = block[start:end].flatten(1, 2)
        for frames, after in ((inside[:0] if last is None else last, inside[:1]), (inside[:-1], inside[1:])):
            if not len(frames) or not len(after):
                continue
            for number, match in enumerate(matches):
                first, second = match(frames, after)
                distances = torch.linalg.vector_norm(first - second, dim=-1)
                totals[number] += distances.sum(dtype=torch.float64).item()
                counts[number] += distances.numel()
        last = inside[-1:].clone() if len(inside) else last
        n_seen += len(block)
    return sums, stops, [total / count for total, count in zip(totals, counts, strict=True)]


def _cycle_accuracy(stops: Stops, n_frames: int, definition: Definition) -> float:
    """Return the share of walks that come back."""
    frames = torch.stack([torch.stack([stops[int(share * n_frames)] for share in walk]) for walk in WALKS])
    rows, cols = (side - side % WALK_WINDOW for side in frames.shape[2:4])
    if not rows or not cols:
        raise InputError(
            "the grid is too small for the walks of the cycle accuracy",
            wanted=f"{WALK_WINDOW}x{WALK_WINDOW} tokens or more",
            found="x".join(map(str, frames.shape[2:4])),
        )
    # A last odd row or column is left out, as average pooling does.
    tokens = frames[:, :, :rows, :cols]
    pooled = pool_tokens(unit_tokens(tokens) if definition.unit_walks else tokens, WALK_WINDOW)
    return cycle_accuracy(cycle_transition(pooled, WALK_TEMPERATURE, walk=(0, 1, 0))).item()
