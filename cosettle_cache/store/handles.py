"""Open shards: a bounded number of files and parsed indexes, the threads that read, their scratch memory.

Everything here belongs to one process: a process that was forked starts with none of it.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, local
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float16, UInt8, UInt64

from cosettle_cache.store._shards import ShardReader
from cosettle_cache.store.format import ALIGNMENT, SlotPlace
from cosettle_cache.store.storage import ReadStorage

#: Shards kept open: a file descriptor each, so at most a quarter of what the process may have.
MAX_OPEN_SHARDS = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

#: Locks that shards share while they are opened.
_OPENING_LOCKS = 64

#: Parsed indexes kept of shards that are not open any more: 16 bytes per chunk, a few kB each.
MAX_INDEXES = 8192

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The `capacity` values used last, by number; not safe to use from several threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[int, Value] = OrderedDict()

    def get(self, key: int) -> Value | None:
        """Return the value of `key`, which is then the last to go."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: int, value: Value) -> None:
        """Keep a value; the one unused for longest goes when there are too many."""
        self._values[key] = value
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)

    def drop(self, key: int) -> None:
        """Forget a value, if it is there."""
        self._values.pop(key, None)


@dataclass(slots=True)
class _Held:
    """What one process holds."""

    process: int
    readers: Recent[ShardReader] = field(default_factory=lambda: Recent(MAX_OPEN_SHARDS))
    indexes: Recent[UInt64[np.ndarray, "chunk 2"]] = field(default_factory=lambda: Recent(MAX_INDEXES))
    lock: Lock = field(default_factory=Lock)
    opening: Sequence[Lock] = field(default_factory=lambda: tuple(Lock() for _ in range(_OPENING_LOCKS)))
    scratch: local = field(default_factory=local)
    pool: ThreadPoolExecutor | None = None
    ring: Float16[np.ndarray, " value"] | None = None


class OpenShards:
    """Shard readers by slot, shared by the threads of a process, made anew in a forked one."""

    def __init__(self, storage: ReadStorage) -> None:
        self._storage = storage
        self._state = _Held(os.getpid())

    def reader(self, place: SlotPlace) -> ShardReader:
        """Return the reader of a slot's shard; raises `OSError`, or `BytesError` when it is damaged."""
        held = self._held
        with held.lock:
            reader = held.readers.get(place.index)
        return reader or self._open(held, place)

    def forget(self, place: SlotPlace) -> None:
        """Close a shard that may have been written again, or of which a copy may be damaged."""
        held = self._held
        with held.lock:
            held.readers.drop(place.index)
            held.indexes.drop(place.index)
        self._storage.forget(place.shard_name)

    def pool(self, n_threads: int) -> ThreadPoolExecutor:
        """Return the threads that read."""
        held = self._held
        with held.lock:
            if held.pool is None:
                held.pool = ThreadPoolExecutor(n_threads, "read")
            return held.pool

    def scratch(self, n_bytes: int) -> UInt8[np.ndarray, " byte"]:
        """Return memory of this thread, kept from call to call: fresh memory costs more than the read."""
        memory = self._held.scratch
        if getattr(memory, "bytes", None) is None or len(memory.bytes) < n_bytes:
            memory.bytes = np.empty(n_bytes, np.uint8)
        found: UInt8[np.ndarray, " byte"] = memory.bytes[:n_bytes]
        return found

    @contextmanager
    def ring(self, n_rows: int, n_values: int) -> Iterator[Float16[np.ndarray, "row value"]]:
        """Lend memory that is kept for the next stream; a stream that overlaps with another has its own."""
        held, n_wanted = self._held, n_rows * n_values
        with held.lock:
            ring, held.ring = held.ring, None
        if ring is None or len(ring) < n_wanted:
            ring = _aligned_memory(n_wanted)
        try:
            yield ring[:n_wanted].reshape(n_rows, n_values)
        finally:
            self._held.ring = ring

    def _open(self, held: _Held, place: SlotPlace) -> ShardReader:
        # One thread opens, the others wait: behind a URL that is a request, or a whole shard to fetch.
        with held.opening[place.index % _OPENING_LOCKS]:
            with held.lock:
                reader = held.readers.get(place.index)
                entries = held.indexes.get(place.index)
            if reader is None:
                reader = ShardReader(self._storage.open(place.shard_name), place.layout, entries)
                with held.lock:
                    held.readers.put(place.index, reader)
                    held.indexes.put(place.index, reader.entries)
        return reader

    @property
    def _held(self) -> _Held:
        if self._state.process != os.getpid():
            # The threads of the parent are not here, and its lock may have been held when it forked.
            self._state = _Held(os.getpid())
        return self._state


def _aligned_memory(n_values: int) -> Float16[np.ndarray, " value"]:
    """Return uninitialised memory that starts at a multiple of 64 bytes, where reads are twice as fast."""
    raw = np.empty(2 * n_values + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + 2 * n_values].view(np.float16)


def each(pool: ThreadPoolExecutor, task: Callable[[int], None], n: int) -> None:
    """Run `task(0)` to `task(n - 1)`, the last in this thread; raise the first error when all have ended."""
    futures = [pool.submit(task, number) for number in range(n - 1)]
    try:
        task(n - 1)
    finally:
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def drained(items: deque[Value]) -> Iterator[Value]:
    """Yield items, first to last, until other threads and this one have taken all."""
    while True:
        try:
            yield items.popleft()
        except IndexError:
            return
