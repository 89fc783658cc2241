"""Writing a store slot by slot: the shard first, durably, then the index part that commits it.

In come tokens and failures per slot; out go two files. Any number of writers may work on different slots; a
writer that dies leaves committed slots and nothing that a reader would look at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from cosettle_cache.errors import DamagedStoreError
from cosettle_cache.files import output_errors, sync, write_durably
from cosettle_cache.store.creation import create_store
from cosettle_cache.store.header import Header, check_same, is_zarr, read_header
from cosettle_cache.store.layout import (
    INDEX_GROUP,
    ROOT_METADATA,
    TOKEN_DTYPE,
    TOKENS_GROUP,
    BytesError,
    SlotPlace,
    SlotTable,
    array_folder,
    check_arrays,
    part_folder,
)
from cosettle_cache.store.locks import WriterLock, is_temporary
from cosettle_cache.store.parts import committed_shards, encode_part, read_part
from cosettle_cache.store.shards import shard_pieces, shard_size
from cosettle_cache.types import ArrayLayout, Fingerprint, Manifest, Slot


@dataclass(frozen=True, slots=True)
class Shard:
    """Memory for the tokens of one slot, float16, to be filled before `StoreWriter.commit`.

    It is uninitialised: whoever commits it has filled every encoding that is not reported as failed.
    """

    tokens: Float16[np.ndarray, "encoding row col channel"]


class StoreWriter:
    """A store open for writing; made by `create_or_resume`."""

    def __init__(self, path: Path, arrays: tuple[ArrayLayout, ...]) -> None:
        self.path = path
        self.slots = SlotTable(arrays)
        with output_errors(path):
            self._lock = WriterLock(path / INDEX_GROUP / ROOT_METADATA)
            if self._lock.alone:
                _remove_leftovers(path, arrays)
            self._lock.share()

    @classmethod
    def create_or_resume(
        cls,
        path: Path,
        arrays: Sequence[ArrayLayout],
        fingerprint: Fingerprint,
        manifest: Manifest,
        encoder: Mapping[str, Any],
    ) -> StoreWriter:
        """Create a store at `path`, or open the one that is there if it was made with the same settings.

        Raises `FingerprintError` when it was not, `InputError` when `path` holds something else,
        `OutputError` when it cannot be written. `encoder` is free provenance and not compared.
        """
        check_arrays(arrays)
        path = Path(os.path.realpath(path))
        wanted = Header(fingerprint, tuple(arrays), encoder)
        if not is_zarr(path):
            create_store(path, wanted, manifest)
        check_same(wanted, read_header(path), path)
        return cls(path, wanted.arrays)

    @property
    def n_slots(self) -> int:
        """Number of slots over all arrays."""
        return len(self.slots)

    def todo(self, *, retry_failed: bool = False) -> list[int]:
        """Return the slots without a commit mark, and with `retry_failed` those that list failures too."""
        committed = set(self._committed())
        if retry_failed:
            committed -= {index for index in committed if self._has_failures(self.slots.place(index))}
        return [index for index in range(self.n_slots) if index not in committed]

    def new_shard(self, slot: Slot) -> Shard:
        """Return memory for the tokens of `slot`."""
        layout = self._place(slot).layout
        shape = (len(slot.encodings), layout.grid.rows, layout.grid.cols, layout.n_channels)
        return Shard(np.empty(shape, TOKEN_DTYPE))

    def commit(self, slot: Slot, shard: Shard, failures: Mapping[str, str]) -> None:
        """Write the shard durably, then its index part; after that the slot is done, or failed.

        `failures` maps video ids to reasons; every inner chunk with an encoding of such a video is left out.
        Raises `OutputError` when there is no room; the slot is then still to do.
        """
        place = self._place(slot)
        layout = place.layout
        reasons = [failures.get(encoding.video_id) for encoding in slot.encodings]
        errors = _spread_over_chunks(reasons, layout.chunk_encodings)
        present = np.array([error is None for error in errors[:: layout.chunk_encodings]])
        self._withdraw(place)
        write_durably(place.token_path(self.path), shard_pieces(layout, shard.tokens, present))
        n_bytes = shard_size(layout, int(present.sum()))
        write_durably(place.part_path(self.path), [encode_part(slot, errors, n_bytes)])

    def close(self) -> None:
        """Let the next writer know that this one is gone; the end of the process does the same."""
        self._lock.close()

    def _withdraw(self, place: SlotPlace) -> None:
        """Remove the commit mark of a slot that is written again: a committed shard never changes."""
        path = place.part_path(self.path)
        with output_errors(path):
            if path.exists():
                path.unlink(missing_ok=True)
                sync(path.parent)

    def _committed(self) -> Iterator[int]:
        for first, layout in zip(self.slots.firsts, self.slots.arrays, strict=False):
            yield from (first + shard for shard in committed_shards(self.path, layout))

    def _has_failures(self, place: SlotPlace) -> bool:
        try:
            return read_part(place.part_path(self.path)).n_failed > 0
        except BytesError as fault:
            raise DamagedStoreError(f"the index part of slot {place.index} is damaged: {fault}") from fault

    def _place(self, slot: Slot) -> SlotPlace:
        place = self.slots.place(slot.index)
        if (place.layout.grid, place.shard, place.rows.start) != (slot.grid, slot.shard, slot.start):
            raise ValueError(f"slot {slot.index} of this store is not {slot.grid} shard {slot.shard}")
        if len(slot.encodings) != len(place.rows):
            raise ValueError(f"slot {slot.index} has {len(place.rows)} encodings, not {len(slot.encodings)}")
        return place


def _spread_over_chunks(reasons: Sequence[str | None], chunk_encodings: int) -> list[str | None]:
    """Return an error per encoding: a chunk is stored whole or not at all."""
    errors: list[str | None] = []
    for start in range(0, len(reasons), chunk_encodings):
        chunk = reasons[start : start + chunk_encodings]
        errors += [next((reason for reason in chunk if reason is not None), None)] * len(chunk)
    return errors


def _remove_leftovers(path: Path, arrays: Sequence[ArrayLayout]) -> None:
    folders = [path, path / INDEX_GROUP, path / TOKENS_GROUP]
    for layout in arrays:
        folders += [array_folder(path, layout.grid), part_folder(path, layout.grid)]
    for folder in folders:
        for leftover in filter(is_temporary, folder.iterdir()):
            leftover.unlink(missing_ok=True)
