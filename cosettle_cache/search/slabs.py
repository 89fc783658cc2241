"""Slabs: a frame's queries cut into neighbouring columns, and the block of keys that their windows reach.

A grid and a window go in; slices and masks come out, and how wide slabs may be within a memory limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.search.affinity import in_window, window_reach

#: Query columns that are ranked together: few enough that their common window stays narrow, many enough for
#: a fast matrix product (at 30x55 tokens 4 to 9 are equally fast, 2 and 14 slower).
SLAB_COLS = 5

_FLOAT_BYTES = 4
#: Of similarity and index of a neighbour, over-fetched, sorted and merged.
_NEIGHBOR_BYTES = 200
#: Of candidates that are multiplied exactly at a time.
_GATHERED_BYTES = 2**22

Blocked = Bool[Tensor, "query position"] | None


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring query columns and the key positions, column by column, that their windows reach."""

    query_cols: slice
    positions: slice
    blocked: Blocked


@dataclass(frozen=True, slots=True)
class SearchSize:
    """What decides the memory of a search.

    `n_parallel` slabs are ranked side by side; labels are kept beside, and keys in bfloat16 where `rough`.
    """

    grid: Grid
    dim: int
    protocol: EvalProtocol
    n_parallel: int
    labels_bytes: int = 0
    rough: bool = False

    def needed_bytes(self, slab_cols: int) -> int:
        """Return the most bytes of tensors that a search with slabs of so many columns holds.

        First frame and queue; the frame in hand, three times while it is normalised and turned; of every
        slab that is ranked similarities and mask; the neighbours; the labels.
        """
        frame = _FLOAT_BYTES * self.grid.n_tokens * self.dim
        reach = 2 * window_reach(self.protocol.window, self.protocol.radius)
        reached = self.grid.rows * min(slab_cols + reach, self.grid.cols)
        keys = max(reached * self.protocol.n_context, self.grid.n_tokens)
        queries = self.grid.rows * min(slab_cols, self.grid.cols)
        masks = self.grid.n_tokens * reached
        found = _NEIGHBOR_BYTES * self.grid.n_tokens * self.protocol.top_k
        slabs = self.n_parallel * _FLOAT_BYTES * queries * keys
        kept = (self.protocol.n_context + 4) * frame
        if self.rough:
            kept += (self.protocol.n_context + 2) * frame // 2 + self.n_parallel * _GATHERED_BYTES
        return kept + slabs + masks + found + self.labels_bytes

    def slab_cols(self, memory_limit: int | None) -> int:
        """Return the widest slabs that fit; raise `UsageError` with the least limit when none do."""
        if memory_limit is None:
            return SLAB_COLS
        for cols in range(SLAB_COLS, 0, -1):
            if self.needed_bytes(cols) <= memory_limit:
                return cols
        raise UsageError(
            f"{self.protocol.name} on {self.grid} tokens of {self.dim} channels needs more memory",
            wanted=f"at least {self.needed_bytes(1)} bytes",
            found=memory_limit,
            hint="a larger --memory-limit, or a smaller n_context",
        )


def make_slabs(
    grid: Grid, protocol: EvalProtocol, device: torch.device, slab_cols: int = SLAB_COLS
) -> list[Slab]:
    """Return slabs that cover every query once, with the protocol's window; a window is never empty."""
    reach = window_reach(protocol.window, protocol.radius)
    slabs = []
    for cols in _slab_cols(grid, slab_cols):
        keys = slice(max(cols.start - reach, 0), min(cols.stop + reach, grid.cols))
        row, col = _displacements(grid, cols, keys, device)
        blocked = ~in_window(row, col, protocol.window, protocol.radius)
        positions = slice(keys.start * grid.rows, keys.stop * grid.rows)
        slabs.append(Slab(cols, positions, blocked if blocked.any() else None))
    return slabs


def make_open_slabs(grid: Grid, slab_cols: int = SLAB_COLS) -> list[Slab]:
    """Return slabs that cover every query once and reach every position."""
    return [Slab(cols, slice(0, grid.n_tokens), None) for cols in _slab_cols(grid, slab_cols)]


def _slab_cols(grid: Grid, slab_cols: int) -> list[slice]:
    return [slice(col, min(col + slab_cols, grid.cols)) for col in range(0, grid.cols, slab_cols)]


def _displacements(
    grid: Grid, queries: slice, keys: slice, device: torch.device
) -> tuple[Int[Tensor, "query position"], Int[Tensor, "query position"]]:
    query_col, query_row = _cells(grid, queries, device)
    key_col, key_row = _cells(grid, keys, device)
    return key_row - query_row[:, None], key_col - query_col[:, None]


def _cells(
    grid: Grid, cols: slice, device: torch.device
) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
    col = torch.arange(cols.start, cols.stop, device=device).repeat_interleave(grid.rows)
    row = torch.arange(grid.rows, device=device).repeat(cols.stop - cols.start)
    return col, row
