"""Copying a store slot by slot, between folders and object stores; every byte is checked on the way.

In come two places; out goes a `CopyReport`. A copy that was cut short goes on where it stopped, and a damaged
slot is named and left out.

Repairing a store: metadata is restored, damaged slots become `todo`, the next extraction does the rest.

In comes the path of a store; out goes a `RepairReport`. What is not damaged is not touched, and a repair that
is cut short is finished by the next one.

The summary of a store: plan, arrays, slots, bytes and failures, for people and for `--json`.

In comes an open store; out goes a `StoreSummary`.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

import pyarrow.compute as pc

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, UsageError
from cosettle_cache.core.files import Buffer, is_url, make_folder, overwrite_durably
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.types import Fingerprint, PlanKind
from cosettle_cache.store._local import sole_writer
from cosettle_cache.store.check import (
    Metadata,
    VerifyReport,
    audit_shard,
    check_slot,
    find_committed,
    inspect_metadata,
    verify_storage,
)
from cosettle_cache.store.create import create_store
from cosettle_cache.store.format import (
    INDEX_GROUP,
    MANIFEST,
    ROOT_METADATA,
    TOKENS_GROUP,
    BytesError,
    SlotPlace,
    SlotTable,
    part_folder,
)
from cosettle_cache.store.header import check_same, read_header, repair_hint
from cosettle_cache.store.index import Damage, Part, decode_part
from cosettle_cache.store.reader import FeatureStore
from cosettle_cache.store.remote import Storage, is_store, open_storage
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
            for copied in map_ahead(self.copy, places, n_threads, stop=stop):
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
        create_store(target, metadata.header.arrays, files)
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


#: Writers lock these, and a lock belongs to the file, not to its name.
_LOCKED = (f"{INDEX_GROUP}/{ROOT_METADATA}", f"{TOKENS_GROUP}/{ROOT_METADATA}")


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair found and did, or would do: files restored and removed, slots that are to do now."""

    path: str
    damages: tuple[Damage, ...]
    restored: tuple[str, ...]
    removed: tuple[str, ...]
    slots: tuple[int, ...]
    interrupted: bool = False

    @property
    def needs_extract(self) -> bool:
        """Whether the extract command must run again to bring back what was removed."""
        return bool(self.removed) or any(damage.file == MANIFEST for damage in self.damages)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def repair_store(
    path: str | Path, *, dry_run: bool = False, progress: Progress = SILENT, stop: Event | None = None
) -> RepairReport:
    """Verify the store at `path` and mend what is damaged; with `dry_run` only say what would be done.

    Damaged slots lose index part and shard. A damaged manifest is removed; the same extract command writes it
    again. Raises `OutputError` while another process of this machine writes, `DamagedStoreError` when neither
    header can be trusted. `stop` ends the search for damage; what was found is mended.
    """
    storage = open_storage(path)
    with _alone(storage, dry_run):
        metadata = inspect_metadata(storage)
        found = verify_storage(storage, metadata, progress, stop or Event())
        report = _plan_repair(storage, metadata, found)
        if not dry_run:
            _apply(storage, metadata, report)
    return report


@contextmanager
def _alone(storage: Storage, dry_run: bool) -> Iterator[None]:
    if storage.local is None or dry_run:
        yield
        return
    with sole_writer(storage.local / INDEX_GROUP / ROOT_METADATA):
        yield


def _plan_repair(storage: Storage, metadata: Metadata, found: VerifyReport) -> RepairReport:
    slots = SlotTable(metadata.header.arrays)
    places = [slots.place(index) for index in found.damaged_slots]
    # The index part first: without it the slot is to do, whatever happens next.
    names = [name for place in places for name in (place.part_name, place.shard_name)]
    damaged = {damage.file for damage in found.damages}
    if MANIFEST in damaged:
        names.append(MANIFEST)
    folders = [part_folder(layout.grid) for layout in metadata.header.arrays]
    return RepairReport(
        path=storage.path,
        damages=found.damages,
        restored=tuple(name for name in [*folders, *metadata.files] if name in damaged),
        removed=tuple(name for name in names if storage.exists(name)),
        slots=found.damaged_slots,
        interrupted=found.interrupted,
    )


def _apply(storage: Storage, metadata: Metadata, report: RepairReport) -> None:
    for name in report.restored:
        if name in metadata.files:
            _restore(storage, name, metadata.files[name])
        elif storage.local is not None:
            make_folder(storage.local / name)
    for name in report.removed:
        storage.delete(name)


def _restore(storage: Storage, name: str, data: bytes) -> None:
    if storage.local is not None:
        path = storage.local / name
        make_folder(path.parent)
        if name in _LOCKED and path.is_file():
            overwrite_durably(path, data)
            return
    storage.write(name, [data])


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """One array: planned and present encodings, slots and their size."""

    grid: str
    n_channels: int
    dtype: str
    codec: str
    n_encodings: int
    n_present: int
    n_slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What `store info` shows; encodings count as planned = present + failed + still to do."""

    path: str
    plan_kind: PlanKind
    fingerprint: Fingerprint
    encoder: Mapping[str, Any]
    arrays: tuple[ArraySummary, ...]
    n_videos: int
    n_slots: int
    n_todo: int
    n_done: int
    n_failed: int
    n_encodings: int
    n_present: int
    n_failed_encodings: int
    n_bytes: int
    failures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def store_summary(store: FeatureStore) -> StoreSummary:
    """Return the summary of a store; `n_bytes` counts every file in its folder."""
    states = store.slot_states()
    arrays = _array_summaries(store)
    n_present = sum(array.n_present for array in arrays)
    return StoreSummary(
        path=store.path,
        plan_kind=store.plan_kind,
        fingerprint=store.fingerprint,
        encoder=store.encoder,
        arrays=arrays,
        n_videos=len(store.manifest),
        n_slots=store.n_slots,
        n_todo=states["todo"],
        n_done=states["done"],
        n_failed=states["failed"],
        n_encodings=sum(array.n_encodings for array in arrays),
        n_present=n_present,
        n_failed_encodings=store.index.num_rows - n_present,
        n_bytes=store.n_bytes,
        failures=store.failures,
    )


def _array_summaries(store: FeatureStore) -> tuple[ArraySummary, ...]:
    index = store.index
    counts = pc.value_counts(index["array"].filter(pc.is_null(index["error"]))).to_pylist()
    present = {count["values"]: count["counts"] for count in counts}
    return tuple(
        ArraySummary(
            grid=str(layout.grid),
            n_channels=layout.n_channels,
            dtype=layout.dtype,
            codec=layout.codec,
            n_encodings=layout.n_encodings,
            n_present=present.get(str(layout.grid), 0),
            n_slots=layout.n_slots,
            slot_bytes=layout.slot_encodings * layout.encoding_bytes,
        )
        for layout in store.arrays
    )
