"""Chunks of committed slots: found through the index, read from shards kept open, damage named.

In come an array and a chunk number; out goes the chunk in the caller's memory, or the error that says which
slot and encodings are damaged or absent.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, UInt8

from cosettle_cache.errors import DamagedStoreError, InputError
from cosettle_cache.store.layout import (
    BytesError,
    SlotPlace,
    SlotTable,
    chunks_per_shard,
)
from cosettle_cache.store.parts import SCHEMA, Part, committed_shards, describe_rows, read_part
from cosettle_cache.store.shards import ChunkMissingError, ShardLostError, ShardReader
from cosettle_cache.types import ArrayLayout

#: Shards kept open with their parsed index; one costs a file descriptor and 16 bytes per chunk.
MAX_OPEN_SHARDS = 128

#: Threads that read index parts; each part is a few kB, so this hides latency only.
_PART_READERS = 4


class ChunkSource:
    """The chunks of the slots that were committed when it was made; any number of threads may share it."""

    def __init__(self, path: Path, arrays: tuple[ArrayLayout, ...]) -> None:
        self.slots = SlotTable(arrays)
        self.committed = _committed_slots(path, self.slots)
        self._path = path
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = Lock()

    def read(self, array: int, chunk: int, out: UInt8[np.ndarray, " byte"]) -> None:
        """Fill `out` with chunk `chunk` of array number `array`.

        Raises `InputError` when the store does not hold it, `DamagedStoreError` when it should and cannot.
        """
        place, number = self._locate(array, chunk)
        try:
            self._reader(place).read_chunk(number, out)
        except BytesError:
            # The slot may have been written again since its shard was opened: look once more.
            self._forget(place)
            try:
                self._reader(place).read_chunk(number, out)
            except BytesError as fault:
                raise self._explain(place, number, fault) from fault

    def read_index(self) -> pa.Table:
        """Return the rows of all index parts, in array and row order."""
        places = [self.slots.place(int(index)) for index in np.flatnonzero(self.committed)]
        with ThreadPoolExecutor(_PART_READERS, "index") as pool:
            parts = list(pool.map(self.read_part, places))
        return pa.concat_tables([SCHEMA.empty_table(), *(_plain_table(part) for part in parts)])

    def read_part(self, place: SlotPlace) -> Part:
        """Return the index part of a slot; raise `DamagedStoreError` when it is unreadable."""
        try:
            return read_part(place.part_path(self._path))
        except BytesError as fault:
            path = place.part_path(self._path)
            rows = f"rows {place.rows.start} to {place.rows.stop - 1}"
            raise DamagedStoreError(
                f"the index part of {_name(place)} is damaged: {fault}",
                details=[f"{path}: {rows} of {place.layout.grid}"],
                hint=_redo(path),
            ) from fault

    def _locate(self, array: int, chunk: int) -> tuple[SlotPlace, int]:
        layout = self.slots.arrays[array]
        n_chunks = layout.n_encodings // layout.chunk_encodings
        if not 0 <= chunk < n_chunks:
            raise InputError(
                f"{self._path} has no chunk {chunk} in array {layout.grid}", wanted=f"0 to {n_chunks - 1}"
            )
        shard, number = divmod(chunk, chunks_per_shard(layout))
        place = SlotPlace(self.slots.index_of(array, shard), layout, shard)
        if not self.committed[place.index]:
            raise InputError(
                f"chunk {chunk} of array {layout.grid} is in {_name(place)}, which is not extracted yet",
                hint="run the same extract command again; it goes on with the slots that are missing",
            )
        return place, number

    def _reader(self, place: SlotPlace) -> ShardReader:
        with self._lock:
            reader = self._readers.get(place.index)
            if reader is not None:
                self._readers.move_to_end(place.index)
                return reader
        reader = ShardReader(place.token_path(self._path), place.layout)
        with self._lock:
            self._readers[place.index] = reader
            while len(self._readers) > MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader

    def _forget(self, place: SlotPlace) -> None:
        with self._lock:
            self._readers.pop(place.index, None)

    def _explain(self, place: SlotPlace, number: int, fault: BytesError) -> InputError | DamagedStoreError:
        """Return the error for a chunk that could not be read: absent on purpose, or damaged."""
        table = self.read_part(place).table
        n_rows = place.layout.chunk_encodings
        chunk = table.slice(number * n_rows, n_rows)
        if isinstance(fault, ChunkMissingError) and chunk["error"].null_count == 0:
            (line, *_) = describe_rows(chunk)
            return InputError(f"{self._path} does not hold {line}: {chunk['error'][0]}")
        if isinstance(fault, ShardLostError):
            chunk = table.filter(pc.is_null(table["error"]))
        return DamagedStoreError(
            f"{_name(place)} of {self._path} is damaged: {fault}",
            details=describe_rows(chunk),
            hint=_redo(place.part_path(self._path)),
        )


def _committed_slots(path: Path, slots: SlotTable) -> Bool[np.ndarray, " slot"]:
    committed = np.zeros(len(slots), bool)
    for first, layout in zip(slots.firsts, slots.arrays, strict=False):
        committed[first : first + layout.n_slots][committed_shards(path, layout)] = True
    return committed


def _plain_table(part: Part) -> pa.Table:
    return part.table.replace_schema_metadata(None)


def _name(place: SlotPlace) -> str:
    return f"slot {place.index} (shard {place.shard} of array {place.layout.grid})"


def _redo(part: Path) -> str:
    return f"delete {part} and run the same extract command again: it makes this slot anew"
