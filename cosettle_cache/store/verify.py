"""Verifying a store: every byte of every file is checked, and every damaged encoding named.

In comes the path of a store; out goes a `VerifyReport`. Nothing is changed, and others may write meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa

from cosettle_cache.core.ahead import map_ahead
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError
from cosettle_cache.store.audit import Fault, audit_shard, present_chunks
from cosettle_cache.store.damage import Damage
from cosettle_cache.store.format import MANIFEST, BytesError, SlotPlace, SlotTable, part_folder
from cosettle_cache.store.locks import TEMPORARY
from cosettle_cache.store.metadata import Metadata, inspect_metadata
from cosettle_cache.store.parts import Part, VideoRows, committed_shards, decode_part, video_rows
from cosettle_cache.store.planned import planned_rows
from cosettle_cache.store.storage import ReadStorage, open_storage


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found; `damages` is empty when all is well. `n_bytes` counts shards that were read.

    Slots that are still to do are no damage, nor are files that do not belong to the store (`notes`).
    """

    path: str
    n_slots: int
    n_todo: int
    n_verified: int
    n_bytes: int
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    interrupted: bool = False

    @property
    def damaged_slots(self) -> tuple[int, ...]:
        """Slots with damage, ascending."""
        return tuple(sorted({damage.slot for damage in self.damages if damage.slot is not None}))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One slot: bytes of its shard that were read, and what is wrong; `committed` False when it is to do."""

    n_bytes: int = 0
    damages: tuple[Damage, ...] = ()
    committed: bool = True


def verify_store(path: str | Path, *, progress: Progress = SILENT, stop: Event | None = None) -> VerifyReport:
    """Check every file of the store at `path`, local or a URL; `stop` ends after the slots in hand.

    Raises `InputError` when there is no store, `DamagedStoreError` when no header can be trusted.
    """
    storage = open_storage(path)
    return verify_storage(storage, inspect_metadata(storage), progress, stop or Event())


def verify_storage(storage: ReadStorage, metadata: Metadata, progress: Progress, stop: Event) -> VerifyReport:
    """Check every file of a store whose metadata was inspected."""
    slots = SlotTable(metadata.header.arrays)
    committed, folder_damages = find_committed(storage, slots)
    run = _Verification(storage, metadata, [*metadata.damages, *folder_damages])
    progress.start(len(committed), "slots")
    try:
        for report in map_ahead(run.check, committed, storage.n_readers, stop):
            run.count(report)
            progress.advance(1, damages=float(len(run.damages)))
    finally:
        progress.finish()
    return VerifyReport(
        path=storage.path,
        n_slots=len(slots),
        n_todo=len(slots) - len(committed) + run.n_withdrawn,
        n_verified=run.n_verified,
        n_bytes=run.n_bytes,
        damages=tuple(run.damages),
        notes=tuple(_strange_files(storage, metadata, slots)),
        interrupted=run.n_verified + run.n_withdrawn < len(committed),
    )


@dataclass(slots=True)
class _Verification:
    storage: ReadStorage
    metadata: Metadata
    damages: list[Damage]
    n_verified: int = 0
    n_withdrawn: int = 0
    n_bytes: int = 0

    def check(self, place: SlotPlace) -> SlotReport:
        return check_slot(self.storage, self.metadata, place)

    def count(self, report: SlotReport) -> None:
        self.n_verified += report.committed
        self.n_withdrawn += not report.committed
        self.n_bytes += report.n_bytes
        self.damages += report.damages


def check_slot(storage: ReadStorage, metadata: Metadata, place: SlotPlace) -> SlotReport:
    """Check a committed slot, again if it was written again meanwhile."""
    while True:
        try:
            before = storage.read(place.part_name)
        except FileNotFoundError:
            return SlotReport(committed=False)
        except OSError as error:
            return SlotReport(damages=(_part_damage(metadata, place, str(error.strerror)),))
        report = _check_files(storage, metadata, place, before)
        if not report.damages or _is_unchanged(storage, place, before):
            return report


def find_committed(storage: ReadStorage, slots: SlotTable) -> tuple[list[SlotPlace], list[Damage]]:
    """Return the committed slots in order, and the index folders that cannot be listed."""
    committed: list[SlotPlace] = []
    damages: list[Damage] = []
    for first, layout in zip(slots.firsts, slots.arrays, strict=False):
        try:
            committed += [
                SlotPlace(first + shard, layout, shard) for shard in committed_shards(storage, layout)
            ]
        except DamagedStoreError as error:
            damages.append(Damage(part_folder(layout.grid), error.message))
    return committed, damages


def shard_damages(place: SlotPlace, part: Part, faults: list[Fault]) -> Iterator[Damage]:
    """Yield what faults in a shard cost, one damage per reason."""
    for reason in dict.fromkeys(fault.reason for fault in faults):
        chunks = {fault.chunk for fault in faults if fault.reason == reason}
        yield Damage(place.shard_name, reason, place.index, _encodings(place, part, chunks))


def lost_shard(place: SlotPlace, part: Part, reason: str) -> Damage:
    """Return the damage of a shard of which nothing can be trusted."""
    chunks = set(present_chunks(place.layout, part).nonzero()[0].tolist())
    return Damage(place.shard_name, reason, place.index, _encodings(place, part, chunks))


def _check_files(storage: ReadStorage, metadata: Metadata, place: SlotPlace, data: bytes) -> SlotReport:
    try:
        part = decode_part(data, place)
    except BytesError as error:
        return SlotReport(damages=(_part_damage(metadata, place, str(error)),))
    faults: list[Fault] = []
    n_bytes = 0
    try:
        for piece in audit_shard(storage.open(place.shard_name), place.layout, part):
            faults += piece.faults
            n_bytes += len(piece.data)
    except (BytesError, OSError) as error:
        return SlotReport(n_bytes, (lost_shard(place, part, _reason(error)),))
    return SlotReport(n_bytes, tuple(shard_damages(place, part, faults)))


def _reason(error: BytesError | OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    return f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def _part_damage(metadata: Metadata, place: SlotPlace, reason: str) -> Damage:
    rows = f"rows {place.rows.start} to {place.rows.stop - 1} of {place.layout.grid}"
    encodings = planned_rows(metadata.header, metadata.manifest, place)
    return Damage(place.part_name, f"{reason} ({rows})", place.index, encodings)


def _is_unchanged(storage: ReadStorage, place: SlotPlace, before: bytes) -> bool:
    try:
        return storage.read(place.part_name) == before
    except OSError:
        return False


def _encodings(place: SlotPlace, part: Part, chunks: set[int]) -> tuple[VideoRows, ...]:
    n_rows = place.layout.chunk_encodings
    rows = [number for number in range(len(part.table)) if number // n_rows in chunks]
    return tuple(video_rows(part.table.take(pa.array(rows, pa.int64()))))


def _strange_files(storage: ReadStorage, metadata: Metadata, slots: SlotTable) -> Iterator[str]:
    """Yield what lies in the store and is not part of it."""
    known = {*metadata.files, MANIFEST}
    for index in range(len(slots)):
        place = slots.place(index)
        known |= {place.shard_name, place.part_name}
    for name, _ in storage.walk():
        if TEMPORARY.fullmatch(name.rpartition("/")[2]):
            yield f"{name}: unfinished; removed by the next extraction that is alone"
        elif name not in known:
            yield f"{name}: not part of the store"
