"""Chunks of committed slots: found through the index, read from shards kept open, damage named.

In come an array and chunk numbers; out go tokens in the caller's memory, or the error that says which slot
and encodings are damaged or absent. Raw chunks are read directly, all others through Zarr.

Open shards: a bounded number of files and parsed indexes, the threads that read, their scratch memory.

Everything here belongs to one process: a process that was forked starts with none of it.

Stretches: neighbouring chunks of one shard that one read fetches, where reads cost a round trip each.

In come chunk numbers and the memory for each; out go groups of them. Nothing is read here.

Streaming: chunks in order, read ahead by other threads while the last one is in use.

Stretches and a function that fills one go in; the stretches come out in order, filled. Near (a local disk)
the consumer reads too, as long as it would only wait; far (an object store) it waits for threads that do.

Chunks that are not raw bytes, read by zarr-python: it undoes the codec and checks the checksum.

In come a storage, an array layout and rows; out go the rows as they are stored. Whether a chunk exists is
never asked of Zarr, which reads what is missing as the fill value.
"""

from __future__ import annotations

import math
import os
import resource
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice, pairwise
from queue import SimpleQueue
from threading import Lock, local
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float16, Int64, Shaped, UInt8, UInt64

from cosettle_cache.core.errors import DamagedStoreError, InputError
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


Tokens = Float16[np.ndarray, " value"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive chunks of one shard from number `first` of the array on, and where their tokens go."""

    first: int
    outs: list[Tokens]


def stretches(
    chunks: Sequence[int], outs: Sequence[Tokens], *, longest: int, per_shard: int
) -> Iterator[Stretch]:
    """Yield the chunks in their order, up to `longest` of them together where they follow each other."""
    first, group = -1, list[Tokens]()
    for chunk, out in zip(chunks, outs, strict=True):
        if group and (chunk != first + len(group) or chunk % per_shard == 0 or len(group) == longest):
            yield Stretch(first, group)
            group = []
        if not group:
            first = chunk
        group.append(out)
    if group:
        yield Stretch(first, group)


def sorted_stretches(
    chunks: Sequence[int], outs: Sequence[Tokens], *, longest: int, per_shard: int
) -> Iterator[Stretch]:
    """Yield the chunks as stretches, in ascending order."""
    order = sorted(range(len(chunks)), key=chunks.__getitem__)
    ordered = [outs[place] for place in order]
    return stretches([chunks[place] for place in order], ordered, longest=longest, per_shard=per_shard)


def runs(chunks: Sequence[int], per_shard: int) -> list[tuple[int, int]]:
    """Return first and number of chunks that follow each other within a shard."""
    bounds = [
        place
        for place, chunk in enumerate(chunks)
        if place == 0 or chunk != chunks[place - 1] + 1 or chunk % per_shard == 0
    ]
    return [(chunks[a], b - a) for a, b in pairwise([*bounds, len(chunks)])]


def shard_starts(parts: Sequence[Stretch], per_shard: int) -> frozenset[int]:
    """Return the numbers of the stretches that lie in another shard than the one before."""
    shards = [part.first // per_shard for part in parts]
    return frozenset(number for number in range(1, len(shards)) if shards[number] != shards[number - 1])


#: Prepares reading of a stretch, in another thread; raises nothing.
Begin = Callable[[Stretch], None]

#: Fills a stretch; says whether that took no waiting for the disk.
Fill = Callable[[Stretch], bool]

#: Stretches that exist at once near: one in use, one that each thread reads, one read ahead.
NEAR_STRETCHES = 4

#: How many stretches before a shard its reading begins.
_BEGIN_AHEAD = 6

#: Bytes that must have been at hand in a row before a second thread reads: more than kernels read ahead.
_STEADY_BYTES = 16 * 2**20


class AtHand:
    """How much was read in a row without waiting for the disk, by all streams of a store.

    One that begins where another ended warm is helped from the start.
    """

    def __init__(self) -> None:
        self._n_bytes = 0

    def note(self, part: Stretch, at_hand: bool) -> None:
        """Count a stretch, or begin anew where it was not at hand."""
        self._n_bytes = self._n_bytes + sum(out.nbytes for out in part.outs) if at_hand else 0

    @property
    def is_steady(self) -> bool:
        """Whether the page cache, not the kernel's read-ahead, holds what comes next."""
        return self._n_bytes >= _STEADY_BYTES


def stream_far(
    parts: Sequence[Stretch], fill: Fill, pool: Executor, n_readers: int
) -> Generator[Stretch, None, None]:
    """Yield the stretches filled; `n_readers` are on their way: a read is a round trip, or a codec's work."""
    pending: deque[tuple[Stretch, Future[bool]]] = deque()
    process = os.getpid()
    try:
        for part in parts:
            pending.append((part, pool.submit(fill, part)))
            if len(pending) > n_readers:
                yield _await(pending)
        while pending:
            yield _await(pending)
    finally:
        if os.getpid() == process:  # a forked child has nobody to wait for
            wait([future for _, future in pending if not future.cancel()])


def _await(pending: deque[tuple[Stretch, Future[bool]]]) -> Stretch:
    part, future = pending.popleft()
    future.result()
    return part


class NearReading:
    """Stretches that the consumer and one helper claim in turn, while their memory is free.

    To wake a thread costs as much as to read a frame from the page cache, so neither waits for the other
    while there is something to read. The helper ends where there is not, and where the disk has to be waited
    for: a lone reader in order is twice as fast there, as the kernel's read-ahead takes it for what it is.

    `begin` is called for stretches whose numbers are in `starts`, a while before they are filled.
    """

    def __init__(
        self,
        parts: Sequence[Stretch],
        starts: Container[int],
        fill: Fill,
        begin: Begin,
        at_hand: AtHand,
        pool: Executor,
    ) -> None:
        self._parts, self._starts, self._fill, self._begin = parts, starts, fill, begin
        self._at_hand, self._n_released = at_hand, 0
        self._start_afresh(pool)

    def stream(self) -> Generator[Stretch, None, None]:
        """Yield the stretches filled, at most `NEAR_STRETCHES` of them in use or ahead at a time."""
        try:
            for number, part in enumerate(self._parts):
                self._finish(number)
                yield part
                # Without the lock, which a forked child may find held for ever; nobody else writes this.
                self._n_released += 1
        finally:
            self._close()

    def _start_afresh(self, pool: Executor | None) -> None:
        self._process, self._pool = os.getpid(), pool
        self._lock = Lock()
        self._helper: Future[None] | None = None
        self._n_claimed = self._n_released
        self._ended: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()
        self._outcomes: dict[int, Exception | None] = {}

    def _finish(self, number: int) -> None:
        """Return when stretch `number` is filled; raise what filling it raised."""
        if self._is_forked:
            # None of the parent's threads is here: what they were reading is read again, by this one.
            self._start_afresh(None)
        self._start_helper()
        while number not in self._outcomes:
            claimed = self._claim() if self._ended.empty() else None
            if claimed is not None:
                self._outcomes[claimed] = self._read(claimed)
            else:
                ended, error = self._ended.get()
                self._outcomes[ended] = error
        error = self._outcomes.pop(number)
        if error is not None:
            raise error

    def _close(self) -> None:
        """Return when nobody fills anything any more."""
        if self._is_forked:
            return
        with self._lock:
            self._n_claimed = len(self._parts)
        if self._helper is not None:
            self._helper.result()

    def _start_helper(self) -> None:
        is_free = self._helper is None or self._helper.done()
        if self._pool and is_free and self._at_hand.is_steady and self._n_claimed < len(self._parts):
            self._helper = self._pool.submit(self._help)

    def _help(self) -> None:
        while self._at_hand.is_steady and (claimed := self._claim()) is not None:
            self._ended.put((claimed, self._read(claimed)))

    @property
    def _is_forked(self) -> bool:
        return self._process != os.getpid()

    def _claim(self) -> int | None:
        """Return the next stretch to read, if there is memory for it."""
        with self._lock:
            if self._n_claimed >= min(len(self._parts), self._n_released + NEAR_STRETCHES):
                return None
            self._n_claimed += 1
            return self._n_claimed - 1

    def _read(self, number: int) -> Exception | None:
        """Fill a stretch; an error is for the moment when the stretch is asked for."""
        self._begin_shards(number)
        part = self._parts[number]
        try:
            self._at_hand.note(part, self._fill(part))
        except Exception as error:
            return error
        return None

    def _begin_shards(self, number: int) -> None:
        """Begin the shard that comes `_BEGIN_AHEAD` stretches later; with the first stretch all up to it."""
        last = number + _BEGIN_AHEAD
        for upcoming in range(last if number else 0, last + 1):
            if self._pool and upcoming in self._starts:
                self._pool.submit(self._begin, self._parts[upcoming])


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


#: Streaming from a local disk: bytes that one thread reads in one go, at least a chunk.
_NEAR_STRETCH_BYTES = 2 * 2**20


class ChunkSource:
    """The chunks of the slots that were committed when it was made; any number of threads may share it."""

    def __init__(self, storage: ReadStorage, arrays: tuple[ArrayLayout, ...]) -> None:
        self.slots = SlotTable(arrays)
        self.committed = _committed_slots(storage, self.slots)
        self._storage = storage
        self._shards = OpenShards(storage)
        self._zarr = ZarrArrays(storage)
        self._firsts = self.slots.firsts
        self._at_hand = AtHand()
        self.n_readers = storage.n_readers

    def read_many(
        self, array: int, chunks: Int64[np.ndarray, " chunk"], out: Float16[np.ndarray, "chunk value"]
    ) -> None:
        """Fill the rows of `out` with the tokens of `chunks` of array number `array`, several at a time.

        Raises `InputError` for a chunk that the store does not hold, `DamagedStoreError` for one that it
        should and cannot give.
        """
        parts = self._shares(array, chunks.tolist(), list(out))
        if self._storage.local is None:
            self._share_out(parts, partial(self._read_waiting, array))
            return
        cold = deque[Stretch]()
        self._share_out(parts, partial(self._read_at_hand, array, cold=cold))
        # One thread asks the disk for all of them before any is waited for: two get in each other's way.
        for part in cold:
            self._prefetch(array, part)
        self._share_out(cold, partial(self._read_waiting, array))

    def warm(self, array: int, chunks: Int64[np.ndarray, " chunk"]) -> None:
        """Bring chunks to this machine, in the order of the disk, if there is room for their shards twice.

        What is in use and what comes next must both stay. Damage is left to the one who reads the chunks.
        """
        layout, pool = self.slots.arrays[array], self._shards.pool(self.n_readers)
        per_shard = chunks_per_shard(layout)
        spans = runs(np.unique(chunks).tolist(), per_shard)
        n_shards = len({first // per_shard for first, _ in spans})
        if not n_shards or 2 * n_shards * per_shard * chunk_bytes(layout) > self._storage.room:
            return
        for (first, n_chunks), (following, _) in pairwise([*spans, spans[-1]]):
            if following // per_shard != first // per_shard:
                pool.submit(self._begin, array, Stretch(following, []))
            place, number = self._locate(array, first)
            with suppress(BytesError, OSError):
                self._shards.reader(place).warm(number, n_chunks)

    def stream(self, array: int, chunks: Int64[np.ndarray, " chunk"]) -> Iterator[Tokens]:
        """Yield the tokens of `chunks` in order, each valid until the next is asked for.

        Their memory is used again, by the next stream too. Raises what `read_many` does.
        """
        layout, pool = self.slots.arrays[array], self._shards.pool(self.n_readers)
        longest, is_near = self._longest_streamed(array), self._is_near(array)
        # A stretch in use, and those that are read meanwhile.
        n_stretches = NEAR_STRETCHES if is_near else self.n_readers + 1
        per_shard, n_values = chunks_per_shard(layout), flat_values(layout)
        fill, begin = partial(self._read_waiting, array), partial(self._begin, array)
        with self._shards.ring(min(len(chunks), n_stretches * longest), n_values) as ring:
            outs = list(islice(cycle(ring), len(chunks)))
            parts = list(stretches(chunks.tolist(), outs, longest=longest, per_shard=per_shard))
            if is_near:
                starts = shard_starts(parts, per_shard)
                filled = NearReading(parts, starts, fill, begin, self._at_hand, pool).stream()
            else:
                filled = stream_far(parts, fill, pool, self.n_readers)
            with closing(filled):
                for part in filled:
                    yield from part.outs

    def _begin(self, array: int, stretch: Stretch) -> None:
        """Open the shard of a stretch that will be read soon, and let the kernel begin to read there.

        A little is read, not hinted at: after hints reads are much slower than the kernel's own read-ahead.
        """
        with suppress(BytesError, OSError):  # told to the one who asks for the tokens
            place, number = self._locate(array, stretch.first)
            self._shards.reader(place).begin(number)

    def _is_near(self, array: int) -> bool:
        """Say whether chunks are raw bytes of a local disk."""
        return self._storage.local is not None and self.slots.arrays[array].codec == "none"

    def _longest_streamed(self, array: int) -> int:
        if not self._is_near(array):
            return self._longest(array)
        return max(1, _NEAR_STRETCH_BYTES // chunk_bytes(self.slots.arrays[array]))

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
        group = stretches if longest == 1 else sorted_stretches
        # Below a quarter of a stretch a request is mostly waiting, and fewer of them are faster.
        fair = max(-(-len(chunks) // self.n_readers), longest // 4)
        return list(group(chunks, outs, longest=min(longest, fair), per_shard=per_shard))

    def _longest(self, array: int) -> int:
        """Return how many neighbouring chunks are worth one read."""
        return max(1, self._storage.stretch_bytes // chunk_bytes(self.slots.arrays[array]))

    def _share_out(self, parts: Iterable[Stretch], read: Callable[[Stretch], object]) -> None:
        """Let all readers take and read stretches until none is left."""
        todo = deque(parts)
        n_threads = min(self.n_readers, len(todo))

        def work(_: int) -> None:
            for part in drained(todo):
                read(part)

        if n_threads > 1:
            each(self._shards.pool(self.n_readers), work, n_threads)
        else:
            work(0)

    def _read_at_hand(self, array: int, stretch: Stretch, cold: deque[Stretch]) -> None:
        """Fill a stretch if the page cache holds it, otherwise add it to `cold`.

        Once there is one, all others are added unseen: to look for bytes that are not there slows the disk.
        """
        place, number = self._locate(array, stretch.first)
        with suppress(BytesError):  # `_read_chunk` finds out which chunk is at fault
            if not cold and self._fetch(place, number, stretch.outs, wait=False):
                return
        cold.append(stretch)

    def _prefetch(self, array: int, stretch: Stretch) -> None:
        """Let the disk fetch what will be waited for."""
        place, number = self._locate(array, stretch.first)
        with suppress(BytesError, OSError):
            self._shards.reader(place).prefetch(number, len(stretch.outs))

    def _read_waiting(self, array: int, stretch: Stretch) -> bool:
        """Fill a stretch; say whether it was at hand."""
        if len(stretch.outs) > 1:
            place, number = self._locate(array, stretch.first)
            with suppress(BytesError):  # `_read_chunk` finds out which chunk is at fault
                return self._fetch(place, number, stretch.outs, wait=True)
        at_hand = [
            self._read_chunk(array, stretch.first + number, out) for number, out in enumerate(stretch.outs)
        ]
        return all(at_hand)

    def _read_chunk(self, array: int, chunk: int, out: Tokens) -> bool:
        """Fill `out` or raise what `read_many` says; say whether the chunk was at hand."""
        place, number = self._locate(array, chunk)
        try:
            return self._fetch(place, number, [out], wait=True)
        except BytesError:
            # The slot may have been written again since its shard was opened, or a copy of it may be damaged.
            self._shards.forget(place)
            try:
                return self._fetch(place, number, [out], wait=True)
            except BytesError as fault:
                raise self._explain(place, number, fault) from fault

    def _fetch(self, place: SlotPlace, first: int, outs: Sequence[Tokens], *, wait: bool) -> bool:
        """Fill `outs` with chunks of a shard, from `first` on, and say whether they were at hand.

        Without `wait` those that are not are left unfilled.
        """
        try:
            reader = self._shards.reader(place)
        except OSError as error:
            raise ShardLostError(f"its shard cannot be read ({error.strerror or 'absent'})") from error
        layout = place.layout
        if layout.codec != "none":
            for number in range(first, first + len(outs)):
                reader.check_present(number)
            for number, out in enumerate(outs if wait else []):
                self._fetch_decoded(place, first + number, out)
            return False
        if layout.dtype == "float16":
            return reader.read_chunks(first, [out.view(np.uint8) for out in outs], wait=wait)
        raw = self._shards.scratch(len(outs) * chunk_bytes(layout)).reshape(len(outs), -1)
        at_hand = reader.read_chunks(first, list(raw), wait=wait)
        if wait or at_hand:
            for stored, out in zip(raw, outs, strict=True):
                _expand(layout, stored, out)
        return at_hand

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
