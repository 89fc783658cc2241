"""Chunks of committed slots: found through the index, read from shards kept open, damage named.

In come an array and chunk numbers; out go tokens in the caller's memory, or the error that says which slot
and encodings are damaged or absent. Raw chunks are read directly, all others through Zarr.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import cycle, islice, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float16, Int64, UInt8

from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.types import ArrayLayout
from cosettle_cache.store._int8 import dequantize
from cosettle_cache.store._shards import ChunkMissingError, ShardLostError
from cosettle_cache.store.format import (
    BytesError,
    SlotPlace,
    SlotTable,
    chunk_bytes,
    chunks_per_shard,
)
from cosettle_cache.store.handles import OpenShards, drained, each
from cosettle_cache.store.parts import (
    OUTLINE,
    SCHEMA,
    Part,
    committed_shards,
    describe_rows,
    outline,
    read_part,
)
from cosettle_cache.store.storage import ReadStorage
from cosettle_cache.store.streaming import NEAR_STRETCHES, AtHand, NearReading, stream_far
from cosettle_cache.store.stretches import Stretch, Tokens, runs, shard_starts, sorted_stretches, stretches
from cosettle_cache.store.through_zarr import ZarrArrays

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
