"""The format's names and arithmetic: where every array, shard, index part and chunk of a store lies.

Pure functions of array layouts, with nothing read or written; `docs/store.md` says the same in words.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from pathlib import Path

import numpy as np

from cosettle_cache.types import ArrayLayout, Grid

SPEC_VERSION = 1

#: The one dtype of spec version 1.
TOKEN_DTYPE = np.dtype("<f2")

#: Inner chunks start at multiples of this many bytes, so that reads land aligned in memory.
ALIGNMENT = 64

CHECKSUM_BYTES = 4

#: Offset and size of an inner chunk that is not in its shard (Zarr's sharding codec).
MISSING = 2**64 - 1

ROOT_METADATA = "zarr.json"
TOKENS_GROUP = "tokens"
INDEX_GROUP = "index"
PART_SUFFIX = ".parquet"


class BytesError(Exception):
    """Stored bytes are not what the format says; becomes a `DamagedStoreError` where the slot is known."""


class SlotState(StrEnum):
    """A slot without an index part, with one, or with one that lists failed encodings."""

    TODO = "todo"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where a slot lies: number `shard` of the array `layout`; `index` counts over all arrays."""

    index: int
    layout: ArrayLayout
    shard: int

    @property
    def rows(self) -> range:
        """Rows of the array that the slot covers; the last slot of an array may be part-filled."""
        start = self.shard * self.layout.slot_encodings
        return range(start, min(start + self.layout.slot_encodings, self.layout.n_encodings))

    def token_path(self, root: Path) -> Path:
        """Return the shard file: the Zarr chunk (shard, 0, 0, 0)."""
        return array_folder(root, self.layout.grid) / f"c.{self.shard}.0.0.0"

    def part_path(self, root: Path) -> Path:
        """Return the slot's index part, its commit mark."""
        return part_folder(root, self.layout.grid) / f"{self.shard:06d}{PART_SUFFIX}"


@dataclass(frozen=True)
class SlotTable:
    """Numbers slots through the arrays in their order: all shards of the first, then of the second, ..."""

    arrays: tuple[ArrayLayout, ...]

    @property
    def firsts(self) -> list[int]:
        """Number of the first slot of each array, and the total."""
        return [0, *accumulate(layout.n_slots for layout in self.arrays)]

    def __len__(self) -> int:
        return self.firsts[-1]

    def place(self, index: int) -> SlotPlace:
        """Return where slot `index` lies."""
        if not 0 <= index < len(self):
            raise IndexError(f"slot {index} of {len(self)}")
        number = bisect_right(self.firsts, index) - 1
        return SlotPlace(index, self.arrays[number], index - self.firsts[number])

    def index_of(self, array: int, shard: int) -> int:
        """Return the number of shard `shard` of array number `array`."""
        return self.firsts[array] + shard


def check_arrays(arrays: Sequence[ArrayLayout]) -> None:
    """Raise `ValueError` when the layouts cannot make a store: repeated grids, or slots that split chunks."""
    if len({layout.grid for layout in arrays}) < len(arrays):
        raise ValueError("two arrays of a store have the same grid")
    for layout in arrays:
        if layout.slot_encodings % layout.chunk_encodings or layout.n_encodings % layout.chunk_encodings:
            raise ValueError(f"array {layout.grid}: slots and array must hold whole chunks")


def chunk_bytes(layout: ArrayLayout) -> int:
    """Return the bytes of one inner chunk, checksum not counted."""
    return layout.chunk_encodings * layout.encoding_bytes


def chunk_stride(layout: ArrayLayout) -> int:
    """Return the distance between two neighbouring chunks of a shard: chunk, checksum, padding."""
    return -(-(chunk_bytes(layout) + CHECKSUM_BYTES) // ALIGNMENT) * ALIGNMENT


def chunks_per_shard(layout: ArrayLayout) -> int:
    """Return the number of entries of a shard's index, part-filled shards included."""
    return layout.slot_encodings // layout.chunk_encodings


def array_folder(root: Path, grid: Grid) -> Path:
    """Return the folder of a Zarr array."""
    return root / TOKENS_GROUP / str(grid)


def part_folder(root: Path, grid: Grid) -> Path:
    """Return the folder of an array's index parts."""
    return root / INDEX_GROUP / str(grid)


def manifest_path(root: Path) -> Path:
    """Return the file of the manifest."""
    return root / INDEX_GROUP / "manifest.parquet"
