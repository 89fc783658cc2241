"""Shards: the bytes of one slot in Zarr's sharding format, written whole and read chunk by chunk.

In come tokens and which chunks exist; out go the pieces of the file. Reading parses a shard's index once and
then fetches each chunk with one system call straight into the caller's memory, checksum verified.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c
from jaxtyping import Bool, Float16, UInt8

from cosettle_cache.files import Buffer
from cosettle_cache.store.layout import (
    CHECKSUM_BYTES,
    MISSING,
    BytesError,
    chunk_bytes,
    chunk_stride,
    chunks_per_shard,
)
from cosettle_cache.types import ArrayLayout

_ENTRY = np.dtype("<u8")


class ChunkMissingError(BytesError):
    """The shard's index says that the chunk was left out."""


class ShardLostError(BytesError):
    """The shard file is missing, truncated, or its index is damaged: nothing in it can be read."""


def shard_size(layout: ArrayLayout, n_present: int) -> int:
    """Return the bytes of a shard file with `n_present` chunks."""
    return n_present * chunk_stride(layout) + _index_bytes(layout)


def shard_pieces(
    layout: ArrayLayout,
    tokens: Float16[np.ndarray, "encoding row col channel"],
    present: Bool[np.ndarray, " chunk"],
) -> Iterator[Buffer]:
    """Yield the pieces of a shard file; chunks that are not `present` take no space."""
    padding = bytes(chunk_stride(layout) - chunk_bytes(layout) - CHECKSUM_BYTES)
    for number in np.flatnonzero(present):
        first = number * layout.chunk_encodings
        chunk = tokens[first : first + layout.chunk_encodings].data.cast("B")
        yield chunk
        yield _checksum(chunk) + padding
    index = _encode_index(layout, present)
    yield index
    yield _checksum(index)


class ShardReader:
    """One open shard file; safe to use from several threads, closed when the last of them lets go."""

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self._chunk_bytes = chunk_bytes(layout)
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._entries = _read_index(self._descriptor, layout)
        except OSError as error:
            raise ShardLostError(f"its shard cannot be read ({error.strerror})") from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_chunk(self, number: int, out: UInt8[np.ndarray, " byte"]) -> None:
        """Fill `out` with chunk `number`; raise `ChunkMissingError`, or `BytesError` when it is damaged."""
        offset, size = self._entries[number]
        if offset == MISSING and size == MISSING:
            raise ChunkMissingError("a chunk is missing from its shard")
        if size != self._chunk_bytes + CHECKSUM_BYTES:
            raise BytesError(f"a chunk has {size} bytes")
        checksum = bytearray(CHECKSUM_BYTES)
        try:
            _read_fully(self._descriptor, [out.data, memoryview(checksum)], offset)
        except OSError as error:
            raise BytesError(f"a chunk cannot be read ({error.strerror})") from error
        if _checksum(out.data) != checksum:
            raise BytesError("the checksum of a chunk does not match")


def _read_index(descriptor: int, layout: ArrayLayout) -> list[tuple[int, int]]:
    size = _index_bytes(layout)
    start = os.fstat(descriptor).st_size - size
    if start < 0:
        raise ShardLostError("its shard is truncated")
    data = bytearray(size)
    _read_fully(descriptor, [memoryview(data)], start)
    index, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if _checksum(index) != checksum:
        raise ShardLostError("the checksum of its shard's index does not match")
    return [(offset, nbytes) for offset, nbytes in np.frombuffer(index, _ENTRY).reshape(-1, 2).tolist()]


def _encode_index(layout: ArrayLayout, present: Bool[np.ndarray, " chunk"]) -> bytes:
    index = np.full((chunks_per_shard(layout), 2), MISSING, _ENTRY)
    numbers = np.flatnonzero(present)
    index[numbers, 0] = np.arange(len(numbers)) * chunk_stride(layout)
    index[numbers, 1] = chunk_bytes(layout) + CHECKSUM_BYTES
    return index.tobytes()


def _index_bytes(layout: ArrayLayout) -> int:
    return chunks_per_shard(layout) * 2 * _ENTRY.itemsize + CHECKSUM_BYTES


def _checksum(data: Buffer) -> bytes:
    return int(crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def _read_fully(descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    while buffers:
        n_read = os.preadv(descriptor, buffers, offset)
        if n_read == 0:
            raise BytesError("its shard ends too early")
        offset += n_read
        buffers = _unfilled(buffers, n_read)


def _unfilled(buffers: Sequence[memoryview], n_filled: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        done = min(n_filled, len(buffer))
        n_filled -= done
        if done < len(buffer):
            rest.append(buffer[done:])
    return rest
