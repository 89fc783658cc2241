"""The trade-off of an encoder: consistency within clips against separability between them.

Tokens in memory, or figures of clips and sums over their middle frames, come in; one `TradeOff` per
definition goes out. Middle frames are compared block by block, so that never more than two blocks are held.
docs/analysis.md has every formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cosettle_cache.analysis.clips import (
    DEFINITIONS,
    SMALLEST_DIAMETER,
    ClipFigures,
    Definition,
    Distances,
    Spread,
    block_slices,
    diameters,
    effective_rank,
    measure_clip,
)
from cosettle_cache.core.errors import InputError, UsageError

Clip = Float[np.ndarray, "_ row col dim"] | Float[Tensor, "_ row col dim"]
Clips = Float[np.ndarray, "clip frame row col dim"] | Float[Tensor, "clip frame row col dim"]
#: Float16 or float32; converted a few places at a time.
Middles = Float[Tensor, "clip place dim"]
#: What two blocks of clips give: distances summed over pairs of clips, and how far the clips of a block that
#: was compared with itself are from each centre of `make_spreads` (else empty).
Comparison = tuple[Float64[np.ndarray, " place"], tuple[Distances, ...]]

#: Distances between clips need two of them.
FEWEST_CLIPS = 2
_BLOCK_CLIPS = 64
#: Places whose pairs of clips are compared at once.
_PLACES = 7


@dataclass(frozen=True, slots=True)
class TradeOff:
    """A set of clips under one definition: figures within clips are means over clips.

    Distances are Euclidean between tokens as they are, `d_*` are in diameters that cover 90, 95 or 100 % of
    the tokens, and the margin is D = d_inter - gamma * d_intra (PROTOCOLS 5.3, 7.7). `effective_rank` is a
    share of the dimensions, `cycle_accuracy` one of the walks. What a definition does not know is None.
    """

    n_videos: int
    n_frames: int
    inter_distance: float
    intra_distance: float
    effective_rank: float
    cycle_accuracy: float
    d_inter_100: float
    d_intra_100: float
    margin_100: float
    inter_diameter_100: float
    intra_diameter_100: float
    d_inter_90: float | None = None
    d_intra_90: float | None = None
    margin_90: float | None = None
    inter_diameter_90: float | None = None
    intra_diameter_90: float | None = None
    d_inter_95: float | None = None
    d_intra_95: float | None = None
    margin_95: float | None = None
    inter_diameter_95: float | None = None
    intra_diameter_95: float | None = None


def trade_off(tokens: Clips | Sequence[Clip], *, definition: str = "released", **overrides: Any) -> TradeOff:
    """Measure clips in memory: distances within and between them, effective rank, cycle accuracy.

    `definition` is `released`, `compat` (the authors' draw of tokens, batches and length of clips as well)
    or `paper`; `overrides` set fields of the `Definition`. Clips may differ in length, not in grid.

    Raises `UsageError` for an unknown definition and `InputError` for fewer than two clips, clips of another
    length than the definition wants (8 frames or more, 40 in `compat`), different grids, or tokens that are
    not finite.
    """
    if definition not in DEFINITIONS:
        raise UsageError("unknown definition", wanted=" or ".join(DEFINITIONS), found=definition)
    chosen = replace(DEFINITIONS[definition], **overrides)
    clips = [torch.as_tensor(clip).detach().cpu() for clip in tokens]
    if len(clips) < FEWEST_CLIPS:
        wanted = f"{FEWEST_CLIPS} clips"
        raise InputError("distances between clips need several", wanted=wanted, found=len(clips))
    shapes = sorted({tuple(clip.shape[1:]) for clip in clips})
    if len(shapes) > 1:
        raise InputError("clips differ in grid or width", wanted="one shape", found=shapes)
    lengths = enumerate(map(len, clips))
    unfit = [f"clip {number} has {length}" for number, length in lengths if not chosen.fits(length)]
    if unfit:
        raise InputError("clips of another length", wanted=chosen.wanted_frames, details=unfit[:8])
    figures, found = [], []
    with torch.inference_mode():
        for clip in clips:
            blocks = [clip[part].float() for part in block_slices(len(clip), clip[0, ..., 0].numel())]
            (of_clip,), middle = measure_clip(partial(iter, blocks), len(clip), [chosen])
            figures.append(of_clip)
            found.append(middle.flatten(0, 1))
        middles = torch.stack(found)
        sums = MiddleSums.of(middles)
        spreads = make_spreads(sums, [chosen])
        comparisons = [
            compare(spreads, middles[pair.first], None if pair.alone else middles[pair.second])
            for pair in block_pairs(len(middles), _BLOCK_CLIPS)
        ]
        (inter,) = inter_figures([chosen], sums, comparisons)
    return combine(chosen, figures, inter, sum(map(len, clips)))


def combine(
    definition: Definition, clips: Sequence[ClipFigures], inter: Mapping[str, float], n_frames: int
) -> TradeOff:
    """Return the figures of clips, given in the order of the manifest; `inter` is of `inter_figures`."""
    known: dict[str, Any] = {**inter}
    for item in fields(ClipFigures):
        values = [value for clip in clips if (value := getattr(clip, item.name)) is not None]
        known[item.name] = float(np.mean(values)) if values else None
    if definition.batch_clips:
        # A short last batch counts as the others.
        starts = range(0, len(clips), definition.batch_clips)
        batches = [clips[start : start + definition.batch_clips] for start in starts]
        means = [np.mean([clip.cycle_accuracy for clip in batch]) for batch in batches]
        known["cycle_accuracy"] = float(np.mean(means))
    for percent in definition.percents:
        d_inter, d_intra = known[f"d_inter_{percent}"], known[f"d_intra_{percent}"]
        known[f"margin_{percent}"] = d_inter - definition.gamma * d_intra
    return TradeOff(n_videos=len(clips), n_frames=n_frames, **known)


@dataclass(frozen=True, slots=True, eq=False)
class MiddleSums:
    """Sums over the middle frames of `n_clips` clips: their tokens place by place, their outer products."""

    n_clips: int
    places: Float64[np.ndarray, "place dim"]
    products: Float64[np.ndarray, "dim dim"]

    def __add__(self, other: MiddleSums) -> MiddleSums:
        n_clips = self.n_clips + other.n_clips
        return MiddleSums(n_clips, self.places + other.places, self.products + other.products)

    @classmethod
    def of(cls, middles: Middles) -> MiddleSums:
        """Return the sums over some clips, or over none."""
        wide = middles.double()
        tokens = wide.flatten(0, 1)
        return cls(len(middles), wide.sum(0).numpy(), (tokens.T @ tokens).numpy())


@dataclass(frozen=True, slots=True)
class BlockPair:
    """Two blocks of clips, or one with itself, whose middle frames are compared; clips by number."""

    number: int
    first: slice
    second: slice

    @property
    def alone(self) -> bool:
        """Whether these are the pairs within one block."""
        return self.first == self.second


def block_pairs(n_clips: int, size: int) -> list[BlockPair]:
    """Return the pairs of blocks of `size` clips; every two clips meet once."""
    blocks = [slice(start, min(start + size, n_clips)) for start in range(0, n_clips, size)]
    pairs = enumerate(combinations_with_replacement(blocks, 2))
    return [BlockPair(number, first, second) for number, (first, second) in pairs]


def make_spreads(sums: MiddleSums, definitions: Sequence[Definition]) -> tuple[Spread, ...]:
    """Return how each definition looks at clips around the mean of all: all places, and those drawn."""
    places = torch.from_numpy(sums.places / sums.n_clips)
    return tuple(Spread.about(places, drawn) for item in definitions for drawn in (item.whole, item))


def compare(
    spreads: Sequence[Spread], first: Middles, second: Float[Tensor, "_ place dim"] | None = None
) -> Comparison:
    """Compare two blocks of clips, or one with itself."""
    summed = []
    for start in range(0, first.shape[1], _PLACES):
        places = slice(start, start + _PLACES)
        one = first[:, places].float().transpose(0, 1).contiguous()
        other = one if second is None else second[:, places].float().transpose(0, 1).contiguous()
        distances = torch.cdist(one, other)
        if second is None:
            distances = distances.triu(1)
        summed.append(distances.sum(dim=(1, 2), dtype=torch.float64).numpy())
    found = () if second is not None else tuple(item.distances(first.float()) for item in spreads)
    return np.concatenate(summed), found


def inter_figures(
    definitions: Sequence[Definition], sums: MiddleSums, comparisons: Sequence[Comparison]
) -> list[dict[str, float]]:
    """Return the figures between clips by name of `TradeOff`, for each definition.

    `comparisons` are those of every `block_pairs`, with `make_spreads`.
    """
    n_pairs = sums.n_clips * (sums.n_clips - 1) / 2
    by_place = np.sum([distances for distances, _ in comparisons], axis=0) / n_pairs
    alone = [spreads for _, spreads in comparisons if spreads]
    spreads = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
    rank = effective_rank(sums.products)
    figures = []
    for definition, whole, drawn in zip(definitions, spreads[::2], spreads[1::2], strict=True):
        distance = float(by_place[definition.drawn(len(by_place))].mean())
        known = {"inter_distance": distance, "effective_rank": rank}
        for percent, diameter in diameters(whole, definition.whole).items():
            known[f"inter_diameter_{percent}"] = diameter
        for percent, diameter in diameters(drawn, definition).items():
            known[f"d_inter_{percent}"] = distance / (diameter + SMALLEST_DIAMETER)
        figures.append(known)
    return figures
