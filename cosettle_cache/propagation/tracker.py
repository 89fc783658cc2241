"""Nearest-token tracking: a point is where the token most like its own lies, refined between tokens.

Tokens of one frame after the other come in, `[row col dim]`; places in cells come out. A cell is a token's
square: (x, y) run from 0 to columns and rows, and a token's centre lies at one half. Nothing grows with the
length of a video but the tokens of the frames in which queries are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import TrackSettings
from cosettle_cache.metrics.tapvid import QUERY_MODES

#: How visibility is estimated.
OCCLUSIONS = ("cycle", "cosine", "never")
#: Queries that meet all tokens of a frame at once; bounds the cosines in memory.
_BLOCK = 1024

Frame = Float[Tensor, "row col dim"]
Cells = Float[Tensor, "query 2"]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where the queries are in one frame, in cells, whether they show there, and how alike the tokens are."""

    cells: Float[Tensor, "query 2"]
    visible: Bool[Tensor, " query"]
    cosines: Float[Tensor, " query"]


def check_settings(settings: TrackSettings) -> None:
    """Raise `UsageError` for settings that mean nothing."""
    for name, value, known in (
        ("query mode", settings.query_mode, QUERY_MODES),
        ("occlusion", settings.occlusion, OCCLUSIONS),
    ):
        if value not in known:
            raise UsageError(f"unknown {name}", wanted=" or ".join(known), found=value)
    positive = ("query_stride", "temperature", "cycle_radius")
    for name in positive:
        if not getattr(settings, name) > 0:
            raise UsageError(f"{name} must be positive", wanted="more than 0", found=getattr(settings, name))
    if settings.radius < 0 or not math.isfinite(settings.radius):
        raise UsageError("radius is a distance in tokens", wanted="0 or more", found=settings.radius)


def sample_tokens(tokens: Frame, cells: Cells) -> Float[Tensor, "query dim"]:
    """Return the tokens at places between cells, bilinearly; beyond the outer centres the rim goes on."""
    rows, cols, _ = tokens.shape
    unit = 2 * cells / torch.tensor([cols, rows], dtype=cells.dtype, device=cells.device) - 1
    sampled = grid_sample(
        tokens.permute(2, 0, 1)[None],
        unit[None, None].to(tokens.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[0, :, 0].T


def locate(
    cosines: Float[Tensor, "query row col"], radius: float, temperature: float
) -> tuple[Cells, Float[Tensor, " query"]]:
    """Return where each map is highest, refined, and how high: of equal ones the first in reading order.

    The refined place is the mean of the centres of all cells within `radius` of the highest, weighted by
    the softmax of `cosines / temperature` over them.
    """
    _, rows, cols = cosines.shape
    best, index = cosines.flatten(1).max(dim=1)
    near = _disc(radius, max(rows, cols), cosines.device)
    x = (index % cols)[:, None] + near[:, 0]
    y = (index // cols)[:, None] + near[:, 1]
    inside = (x >= 0) & (x < cols) & (y >= 0) & (y < rows)
    flat = y.clamp(0, rows - 1) * cols + x.clamp(0, cols - 1)
    values = cosines.flatten(1).gather(1, flat).where(inside, -torch.inf)
    weights = torch.softmax(values / temperature, dim=1)
    cells = torch.stack([(weights * x).sum(dim=1), (weights * y).sum(dim=1)], dim=1) + 0.5
    return cells.double(), best


def _disc(radius: float, side: int, device: torch.device) -> Int64[Tensor, "cell 2"]:
    """Return the offsets (x, y) of the cells within `radius` of one, those beyond a grid's `side` aside."""
    farthest = min(math.floor(radius), side - 1)
    reach = torch.arange(-farthest, farthest + 1, device=device)
    x, y = torch.meshgrid(reach, reach, indexing="xy")
    offsets = torch.stack([x.flatten(), y.flatten()], dim=1)
    return offsets[offsets.square().sum(dim=1) <= radius**2]


class Tracker:
    """All queries on their way through the frames of one video, in any order of frames.

    `homes` are the tokens of the frames in which queries are given, by frame; `frames` and `cells` say where.
    """

    def __init__(
        self,
        homes: Mapping[int, Frame],
        frames: Int64[Tensor, " query"],
        cells: Cells,
        settings: TrackSettings,
    ) -> None:
        check_settings(settings)
        self._settings, self._frames, self._cells = settings, frames, cells.double()
        goes_back = settings.occlusion == "cycle"
        self._homes = {frame: normalize(tokens, dim=-1) for frame, tokens in homes.items() if goes_back}
        self._members = {frame: torch.nonzero(frames == frame)[:, 0] for frame in homes}
        self._shape = next(iter(homes.values())).shape
        self._tokens = cells.new_zeros((len(cells), self._shape[-1]), dtype=next(iter(homes.values())).dtype)
        for frame, tokens in homes.items():
            chosen = self._members[frame]
            self._tokens[chosen] = normalize(sample_tokens(tokens, self._cells[chosen]), dim=-1)

    def step(self, tokens: Frame, frame: int) -> Found:
        """Return where every query is in `frame`; a query of this very frame is where it was given."""
        if tokens.shape != self._shape:
            raise InputError(
                f"frame {frame} has tokens of another grid than the frames of the queries",
                wanted=tuple(self._shape),
                found=tuple(tokens.shape),
            )
        cells, cosines = self._locate(self._tokens, normalize(tokens, dim=-1))
        visible = self._shows(tokens, cells, cosines)
        given = self._frames == frame
        cells = torch.where(given[:, None], self._cells, cells)
        return Found(cells, visible | given, cosines)

    def _locate(
        self, queries: Float[Tensor, "query dim"], unit: Frame
    ) -> tuple[Cells, Float[Tensor, " query"]]:
        keys = unit.flatten(0, 1).T
        radius, temperature = self._settings.radius, self._settings.temperature
        parts = [
            locate((block @ keys).view(len(block), *unit.shape[:2]), radius, temperature)
            for block in torch.split(queries, _BLOCK)
        ]
        return torch.cat([cells for cells, _ in parts]), torch.cat([best for _, best in parts])

    def _shows(self, tokens: Frame, cells: Cells, cosines: Float[Tensor, " query"]) -> Bool[Tensor, " query"]:
        if self._settings.occlusion == "never":
            return torch.ones_like(cosines, dtype=torch.bool)
        if self._settings.occlusion == "cosine":
            return cosines >= self._settings.min_cosine
        back = normalize(sample_tokens(tokens, cells), dim=-1)
        visible = torch.zeros_like(cosines, dtype=torch.bool)
        for frame, home in self._homes.items():
            chosen = self._members[frame]
            ends, _ = self._locate(back[chosen], home)
            gap = (ends - self._cells[chosen]).square().sum(dim=1)
            visible[chosen] = gap <= self._settings.cycle_radius**2
        return visible
