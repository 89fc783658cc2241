"""Copying a store slot by slot, between folders and object stores; every byte is checked on the way.

In come two places; out goes a `CopyReport`. A copy that was cut short goes on where it stopped, and a damaged
slot is named and left out.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from cosettle_cache.core.ahead import map_ahead
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, UsageError
from cosettle_cache.core.files import Buffer
from cosettle_cache.store.audit import audit_shard
from cosettle_cache.store.create import create_from_files
from cosettle_cache.store.damage import Damage
from cosettle_cache.store.format import MANIFEST, BytesError, SlotPlace, SlotTable
from cosettle_cache.store.header import check_same, read_header, repair_hint
from cosettle_cache.store.metadata import Metadata, inspect_metadata
from cosettle_cache.store.parts import Part, decode_part
from cosettle_cache.store.storage import Storage, is_store, is_url, open_storage
from cosettle_cache.store.verify import check_slot, find_committed
from cosettle_cache.store.writer import StoreWriter

#: A slot in hand may take its shard's bytes of memory where it goes to an object store.
MAX_SLOTS_IN_HAND = 4


class Outcome(StrEnum):
    """What became of a slot."""

    COPIED = "copied"
    THERE = "there"
    HELD = "held"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did with the slots that the source has; `n_held` are being written by somebody else."""

    source: str
    target: str
    n_slots: int
    n_copied: int
    n_there: int
    n_held: int
    n_bytes: int
    damages: tuple[Damage, ...]
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What a copy would do, as far as listings say; `n_bytes` are those of the shards to copy."""

    source: str
    target: str
    n_slots: int
    n_there: int
    n_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def copy_store(
    source: str | Path, target: str | Path, *, progress: Progress = SILENT, stop: Event | None = None
) -> CopyReport:
    """Copy the committed slots of `source` that `target` has not; both are local or URLs.

    The copy has the same bytes. A slot that failed at the target is replaced by a better one. `stop` ends
    after the slots in hand. Raises `UsageError` for places inside each other, `InputError` when the target is
    something else, `FingerprintError` when it is another store, `DamagedStoreError` when the metadata of the
    source is damaged.
    """
    reader, writer_storage, metadata = _open_both(source, target)
    writer = _open_target(reader, writer_storage, metadata)
    slots = SlotTable(metadata.header.arrays)
    committed, _ = find_committed(reader, slots)
    with closing(writer):
        run = _Copy(reader, writer_storage, metadata, writer)
        run.run(committed, progress, stop or Event())
    return CopyReport(
        source=reader.path,
        target=writer_storage.path,
        n_slots=len(committed),
        n_copied=run.outcomes[Outcome.COPIED],
        n_there=run.outcomes[Outcome.THERE],
        n_held=run.outcomes[Outcome.HELD],
        n_bytes=run.n_bytes,
        damages=tuple(run.damages),
        interrupted=run.outcomes.total() < len(committed),
    )


def plan_copy(source: str | Path, target: str | Path) -> CopyPlan:
    """Return what `copy_store` would do; nothing is written, and only metadata is checked."""
    reader, target_storage, metadata = _open_both(source, target)
    sizes = dict(reader.walk())
    there = {name for name, _ in target_storage.walk()}
    committed, _ = find_committed(reader, SlotTable(metadata.header.arrays))
    missing = [place for place in committed if place.part_name not in there]
    n_bytes = sum(sizes.get(place.shard_name, 0) for place in missing)
    return CopyPlan(reader.path, target_storage.path, len(committed), len(committed) - len(missing), n_bytes)


@dataclass(frozen=True, slots=True)
class _SlotCopy:
    outcome: Outcome
    n_bytes: int = 0
    damages: tuple[Damage, ...] = ()


@dataclass(slots=True)
class _Copy:
    """One run: slots go through threads, and what becomes of them is counted."""

    source: Storage
    target: Storage
    metadata: Metadata
    writer: StoreWriter
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    n_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)

    def run(self, places: Sequence[SlotPlace], progress: Progress, stop: Event) -> None:
        progress.start(len(places), "slots")
        n_threads = min(self.target.n_readers, MAX_SLOTS_IN_HAND)
        try:
            for copied in map_ahead(self.copy, places, n_threads, stop):
                self.outcomes[copied.outcome] += 1
                self.n_bytes += copied.n_bytes
                self.damages += copied.damages
                progress.advance(1, megabytes=self.n_bytes / 1e6, damages=float(len(self.damages)))
        finally:
            progress.finish()

    def copy(self, place: SlotPlace) -> _SlotCopy:
        """Copy a slot unless the target has it, or somebody is writing it there."""
        if not self.writer.claim(place.index, retry_failed=True):
            is_there = self.target.exists(place.part_name)
            return _SlotCopy(Outcome.THERE if is_there else Outcome.HELD)
        try:
            return self._copy_held(place)
        finally:
            self.writer.release(place.index)

    def _copy_held(self, place: SlotPlace) -> _SlotCopy:
        while True:
            try:
                return self._try_copy(place)
            except BytesError:
                report = check_slot(self.source, self.metadata, place)
                if report.damages:
                    return _SlotCopy(Outcome.DAMAGED, damages=report.damages)
                if not report.committed:
                    return _SlotCopy(Outcome.HELD)

    def _try_copy(self, place: SlotPlace) -> _SlotCopy:
        """Copy a slot; raise `BytesError` before anything wrong is committed."""
        part, data = self._read_part(place)
        if self.target.exists(place.part_name):
            if self.target.read(place.part_name) == data:
                return _SlotCopy(Outcome.THERE)
            # A failed slot is only given up for one that is whole.
            deque(self._checked_bytes(place, part), maxlen=0)
        self.writer.adopt(place.index, self._checked_bytes(place, part), data)
        return _SlotCopy(Outcome.COPIED, part.shard.n_bytes)

    def _read_part(self, place: SlotPlace) -> tuple[Part, bytes]:
        try:
            data = self.source.read(place.part_name)
        except OSError as error:
            raise BytesError("the index part cannot be read") from error
        return decode_part(data, place), data

    def _checked_bytes(self, place: SlotPlace, part: Part) -> Iterator[Buffer]:
        try:
            for piece in audit_shard(self.source.open(place.shard_name), place.layout, part):
                if piece.faults:
                    raise BytesError(piece.faults[0].reason)
                yield piece.data
        except OSError as error:  # or it would pass for an error of the target
            raise BytesError("the shard cannot be read") from error


def _open_both(source: str | Path, target: str | Path) -> tuple[Storage, Storage, Metadata]:
    reader = open_storage(source)
    writer = open_storage(target if is_url(target) else os.path.realpath(target))
    _check_apart(source, target)
    metadata = inspect_metadata(reader)
    if metadata.damages:
        raise DamagedStoreError(
            f"the metadata of {reader.path} is damaged, so it cannot be copied",
            details=[line for damage in metadata.damages for line in damage.lines()],
            hint=repair_hint(reader.path),
        )
    if is_store(writer):
        hint = "copy to another place"
        check_same(metadata.header, read_header(writer), writer.path, hint=hint)
    return reader, writer, metadata


def _open_target(source: Storage, target: Storage, metadata: Metadata) -> StoreWriter:
    if not is_store(target):
        files = {name: source.read(name) for name in [*metadata.files, MANIFEST]}
        create_from_files(target, metadata.header.arrays, files)
        check_same(metadata.header, read_header(target), target.path)  # a rival may have been faster
    return StoreWriter(target, metadata.header.arrays)


def _check_apart(source: str | Path, target: str | Path) -> None:
    one, other = (
        PurePosixPath(str(place) if is_url(place) else os.path.realpath(place)) for place in (source, target)
    )
    if one == other or one in other.parents or other in one.parents:
        raise UsageError(
            "a store cannot be copied into itself", wanted="two places apart", found=f"{source} and {target}"
        )
