"""Where every array, shard, index part and chunk of a store lies; `docs/store.md` says the same in words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import ArrayLayout, Grid

#: The newest version that this package reads and writes.
SPEC_VERSION = 2

#: The newest version of index parts: from 2 on they name their store and slot, rows and chunks.
PART_VERSION = 2

#: Most slots and videos of a store, and bytes of a shard: more is not believed, whatever a file says.
MOST_SLOTS = 2**28
MOST_VIDEOS = 2**24
MOST_SHARD_BYTES = 2**40

#: How tokens can lie in an array; the first of each is spec version 1, the others need version 2.
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "int8": np.dtype("i1")}
CODECS = ("none", "zstd")

#: Inner chunks start at multiples of this many bytes, so that reads land aligned in memory.
ALIGNMENT = 64

CHECKSUM_BYTES = 4

#: Offset and size of an inner chunk that is not in its shard (Zarr's sharding codec).
MISSING = 2**64 - 1

ROOT_METADATA = "zarr.json"
TOKENS_GROUP = "tokens"
INDEX_GROUP = "index"
PART_SUFFIX = ".parquet"

#: The videos of a store, beside the index parts.
MANIFEST = f"{INDEX_GROUP}/manifest.parquet"


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

    @property
    def shard_name(self) -> str:
        """Name of the shard file in the store: the Zarr chunk (shard, 0, 0, 0)."""
        return f"{array_folder(self.layout.grid)}/c.{self.shard}.0.0.0"

    @property
    def part_name(self) -> str:
        """Name of the slot's index part, its commit mark."""
        return f"{part_folder(self.layout.grid)}/{self.shard:06d}{PART_SUFFIX}"

    @property
    def title(self) -> str:
        """What messages call the slot."""
        return f"slot {self.index} (shard {self.shard} of array {self.layout.grid})"


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


def check_arrays(arrays: Sequence[ArrayLayout]) -> None:
    """Raise `ValueError` for layouts that cannot make a store, `UsageError` for unknown dtypes and codecs."""
    if not arrays or len({layout.grid for layout in arrays}) < len(arrays):
        raise ValueError("a store has arrays, each of another grid")
    for layout in arrays:
        spec_version(layout.dtype, layout.codec)
        numbers = (layout.n_encodings, layout.slot_encodings, layout.chunk_encodings, layout.n_channels)
        if any(type(number) is not int or number < 1 for number in (*numbers, *astuple(layout.grid))):
            raise ValueError(f"array {layout.grid}: a number is not positive and whole")
        if layout.slot_encodings % layout.chunk_encodings or layout.n_encodings % layout.chunk_encodings:
            raise ValueError(f"array {layout.grid}: slots and array must hold whole chunks")
        if layout.slot_encodings * layout.encoding_bytes > MOST_SHARD_BYTES:
            raise ValueError(f"array {layout.grid}: a shard has more than {MOST_SHARD_BYTES} bytes")
    if sum(layout.n_slots for layout in arrays) > MOST_SLOTS:
        raise ValueError(f"it has more than {MOST_SLOTS} slots")


def chunk_bytes(layout: ArrayLayout) -> int:
    """Return the bytes of one inner chunk, checksum not counted."""
    return layout.chunk_encodings * layout.encoding_bytes


def chunks_per_shard(layout: ArrayLayout) -> int:
    """Return the number of entries of a shard's index, part-filled shards included."""
    return layout.slot_encodings // layout.chunk_encodings


def array_folder(grid: Grid) -> str:
    """Return the folder of a Zarr array in the store."""
    return f"{TOKENS_GROUP}/{grid}"


def part_folder(grid: Grid) -> str:
    """Return the folder of an array's index parts in the store."""
    return f"{INDEX_GROUP}/{grid}"


def spec_version(dtype: str = "float16", codec: str = "none") -> int:
    """Return the version of the format that `dtype` and `codec` need; raise `UsageError` for unknown ones."""
    if dtype not in DTYPES:
        raise UsageError("a store cannot hold this dtype", wanted=" or ".join(DTYPES), found=dtype)
    if codec not in CODECS:
        raise UsageError("unknown codec", wanted=" or ".join(CODECS), found=codec)
    return 1 if (dtype, codec) == ("float16", "none") else 2
