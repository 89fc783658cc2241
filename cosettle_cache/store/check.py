"""Checking a store: every byte of every file is compared with the format, every damaged encoding named.

Nothing is changed, and others may write meanwhile. Memory is bounded by the size of a piece of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
from awscrt.checksums import crc32c
from jaxtyping import Bool, UInt64

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import CosettleError, DamagedStoreError, InputError
from cosettle_cache.core.files import parse_json
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.settings import differing, digest, flat
from cosettle_cache.core.tables import read_metadata
from cosettle_cache.core.types import ArrayLayout, Manifest
from cosettle_cache.store._local import TEMPORARY
from cosettle_cache.store._shards import ShardLostError, checksum_bytes, decoded, padding_after, read_entries
from cosettle_cache.store.create import header_copy, metadata_bytes, metadata_files, plain_metadata
from cosettle_cache.store.format import (
    CHECKSUM_BYTES,
    MANIFEST,
    MISSING,
    ROOT_METADATA,
    BytesError,
    SlotPlace,
    SlotTable,
    chunk_bytes,
    chunks_per_shard,
    part_folder,
)
from cosettle_cache.store.header import Header, read_header
from cosettle_cache.store.index import (
    SCHEMA,
    Damage,
    Part,
    check_rows,
    committed_shards,
    decode_part,
    unseal,
    video_rows,
)
from cosettle_cache.store.plan import Plan, plan_of_store
from cosettle_cache.store.remote import RangeFile, Storage, open_storage
from cosettle_cache.videos.manifest import manifest_digest, manifest_from_table

#: Bytes read at once; a larger chunk is read whole.
PIECE_BYTES = 4 * 2**20

#: Consecutive bytes of a shard, and the damaged chunks in them: number and reason.
Piece = tuple[memoryview, list[tuple[int, str]]]

#: Bytes of a slot's shard that were read, and what is wrong with the slot.
SlotReport = tuple[int, list[Damage]]


def audit_shard(storage: Storage, place: SlotPlace, part: Part) -> Iterator[Piece]:
    """Yield the whole shard of a slot piece by piece; raise `ShardLostError` when none of it can be trusted.

    So it is when it cannot be read, when its size or its index is not what the part implies, or, known at the
    end, when its chunks are not those of the part.
    """
    try:
        yield from _pieces(storage.open(place.shard_name), place.layout, part)
    except FileNotFoundError as error:
        raise ShardLostError("it is missing") from error
    except OSError as error:
        raise ShardLostError(f"it cannot be read ({error.strerror})") from error


def _pieces(file: RangeFile, layout: ArrayLayout, part: Part) -> Iterator[Piece]:
    present = _present_chunks(layout, part)
    entries = _check_entries(file, layout, part, present)
    starts, sizes = entries[present].astype(np.int64).T
    stops = starts + sizes + padding_after(sizes)
    extents = list(zip(np.flatnonzero(present).tolist(), starts.tolist(), sizes.tolist(), strict=True))
    first, checksum, found = 0, 0, bytearray(CHECKSUM_BYTES * (len(part.table) // layout.chunk_encodings))
    while first < len(extents):
        origin = extents[first][1]
        last = max(first + 1, int(np.searchsorted(stops, origin + PIECE_BYTES, "right")))
        data = np.empty(int(stops[last - 1]) - origin, np.uint8).data
        if file.read([data], origin) < len(data):
            raise ShardLostError("it ends too early")
        faults = []
        for chunk, start, size in extents[first:last]:
            view = data[start - origin : start - origin + size + padding_after(size)]
            if reason := _chunk_fault(layout, view, size):
                faults.append((chunk, reason))
            stored = view[size - CHECKSUM_BYTES : size]
            checksum = int(crc32c(stored, checksum))
            found[CHECKSUM_BYTES * chunk : CHECKSUM_BYTES * (chunk + 1)] = stored
        yield data, faults
        first = last
    if part.chunks_checksum not in (None, checksum) or part.checksums not in (None, bytes(found)):
        raise ShardLostError("its chunks are not those that its index part commits")
    index = entries.astype("<u8").tobytes()
    yield memoryview(index + checksum_bytes(index)), []


def _present_chunks(layout: ArrayLayout, part: Part) -> Bool[np.ndarray, " chunk"]:
    is_present = np.asarray(part.table["error"].is_null())[:: layout.chunk_encodings]
    present = np.zeros(chunks_per_shard(layout), bool)
    present[: len(is_present)] = is_present
    return present


def _check_entries(
    file: RangeFile, layout: ArrayLayout, part: Part, present: Bool[np.ndarray, " chunk"]
) -> UInt64[np.ndarray, "chunk 2"]:
    """Return the shard's index, which the format determines but for the sizes of compressed chunks."""
    n_bytes = file.size()
    if n_bytes != part.shard_bytes:
        raise ShardLostError(f"it has {n_bytes} bytes, not {part.shard_bytes}")
    entries = read_entries(file, layout)
    offsets, sizes = entries[present].T
    raw_size = chunk_bytes(layout) + CHECKSUM_BYTES
    plausible = sizes == raw_size if layout.codec == "none" else sizes <= n_bytes
    if (entries[~present] != MISSING).any() or not plausible.all():
        raise ShardLostError("its index lists other chunks than its index part")
    sizes = sizes.astype(np.int64)
    starts = np.cumsum([0, *(sizes + padding_after(sizes))])
    if (offsets != starts[:-1]).any() or starts[-1] + entries.nbytes + CHECKSUM_BYTES != n_bytes:
        raise ShardLostError("its index does not put the chunks where the format does")
    return entries


def _chunk_fault(layout: ArrayLayout, view: memoryview, size: int) -> str | None:
    chunk, checksum = view[: size - CHECKSUM_BYTES], view[size - CHECKSUM_BYTES : size]
    if checksum_bytes(chunk) != checksum:
        return "the checksum of a chunk does not match"
    if any(view[size:]):
        return "the bytes after a chunk are not zero"
    try:
        if layout.codec != "none":
            decoded(chunk, layout)
    except BytesError as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Metadata:
    """The header of a store, the metadata that follows from it, the plan unless that is unknown, damage."""

    header: Header
    files: Mapping[str, bytes]
    plan: Plan | None
    damages: tuple[Damage, ...]


def inspect_metadata(storage: Storage) -> Metadata:
    """Compare every small file with what it must be; a damaged header is taken from the manifest's copy.

    Raises `InputError` when there is no store, `DamagedStoreError` when neither header can be trusted.
    """
    copy, manifest, manifest_fault = _read_manifest(storage)
    header, header_fault = _find_header(storage, copy)
    if manifest is not None and manifest_digest(manifest) != header.fingerprint.manifest_digest:
        manifest, manifest_fault = None, "it lists other videos than the store was made from"
    try:
        files = metadata_files(header)
    except RecursionError as error:
        raise DamagedStoreError(f"the header of {storage.path} is damaged: it is nested too deep") from error
    faults = {name: _document_fault(storage, name, json.loads(data)) for name, data in files.items()}
    if header_fault is not None:
        faults[ROOT_METADATA] = header_fault
    faults[MANIFEST] = manifest_fault
    damages = tuple(Damage(name, fault) for name, fault in faults.items() if fault)
    plan = None if manifest is None else plan_of_store(header, manifest)
    return Metadata(header, files, plan, damages)


def _read_manifest(storage: Storage) -> tuple[Header | None, Manifest | None, str | None]:
    """Return the manifest's copy of the header, the manifest, and what is wrong with it."""
    try:
        table = unseal(storage.read(MANIFEST))
    except FileNotFoundError:
        return None, None, "it is missing; the same extract command writes it again"
    except (BytesError, OSError) as error:
        return None, None, str(error)
    try:
        copy = header_copy(read_metadata(table), storage.path)
    except DamagedStoreError as error:
        return None, None, error.summary
    try:
        return copy, manifest_from_table(table, MANIFEST), None
    except CosettleError as error:
        return copy, None, error.summary


def _find_header(storage: Storage, copy: Header | None) -> tuple[Header, str | None]:
    """Return the store's header and, where that is the manifest's copy, why."""
    try:
        header = read_header(storage)
    except (DamagedStoreError, InputError) as error:
        if copy is not None:
            return copy, error.message
        if not storage.exists(MANIFEST):
            raise
        raise DamagedStoreError(
            f"neither header of {storage.path} can be trusted: {ROOT_METADATA} is damaged, and {MANIFEST} "
            "holds no intact copy of it",
            found=error.message,
            hint=f"put {ROOT_METADATA} back from a backup, or extract into a new store",
        ) from error
    if copy is None or copy.identity == header.identity:
        return header, None
    raise DamagedStoreError(
        f"{ROOT_METADATA} and {MANIFEST} of {storage.path} belong to different stores",
        details=differing(*(flat(found.to_json()["fingerprint"]) for found in (header, copy))),
        hint="put the right one back",
    )


def _document_fault(storage: Storage, name: str, wanted: Mapping[str, Any]) -> str | None:
    try:
        data = storage.read(name)
        found = parse_json(data, name)
    except FileNotFoundError:
        return "it is missing"
    except (OSError, InputError) as error:
        return str(error)
    # Digests differ whenever two documents do: as Python objects, 1 and true are equal.
    if not isinstance(found, dict) or digest(plain_metadata(found)) != digest(wanted):
        return "it is not what the header implies"
    return None if metadata_bytes(found) == data else "its white space is not what Zarr writes"


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


def verify_store(path: str | Path, *, progress: Progress = SILENT, stop: Event | None = None) -> VerifyReport:
    """Check every file of the store at `path`, local or a URL; `stop` ends after the slots in hand.

    Raises `InputError` when there is no store, `DamagedStoreError` when no header can be trusted.
    """
    storage = open_storage(path)
    return verify_storage(storage, inspect_metadata(storage), progress, stop)


def verify_storage(
    storage: Storage, metadata: Metadata, progress: Progress, stop: Event | None
) -> VerifyReport:
    """Check every file of a store whose metadata was inspected."""
    slots = SlotTable(metadata.header.arrays)
    committed, folder_damages = find_committed(storage, slots)
    damages = [*metadata.damages, *folder_damages]
    n_verified = n_bytes = 0
    withdrawn = list[SlotPlace]()
    with counting(progress, len(committed), "slots") as advance:
        task = partial(check_slot, storage, metadata)
        reports = map_ahead(task, committed, storage.n_readers, stop=stop)
        for place, report in zip(committed, reports, strict=False):
            if report is None:
                withdrawn.append(place)
            else:
                n_verified += 1
                n_bytes += report[0]
                damages += report[1]
            advance(1, damages=float(len(damages)))
    known = {*metadata.files, MANIFEST}
    for place in map(slots.place, range(len(slots))):
        known |= {place.shard_name, place.part_name}
    listed = dict(storage.walk())
    for place in withdrawn:
        if place.part_name in listed and check_slot(storage, metadata, place) is None:
            damages.append(_part_damage(metadata, place, "it is listed, and not found"))
    strange = {name: "not part of the store" for name in listed if name not in known}
    for name in strange:
        if TEMPORARY.fullmatch(name.rpartition("/")[2]):
            strange[name] = "unfinished or set aside; removed by the next extraction that is alone"
    return VerifyReport(
        path=storage.path,
        n_slots=len(slots),
        n_todo=len(slots) - len(committed) + len(withdrawn),
        n_verified=n_verified,
        n_bytes=n_bytes,
        damages=tuple(damages),
        notes=tuple(f"{name}: {why}" for name, why in strange.items()),
        interrupted=n_verified + len(withdrawn) < len(committed),
    )


def find_committed(storage: Storage, slots: SlotTable) -> tuple[list[SlotPlace], list[Damage]]:
    """Return the committed slots in order, and the index folders that cannot be listed."""
    committed, damages = list[SlotPlace](), list[Damage]()
    for first, layout in zip(slots.firsts, slots.arrays, strict=False):
        try:
            shards = committed_shards(storage, layout)
            committed += [SlotPlace(first + shard, layout, shard) for shard in shards]
        except DamagedStoreError as error:
            damages.append(Damage(part_folder(layout.grid), error.message))
    return committed, damages


def check_slot(storage: Storage, metadata: Metadata, place: SlotPlace) -> SlotReport | None:
    """Check a slot, again if it was written again meanwhile; return None when it is to do by now."""
    while True:
        try:
            data = storage.read(place.part_name)
        except FileNotFoundError:
            return None
        except OSError as error:
            return 0, [_part_damage(metadata, place, str(error.strerror))]
        report = _check_files(storage, metadata, place, data)
        with suppress(OSError):
            if not report[1] or storage.read(place.part_name) == data:
                return report


def _check_files(storage: Storage, metadata: Metadata, place: SlotPlace, data: bytes) -> SlotReport:
    try:
        part = decode_part(data, place, metadata.header)
        check_rows(part, planned_rows(metadata, place))
    except BytesError as error:
        return 0, [_part_damage(metadata, place, str(error))]
    n_bytes, faults = 0, dict[str, list[int]]()
    try:
        for piece, found in audit_shard(storage, place, part):
            n_bytes += len(piece)
            for chunk, reason in found:
                faults.setdefault(reason, []).append(chunk)
    except BytesError as error:
        faults = {str(error): np.flatnonzero(_present_chunks(place.layout, part)).tolist()}
    numbers = np.arange(len(part.table)) // place.layout.chunk_encodings
    return n_bytes, [
        Damage(place.shard_name, reason, place.index, video_rows(part.table.filter(np.isin(numbers, chunks))))
        for reason, chunks in faults.items()
    ]


def _part_damage(metadata: Metadata, place: SlotPlace, reason: str) -> Damage:
    rows = f"rows {place.rows.start} to {place.rows.stop - 1} of {place.layout.grid}"
    planned = planned_rows(metadata, place)
    encodings = () if planned is None else video_rows(planned)
    return Damage(place.part_name, f"{reason} ({rows})", place.index, encodings)


def planned_rows(metadata: Metadata, place: SlotPlace) -> pa.Table | None:
    """Return the encodings planned for a slot; None where the plan cannot be made again."""
    if metadata.plan is None:
        return None
    names = ("row", "video_id", "frame", "view", "role", "flip")
    rows = [
        {"row": row} | {name: getattr(encoding, name) for name in names[1:]} | {"role": str(encoding.role)}
        for row, encoding in zip(place.rows, metadata.plan.slot(place.index).encodings, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema([SCHEMA.field(name) for name in names]))
