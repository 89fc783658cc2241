"""What the trade-off is measured by: the released metrics, the same with their quirks, and the paper's.

A name goes in, a `Definition` with every choice in which the three differ comes out (PROTOCOLS 7.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError

#: Frames cut off at either end before neighbouring frames are compared (released code).
CUT_FRAMES = 3
#: Two neighbouring frames between the cuts; the frames of every walk differ as well.
FEWEST_FRAMES = 2 * CUT_FRAMES + 2
#: Where the walks of the cycle accuracy start and turn, in shares of the clip (released code).
WALKS = ((0.25, 0.40), (0.35, 0.50), (0.45, 0.60), (0.55, 0.70), (0.65, 0.80))
#: Pooling window and temperature of the walks, those of the objective.
WALK_WINDOW, WALK_TEMPERATURE = 2, 0.03
#: The weight of D_intra in the margin D (PROTOCOLS 5.3).
GAMMA = 0.3
#: Added to a diameter before it divides (released code): a clip of one colour has none.
SMALLEST_DIAMETER = 1e-8
DRAW_SEED = 42


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
    gamma: float = GAMMA

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"percents": list(self.percents)}

    def fits(self, n_frames: int) -> bool:
        """Say whether a clip of so many frames can be measured."""
        return n_frames == self.n_frames if self.n_frames else n_frames >= FEWEST_FRAMES

    @property
    def wanted_frames(self) -> str:
        """Which clips fit, in words."""
        return f"exactly {self.n_frames} frames" if self.n_frames else f"{FEWEST_FRAMES} frames or more"

    @property
    def whole(self) -> Definition:
        """This definition without a draw of tokens: within clips no definition draws."""
        return replace(self, n_drawn=0)

    def drawn(self, n_places: int) -> Int[Tensor, " drawn"] | None:
        """Return the places that the distance between clips looks at; None for all."""
        if not self.n_drawn:
            return None
        if n_places < self.n_drawn:
            raise InputError(
                "the grid has fewer tokens than the released script draws",
                wanted=f"{self.n_drawn} tokens",
                found=n_places,
            )
        generator = torch.Generator().manual_seed(DRAW_SEED)
        return torch.randperm(n_places, generator=generator)[: self.n_drawn]


#: `released` are the authors' formulas over all tokens and clips; `compat` also samples, batches and skips as
#: their script does; `paper` is what D.3.3 writes.
DEFINITIONS: Mapping[str, Definition] = {
    item.name: item
    for item in (
        Definition("released", "nearest", "token", (90, 95, 100), unit_walks=False),
        Definition(
            "compat",
            "nearest",
            "token",
            (90, 95, 100),
            unit_walks=False,
            n_drawn=8,
            n_frames=40,
            batch_clips=32,
        ),
        Definition("paper", "position", "place", (100,), unit_walks=True),
    )
}


def find_definition(name: str) -> Definition:
    """Return the definition called `name`; raise `UsageError` when there is none."""
    if name not in DEFINITIONS:
        raise UsageError("unknown definition", wanted=" or ".join(DEFINITIONS), found=name)
    return DEFINITIONS[name]
