"""Shards: the bytes of one slot in Zarr's sharding format, written whole and read chunk by chunk.

Reading parses a shard's index once and then fetches neighbouring chunks with one request, raw ones straight
into the caller's memory, checksums verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from awscrt.checksums import crc32c
from jaxtyping import Bool, Float16, UInt8, UInt64

from cosettle_cache.core.files import Buffer
from cosettle_cache.core.types import ArrayLayout
from cosettle_cache.store._int8 import quantize
from cosettle_cache.store.format import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    MISSING,
    MOST_SHARD_BYTES,
    BytesError,
    chunk_bytes,
    chunks_per_shard,
)
from cosettle_cache.store.remote import RangeFile

_ENTRY = np.dtype("<u8")

Size = TypeVar("Size", int, np.ndarray)

#: Higher levels gain next to nothing on tokens, whose low bytes are noise.
ZSTD_LEVEL = 1


class ChunkMissingError(BytesError):
    """The shard's index says that the chunk was left out."""


class ShardLostError(BytesError):
    """The shard file is missing, truncated, or its index is damaged: nothing in it can be read."""


class ShardEncoder:
    """The pieces of a shard file, made while they are asked for; chunks not `present` take no space.

    `n_bytes`, the chunks' `checksums` (4 bytes each, zeros for one that is not there) and `chunks_checksum`
    (CRC-32C of the checksums of those that are there) are known after the last.
    """

    def __init__(
        self,
        layout: ArrayLayout,
        tokens: Float16[np.ndarray, "encoding row col channel"],
        present: Bool[np.ndarray, " chunk"],
    ) -> None:
        self.n_bytes = 0
        self.chunks_checksum = 0
        self.checksums = bytearray(CHECKSUM_BYTES * len(present))
        self._layout, self._tokens, self._present = layout, tokens, present

    def __iter__(self) -> Iterator[Buffer]:
        entries = np.full((chunks_per_shard(self._layout), 2), MISSING, _ENTRY)
        for number in np.flatnonzero(self._present):
            chunk = self._encode(int(number))
            checksum = checksum_bytes(chunk)
            size = len(chunk) + CHECKSUM_BYTES
            entries[number] = self.n_bytes, size
            self.chunks_checksum = int(crc32c(checksum, self.chunks_checksum))
            self.checksums[CHECKSUM_BYTES * number : CHECKSUM_BYTES * (number + 1)] = checksum
            self.n_bytes += size + padding_after(size)
            yield chunk
            yield checksum + bytes(padding_after(size))
        index = entries.tobytes()
        self.n_bytes += len(index) + CHECKSUM_BYTES
        yield index
        yield checksum_bytes(index)

    def _encode(self, number: int) -> Buffer:
        first = number * self._layout.chunk_encodings
        tokens = self._tokens[first : first + self._layout.chunk_encodings]
        stored = quantize(tokens) if self._layout.dtype == "int8" else tokens
        raw: Buffer = np.ascontiguousarray(stored).data.cast("B")
        if self._layout.codec == "zstd":
            from numcodecs import Zstd

            raw = Zstd(level=ZSTD_LEVEL).encode(raw)
        return raw


class ShardReader:
    """One open shard, for several threads; `checksums` are those that its index part commits, if it does."""

    def __init__(
        self,
        file: RangeFile,
        layout: ArrayLayout,
        checksums: bytes | None,
        entries: UInt64[np.ndarray, "chunk 2"] | None = None,
    ) -> None:
        self.entries = read_entries(file, layout) if entries is None else entries
        self._file, self._layout, self._checksums = file, layout, checksums
        size = chunk_bytes(layout)
        # Compressed, a chunk grows by less than this (ZSTD_compressBound), whatever an index says.
        self._sizes = (size, size) if layout.codec == "none" else (1, size + size // 128 + 1024)

    def check_present(self, number: int) -> tuple[int, int]:
        """Return offset and size (with checksum) of a chunk; raise `ChunkMissingError` if it is absent."""
        offset, size = self.entries[number].tolist()
        if offset == MISSING and size == MISSING:
            raise ChunkMissingError("a chunk is missing from its shard")
        if not self._sizes[0] <= size - CHECKSUM_BYTES <= self._sizes[1] or offset >= MOST_SHARD_BYTES:
            raise BytesError(f"a chunk has {size} bytes at {offset}")
        return offset, size

    def prefetch(self, first: int, n_chunks: int) -> None:
        """Start fetching chunks that will be read soon, where that is possible."""
        offset, _ = self.check_present(first)
        last, size = self.check_present(first + n_chunks - 1)
        self._file.prefetch(offset, last + size - offset)

    def will_need(self) -> None:
        """Bring the shard into the page cache, where there is one."""
        self._file.prefetch(0, 0)

    def read_chunks(self, first: int, outs: Sequence[UInt8[np.ndarray, " byte"]]) -> None:
        """Fill `outs` with chunks from `first` on, in one read; raise `ChunkMissingError`, `BytesError`."""
        is_raw = self._layout.codec == "none"
        start, _ = self.check_present(first)
        stop, buffers = start, list[memoryview]()
        for number, out in enumerate(outs, first):
            offset, size = self.check_present(number)
            if offset != stop:
                raise BytesError("chunks do not lie side by side")
            chunk = out.data if is_raw else memoryview(bytearray(size - CHECKSUM_BYTES))
            buffers += (chunk, memoryview(bytearray(CHECKSUM_BYTES + padding_after(size))))
            stop += size + padding_after(size)
        # Only the last checksum is read without the zeros behind it.
        buffers[-1] = buffers[-1][:CHECKSUM_BYTES]
        try:
            n_read = self._file.read(buffers, start)
        except OSError as error:
            raise BytesError(f"a chunk cannot be read ({error.strerror})") from error
        if n_read < sum(map(len, buffers)):
            raise BytesError("its shard ends too early")
        wanted, place = self._checksums, CHECKSUM_BYTES * first
        for out, chunk, gap in zip(outs, buffers[::2], buffers[1::2], strict=True):
            checksum = checksum_bytes(chunk)
            if checksum != gap[:CHECKSUM_BYTES]:
                raise BytesError("the checksum of a chunk does not match")
            if wanted is not None and checksum != wanted[place : place + CHECKSUM_BYTES]:
                raise BytesError("a chunk is not the one that its index part commits")
            place += CHECKSUM_BYTES
            if not is_raw:
                out[:] = np.frombuffer(decoded(chunk, self._layout), np.uint8)


def read_entries(file: RangeFile, layout: ArrayLayout) -> UInt64[np.ndarray, "chunk 2"]:
    """Return offset and size of every chunk of a shard; raise `ShardLostError` when its index is damaged."""
    size = chunks_per_shard(layout) * 2 * _ENTRY.itemsize + CHECKSUM_BYTES
    data = file.read_tail(size)
    if len(data) < size:
        raise ShardLostError("its shard is truncated")
    index, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if checksum_bytes(index) != checksum:
        raise ShardLostError("the checksum of its shard's index does not match")
    return np.frombuffer(index, _ENTRY).astype(np.uint64).reshape(-1, 2)


def padding_after(size: Size) -> Size:
    """Return the zero bytes between a chunk of `size` bytes, checksum counted, and the next."""
    return -size % ALIGNMENT


def checksum_bytes(data: Buffer) -> bytes:
    """Return the CRC-32C of `data` as it lies behind it."""
    return int(crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def decoded(chunk: Buffer, layout: ArrayLayout) -> Buffer:
    """Return a compressed chunk as it was; raise `BytesError` when it cannot be decoded, or is no chunk."""
    from numcodecs import Zstd

    n_bytes = _content_bytes(bytes(chunk[:18]))
    if n_bytes != chunk_bytes(layout):
        raise BytesError(f"a chunk decodes to {n_bytes} bytes")
    raw = bytearray(n_bytes)  # the most that it may take, whatever comes after its first frame
    try:
        Zstd().decode(chunk, raw)
    except (RuntimeError, ValueError) as error:
        raise BytesError(f"a chunk cannot be decoded ({error})") from error
    return raw


def _content_bytes(start: bytes) -> int:
    """Return the content size that a zstd frame begins with (RFC 8878, 3.1.1.1), 0 where it has none."""
    flags = start[4] if len(start) > 4 else 0
    is_single = flags >> 5 & 1
    place, length = 6 - is_single + (0, 1, 2, 4)[flags & 3], (is_single, 2, 4, 8)[flags >> 6]
    size = int.from_bytes(start[place : place + length], "little")
    return size + 256 if length == 2 else size
