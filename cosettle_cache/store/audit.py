"""Auditing a shard: every byte of it compared with what the format and its index part say it must be.

In come an open shard and its index part; out goes the whole file piece by piece, with what is wrong in each,
so that whoever copies it never passes on what has not been checked. Memory is bounded by the size of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from awscrt.checksums import crc32c
from jaxtyping import Bool, UInt64

from cosettle_cache.core.types import ArrayLayout
from cosettle_cache.store._shards import (
    ShardLostError,
    checksum_bytes,
    decoded_bytes,
    index_bytes,
    padding_after,
    read_entries,
)
from cosettle_cache.store.format import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    MISSING,
    BytesError,
    chunk_bytes,
    chunks_per_shard,
)
from cosettle_cache.store.parts import Part
from cosettle_cache.store.storage import RangeFile

#: Bytes read at once; a larger chunk is read whole.
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with inner chunk number `chunk` of a shard."""

    chunk: int
    reason: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of a shard, and what is wrong in them."""

    data: memoryview
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a chunk lies: `size` counts its checksum, `stop` is where the next chunk begins."""

    chunk: int
    start: int
    size: int
    stop: int


def audit_shard(file: RangeFile, layout: ArrayLayout, part: Part) -> Iterator[Piece]:
    """Yield all pieces of a shard in order.

    Raises `ShardLostError` when nothing of it can be trusted: another size than the part says, an index that
    is damaged or not what the part implies, or at the end chunks that are not those of the part.
    """
    present = present_chunks(layout, part)
    entries = _check_entries(file, layout, part, present)
    checksum = 0
    for extents in _batches(_extents(entries, present)):
        data = _read(file, extents[0].start, extents[-1].stop)
        views = [_cut(data, extent, extents[0].start) for extent in extents]
        faults = [_find_fault(layout, extent, view) for extent, view in zip(extents, views, strict=True)]
        yield Piece(data, tuple(fault for fault in faults if fault is not None))
        for extent, view in zip(extents, views, strict=True):
            checksum = int(crc32c(view[extent.size - CHECKSUM_BYTES : extent.size], checksum))
    if part.shard.chunks_checksum not in (None, checksum):
        raise ShardLostError("its chunks are not those that its index part commits")
    index = entries.astype("<u8").tobytes()
    yield Piece(memoryview(index + checksum_bytes(index)), ())


def present_chunks(layout: ArrayLayout, part: Part) -> Bool[np.ndarray, " chunk"]:
    """Return which chunks of a shard the index part says are there."""
    is_present = np.asarray(part.table["error"].is_null())[:: layout.chunk_encodings]
    present = np.zeros(chunks_per_shard(layout), bool)
    present[: len(is_present)] = is_present
    return present


def _check_entries(
    file: RangeFile, layout: ArrayLayout, part: Part, present: Bool[np.ndarray, " chunk"]
) -> UInt64[np.ndarray, "chunk 2"]:
    """Return the shard's index, which the format determines but for the sizes of compressed chunks."""
    n_bytes = file.size()
    if n_bytes != part.shard.n_bytes:
        raise ShardLostError(f"it has {n_bytes} bytes, not {part.shard.n_bytes}")
    entries = read_entries(file, layout)
    offsets, sizes = entries[present].T
    raw_size = chunk_bytes(layout) + CHECKSUM_BYTES
    plausible = sizes == raw_size if layout.codec == "none" else sizes <= n_bytes
    if (entries[~present] != MISSING).any() or not plausible.all():
        raise ShardLostError("its index lists other chunks than its index part")
    strides = sizes.astype(np.int64) + -sizes.astype(np.int64) % ALIGNMENT
    starts = np.concatenate([[0], np.cumsum(strides)])
    if (offsets != starts[:-1]).any() or starts[-1] + index_bytes(layout) != n_bytes:
        raise ShardLostError("its index does not put the chunks where the format does")
    return entries


def _extents(entries: UInt64[np.ndarray, "chunk 2"], present: Bool[np.ndarray, " chunk"]) -> list[_Extent]:
    chunks = np.flatnonzero(present).tolist()
    return [
        _Extent(chunk, start, size, start + size + padding_after(size))
        for chunk, (start, size) in zip(chunks, entries[present].tolist(), strict=True)
    ]


def _batches(extents: list[_Extent]) -> Iterator[list[_Extent]]:
    """Group neighbours to pieces of `PIECE_BYTES`, at least one chunk each."""
    batch: list[_Extent] = []
    for extent in extents:
        if batch and extent.stop - batch[0].start > PIECE_BYTES:
            yield batch
            batch = []
        batch.append(extent)
    if batch:
        yield batch


def _read(file: RangeFile, start: int, stop: int) -> memoryview:
    data = np.empty(stop - start, np.uint8).data
    try:
        n_read = file.read([data], start)
    except OSError as error:
        raise ShardLostError(f"it cannot be read ({error.strerror})") from error
    if n_read < len(data):
        raise ShardLostError("it ends too early")
    return data


def _cut(data: memoryview, extent: _Extent, origin: int) -> memoryview:
    return data[extent.start - origin : extent.stop - origin]


def _find_fault(layout: ArrayLayout, extent: _Extent, view: memoryview) -> Fault | None:
    chunk, checksum = view[: extent.size - CHECKSUM_BYTES], view[extent.size - CHECKSUM_BYTES : extent.size]
    if checksum_bytes(chunk) != checksum:
        return Fault(extent.chunk, "the checksum of a chunk does not match")
    if any(view[extent.size :]):
        return Fault(extent.chunk, "the bytes after a chunk are not zero")
    if layout.codec == "none":
        return None
    try:
        n_bytes = decoded_bytes(chunk)
    except BytesError as error:
        return Fault(extent.chunk, str(error))
    return (
        None if n_bytes == chunk_bytes(layout) else Fault(extent.chunk, f"a chunk decodes to {n_bytes} bytes")
    )
