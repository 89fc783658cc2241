"""Writing a store slot by slot: the shard first, durably, then the index part that commits it.

Any number of writers may work on one store: each claims the slots it works on, and one that dies leaves
committed slots and nothing that a reader looks at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from cosettle_cache.core.errors import DamagedStoreError
from cosettle_cache.core.files import Buffer, is_url, output_errors
from cosettle_cache.core.types import ArrayLayout, Fingerprint, Manifest, Slot
from cosettle_cache.store._local import TEMPORARY, SlotClaims, WriterLock, is_temporary
from cosettle_cache.store._shards import ShardEncoder
from cosettle_cache.store.create import create_store, manifest_file, metadata_files, remove_dead_builds
from cosettle_cache.store.format import (
    INDEX_GROUP,
    MANIFEST,
    ROOT_METADATA,
    TOKENS_GROUP,
    BytesError,
    SlotPlace,
    SlotTable,
    array_folder,
    check_arrays,
    part_folder,
)
from cosettle_cache.store.header import Header, check_same, read_header, repair_hint
from cosettle_cache.store.index import committed_shards, encode_part, read_part
from cosettle_cache.store.remote import Storage, is_store, open_storage


@dataclass(frozen=True, slots=True)
class Shard:
    """Memory for a slot's tokens, all filled but those of failed videos before `StoreWriter.commit`."""

    tokens: Float16[np.ndarray, "encoding row col channel"]


class StoreWriter:
    """A store open for writing; made by `create_or_resume`. Threads may share it."""

    def __init__(self, storage: Storage, header: Header) -> None:
        arrays = header.arrays
        self.slots = SlotTable(arrays)
        self.n_slots = len(self.slots)
        self.path = storage.path
        self._storage, self._header = storage, header
        self._lock: WriterLock | None = None
        self._claims: SlotClaims | None = None
        folder = storage.local
        if folder is None:
            for name in filter(TEMPORARY.fullmatch, storage.names(INDEX_GROUP)):
                storage.delete(f"{INDEX_GROUP}/{name}")  # set aside by a repair
            return
        with output_errors(folder):
            self._lock = WriterLock(folder / INDEX_GROUP / ROOT_METADATA)
            self._claims = SlotClaims(folder / TOKENS_GROUP / ROOT_METADATA)
            if self._lock.alone:
                _remove_leftovers(folder, arrays)
                remove_dead_builds(folder)
            self._lock.share()

    @classmethod
    def create_or_resume(
        cls,
        path: str | Path,
        arrays: Sequence[ArrayLayout],
        fingerprint: Fingerprint,
        manifest: Manifest,
        encoder: Mapping[str, Any],
    ) -> StoreWriter:
        """Create a store at `path` (local or a URL), or open the one there, made with the same settings.

        Raises `FingerprintError` when it was not, `InputError` when `path` holds something else,
        `OutputError` when it cannot be written. `encoder` is free provenance and not compared.
        """
        check_arrays(arrays)
        storage = open_storage(path if is_url(path) else os.path.realpath(path))
        wanted = Header(fingerprint, tuple(arrays), encoder)
        if not is_store(storage):
            files = {**metadata_files(wanted), MANIFEST: manifest_file(wanted, manifest)}
            create_store(storage, wanted.arrays, files)
        header = read_header(storage)
        check_same(wanted, header, storage.path)
        if not storage.exists(MANIFEST):  # the store has lost it
            storage.write(MANIFEST, [manifest_file(header, manifest)])
        return cls(storage, header)

    def todo(self, *, retry_failed: bool = False) -> list[int]:
        """Return the slots without a commit mark, and with `retry_failed` those that list failures too."""
        committed: set[int] = set()
        for first, layout in zip(self.slots.firsts, self.slots.arrays, strict=False):
            committed |= {first + shard for shard in committed_shards(self._storage, layout)}
        return [
            index
            for index in range(self.n_slots)
            if index not in committed or (retry_failed and self._has_failures(self.slots.place(index)))
        ]

    def claim(self, index: int, *, retry_failed: bool = False) -> bool:
        """Hold slot `index` until it is committed or released, without waiting; say whether it is to do.

        False: another writer holds it, or it was committed meanwhile. An object store has no locks: there two
        writers may do a slot twice, with the same bytes.
        """
        if self._claims is not None and not self._claims.take(index):
            return False
        if self._is_todo(self.slots.place(index), retry_failed):
            return True
        self.release(index)
        return False

    def release(self, index: int) -> None:
        """Give a claimed slot back; nothing happens to one that is not held."""
        if self._claims is not None:
            self._claims.release(index)

    def new_shard(self, slot: Slot) -> Shard:
        """Return memory for the tokens of `slot`."""
        layout = self._place(slot).layout
        shape = (len(slot.encodings), layout.grid.rows, layout.grid.cols, layout.n_channels)
        return Shard(np.empty(shape, np.float16))

    def commit(self, slot: Slot, shard: Shard, failures: Mapping[str, str]) -> None:
        """Write the shard durably, then its index part; after that the slot is done, or failed, and not held.

        `failures` maps video ids to reasons; every inner chunk with an encoding of such a video is left out.
        A slot that is done stays as it is. Raises `OutputError`, after which the slot is still to do.
        """
        place = self._place(slot)
        if self._is_todo(place, retry_failed=True):
            size = place.layout.chunk_encodings
            errors: list[str | None] = []
            for start in range(0, len(slot.encodings), size):
                ids = [encoding.video_id for encoding in slot.encodings[start : start + size]]
                # A chunk is stored whole or not at all.
                errors += [next((failures[name] for name in ids if name in failures), None)] * size
            present = np.array([error is None for error in errors[::size]])
            encoder = ShardEncoder(place.layout, shard.tokens, present)

            def part() -> bytes:
                return encode_part(slot, errors, encoder, self._header.identity)

            self._put(place, encoder, part)
        self.release(place.index)

    def adopt(self, index: int, shard: Iterable[Buffer], part: bytes) -> None:
        """Commit a slot whose shard and index part exist elsewhere; both are written as they are."""
        self._put(self.slots.place(index), shard, lambda: part)
        self.release(index)

    def replace_manifest(self, manifest: Manifest) -> None:
        """Write another manifest of the same digest: what was seen of the media has changed."""
        self._storage.write(MANIFEST, [manifest_file(read_header(self._storage), manifest)])

    def close(self) -> None:
        """Let the next writer know that this one is gone; the end of the process does the same."""
        for lock in (self._claims, self._lock):
            if lock is not None:
                lock.close()

    def _put(self, place: SlotPlace, shard: Iterable[Buffer], part: Callable[[], bytes]) -> None:
        # Withdrawn first: a committed shard never changes.
        self._storage.delete(place.part_name)
        self._storage.write(place.shard_name, shard)
        self._storage.write(place.part_name, [part()])

    def _is_todo(self, place: SlotPlace, retry_failed: bool) -> bool:
        if not self._storage.exists(place.part_name):
            return True
        return retry_failed and self._has_failures(place)

    def _has_failures(self, place: SlotPlace) -> bool:
        try:
            return read_part(self._storage, place, self._header).n_failed > 0
        except BytesError as fault:
            raise DamagedStoreError(
                f"the index part of slot {place.index} is damaged: {fault}",
                hint=repair_hint(self._storage.path),
            ) from fault

    def _place(self, slot: Slot) -> SlotPlace:
        place = self.slots.place(slot.index)
        if (place.layout.grid, place.shard, place.rows.start) != (slot.grid, slot.shard, slot.start):
            raise ValueError(f"slot {slot.index} of this store is not {slot.grid} shard {slot.shard}")
        if len(slot.encodings) != len(place.rows):
            raise ValueError(f"slot {slot.index} has {len(place.rows)} encodings, not {len(slot.encodings)}")
        return place


def _remove_leftovers(path: Path, arrays: Sequence[ArrayLayout]) -> None:
    folders = [path, path / INDEX_GROUP, path / TOKENS_GROUP]
    for layout in arrays:
        folders += [path / array_folder(layout.grid), path / part_folder(layout.grid)]
    for folder in folders:
        for leftover in filter(is_temporary, folder.iterdir()):
            if leftover.is_symlink() or not leftover.is_dir():
                leftover.unlink(missing_ok=True)
