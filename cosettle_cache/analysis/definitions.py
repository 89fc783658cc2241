"""What the trade-off is measured by: the released metrics, the same with their quirks, and the paper's.

A name goes in, a `Definition` with every choice in which the three differ comes out (PROTOCOLS 7.7); the
figures that distances within and between clips share (diameters, effective rank) stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import MARGIN_GAMMA

#: Frames cut off at either end before neighbouring frames are compared (released code).
CUT_FRAMES = 3
#: Two neighbouring frames between the cuts; the frames of every walk differ as well.
_FEWEST_FRAMES = 2 * CUT_FRAMES + 2
#: Where the walks of the cycle accuracy start and turn, in shares of the clip (released code).
WALKS = ((0.25, 0.40), (0.35, 0.50), (0.45, 0.60), (0.55, 0.70), (0.65, 0.80))
#: Pooling window and temperature of the walks, those of the objective.
WALK_WINDOW, WALK_TEMPERATURE = 2, 0.03
#: Added to a diameter before it divides (released code): a clip of one colour has none.
SMALLEST_DIAMETER = 1e-8
#: Added to a share before its logarithm (released code).
_SMALLEST_SHARE = 1e-12
#: Of the draw of tokens (released code).
_DRAW_SEED = 42

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
