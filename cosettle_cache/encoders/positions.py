"""Absolute position embeddings: brought to other grids by the family's rule, and shifted as Co-Settle does.

Holds the embedding of the encoder's own grid; gives one embedding per image for any grid, plain or shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders.families import PositionResize

#: Added to rows and columns by the released scale-factor resize, against rounding (PROTOCOLS 7.4).
_SCALE_MARGIN = 0.1


class Positions:
    """The absolute position embedding of an encoder's patch tokens."""

    def __init__(self, embedding: Float[Tensor, "row col dim"], resize: PositionResize) -> None:
        self._embedding = embedding
        self._resize = resize
        self._plain = lru_cache(maxsize=8)(self._make_plain)
        self._weights = lru_cache(maxsize=16)(self._make_weights)

    def plain(self, grid: Grid) -> Float[Tensor, "1 token dim"]:
        """Return the embedding at `grid`."""
        return self._plain(grid)

    def shifted(self, grid: Grid, shifts: Sequence[PositionShift]) -> Float[Tensor, "n token dim"]:
        """Return one shifted embedding per shift: the crop at its offsets of the enlarged embedding.

        The enlargement (bicubic, no antialias; PROTOCOLS 7.2) is linear and separable, so the crop is row
        weights x embedding x column weights. The whole enlarged embedding, 600 MB for a ViT-B at 480x880, is
        never made.
        """
        rows = torch.stack([self._crop(grid, shift, 0) for shift in shifts])
        cols = torch.stack([self._crop(grid, shift, 1) for shift in shifts])
        by_row = torch.einsum("nri,ijd->nrjd", rows, self._embedding)
        return torch.einsum("ncj,nrjd->nrcd", cols, by_row).flatten(1, 2)

    def _make_plain(self, grid: Grid) -> Tensor:
        return resize_positions(self._embedding, grid, self._resize).flatten(0, 1).unsqueeze(0)

    def _crop(self, grid: Grid, shift: PositionShift, axis: int) -> Tensor:
        length, start = ((grid.rows, shift.row), (grid.cols, shift.col))[axis]
        return self._weights(axis, enlarged_length(length, shift.ratio))[start : start + length]

    def _make_weights(self, axis: int, length: int) -> Tensor:
        return bicubic_weights(self._embedding.shape[axis], length).to(self._embedding)


def resize_positions(
    embedding: Float[Tensor, "row col dim"], grid: Grid, rule: PositionResize
) -> Float[Tensor, "new_row new_col dim"]:
    """Return the embedding at another grid by the family's rule; at its own grid it is returned as it is."""
    rows, cols, _ = embedding.shape
    if (rows, cols) == (grid.rows, grid.cols):
        return embedding
    planes = embedding.permute(2, 0, 1).unsqueeze(0)
    if rule is PositionResize.SCALE_FACTOR:
        factors = ((grid.rows + _SCALE_MARGIN) / rows, (grid.cols + _SCALE_MARGIN) / cols)
        resized = F.interpolate(planes, scale_factor=factors, mode="bicubic")
    else:
        antialias = rule is PositionResize.ANTIALIAS
        resized = F.interpolate(planes, size=(grid.rows, grid.cols), mode="bicubic", antialias=antialias)
    return resized[0].permute(1, 2, 0).contiguous()


def enlarged_length(length: int, ratio: float) -> int:
    """Return the length of an axis of the enlarged position grid (PROTOCOLS 7.2)."""
    return int((1 + ratio) * length)


def check_shift(grid: Grid, shift: PositionShift) -> None:
    """Raise `InputError` when the shift's crop does not lie within the enlarged grid."""
    if not shift.ratio >= 0:
        raise InputError("a position shift enlarges", wanted="a ratio of at least 0", found=shift.ratio)
    free = Grid(*(enlarged_length(length, shift.ratio) - length for length in (grid.rows, grid.cols)))
    if not (0 <= shift.row <= free.rows and 0 <= shift.col <= free.cols):
        raise InputError(
            "the position shift lies outside the enlarged grid",
            wanted=f"row 0 to {free.rows}, column 0 to {free.cols} (grid {grid}, ratio {shift.ratio:g})",
            found=f"row {shift.row}, column {shift.col}",
        )


def bicubic_weights(length: int, enlarged: int) -> Float[Tensor, "enlarged length"]:
    """Return the matrix that torch's bicubic interpolation (`align_corners=False`) applies along one axis."""
    unit = torch.eye(length)[None, None]
    return F.interpolate(unit, size=(enlarged, length), mode="bicubic")[0, 0]
