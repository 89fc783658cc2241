"""What Zarr reads a store behind a URL through: our own reads, with their errors, retries and copies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore, WrapperStore

from cosettle_cache.store.storage import ReadStorage


class ZarrView(WrapperStore[ObjectStore[Any]]):
    """The objects of a storage; metadata comes from the object store, chunks through the storage's files."""

    def __init__(self, store: ObjectStore[Any], storage: ReadStorage) -> None:
        super().__init__(store)
        self._storage = storage

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return bytes of an object, None when there is none."""
        try:
            data = await asyncio.to_thread(_read, self._storage, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **_: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Yield `(number, bytes)` of each range; newer Zarrs ask so, and would pass by `get`."""
        for number, byte_range in enumerate(byte_ranges):
            found = await self.get(key, prototype, byte_range)
            if found is None:
                raise FileNotFoundError(key)
            yield [(number, found)]


def _read(storage: ReadStorage, key: str, byte_range: ByteRequest | None) -> bytes:
    if byte_range is None:
        return storage.read(key)
    if isinstance(byte_range, SuffixByteRequest):
        return storage.open(key).read_tail(byte_range.suffix)
    if not isinstance(byte_range, RangeByteRequest):
        raise NotImplementedError(f"Zarr asks for {byte_range}")
    data = bytearray(byte_range.end - byte_range.start)
    n_read = storage.open(key).read([memoryview(data)], byte_range.start)
    return bytes(data[:n_read])
