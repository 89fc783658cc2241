"""Repairing a store: metadata is restored, damaged slots become `todo`, the next extraction does the rest.

In comes the path of a store; out goes a `RepairReport`. What is not damaged is not touched, and a repair that
is cut short is finished by the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.files import make_folder, overwrite_durably
from cosettle_cache.store.damage import Damage
from cosettle_cache.store.format import (
    INDEX_GROUP,
    MANIFEST,
    ROOT_METADATA,
    TOKENS_GROUP,
    SlotTable,
    part_folder,
)
from cosettle_cache.store.locks import sole_writer
from cosettle_cache.store.metadata import Metadata, inspect_metadata
from cosettle_cache.store.storage import Storage, open_storage
from cosettle_cache.store.verify import VerifyReport, verify_storage

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
