"""Verifying a store: every byte of every file is checked, and every damaged encoding named.

In comes the path of a store; out goes a `VerifyReport`. Nothing is changed, and others may write meanwhile.

Auditing a shard: every byte of it compared with what the format and its index part say it must be.

In come an open shard and its index part; out goes the whole file piece by piece, with what is wrong in each,
so that whoever copies it never passes on what has not been checked. Memory is bounded by the size of a piece.

A store's small files: group and array metadata follow from the header, which the manifest holds a copy of.

In comes a storage; out go the header, what is wrong with these files, and the bytes they should hold.

What a slot must hold by the plan, for slots whose index part cannot say it any more.

In come header, manifest and slot; out go the videos, frames and rows that were planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
from awscrt.checksums import crc32c
from jaxtyping import Bool, UInt64

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import CosettleError, DamagedStoreError, FingerprintError, InputError
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.tables import read_metadata
from cosettle_cache.core.types import ArrayLayout, Encoding, Manifest, PlanKind
from cosettle_cache.store._local import TEMPORARY
from cosettle_cache.store._shards import (
    ShardLostError,
    checksum_bytes,
    decoded_bytes,
    index_bytes,
    padding_after,
    read_entries,
)
from cosettle_cache.store.create import HEADER_COPY, metadata_bytes, metadata_files, plain_metadata
from cosettle_cache.store.format import (
    ALIGNMENT,
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
from cosettle_cache.store.header import ATTRIBUTE, Header, check_same, parse_header, read_header
from cosettle_cache.store.index import (
    Damage,
    Part,
    VideoRows,
    committed_shards,
    decode_part,
    unseal,
    video_rows,
)
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.store.remote import RangeFile, Storage, open_storage
from cosettle_cache.videos.manifest import manifest_digest, manifest_from_table

#: Bytes read at once; a larger chunk is read whole.
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with inner chunk number `chunk` of a shard."""

    chunk: int
    reason: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of a shard, and what is wrong in them."""

    data: memoryview
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a chunk lies: `size` counts its checksum, `stop` is where the next chunk begins."""

    chunk: int
    start: int
    size: int
    stop: int


def audit_shard(file: RangeFile, layout: ArrayLayout, part: Part) -> Iterator[Piece]:
    """Yield all pieces of a shard in order.

    Raises `ShardLostError` when nothing of it can be trusted: another size than the part says, an index that
    is damaged or not what the part implies, or at the end chunks that are not those of the part.
    """
    present = present_chunks(layout, part)
    entries = _check_entries(file, layout, part, present)
    checksum = 0
    for extents in _batches(_extents(entries, present)):
        data = _read(file, extents[0].start, extents[-1].stop)
        views = [_cut(data, extent, extents[0].start) for extent in extents]
        faults = [_find_fault(layout, extent, view) for extent, view in zip(extents, views, strict=True)]
        yield Piece(data, tuple(fault for fault in faults if fault is not None))
        for extent, view in zip(extents, views, strict=True):
            checksum = int(crc32c(view[extent.size - CHECKSUM_BYTES : extent.size], checksum))
    if part.shard.chunks_checksum not in (None, checksum):
        raise ShardLostError("its chunks are not those that its index part commits")
    index = entries.astype("<u8").tobytes()
    yield Piece(memoryview(index + checksum_bytes(index)), ())


def present_chunks(layout: ArrayLayout, part: Part) -> Bool[np.ndarray, " chunk"]:
    """Return which chunks of a shard the index part says are there."""
    is_present = np.asarray(part.table["error"].is_null())[:: layout.chunk_encodings]
    present = np.zeros(chunks_per_shard(layout), bool)
    present[: len(is_present)] = is_present
    return present


def _check_entries(
    file: RangeFile, layout: ArrayLayout, part: Part, present: Bool[np.ndarray, " chunk"]
) -> UInt64[np.ndarray, "chunk 2"]:
    """Return the shard's index, which the format determines but for the sizes of compressed chunks."""
    n_bytes = file.size()
    if n_bytes != part.shard.n_bytes:
        raise ShardLostError(f"it has {n_bytes} bytes, not {part.shard.n_bytes}")
    entries = read_entries(file, layout)
    offsets, sizes = entries[present].T
    raw_size = chunk_bytes(layout) + CHECKSUM_BYTES
    plausible = sizes == raw_size if layout.codec == "none" else sizes <= n_bytes
    if (entries[~present] != MISSING).any() or not plausible.all():
        raise ShardLostError("its index lists other chunks than its index part")
    strides = sizes.astype(np.int64) + -sizes.astype(np.int64) % ALIGNMENT
    starts = np.concatenate([[0], np.cumsum(strides)])
    if (offsets != starts[:-1]).any() or starts[-1] + index_bytes(layout) != n_bytes:
        raise ShardLostError("its index does not put the chunks where the format does")
    return entries


def _extents(entries: UInt64[np.ndarray, "chunk 2"], present: Bool[np.ndarray, " chunk"]) -> list[_Extent]:
    chunks = np.flatnonzero(present).tolist()
    return [
        _Extent(chunk, start, size, start + size + padding_after(size))
        for chunk, (start, size) in zip(chunks, entries[present].tolist(), strict=True)
    ]


def _batches(extents: list[_Extent]) -> Iterator[list[_Extent]]:
    """Group neighbours to pieces of `PIECE_BYTES`, at least one chunk each."""
    batch: list[_Extent] = []
    for extent in extents:
        if batch and extent.stop - batch[0].start > PIECE_BYTES:
            yield batch
            batch = []
        batch.append(extent)
    if batch:
        yield batch


def _read(file: RangeFile, start: int, stop: int) -> memoryview:
    data = np.empty(stop - start, np.uint8).data
    try:
        n_read = file.read([data], start)
    except OSError as error:
        raise ShardLostError(f"it cannot be read ({error.strerror})") from error
    if n_read < len(data):
        raise ShardLostError("it ends too early")
    return data


def _cut(data: memoryview, extent: _Extent, origin: int) -> memoryview:
    return data[extent.start - origin : extent.stop - origin]


def _find_fault(layout: ArrayLayout, extent: _Extent, view: memoryview) -> Fault | None:
    chunk, checksum = view[: extent.size - CHECKSUM_BYTES], view[extent.size - CHECKSUM_BYTES : extent.size]
    if checksum_bytes(chunk) != checksum:
        return Fault(extent.chunk, "the checksum of a chunk does not match")
    if any(view[extent.size :]):
        return Fault(extent.chunk, "the bytes after a chunk are not zero")
    if layout.codec == "none":
        return None
    try:
        n_bytes = decoded_bytes(chunk)
    except BytesError as error:
        return Fault(extent.chunk, str(error))
    return (
        None if n_bytes == chunk_bytes(layout) else Fault(extent.chunk, f"a chunk decodes to {n_bytes} bytes")
    )


@dataclass(frozen=True, slots=True)
class Metadata:
    """The header of a store, the bytes of the metadata that follows from it, and what is damaged.

    `manifest` is None where it is damaged.
    """

    header: Header
    files: Mapping[str, bytes]
    manifest: Manifest | None
    damages: tuple[Damage, ...]


def inspect_metadata(storage: Storage) -> Metadata:
    """Compare every small file with what it must be; a damaged header is taken from the manifest's copy.

    Raises `InputError` when there is no store, `DamagedStoreError` when neither header can be trusted.
    """
    table, manifest_fault = _read_manifest(storage)
    copy = None if table is None else _header_copy(storage, table)
    header, header_fault = _find_header(storage, copy)
    manifest = None
    if table is not None:
        manifest, manifest_fault = _check_manifest(storage, header, table)
    files = _wanted_files(storage, header, trusted=header_fault is None)
    damages = [Damage(ROOT_METADATA, header_fault)] if header_fault else []
    skip = {ROOT_METADATA} if header_fault else set()
    damages += _document_damages(storage, {name: files[name] for name in files if name not in skip})
    if manifest_fault:
        damages.append(Damage(MANIFEST, manifest_fault))
    return Metadata(header, files, manifest, tuple(damages))


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
    if copy is not None:
        _check_one_store(storage, header, copy)
    return header, None


def _check_one_store(storage: Storage, header: Header, copy: Header) -> None:
    try:
        check_same(header, copy, f"{storage.path}/{MANIFEST}")
    except FingerprintError as error:
        raise DamagedStoreError(
            f"{ROOT_METADATA} and {MANIFEST} of {storage.path} belong to different stores",
            details=error.details,
            hint="put the right one back",
        ) from error


def _read_manifest(storage: Storage) -> tuple[pa.Table | None, str | None]:
    try:
        return unseal(storage.read(MANIFEST)), None
    except FileNotFoundError:
        return None, "it is missing; the same extract command writes it again"
    except (BytesError, OSError) as error:
        return None, str(error)


def _header_copy(storage: Storage, table: pa.Table) -> Header | None:
    """Return the copy of the header; stores of the first release have none."""
    text = read_metadata(table).get(HEADER_COPY)
    return None if text is None else parse_header(json.loads(text), storage.path)


def _check_manifest(storage: Storage, header: Header, table: pa.Table) -> tuple[Manifest | None, str | None]:
    try:
        manifest = manifest_from_table(table, MANIFEST)
    except CosettleError as error:
        return None, error.summary
    if manifest_digest(manifest) != header.fingerprint.manifest_digest:
        return None, "it lists other videos than the store was made from"
    return manifest, None


def _wanted_files(storage: Storage, header: Header, *, trusted: bool) -> dict[str, bytes]:
    """Return the metadata that follows from the header; one whose digest is right stays as it stands."""
    files = metadata_files(header)
    if trusted:
        root = json.loads(files[ROOT_METADATA])
        root["attributes"][ATTRIBUTE] = json.loads(storage.read(ROOT_METADATA))["attributes"][ATTRIBUTE]
        files[ROOT_METADATA] = metadata_bytes(root)
    return files


def _document_damages(storage: Storage, wanted: Mapping[str, bytes]) -> Iterator[Damage]:
    for name, data in wanted.items():
        fault = _document_fault(storage, name, json.loads(data))
        if fault:
            yield Damage(name, fault)


def _document_fault(storage: Storage, name: str, wanted: Mapping[str, Any]) -> str | None:
    try:
        data = storage.read(name)
        found = json.loads(data)
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(found, dict) or _canonical(plain_metadata(found)) != _canonical(wanted):
        return "it is not what the header implies"
    return None if metadata_bytes(found) == data else "its white space is not what Zarr writes"


def _canonical(document: Mapping[str, Any]) -> str:
    """Return text that differs whenever two documents do: as Python objects, 1 and true are equal."""
    return json.dumps(document, sort_keys=True)


def planned_rows(header: Header, manifest: Manifest | None, place: SlotPlace) -> tuple[VideoRows, ...]:
    """Return the encodings planned for a slot; none where the plan cannot be made again."""
    plan = None if manifest is None else _remake_plan(header, manifest)
    if plan is None:
        return ()
    items = enumerate(plan.slot(place.index).encodings, start=place.rows.start)
    groups = groupby(items, key=lambda item: item[1].video_id)
    return tuple(_video_rows(video_id, list(group)) for video_id, group in groups)


def _remake_plan(header: Header, manifest: Manifest) -> Plan | None:
    """Return the plan that gives the header's arrays; slots had their default size or all the same one."""
    patch = header.encoder.get("patch")
    if not isinstance(patch, int):
        return None
    first = header.arrays[0]
    kinds = {"dtype": first.dtype, "codec": first.codec}
    for size in (None, max(layout.slot_encodings for layout in header.arrays)):
        try:
            plan = make_plan(
                manifest, _settings(header), patch=patch, dim=first.n_channels, slot_encodings=size, **kinds
            )
        except (CosettleError, TypeError, ValueError):
            return None
        if plan.arrays == header.arrays:
            return plan
    return None


def _settings(header: Header) -> PairsSettings | FramesSettings:
    plan = header.fingerprint.plan
    kind = PairsSettings if PlanKind(plan["kind"]) is PlanKind.PAIRS else FramesSettings
    return kind(**{item.name: plan[item.name] for item in fields(kind) if item.name in plan})


def _video_rows(video_id: str, items: list[tuple[int, Encoding]]) -> VideoRows:
    frames = tuple(sorted({encoding.frame for _, encoding in items}))
    return VideoRows(video_id, frames, tuple(row for row, _ in items))


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


def verify_storage(storage: Storage, metadata: Metadata, progress: Progress, stop: Event) -> VerifyReport:
    """Check every file of a store whose metadata was inspected."""
    slots = SlotTable(metadata.header.arrays)
    committed, folder_damages = find_committed(storage, slots)
    run = _Verification(storage, metadata, [*metadata.damages, *folder_damages])
    progress.start(len(committed), "slots")
    try:
        for report in map_ahead(run.check, committed, storage.n_readers, stop=stop):
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
    storage: Storage
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


def check_slot(storage: Storage, metadata: Metadata, place: SlotPlace) -> SlotReport:
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


def find_committed(storage: Storage, slots: SlotTable) -> tuple[list[SlotPlace], list[Damage]]:
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


def _check_files(storage: Storage, metadata: Metadata, place: SlotPlace, data: bytes) -> SlotReport:
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


def _is_unchanged(storage: Storage, place: SlotPlace, before: bytes) -> bool:
    try:
        return storage.read(place.part_name) == before
    except OSError:
        return False


def _encodings(place: SlotPlace, part: Part, chunks: set[int]) -> tuple[VideoRows, ...]:
    n_rows = place.layout.chunk_encodings
    rows = [number for number in range(len(part.table)) if number // n_rows in chunks]
    return tuple(video_rows(part.table.take(pa.array(rows, pa.int64()))))


def _strange_files(storage: Storage, metadata: Metadata, slots: SlotTable) -> Iterator[str]:
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
