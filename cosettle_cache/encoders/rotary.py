"""Rotary positions (DINOv3, EVA-02, RoPE-ViT): the tables of a grid, plain or shifted.

A shift has no released counterpart here. It is the same idea on coordinates: those of the grid are
refined to `int((1 + ratio) * grid)` steps over the same extent, and the crop at the shift's offsets is
used. Attention between patches sees distances shrunk by `1 + ratio`; as rotations are relative, the
offsets matter to prefix tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    get_mixed_freqs,
    get_mixed_grid,
)
from torch import Tensor

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders.positions import enlarged_length


class Rotary:
    """The rotary embedding of a timm Eva model; `tables` gives one sine-cosine table per block."""

    def __init__(self, rope: Any, depth: int) -> None:
        self._rope = rope
        self._depth = depth
        #: Learned frequencies differ by block and head; fixed ones are shared.
        self._by_block = isinstance(rope, RotaryEmbeddingMixed)
        self._plain = lru_cache(maxsize=4)(lambda grid: rope.get_embed(shape=(grid.rows, grid.cols)))
        self._enlarged = lru_cache(maxsize=2)(self._make_enlarged)

    def tables(self, grid: Grid, shifts: Sequence[PositionShift | None]) -> Sequence[Tensor]:
        """Return the table of each block, with an axis of views when a view is shifted."""
        if all(shift is None for shift in shifts):
            tables = self._plain(grid)
            return list(tables) if self._by_block else [tables] * self._depth
        views = [self._plain(grid) if shift is None else self._shifted(grid, shift) for shift in shifts]
        if self._by_block:
            return list(torch.stack(views, 1))
        return [torch.stack(views)[:, None]] * self._depth

    def _shifted(self, grid: Grid, shift: PositionShift) -> Tensor:
        if self._by_block:
            return self._shifted_mixed(grid, shift)
        return _crop(self._enlarged(grid, shift.ratio), grid, shift).flatten(0, 1)

    def _make_enlarged(self, grid: Grid, ratio: float) -> Tensor:
        large, rope = _enlarged(grid, ratio), self._rope
        if isinstance(rope, RotaryEmbeddingCat) and not rope.in_pixels:
            # Counts patches: the reference shape makes it count in steps of the grid's own extent.
            rope = copy(rope)
            rope.ref_feat_shape = self._rope.ref_feat_shape or [grid.rows, grid.cols]
        elif not isinstance(rope, RotaryEmbeddingCat | RotaryEmbeddingDinoV3):
            raise UsageError(
                "position shifts are not defined for this rotary embedding",
                wanted="absolute positions, or rotary ones of DINOv3, EVA-02 or RoPE-ViT",
                found=type(rope).__name__,
            )
        table: Tensor = rope.get_embed(shape=(large.rows, large.cols))
        return table.view(large.rows, large.cols, -1)

    def _shifted_mixed(self, grid: Grid, shift: PositionShift) -> Tensor:
        large, rope = _enlarged(grid, shift.ratio), self._rope
        steps = {"row": grid.rows / large.rows, "col": grid.cols / large.cols}
        order = ("row", "col") if rope.grid_indexing == "ij" else ("col", "row")
        coordinates = get_mixed_grid([large.rows, large.cols], rope.grid_indexing, rope.freqs.device)
        first, second = (
            _crop(along.view(large.rows, large.cols), grid, shift).flatten() * steps[axis]
            for along, axis in zip(coordinates, order, strict=True)
        )
        return get_mixed_freqs(rope.freqs, first, second)


def _enlarged(grid: Grid, ratio: float) -> Grid:
    return Grid(enlarged_length(grid.rows, ratio), enlarged_length(grid.cols, ratio))


def _crop(table: Tensor, grid: Grid, shift: PositionShift) -> Tensor:
    return table[shift.row : shift.row + grid.rows, shift.col : shift.col + grid.cols]
