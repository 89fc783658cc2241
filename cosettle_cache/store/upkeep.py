"""Copying a store slot by slot, between folders and object stores; repairing one; the summary of one.

A copy checks every byte on the way, names and leaves out damaged slots, and goes on where it was cut short.
A repair restores metadata and makes damaged slots `todo`, so that the next extraction does the rest.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pyarrow.compute as pc

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import DamagedStoreError, InputError, RemoteError, UsageError
from cosettle_cache.core.files import Buffer, is_url, make_folder, overwrite_durably
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.store._local import LocalStorage, sole_writer
from cosettle_cache.store.check import (
    Metadata,
    VerifyReport,
    audit_shard,
    check_slot,
    find_committed,
    inspect_metadata,
    planned_rows,
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
from cosettle_cache.store.index import FOREIGN, Damage, Part, check_rows, decode_part
from cosettle_cache.store.reader import FeatureStore
from cosettle_cache.store.remote import Storage, check_writable, is_store, open_storage
from cosettle_cache.store.writer import StoreWriter

#: A slot in hand may take its shard's bytes of memory where it goes to an object store.
MAX_SLOTS_IN_HAND = 4

_READ_WELL = "it was read well at another try"


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


def copy_store(
    source: str | Path, target: str | Path, *, progress: Progress = SILENT, stop: Event | None = None
) -> CopyReport:
    """Copy the committed slots of `source` that `target` has not; both are local or URLs.

    The copy has the same bytes. A slot that failed at the target is replaced by a better one. `stop` ends
    after the slots in hand. Raises `UsageError` for places inside each other, `InputError` when the target is
    something else, `FingerprintError` for another store, `DamagedStoreError` for damaged source metadata.
    """
    reader, there, metadata = _open_both(source, target)
    if not is_store(there):
        files = {name: reader.read(name) for name in [*metadata.files, MANIFEST]}
        create_store(there, metadata.header.arrays, files)
    theirs = read_header(there)
    check_same(metadata.header, theirs, there.path, hint="copy to another place", exact=True)
    outcomes: Counter[str] = Counter()
    n_bytes, damages = 0, list[Damage]()
    with closing(StoreWriter(there, theirs)) as writer:
        committed, _ = find_committed(reader, writer.slots)
        with counting(progress, len(committed), "slots") as advance:
            task = partial(_copy_slot, reader, there, metadata, writer)
            n_threads = min(there.n_readers, MAX_SLOTS_IN_HAND)
            for outcome, copied, found in map_ahead(task, committed, n_threads, stop=stop):
                outcomes[outcome] += 1
                n_bytes += copied
                damages += found
                advance(1, megabytes=n_bytes / 1e6, damages=float(len(damages)))
    return CopyReport(
        source=reader.path,
        target=there.path,
        n_slots=len(committed),
        n_copied=outcomes["copied"],
        n_there=outcomes["there"],
        n_held=outcomes["held"],
        n_bytes=n_bytes,
        damages=tuple(damages),
        interrupted=outcomes.total() < len(committed),
    )


def plan_copy(source: str | Path, target: str | Path) -> dict[str, Any]:
    """Return what `copy_store` would do, as far as listings say; only metadata is read, nothing written."""
    reader, target_storage, metadata = _open_both(source, target)
    sizes = dict(reader.walk())
    there = {name for name, _ in target_storage.walk()}
    committed, _ = find_committed(reader, SlotTable(metadata.header.arrays))
    missing = [place for place in committed if place.part_name not in there]
    return {
        "source": reader.path,
        "target": target_storage.path,
        "n_slots": len(committed),
        "n_there": len(committed) - len(missing),
        "n_bytes": sum(sizes.get(place.shard_name, 0) for place in missing),
    }


def _open_both(source: str | Path, target: str | Path) -> tuple[Storage, Storage, Metadata]:
    check_writable(target)
    paths = [str(place) if is_url(place) else os.path.realpath(place) for place in (source, target)]
    reader, writer = open_storage(source), open_storage(paths[1])
    one, other = map(PurePosixPath, paths)
    if one == other or one in other.parents or other in one.parents:
        found = f"{source} and {target}"
        raise UsageError("a store cannot be copied into itself", wanted="two places apart", found=found)
    metadata = inspect_metadata(reader)
    if metadata.damages:
        raise DamagedStoreError(
            f"the metadata of {reader.path} is damaged, so it cannot be copied",
            details=[line for damage in metadata.damages for line in damage.lines()],
            hint=repair_hint(reader.path),
        )
    if is_store(writer):
        hint = "copy to another place"
        check_same(metadata.header, read_header(writer), writer.path, hint=hint, exact=True)
    return reader, writer, metadata


def _copy_slot(
    source: Storage, target: Storage, metadata: Metadata, writer: StoreWriter, place: SlotPlace
) -> tuple[str, int, list[Damage]]:
    """Return what became of a slot (`copied`, `there`, `held`, `damaged`), its copied bytes, and damages."""
    if not writer.claim(place.index, retry_failed=True):
        return ("there" if target.exists(place.part_name) else "held"), 0, []
    try:
        while True:
            try:
                n_bytes = _try_copy(source, target, metadata, writer, place)
                return ("copied" if n_bytes else "there"), n_bytes, []
            except BytesError:
                report = check_slot(source, metadata, place)
                if report is None:
                    return "held", 0, []
                if report[1]:
                    return "damaged", 0, report[1]
    finally:
        writer.release(place.index)


def _try_copy(
    source: Storage, target: Storage, metadata: Metadata, writer: StoreWriter, place: SlotPlace
) -> int:
    """Return the bytes copied, 0 where they are there; raise `BytesError` before a wrong one is committed."""
    try:
        data = source.read(place.part_name)
    except OSError as error:
        raise BytesError("the index part cannot be read") from error
    part = decode_part(data, place, metadata.header)
    check_rows(part, planned_rows(metadata, place))
    if target.exists(place.part_name):
        if target.read(place.part_name) == data:
            return 0
        # A failed slot is only given up for one that is whole.
        deque(_checked_bytes(source, place, part), maxlen=0)
    writer.adopt(place.index, _checked_bytes(source, place, part), data)
    return part.shard_bytes


def _checked_bytes(source: Storage, place: SlotPlace, part: Part) -> Iterator[Buffer]:
    for data, faults in audit_shard(source, place, part):
        if faults:
            raise BytesError(faults[0][1])
        yield data


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair found and did, or would do: files restored and removed, slots that are to do now."""

    path: str
    damages: tuple[Damage, ...]
    restored: tuple[str, ...]
    removed: tuple[str, ...]
    slots: tuple[int, ...]
    interrupted: bool = False


def repair_store(
    path: str | Path, *, dry_run: bool = False, progress: Progress = SILENT, stop: Event | None = None
) -> RepairReport:
    """Verify the store at `path` and mend what is damaged; with `dry_run` only say what would be done.

    Damaged slots lose index part and shard. A damaged manifest is removed; the same extract command writes it
    again. What is removed is set aside (see `set_aside` of the storages), and only after it was read whole
    twice more and found bad. When that is impossible, nothing is changed, and this raises `InputError`, or
    `RemoteError` behind a URL. Raises `OutputError` while another process of this machine writes,
    `DamagedStoreError` when neither header can be trusted. After `stop` what was found so far is mended.
    """
    storage = open_storage(path)
    local = None if dry_run else storage.local
    with nullcontext() if local is None else sole_writer(local / INDEX_GROUP / ROOT_METADATA):
        metadata = inspect_metadata(storage)
        found = verify_storage(storage, metadata, progress, stop)
        foreign = {damage.slot for damage in found.damages if damage.reason.startswith(FOREIGN)}
        if foreign and len(foreign) == found.n_verified:
            raise DamagedStoreError(
                f"all index parts of {storage.path} are of another store than its {ROOT_METADATA}",
                hint=f"put the right {ROOT_METADATA} and {MANIFEST} back",
            )
        damaged = {damage.file for damage in found.damages}
        listed = _confirm(storage, metadata, found)
        slots = SlotTable(metadata.header.arrays)
        places = map(slots.place, found.damaged_slots)
        # The index part first: without it the slot is to do, whatever happens next.
        names = [name for place in places for name in (place.part_name, place.shard_name)]
        names += {MANIFEST} & damaged
        folders = [part_folder(layout.grid) for layout in slots.arrays]
        report = RepairReport(
            path=storage.path,
            damages=found.damages,
            restored=tuple(name for name in [*folders, *metadata.files] if name in damaged),
            removed=tuple(name for name in names if name in listed),
            slots=found.damaged_slots,
            interrupted=found.interrupted,
        )
        if not dry_run:
            for name in report.restored:
                _restore(storage, name, metadata)
            for name in report.removed:
                storage.set_aside(name)
    return report


def _confirm(storage: Storage, metadata: Metadata, found: VerifyReport) -> Mapping[str, int]:
    """Read all that was found damaged again, whole; return what the storage lists, by name with its bytes.

    Behind a lack of permission, a broken device or a proxy good bytes look absent, short or wrong. So this
    raises unless both tries and the listing agree, and the bytes are as bad as they were.
    """
    listed, faults = dict(storage.walk()), dict[str, str]()
    files = {damage.file for damage in metadata.damages}
    for name in files:
        _read_twice(storage, name, listed, faults)
    for name in files - {damage.file for damage in inspect_metadata(storage).damages}:
        faults.setdefault(name, _READ_WELL)
    for damage in found.damages:
        is_folder = damage.slot is None and damage.file not in files
        if is_folder and storage.local is not None and (storage.local / damage.file).exists():
            faults[damage.file] = damage.reason
    for place in map(SlotTable(metadata.header.arrays).place, found.damaged_slots):
        files_of_slot = (place.part_name, place.shard_name)
        found_again = {name: _read_twice(storage, name, listed, faults) for name in files_of_slot}
        if not _is_damaged(found_again, metadata, place):
            faults.setdefault(place.shard_name, _READ_WELL)
    if faults:
        raise (InputError if storage.local else RemoteError)(
            f"nothing of {storage.path} is repaired: what seems damaged cannot be read whole",
            details=[f"{name}: {reason}" for name, reason in faults.items()],
            hint="mend permissions, device or server, or remove by hand what is lost; then repair again",
        )
    return listed


def _is_damaged(files: Mapping[str, bytes | None], metadata: Metadata, place: SlotPlace) -> bool:
    """Say whether the files of a slot, read whole (None: absent), are damaged."""
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            if data is not None:
                make_folder((Path(folder) / name).parent)
                (Path(folder) / name).write_bytes(data)
        report = check_slot(LocalStorage(Path(folder)), metadata, place)
    return report is not None and bool(report[1])


def _read_twice(
    storage: Storage, name: str, listed: Mapping[str, int], faults: dict[str, str]
) -> bytes | None:
    """Return a whole file, None where there is none; add to `faults` when that is not sure."""
    tries = list[bytes | None]()
    for _ in range(2):
        try:
            tries.append(storage.read(name))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            tries.append(None)
        except OSError as error:
            faults[name] = f"it cannot be read ({error.strerror or error})"
            return None
    data = tries[1]
    if tries[0] != data or listed.get(name) != (None if data is None else len(data)):
        sizes = [None if found is None else len(found) for found in tries]
        faults[name] = (
            f"it is listed with {listed.get(name)} bytes, and reading gave {sizes[0]} and {sizes[1]}"
        )
    return data


def _restore(storage: Storage, name: str, metadata: Metadata) -> None:
    data = metadata.files.get(name)  # None for a folder
    if storage.local is not None:
        path = storage.local / name
        make_folder(path if data is None else path.parent)
        # Writers lock these, and a lock belongs to the file, not to its name.
        locked = (f"{INDEX_GROUP}/{ROOT_METADATA}", f"{TOKENS_GROUP}/{ROOT_METADATA}")
        if data is not None and name in locked and path.is_file():
            overwrite_durably(path, data)
            return
    if data is not None:
        storage.write(name, [data])


def store_summary(store: FeatureStore) -> dict[str, Any]:
    """Return what `store info --json` prints; `n_encodings` counts present, failed and those still to do."""
    states, index = store.slot_states(), store.index
    counts = pc.value_counts(index["array"].filter(pc.is_null(index["error"]))).to_pylist()
    present = {count["values"]: count["counts"] for count in counts}
    n_present = sum(present.values())
    return {
        "path": store.path,
        "plan_kind": store.plan_kind,
        "fingerprint": store.fingerprint.to_json(),
        "encoder": store.encoder,
        "arrays": [
            {
                "grid": str(layout.grid),
                **{name: getattr(layout, name) for name in ("n_channels", "dtype", "codec", "n_encodings")},
                "n_present": present.get(str(layout.grid), 0),
                "n_slots": layout.n_slots,
                "slot_bytes": layout.slot_encodings * layout.encoding_bytes,
            }
            for layout in store.arrays
        ],
        "n_videos": len(store.manifest),
        "n_slots": store.n_slots,
        **{f"n_{state}": states[state] for state in ("todo", "done", "failed")},
        "n_encodings": sum(layout.n_encodings for layout in store.arrays),
        "n_present": n_present,
        "n_failed_encodings": index.num_rows - n_present,
        "n_bytes": store.n_bytes,
        "failures": store.failures,
    }
