"""Chunks of committed slots: found through the index, read from shards kept open, damage named.

In come an array and chunk numbers; out go tokens in the caller's memory, or the error that says which slot
and encodings are damaged or absent. Raw chunks are read directly, all others through Zarr.
"""

from __future__ import annotations

import math
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from threading import Lock, local
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float16, Int64, Shaped, UInt8, UInt64

from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.types import ArrayLayout, Grid
from cosettle_cache.store._int8 import dequantize
from cosettle_cache.store._local import ReadStorage
from cosettle_cache.store._shards import ChunkMissingError, ShardLostError, ShardReader
from cosettle_cache.store.format import (
    ALIGNMENT,
    BytesError,
    SlotPlace,
    SlotTable,
    array_folder,
    chunk_bytes,
    chunks_per_shard,
)
from cosettle_cache.store.index import (
    OUTLINE,
    SCHEMA,
    Part,
    committed_shards,
    describe_rows,
    outline,
    read_part,
)

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


def _aligned_memory(n_rows: int, n_values: int) -> Float16[np.ndarray, "row value"]:
    """Return uninitialised memory that starts at a multiple of 64 bytes, where reads are twice as fast."""
    raw = np.empty(2 * n_rows * n_values + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + 2 * n_rows * n_values].view(np.float16).reshape(n_rows, n_values)


Tokens = Float16[np.ndarray, " value"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive chunks of one shard from number `first` of the array on, and where their tokens go."""

    first: int
    outs: list[Tokens]


def neighbours(chunks: Sequence[int], *, longest: int, per_shard: int) -> Iterator[list[int]]:
    """Yield the chunks in their order, up to `longest` together where they follow each other in a shard."""
    group: list[int] = []
    for chunk in chunks:
        if group and (chunk != group[-1] + 1 or chunk % per_shard == 0 or len(group) == longest):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


class ZarrArrays:
    """The arrays of one store, opened when first read; not to be used across a fork."""

    def __init__(self, storage: ReadStorage) -> None:
        self._storage = storage
        self._arrays: dict[Grid, Any] = {}

    def read(self, layout: ArrayLayout, rows: slice) -> Shaped[np.ndarray, "encoding row col channel"]:
        """Return rows of an array; raise `BytesError` when Zarr cannot decode them."""
        array = self._arrays.get(layout.grid)
        if array is None:
            array = self._arrays[layout.grid] = self._open(layout.grid)
        try:
            return np.asarray(array[rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise BytesError(f"a chunk cannot be decoded ({error})") from error

    def _open(self, grid: Grid) -> Any:
        import zarr

        try:
            return zarr.open_array(self._storage.zarr_store(), path=array_folder(grid), mode="r")
        except Exception as error:  # on damaged metadata Zarr fails in any way
            raise BytesError(f"Zarr cannot open its array ({error})") from error


#: Streaming from a local disk: bytes that are read in one go, at least a chunk.
_NEAR_BYTES = 2 * 2**20


class ChunkSource:
    """The chunks of the slots that were committed when it was made; any number of threads may share it."""

    def __init__(self, storage: ReadStorage, arrays: tuple[ArrayLayout, ...]) -> None:
        self.slots = SlotTable(arrays)
        self.committed = _committed_slots(storage, self.slots)
        self._storage = storage
        self._shards = OpenShards(storage)
        self._zarr = ZarrArrays(storage)
        self._firsts = self.slots.firsts
        self.n_readers = storage.n_readers

    def read_many(
        self, array: int, chunks: Int64[np.ndarray, " chunk"], out: Float16[np.ndarray, "chunk value"]
    ) -> None:
        """Fill the rows of `out` with the tokens of `chunks` of array number `array`, several at a time.

        Raises `InputError` for a chunk that the store does not hold, `DamagedStoreError` for one that it
        should and cannot give.
        """
        parts = self._shares(array, chunks.tolist(), list(out))
        if self._storage.local is not None and len(parts) > 1:
            # One thread asks the disk for all of them before any is waited for: two get in each other's way.
            for part in parts:
                self._prefetch(array, part)
        self._share_out(parts, partial(self._read_waiting, array))

    def will_need(self, slots: Sequence[int] | Int64[np.ndarray, " n"]) -> None:
        """Let shards that are read soon come into the page cache, or the shard cache, in the background.

        Nothing is done where there is no room for them twice: what is in use and what comes next must stay.
        """
        places = [self.slots.place(int(index)) for index in slots]
        n_bytes = sum(place.layout.slot_encodings * place.layout.encoding_bytes for place in places)
        if 2 * n_bytes <= self._storage.room:
            self._shards.pool(self.n_readers).submit(self._fetch_shards, places)

    def _fetch_shards(self, places: Sequence[SlotPlace]) -> None:
        for place in places:
            with suppress(BytesError, OSError):  # told to the one who asks for the tokens
                self._shards.reader(place).will_need()

    def stream(self, array: int, chunks: Int64[np.ndarray, " chunk"]) -> Iterator[Tokens]:
        """Yield the tokens of `chunks` in order, read ahead by other threads; raises what `read_many` does.

        On a local disk one thread reads: the kernel reads ahead of a lone reader. Elsewhere a read is a round
        trip, or a codec's work, and many do it.
        """
        layout = self.slots.arrays[array]
        is_near = self._storage.local is not None and layout.codec == "none"
        longest = max(1, _NEAR_BYTES // chunk_bytes(layout)) if is_near else self._longest(array)
        groups = neighbours(chunks.tolist(), longest=longest, per_shard=chunks_per_shard(layout))

        def read(group: Sequence[int]) -> Sequence[Tokens]:
            outs = list(_aligned_memory(len(group), flat_values(layout)))
            self._read_waiting(array, Stretch(group[0], outs))
            return outs

        n_threads = 1 if is_near else self.n_readers
        with closing(map_ahead(read, groups, n_threads, n_ahead=max(2, n_threads))) as filled:
            for outs in filled:
                yield from outs

    def _longest(self, array: int) -> int:
        """Return how many neighbouring chunks are worth one read."""
        return max(1, self._storage.stretch_bytes // chunk_bytes(self.slots.arrays[array]))

    def read_index(self) -> pa.Table:
        """Return the rows of all index parts, in array and row order."""
        return self._gather(lambda place: self.read_part(place).table, SCHEMA)

    def read_outline(self) -> pa.Table:
        """Return the outline of all index parts, in array and row order; see `parts.outline`."""
        return self._gather(lambda place: outline(self.read_part(place, OUTLINE.names).table), OUTLINE)

    def _gather(self, read: Callable[[SlotPlace], pa.Table], schema: pa.Schema) -> pa.Table:
        places = [self.slots.place(int(index)) for index in np.flatnonzero(self.committed)]
        with ThreadPoolExecutor(self._storage.n_readers, "index") as pool:
            tables = [table.replace_schema_metadata(None) for table in pool.map(read, places)]
        return pa.concat_tables([schema.empty_table(), *tables])

    def read_part(self, place: SlotPlace, columns: Sequence[str] | None = None) -> Part:
        """Return the index part of a slot; raise `DamagedStoreError` when it is unreadable."""
        try:
            return read_part(self._storage, place, columns)
        except BytesError as fault:
            rows = f"rows {place.rows.start} to {place.rows.stop - 1}"
            raise DamagedStoreError(
                f"the index part of {place.title} is damaged: {fault}",
                details=[f"{self._storage.path}/{place.part_name}: {rows} of {place.layout.grid}"],
                hint=self._repair_hint,
            ) from fault

    def _shares(self, array: int, chunks: list[int], outs: list[Tokens]) -> list[Stretch]:
        """Return the chunks as stretches, shorter ones rather than idle readers."""
        longest, per_shard = self._longest(array), chunks_per_shard(self.slots.arrays[array])
        # Below a quarter of a stretch a request is mostly waiting, and fewer of them are faster.
        fair = min(longest, max(-(-len(chunks) // self.n_readers), longest // 4))
        order = range(len(chunks)) if longest == 1 else sorted(range(len(chunks)), key=chunks.__getitem__)
        ordered = iter([outs[place] for place in order])
        groups = neighbours([chunks[place] for place in order], longest=fair, per_shard=per_shard)
        return [Stretch(group[0], list(islice(ordered, len(group)))) for group in groups]

    def _share_out(self, parts: Sequence[Stretch], read: Callable[[Stretch], None]) -> None:
        """Let all readers, this thread among them, take and read parts until none is left."""
        todo = iter(parts)

        def work() -> None:
            for part in todo:
                read(part)

        n_others = min(self.n_readers, len(parts)) - 1
        others = [self._shards.pool(self.n_readers).submit(work) for _ in range(n_others)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()

    def _prefetch(self, array: int, stretch: Stretch) -> None:
        """Let the disk fetch what will be waited for."""
        place, number = self._locate(array, stretch.first)
        with suppress(BytesError, OSError):
            self._shards.reader(place).prefetch(number, len(stretch.outs))

    def _read_waiting(self, array: int, part: Stretch) -> None:
        place, number = self._locate(array, part.first)
        try:
            self._fetch(place, number, part.outs)
        except BytesError:
            # The slot may have been written again since its shard was opened, or a copy of it may be damaged.
            self._shards.forget(place)
            for offset, out in enumerate(part.outs):
                try:
                    self._fetch(place, number + offset, [out])
                except BytesError as fault:
                    raise self._explain(place, number + offset, fault) from fault

    def _fetch(self, place: SlotPlace, first: int, outs: Sequence[Tokens]) -> None:
        """Fill `outs` with chunks of a shard, from `first` on."""
        try:
            reader = self._shards.reader(place)
        except OSError as error:
            raise ShardLostError(f"its shard cannot be read ({error.strerror or 'absent'})") from error
        layout = place.layout
        if layout.codec != "none":
            for number, out in enumerate(outs, first):
                reader.check_present(number)
                self._fetch_decoded(place, number, out)
        elif layout.dtype == "float16":
            reader.read_chunks(first, [out.view(np.uint8) for out in outs])
        else:
            raw = self._shards.scratch(len(outs) * chunk_bytes(layout)).reshape(len(outs), -1)
            reader.read_chunks(first, list(raw))
            for stored, out in zip(raw, outs, strict=True):
                _expand(layout, stored, out)

    def _fetch_decoded(self, place: SlotPlace, number: int, out: Tokens) -> None:
        layout = place.layout
        start = place.rows.start + number * layout.chunk_encodings
        stored = self._zarr.read(layout, slice(start, start + layout.chunk_encodings))
        if layout.dtype == "float16":
            out[:] = stored.ravel()
        else:
            _expand(layout, stored.ravel().view(np.uint8), out)

    def _locate(self, array: int, chunk: int) -> tuple[SlotPlace, int]:
        layout = self.slots.arrays[array]
        n_chunks = layout.n_encodings // layout.chunk_encodings
        if not 0 <= chunk < n_chunks:
            raise InputError(
                f"{self._storage.path} has no chunk {chunk} in array {layout.grid}",
                wanted=f"0 to {n_chunks - 1}",
            )
        shard, number = divmod(chunk, chunks_per_shard(layout))
        place = SlotPlace(self._firsts[array] + shard, layout, shard)
        if not self.committed[place.index]:
            raise InputError(
                f"chunk {chunk} of array {layout.grid} is in {place.title}, which is not extracted yet",
                hint="run the same extract command again; it goes on with the slots that are missing",
            )
        return place, number

    def _explain(self, place: SlotPlace, number: int, fault: BytesError) -> InputError | DamagedStoreError:
        """Return the error for a chunk that could not be read: absent on purpose, or damaged."""
        table = self.read_part(place).table
        n_rows = place.layout.chunk_encodings
        chunk = table.slice(number * n_rows, n_rows)
        if isinstance(fault, ChunkMissingError) and chunk["error"].null_count == 0:
            (line, *_) = describe_rows(chunk)
            return InputError(f"{self._storage.path} does not hold {line}: {chunk['error'][0]}")
        if isinstance(fault, ShardLostError):
            chunk = table.filter(pc.is_null(table["error"]))
        return DamagedStoreError(
            f"{place.title} of {self._storage.path} is damaged: {fault}",
            details=describe_rows(chunk),
            hint=self._repair_hint,
        )

    @property
    def _repair_hint(self) -> str:
        return (
            f"cosettle-cache store repair {self._storage.path}, then the same extract command again: "
            "it makes the damaged slots anew"
        )


def _expand(layout: ArrayLayout, raw: UInt8[np.ndarray, " byte"], out: Tokens) -> None:
    dequantize(raw.view(np.int8).reshape(-1, layout.stored_channels), out.reshape(-1, layout.n_channels))


def _committed_slots(storage: ReadStorage, slots: SlotTable) -> Bool[np.ndarray, " slot"]:
    committed = np.zeros(len(slots), bool)
    for first, layout in zip(slots.firsts, slots.arrays, strict=False):
        committed[first : first + layout.n_slots][committed_shards(storage, layout)] = True
    return committed


def flat_values(layout: ArrayLayout) -> int:
    """Return the number of values in a chunk's tokens."""
    return layout.chunk_encodings * layout.grid.n_tokens * layout.n_channels


def flat_rows(out: Float16[np.ndarray, "n ..."]) -> Float16[np.ndarray, "n value"]:
    """Return a view of contiguous tokens with one row of values per chunk."""
    return out.reshape(len(out), math.prod(out.shape[1:]))
