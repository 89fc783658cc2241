"""The trade-off of an encoder: consistency within clips against separability between them.

Figures of clips and of all pairs of clips come in and one `TradeOff` per definition goes out; `trade_off`
does the whole for tokens in memory. docs/analysis.md has every formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.analysis.between import (
    InterFigures,
    MiddleSums,
    block_pairs,
    compare,
    inter_figures,
    make_spreads,
)
from cosettle_cache.analysis.definitions import Definition, find_definition
from cosettle_cache.analysis.within import ClipFigures, make_blocks, measure_clip
from cosettle_cache.core.errors import InputError

Clip = Float[np.ndarray, "_ row col dim"] | Float[Tensor, "_ row col dim"]
Clips = Float[np.ndarray, "clip frame row col dim"] | Float[Tensor, "clip frame row col dim"]

#: Distances between clips need two of them.
FEWEST_CLIPS = 2
_BLOCK_CLIPS = 64


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
    chosen = replace(find_definition(definition), **overrides)
    clips = [torch.as_tensor(clip).detach().cpu() for clip in tokens]
    _check_clips(clips, chosen)
    with torch.inference_mode():
        measures = [measure_clip(make_blocks(clip, _as_is), len(clip), [chosen]) for clip in clips]
        middles = torch.stack([item.middle.flatten(0, 1) for item in measures])
        inter = _compare_all(middles, chosen)
    n_frames = sum(map(len, clips))
    return combine(chosen, [item.figures[0] for item in measures], inter, n_frames)


def combine(
    definition: Definition, clips: Sequence[ClipFigures], inter: InterFigures, n_frames: int
) -> TradeOff:
    """Return the figures of a set of clips, given in the order of the manifest."""
    intra = {item.name: _mean([getattr(clip, item.name) for clip in clips]) for item in fields(ClipFigures)}
    intra["cycle_accuracy"] = _batch_mean([clip.cycle_accuracy for clip in clips], definition.batch_clips)
    known = {**asdict(inter), **intra}
    for percent in definition.percents:
        d_inter, d_intra = known[f"d_inter_{percent}"], known[f"d_intra_{percent}"]
        known[f"margin_{percent}"] = d_inter - definition.gamma * d_intra
    return TradeOff(n_videos=len(clips), n_frames=n_frames, **known)


def _as_is(tokens: Tensor) -> Tensor:
    return tokens


def _check_clips(clips: Sequence[Float[Tensor, "_ _ _ _"]], definition: Definition) -> None:
    if len(clips) < FEWEST_CLIPS:
        raise InputError(
            "distances between clips need several", wanted=f"{FEWEST_CLIPS} clips", found=len(clips)
        )
    shapes = sorted({tuple(clip.shape[1:]) for clip in clips})
    if len(shapes) > 1:
        raise InputError("clips differ in grid or width", wanted="one shape", found=shapes)
    unfit = [
        f"clip {number} has {len(clip)}"
        for number, clip in enumerate(clips)
        if not definition.fits(len(clip))
    ]
    if unfit:
        raise InputError("clips of another length", wanted=definition.wanted_frames, details=unfit[:8])


def _compare_all(middles: Float[Tensor, "clip place dim"], definition: Definition) -> InterFigures:
    sums = MiddleSums.of(middles)
    spreads = make_spreads(sums, [definition])
    comparisons = [
        compare(middles[_slice(pair.first)], None if pair.alone else middles[_slice(pair.second)], spreads)
        for pair in block_pairs(len(middles), _BLOCK_CLIPS)
    ]
    return inter_figures([definition], sums, comparisons)[0]


def _slice(clips: range) -> slice:
    return slice(clips.start, clips.stop)


def _mean(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return float(np.mean(known)) if known else None


def _batch_mean(figures: Sequence[float], size: int) -> float:
    """Return the mean, or the mean over batches of `size` in which a short last one counts as the others."""
    starts = range(0, len(figures), size or len(figures))
    return float(np.mean([np.mean(figures[start : start + (size or len(figures))]) for start in starts]))
