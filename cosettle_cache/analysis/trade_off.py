"""The trade-off of an encoder: consistency within clips against separability between them.

A `Definition` has every choice in which the released metrics, the same with their quirks, and the paper's
differ (PROTOCOLS 7.7; docs/analysis.md has every formula). Tokens in memory, or clips block by block, come
in; figures of clips, and a `TradeOff` per definition, go out. At most two blocks of middle frames are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import MARGIN_GAMMA
from cosettle_cache.metrics.cycle import cycle_accuracy, cycle_transition, pool_tokens
from cosettle_cache.search.correspondence import find_correspondence
from cosettle_cache.search.masked import unit_tokens

#: Frames cut off at either end before neighbouring frames are compared (released code).
_CUT_FRAMES = 3
#: Two neighbouring frames between the cuts; the frames of every walk differ as well.
_FEWEST_FRAMES = 2 * _CUT_FRAMES + 2
#: Where the walks of the cycle accuracy start and turn, in shares of the clip (released code).
_WALKS = ((0.25, 0.40), (0.35, 0.50), (0.45, 0.60), (0.55, 0.70), (0.65, 0.80))
#: Pooling window and temperature of the walks, those of the objective.
_WALK_WINDOW, _WALK_TEMPERATURE = 2, 0.03
#: Added to a diameter before it divides (released code): a clip of one colour has none.
_SMALLEST_DIAMETER = 1e-8
#: Added to a share before its logarithm (released code).
_SMALLEST_SHARE = 1e-12
#: Of the draw of tokens (released code).
_DRAW_SEED = 42

#: Tokens per block: 8 frames of the released grid, whose distances to the next stay in a CPU's caches.
BLOCK_TOKENS = 8 * 196

Block = Float32[Tensor, "frame row col dim"]
#: The middle frame of a clip and those where walks start and turn, by number.
_Stops = dict[int, Float32[Tensor, "row col dim"]]
#: Of frames or clips to a centre: of every token, or one of all tokens together.
Distances = Float32[Tensor, "_ _"]
Clip = Float[np.ndarray, "_ row col dim"] | Float[Tensor, "_ row col dim"]
Clips = Float[np.ndarray, "clip frame row col dim"] | Float[Tensor, "clip frame row col dim"]
#: Figures of one clip under one definition by their names in `TradeOff`; those that it knows.
ClipFigures = Mapping[str, float]
#: Float16 or float32; converted a few places at a time.
Middles = Float[Tensor, "clip place dim"]
#: What two blocks of clips give: distances summed over pairs of clips, and how far the clips of a block that
#: was compared with itself are from each centre of `make_spreads` (else empty).
Comparison = tuple[Float64[np.ndarray, " place"], tuple[Distances, ...]]

#: All figures of a clip, in the order of the table.
CLIP_FIGURES = (
    *("intra_distance", "cycle_accuracy", "intra_diameter_90", "intra_diameter_95", "intra_diameter_100"),
    *("d_intra_90", "d_intra_95", "d_intra_100"),
)
#: Distances between clips need two of them.
FEWEST_CLIPS = 2
_BLOCK_CLIPS = 64
#: Places whose pairs of clips are compared at once.
_PLACES = 7


@dataclass(frozen=True, slots=True)
class Definition:
    """Every choice in which the definitions differ.

    Within a clip, `correspondence` says which tokens of neighbouring frames are compared: `nearest` (each
    with its nearest, the closest half of these pairs) or `position` (all, with the same place). `centre`
    says what a radius is: the distance of single tokens to one mean (`token`), or the mean over places of the
    distance to the mean token of that place (`place`); `percents` which share of the distances it covers.
    `unit_walks` walks between tokens of length one, else between tokens as they are.

    Between clips, `n_drawn` tokens of the middle frame are compared, drawn by a fixed seed (0: all);
    `n_frames` leaves out clips of another length (0: none); the cycle accuracy is the mean over clips, or
    over means of `batch_clips` clips where that is not 0.
    """

    name: str
    correspondence: str
    centre: str
    percents: tuple[int, ...]
    unit_walks: bool
    n_drawn: int = 0
    n_frames: int = 0
    batch_clips: int = 0
    gamma: float = MARGIN_GAMMA

    def fits(self, n_frames: int) -> bool:
        """Say whether a clip of so many frames can be measured."""
        return n_frames == self.n_frames if self.n_frames else n_frames >= _FEWEST_FRAMES

    @property
    def wanted_frames(self) -> str:
        """Which clips fit, in words."""
        return f"exactly {self.n_frames} frames" if self.n_frames else f"{_FEWEST_FRAMES} frames or more"

    @property
    def whole(self) -> Definition:
        """This definition without a draw of tokens: within clips no definition draws."""
        return replace(self, n_drawn=0)

    def drawn(self, n_places: int) -> slice | Int64[np.ndarray, " drawn"]:
        """Return the places that the distance between clips looks at."""
        if not self.n_drawn:
            return slice(None)
        if n_places < self.n_drawn:
            raise InputError(
                "the grid has fewer tokens than the released script draws",
                wanted=f"{self.n_drawn} tokens",
                found=n_places,
            )
        generator = torch.Generator().manual_seed(_DRAW_SEED)
        return torch.randperm(n_places, generator=generator)[: self.n_drawn].numpy()


_RELEASED = Definition("released", "nearest", "token", (90, 95, 100), unit_walks=False)

#: `released` are the authors' formulas over all tokens and clips; `compat` also samples, batches and skips as
#: their script does; `paper` is what D.3.3 writes.
DEFINITIONS: Mapping[str, Definition] = {
    "released": _RELEASED,
    "compat": replace(_RELEASED, name="compat", n_drawn=8, n_frames=40, batch_clips=32),
    "paper": Definition("paper", "position", "place", (100,), unit_walks=True),
}


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Distances to a centre as one definition has them: of every token, or of an item as a whole."""

    definition: Definition
    centre: Float32[Tensor, "#place dim"]

    @classmethod
    def about(cls, places: Float64[Tensor, "place dim"], definition: Definition) -> Spread:
        """Return the spread about the mean tokens of all places."""
        chosen = places[definition.drawn(len(places))]
        centre = chosen if definition.centre == "place" else chosen.mean(0, keepdim=True)
        return cls(definition, centre.float())

    def distances(self, tokens: Float32[Tensor, "item place dim"]) -> Distances:
        """Return how far the tokens of frames or of clips are away from the centre: tokens, or their mean."""
        chosen = tokens[:, self.definition.drawn(tokens.shape[1])]
        found = torch.linalg.vector_norm(chosen - self.centre.to(chosen.device), dim=-1)
        distances: Distances = found.mean(-1, keepdim=True) if self.definition.centre == "place" else found
        return distances


def diameters(distances: Distances, definition: Definition) -> dict[int, float]:
    """Return twice the radius that covers each percentage of the distances, interpolated between two of them.

    A definition that draws tokens takes the largest of so many per cent of the distances, rounded down.
    """
    values = distances.cpu().numpy().astype(np.float64).ravel()
    shares = [item / 100 for item in definition.percents]
    if definition.n_drawn:
        ranks = [max(int(share * len(values)), 1) - 1 for share in shares]
        radii = np.sort(values)[ranks]
    else:
        radii = np.quantile(values, shares)
    return {percent: 2 * float(radius) for percent, radius in zip(definition.percents, radii, strict=True)}


def effective_rank(products: Float64[np.ndarray, "dim dim"]) -> float:
    """Return exp(entropy of the normalised singular values) of the tokens whose outer products sum to this.

    As a share of the dimensions, in (0, 1]; tokens are not centred. The singular values are the roots of the
    eigenvalues of `products`, so those below 1e-8 of the largest are lost; they move the figure by less.
    """
    # By torch, whose linear algebra is in use already: numpy's has threads with buffers of their own.
    values = torch.linalg.eigvalsh(torch.from_numpy(products)).clamp(min=0).sqrt().numpy()
    shares = values / max(float(values.sum()), _SMALLEST_SHARE)
    entropy = -(shares * np.log(shares + _SMALLEST_SHARE)).sum()
    return float(np.exp(entropy) / len(products))


def block_slices(n_frames: int, n_tokens: int) -> list[slice]:
    """Return the frames of each block of a clip whose frames have so many tokens."""
    return _slices(n_frames, max(1, BLOCK_TOKENS // n_tokens))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def measure_clip(
    blocks: Callable[[], Iterable[Block]], n_frames: int, definitions: Sequence[Definition]
) -> tuple[tuple[ClipFigures, ...], Float32[Tensor, "row col dim"]]:
    """Return the `CLIP_FIGURES` of one clip, in the order of the definitions, and its middle frame.

    `blocks` gives the frames in order and is called twice; on a GPU the host waits for the figures only.
    Raises `InputError` for tokens that are not finite and for a grid too small for walks.
    """
    place_sums, stops, moved = _first_pass(blocks(), n_frames, definitions)
    walks = [_cycle_accuracy(stops, n_frames, item) for item in definitions]
    # What is not finite stays so in a sum.
    is_finite = place_sums.isfinite().all().double()
    known_finite, *read = torch.stack([is_finite, *moved, *(walk.double() for walk in walks)]).tolist()
    if not known_finite:
        raise InputError("tokens that are not finite", hint="extract this clip again into another store")
    n_definitions = len(definitions)
    spreads = [Spread.about(place_sums / n_frames, item.whole) for item in definitions]
    distances = [[spread.distances(block.flatten(1, 2)) for spread in spreads] for block in blocks()]
    figures = []
    read_pairs = zip(read[:n_definitions], read[n_definitions:], strict=True)
    for item, (distance, accuracy), *found in zip(definitions, read_pairs, *distances, strict=True):
        known = {"intra_distance": distance, "cycle_accuracy": accuracy}
        for percent, diameter in diameters(torch.cat(found), item.whole).items():
            known[f"intra_diameter_{percent}"] = diameter
            known[f"d_intra_{percent}"] = distance / (diameter + _SMALLEST_DIAMETER)
        figures.append(known)
    return tuple(figures), stops[n_frames // 2]


def _first_pass(
    blocks: Iterable[Block], n_frames: int, definitions: Sequence[Definition]
) -> tuple[Float64[Tensor, "place dim"], _Stops, list[Float64[Tensor, ""]]]:
    """Return the sum of the tokens of each place, the middle frame and those of the walks by number, and by
    definition the mean distance between corresponding tokens of neighbouring frames.
    """
    matches = [find_correspondence(item.correspondence) for item in definitions]
    totals, counts = [torch.zeros((), dtype=torch.float64)] * len(matches), [0] * len(matches)
    kept = {n_frames // 2, *(int(share * n_frames) for walk in _WALKS for share in walk)}
    stops, sums, last, n_seen = _Stops(), torch.zeros((), dtype=torch.float64), None, 0
    for block in blocks:
        summed = block.sum(0).flatten(0, 1)
        sums = sums + summed.double()
        stops |= {number: frame.clone() for number, frame in enumerate(block, start=n_seen) if number in kept}
        start, end = (
            min(max(edge - n_seen, 0), len(block)) for edge in (_CUT_FRAMES, n_frames - _CUT_FRAMES)
        )
        inside = block[start:end].flatten(1, 2)
        for frames, after in ((inside[:0] if last is None else last, inside[:1]), (inside[:-1], inside[1:])):
            if not len(frames) or not len(after):
                continue
            for number, match in enumerate(matches):
                first, second = match(frames, after)
                distances = torch.linalg.vector_norm(first - second, dim=-1)
                totals[number] = totals[number] + distances.sum(dtype=torch.float64)
                counts[number] += distances.numel()
        last = inside[-1:].clone() if len(inside) else last
        n_seen += len(block)
    return sums, stops, [total / count for total, count in zip(totals, counts, strict=True)]


def _cycle_accuracy(stops: _Stops, n_frames: int, definition: Definition) -> Float[Tensor, ""]:
    """Return the share of walks that come back."""
    frames = torch.stack([torch.stack([stops[int(share * n_frames)] for share in walk]) for walk in _WALKS])
    rows, cols = (side - side % _WALK_WINDOW for side in frames.shape[2:4])
    if not rows or not cols:
        raise InputError(
            "the grid is too small for the walks of the cycle accuracy",
            wanted=f"{_WALK_WINDOW}x{_WALK_WINDOW} tokens or more",
            found="x".join(map(str, frames.shape[2:4])),
        )
    # A last odd row or column is left out, as average pooling does.
    tokens = frames[:, :, :rows, :cols]
    pooled = pool_tokens(unit_tokens(tokens) if definition.unit_walks else tokens, _WALK_WINDOW)
    return cycle_accuracy(cycle_transition(pooled, _WALK_TEMPERATURE, walk=(0, 1, 0)))


@dataclass(frozen=True, slots=True)
class TradeOff:
    """A set of clips under one definition: figures within clips are means over clips.

    Distances are Euclidean between tokens as they are, `d_*` are in diameters that cover 90, 95 or 100 % of
    the tokens, and the margin is D = d_inter - gamma * d_intra (PROTOCOLS 5.3, 7.7). `effective_rank` is a
    share of the dimensions, `cycle_accuracy` that of walks to another frame and back that end where they
    started. What a definition does not know is None.
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
    known = {**inter, **{name: float(np.mean([clip[name] for clip in clips])) for name in clips[0]}}
    if definition.batch_clips:
        # A short last batch counts as the others.
        batches = [clips[part] for part in _slices(len(clips), definition.batch_clips)]
        means = [np.mean([clip["cycle_accuracy"] for clip in batch]) for batch in batches]
        known["cycle_accuracy"] = float(np.mean(means))
    for percent in definition.percents:
        d_inter, d_intra = known[f"d_inter_{percent}"], known[f"d_intra_{percent}"]
        known[f"margin_{percent}"] = d_inter - definition.gamma * d_intra
    return TradeOff(len(clips), n_frames, **known)


@dataclass(frozen=True, slots=True, eq=False)
class MiddleSums:
    """Sums over the middle frames of `n_clips` clips: their tokens place by place, their outer products."""

    n_clips: int
    places: Float64[Tensor, "place dim"]
    products: Float64[Tensor, "dim dim"]

    def __add__(self, other: MiddleSums) -> MiddleSums:
        n_clips = self.n_clips + other.n_clips
        return MiddleSums(n_clips, self.places + other.places, self.products + other.products)

    @classmethod
    def of(cls, middles: Middles) -> MiddleSums:
        """Return the sums over some clips, or over none."""
        wide = middles.double()
        tokens = wide.flatten(0, 1)
        return cls(len(middles), wide.sum(0), tokens.T @ tokens)

    def cpu(self) -> MiddleSums:
        """Return the sums in the memory of the host."""
        return MiddleSums(self.n_clips, self.places.cpu(), self.products.cpu())


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
    pairs = enumerate(combinations_with_replacement(_slices(n_clips, size), 2))
    return [BlockPair(number, first, second) for number, (first, second) in pairs]


def make_spreads(sums: MiddleSums, definitions: Sequence[Definition]) -> tuple[Spread, ...]:
    """Return how each definition looks at clips around the mean of all: all places, and those drawn."""
    places = sums.places / sums.n_clips
    return tuple(Spread.about(places, drawn) for item in definitions for drawn in (item.whole, item))


def compare(
    spreads: Sequence[Spread], first: Middles, second: Float[Tensor, "_ place dim"] | None = None
) -> Comparison:
    """Compare two blocks of clips, or one with itself."""
    summed = []
    for places in _slices(first.shape[1], _PLACES):
        one = first[:, places].float().transpose(0, 1).contiguous()
        other = one if second is None else second[:, places].float().transpose(0, 1).contiguous()
        distances = torch.cdist(one, other)
        if second is None:
            distances = distances.triu(1)
        summed.append(distances.sum(dim=(1, 2), dtype=torch.float64))
    found = () if second is not None else tuple(item.distances(first.float()).cpu() for item in spreads)
    return torch.cat(summed).cpu().numpy(), found


def inter_figures(
    definitions: Sequence[Definition], sums: MiddleSums, comparisons: Sequence[Comparison]
) -> list[dict[str, float]]:
    """Return the figures between clips for each definition; `comparisons` are those of all `block_pairs`."""
    n_pairs = sums.n_clips * (sums.n_clips - 1) / 2
    by_place = np.sum([distances for distances, _ in comparisons], axis=0) / n_pairs
    alone = [spreads for _, spreads in comparisons if spreads]
    spreads = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    rank = effective_rank(sums.products.numpy())
    figures = []
    for definition, whole, drawn in zip(definitions, spreads[::2], spreads[1::2], strict=True):
        distance = float(by_place[definition.drawn(len(by_place))].mean())
        known = {"inter_distance": distance, "effective_rank": rank}
        for percent, diameter in diameters(whole, definition.whole).items():
            known[f"inter_diameter_{percent}"] = diameter
        for percent, diameter in diameters(drawn, definition).items():
            known[f"d_inter_{percent}"] = distance / (diameter + _SMALLEST_DIAMETER)
        figures.append(known)
    return figures
