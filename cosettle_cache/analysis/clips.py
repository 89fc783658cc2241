"""One clip under the released definition, the same with its quirks, or the paper's: how far tokens move.

A `Definition` has every choice in which the three differ (PROTOCOLS 7.7). The tokens of a clip come in block
by block, twice if they do not fit into memory; one `ClipFigures` per definition goes out. The figures that
distances within and between clips share (diameters, effective rank) stand here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError
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
SMALLEST_DIAMETER = 1e-8
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
Distances = Float32[np.ndarray, "_ _"]


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
        found = torch.linalg.vector_norm(chosen - self.centre, dim=-1)
        if self.definition.centre == "place":
            found = found.mean(-1, keepdim=True)
        distances: Distances = found.numpy()
        return distances


def diameters(distances: Distances, definition: Definition) -> dict[int, float]:
    """Return twice the radius that covers each percentage of the distances, interpolated between two of them.

    A definition that draws tokens takes the largest of so many per cent of the distances, rounded down.
    """
    values, shares = distances.astype(np.float64).ravel(), [item / 100 for item in definition.percents]
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
) -> tuple[Float64[Tensor, "place dim"], _Stops, list[float]]:
    """Return the sum of the tokens of each place, the middle frame and those of the walks by number, and by
    definition the mean distance between corresponding tokens of neighbouring frames.
    """
    matches = [find_correspondence(item.correspondence) for item in definitions]
    totals, counts = [0.0] * len(matches), [0] * len(matches)
    kept = {n_frames // 2, *(int(share * n_frames) for walk in _WALKS for share in walk)}
    stops, sums, last, n_seen = _Stops(), torch.zeros((), dtype=torch.float64), None, 0
    for block in blocks:
        summed = block.sum(0).flatten(0, 1)
        # What is not finite stays so in a sum.
        if not summed.isfinite().all():
            raise InputError("tokens that are not finite", hint="extract this clip again into another store")
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
                totals[number] += distances.sum(dtype=torch.float64).item()
                counts[number] += distances.numel()
        last = inside[-1:].clone() if len(inside) else last
        n_seen += len(block)
    return sums, stops, [total / count for total, count in zip(totals, counts, strict=True)]


def _cycle_accuracy(stops: _Stops, n_frames: int, definition: Definition) -> float:
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
    return cycle_accuracy(cycle_transition(pooled, _WALK_TEMPERATURE, walk=(0, 1, 0))).item()
