"""Chunks of committed slots: found through the index, read from shards kept open, damage named."""

from __future__ import annotations

import math
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from hashlib import sha256
from itertools import islice
from threading import Lock, local
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int64, UInt8, UInt64

from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.settings import digest
from cosettle_cache.store._int8 import dequantize
from cosettle_cache.store._shards import ChunkMissingError, ShardLostError, ShardReader
from cosettle_cache.store.format import (
    ALIGNMENT,
    BytesError,
    SlotPlace,
    SlotTable,
    chunk_bytes,
    chunks_per_shard,
)
from cosettle_cache.store.header import Header, repair_hint
from cosettle_cache.store.index import OUTLINE, SCHEMA, committed_shards, outline, read_part, video_rows
from cosettle_cache.store.remote import Storage

#: Shards kept open: a file descriptor each, so at most a quarter of what the process may have.
MAX_OPEN_SHARDS = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

#: Locks that shards share while they are opened.
_OPENING_LOCKS = 64

#: Parsed indexes kept of shards that are not open any more: 16 bytes per chunk, a few kB each.
_MAX_INDEXES = 8192

#: Streaming from a local disk: bytes that are read in one go, at least a chunk.
_NEAR_BYTES = 2 * 2**20

Value = TypeVar("Value")
Tokens = Float16[np.ndarray, " value"]


class _OpenShards:
    """Shard readers by slot, memory and threads to read with; shared by the threads of one process."""

    def __init__(self, storage: Storage, checksums: Callable[[SlotPlace], bytes | None]) -> None:
        self.process = os.getpid()
        self._storage, self._checksums = storage, checksums
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._indexes: OrderedDict[int, UInt64[np.ndarray, "chunk 2"]] = OrderedDict()
        self._lock = Lock()
        self._opening = [Lock() for _ in range(_OPENING_LOCKS)]
        self._scratch = local()
        self.pool = ThreadPoolExecutor(storage.n_readers, "read")  # no thread starts before it has work

    def reader(self, place: SlotPlace) -> ShardReader:
        """Return the reader of a slot's shard; raises `OSError`, or `BytesError` when it is damaged."""
        index = place.index
        with self._lock:
            reader = _use(self._readers, index)
        if reader is not None:
            return reader
        # One thread opens, the others wait: behind a URL that is a request, or a whole shard to fetch.
        with self._opening[index % _OPENING_LOCKS]:
            with self._lock:
                reader, entries = _use(self._readers, index), _use(self._indexes, index)
            if reader is None:
                file, checksums = self._storage.open(place.shard_name), self._checksums(place)
                reader = ShardReader(file, place.layout, checksums, entries)
                with self._lock:
                    _keep(self._readers, index, reader, MAX_OPEN_SHARDS)
                    _keep(self._indexes, index, reader.entries, _MAX_INDEXES)
        return reader

    def forget(self, place: SlotPlace) -> None:
        """Close a shard that may have been written again, or of which a copy may be damaged."""
        with self._lock:
            self._readers.pop(place.index, None)
            self._indexes.pop(place.index, None)
        self._storage.forget(place.shard_name)

    def scratch(self, n_bytes: int) -> UInt8[np.ndarray, " byte"]:
        """Return memory of this thread, kept from call to call: fresh memory costs more than the read."""
        memory = self._scratch
        if len(getattr(memory, "bytes", ())) < n_bytes:
            memory.bytes = np.empty(n_bytes, np.uint8)
        found: UInt8[np.ndarray, " byte"] = memory.bytes[:n_bytes]
        return found


def _use(recent: OrderedDict[int, Value], key: int) -> Value | None:
    """Return the value of `key`, which is then the last to go."""
    if key in recent:
        recent.move_to_end(key)
    return recent.get(key)


def _keep(recent: OrderedDict[int, Value], key: int, value: Value, capacity: int) -> None:
    recent[key] = value
    if len(recent) > capacity:
        recent.popitem(last=False)


class ChunkSource:
    """The chunks of the slots that were committed when it was made; any number of threads may share it."""

    def __init__(self, storage: Storage, header: Header) -> None:
        arrays = header.arrays
        self.slots = SlotTable(arrays)
        self.committed = np.zeros(len(self.slots), bool)
        self._storage, self._header = storage, header
        self._firsts = self.slots.firsts
        for first, layout in zip(self._firsts, arrays, strict=False):
            self.committed[first : first + layout.n_slots][committed_shards(storage, layout)] = True
        self._checksums: dict[int, bytes | None] = {}  # of the slots whose index part was read
        self._open_shards = _OpenShards(storage, self._committed_checksums)
        self._repair_hint = f"{repair_hint(storage.path)}: it makes the damaged slots anew"

    def read_many(
        self, array: int, chunks: Int64[np.ndarray, " chunk"], out: Float16[np.ndarray, "chunk ..."]
    ) -> None:
        """Fill `out`, C-contiguous, with the tokens of `chunks` of array number `array`, several at a time.

        Raises `InputError` for a chunk that is not there, `DamagedStoreError` for one that should be.
        """
        rows = out.reshape(len(out), math.prod(out.shape[1:]))
        parts = self._shares(array, chunks.tolist(), list(rows))
        if self._storage.local is not None and len(parts) > 1:
            # One thread asks the disk for all of them before any is waited for: two get in each other's way.
            for first, outs in parts:
                place, number = self._locate(array, first)
                with suppress(BytesError, OSError):
                    self._shards.reader(place).prefetch(number, len(outs))
        todo = iter(parts)

        def work() -> None:
            for first, outs in todo:
                self._read_waiting(array, first, outs)

        n_others = min(self._storage.n_readers, len(parts)) - 1
        others = [self._shards.pool.submit(work) for _ in range(n_others)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()

    def will_need(self, slots: Sequence[int] | Int64[np.ndarray, " n"]) -> None:
        """Let shards come nearer as `FeatureStore.will_need` says; what is in use must stay there as well."""
        places = [self.slots.place(int(index)) for index in slots]
        n_bytes = sum(place.layout.slot_encodings * place.layout.encoding_bytes for place in places)

        def fetch() -> None:
            for place in places:
                with suppress(BytesError, OSError):  # told to the one who asks for the tokens
                    self._shards.reader(place).will_need()

        if 2 * n_bytes <= self._storage.room:
            self._shards.pool.submit(fetch)

    def stream(self, array: int, chunks: Int64[np.ndarray, " chunk"]) -> Iterator[Tokens]:
        """Yield the tokens of `chunks` in order, read ahead by other threads; raises what `read_many` does.

        On a local disk one thread reads: the kernel reads ahead of a lone reader. Elsewhere a read is a round
        trip, or a codec's work, and many do it.
        """
        layout, storage = self.slots.arrays[array], self._storage
        is_near = storage.local is not None and layout.codec == "none"
        at_once, n_threads = (_NEAR_BYTES, 1) if is_near else (storage.stretch_bytes, storage.n_readers)
        longest = max(1, at_once // chunk_bytes(layout))
        groups = _neighbours(chunks.tolist(), longest, chunks_per_shard(layout))

        def read(group: Sequence[int]) -> Sequence[Tokens]:
            # Memory that starts at a multiple of 64 bytes, where reads are twice as fast.
            n_bytes = 2 * len(group) * layout.chunk_encodings * layout.grid.n_tokens * layout.n_channels
            raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            outs = list(raw[start : start + n_bytes].view(np.float16).reshape(len(group), -1))
            self._read_waiting(array, group[0], outs)
            return outs

        with closing(map_ahead(read, groups, n_threads, n_ahead=max(2, n_threads))) as filled:
            for outs in filled:
                yield from outs

    def read_index(self, *, outlined: bool = False) -> pa.Table:
        """Return the rows of all index parts, in array and row order, or their outline (`index.outline`)."""

        def read(place: SlotPlace) -> pa.Table:
            table = self._read_part(place, OUTLINE.names if outlined else None)
            return (outline(table) if outlined else table).replace_schema_metadata(None)

        places = [self.slots.place(int(index)) for index in np.flatnonzero(self.committed)]
        schema = OUTLINE if outlined else SCHEMA
        with ThreadPoolExecutor(self._storage.n_readers, "index") as pool:
            return pa.concat_tables([schema.empty_table(), *pool.map(read, places)])

    def parts_digest(self, array: int, rows: Int64[np.ndarray, " row"]) -> str:
        """Return a digest of the index parts of rows of an array, their shards' checksums included."""
        first, n_rows = self._firsts[array], self.slots.arrays[array].slot_encodings
        places = [self.slots.place(first + int(shard)) for shard in np.unique(rows // n_rows)]
        try:
            return digest([sha256(self._storage.read(place.part_name)).hexdigest() for place in places])
        except OSError as error:
            what = f"an index part of {self._storage.path} cannot be read: {error.strerror or 'absent'}"
            raise DamagedStoreError(what, hint=self._repair_hint) from error

    @property
    def _shards(self) -> _OpenShards:
        if self._open_shards.process != os.getpid():
            # The threads of the parent are not here, and its lock may have been held when it forked.
            self._open_shards = _OpenShards(self._storage, self._committed_checksums)
        return self._open_shards

    def _committed_checksums(self, place: SlotPlace) -> bytes | None:
        """Return the checksums that the chunks of a slot must have; its index part is read unless it was."""
        if place.index not in self._checksums:
            self._read_part(place, ())
        return self._checksums[place.index]

    def _read_part(self, place: SlotPlace, columns: Sequence[str] | None = None) -> pa.Table:
        try:
            part = read_part(self._storage, place, self._header, columns)
            self._checksums[place.index] = part.checksums
            return part.table
        except BytesError as fault:
            rows = f"rows {place.rows.start} to {place.rows.stop - 1}"
            raise DamagedStoreError(
                f"the index part of {place.title} is damaged: {fault}",
                details=[f"{self._storage.path}/{place.part_name}: {rows} of {place.layout.grid}"],
                hint=self._repair_hint,
            ) from fault

    def _shares(self, array: int, chunks: list[int], outs: list[Tokens]) -> list[tuple[int, list[Tokens]]]:
        """Return first chunks of stretches and where these go; shorter stretches rather than idle readers."""
        layout = self.slots.arrays[array]
        longest = max(1, self._storage.stretch_bytes // chunk_bytes(layout))
        # Below a quarter of a stretch a request is mostly waiting, and fewer of them are faster.
        fair = min(longest, max(-(-len(chunks) // self._storage.n_readers), longest // 4))
        order = range(len(chunks)) if longest == 1 else sorted(range(len(chunks)), key=chunks.__getitem__)
        ordered = iter([outs[place] for place in order])
        groups = _neighbours([chunks[place] for place in order], fair, chunks_per_shard(layout))
        return [(group[0], list(islice(ordered, len(group)))) for group in groups]

    def _read_waiting(self, array: int, first: int, outs: Sequence[Tokens]) -> None:
        """Fill `outs` with neighbouring chunks of one shard, from chunk `first` of the array on."""
        place, number = self._locate(array, first)
        try:
            self._fetch(place, number, outs)
        except BytesError:
            # The slot may have been written again since its shard was opened, or a copy of it may be damaged.
            self._shards.forget(place)
            self._checksums.pop(place.index, None)
            for offset, out in enumerate(outs):
                try:
                    self._fetch(place, number + offset, [out])
                except BytesError as fault:
                    raise self._explain(place, number + offset, fault) from fault

    def _fetch(self, place: SlotPlace, first: int, outs: Sequence[Tokens]) -> None:
        try:
            reader = self._shards.reader(place)
        except OSError as error:
            raise ShardLostError(f"its shard cannot be read ({error.strerror or 'absent'})") from error
        layout = place.layout
        if layout.dtype == "float16":
            reader.read_chunks(first, [out.view(np.uint8) for out in outs])
            return
        stored = self._shards.scratch(len(outs) * chunk_bytes(layout)).reshape(len(outs), -1)
        reader.read_chunks(first, list(stored))
        for row, out in zip(stored, outs, strict=True):
            levels = row.view(np.int8).reshape(-1, layout.stored_channels)
            dequantize(levels, out.reshape(-1, layout.n_channels))

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
        table = self._read_part(place)
        n_rows = place.layout.chunk_encodings
        chunk = table.slice(number * n_rows, n_rows)
        if isinstance(fault, ChunkMissingError) and chunk["error"].null_count == 0:
            (line, *_) = video_rows(chunk)
            return InputError(f"{self._storage.path} does not hold {line}: {chunk['error'][0]}")
        if isinstance(fault, ShardLostError):
            chunk = table.filter(pc.is_null(table["error"]))
        return DamagedStoreError(
            f"{self._storage.path}/{place.shard_name}, {place.title}, is damaged: {fault}",
            details=[str(video) for video in video_rows(chunk)],
            hint=self._repair_hint,
        )


def _neighbours(chunks: Sequence[int], longest: int, per_shard: int) -> Iterator[list[int]]:
    """Yield the chunks in their order, up to `longest` together where they follow each other in a shard."""
    group: list[int] = []
    for chunk in chunks:
        if group and (chunk != group[-1] + 1 or chunk % per_shard == 0 or len(group) == longest):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group
