"""The index of a store: one sealed Parquet file per slot, whose presence commits it; one row per encoding.

A sealed file carries a checksum of itself, so that any flipped byte is found: a metadata entry whose eight
hex digits are the CRC-32C of the whole file computed with these digits as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from awscrt.checksums import crc32c

from cosettle_cache.core.errors import DamagedStoreError, first_line
from cosettle_cache.core.settings import digest
from cosettle_cache.core.tables import encode_parquet, make_table, read_metadata, with_metadata
from cosettle_cache.core.types import ArrayLayout, Role, Slot
from cosettle_cache.store._shards import ShardEncoder
from cosettle_cache.store.format import (
    CHECKSUM_BYTES,
    MOST_VIDEOS,
    PART_SUFFIX,
    PART_VERSION,
    BytesError,
    SlotPlace,
    part_folder,
)
from cosettle_cache.store.header import Header
from cosettle_cache.store.remote import Storage

#: What is wrong with an index part that was written for another place.
FOREIGN = "it is the index part of another store or slot"

_SEAL_KEY = "seal"
_MARK = b"file-crc32c="
_DIGITS = 8
_BLANK = _MARK + b"0" * _DIGITS


def seal(table: pa.Table) -> bytes:
    """Return `table` as a sealed Parquet file; equal tables give equal bytes."""
    blank = encode_parquet(with_metadata(table, {**read_metadata(table), _SEAL_KEY: _BLANK.decode()}))
    start = _digits_start(blank)
    return blank[:start] + b"%08x" % crc32c(blank) + blank[start + _DIGITS :]


def unseal(data: bytes, columns: Sequence[str] | None = None, most_rows: int = MOST_VIDEOS) -> pa.Table:
    """Return the table of a sealed file, or some columns; raise `BytesError` when any byte has changed.

    So it does for more than `most_rows` rows, before it reads them: a few bytes can say billions of rows.
    Without columns (an empty sequence) nothing but the metadata is read.
    """
    start = _digits_start(data)
    blank = data[:start] + b"0" * _DIGITS + data[start + _DIGITS :]
    if data[start : start + _DIGITS] != b"%08x" % crc32c(blank):
        raise BytesError("its checksum does not match")
    try:
        # Thrice as fast as `read_table`, which looks for data sets: a store has thousands of small parts.
        file = pa.parquet.ParquetFile(pa.BufferReader(data))
        if file.metadata.num_rows > most_rows:
            raise BytesError(f"it has {file.metadata.num_rows} rows")
        if columns is not None and not columns:
            table = file.schema_arrow.empty_table()
        else:
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
            table.validate(full=True)  # texts of other bytes than UTF-8 among others
        return with_metadata(table, {k: v for k, v in read_metadata(table).items() if k != _SEAL_KEY})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BytesError(f"it is not Parquet ({first_line(error)})") from error


def _digits_start(data: bytes) -> int:
    # The metadata is near the end of the file, after any video id or statistic that could look like the mark.
    mark = data.rfind(_MARK)
    if mark < 0 or mark + len(_BLANK) > len(data):
        raise BytesError("it has no seal")
    return mark + len(_MARK)


_CROP = ("top", "left", "height", "width")

#: Columns of the index; `error` says why an encoding is absent and is null where it is present.
SCHEMA = pa.schema(
    [
        pa.field("array", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("slot", pa.int64(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("frame", pa.int64(), nullable=False),
        pa.field("view", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        *(pa.field(f"crop_{side}", pa.int32()) for side in _CROP),
        pa.field("flip", pa.bool_(), nullable=False),
        pa.field("shift_ratio", pa.float64()),
        pa.field("shift_row", pa.int32()),
        pa.field("shift_col", pa.int32()),
        pa.field("error", pa.string()),
    ]
)

#: What finds videos and samples and names failures: a third of the rows of a pairs plan, half the columns.
OUTLINE = pa.schema(
    [SCHEMA.field(name) for name in ("array", "row", "slot", "video_id", "frame", "view", "role", "error")]
)
_OUTLINED_ROLES = pa.array([str(Role.A), str(Role.PLAIN)])


@dataclass(frozen=True, slots=True)
class Part:
    """One index part: its rows, bytes and checksums of the shard it commits, and how many encodings failed.

    `checksums` are those of all chunks, zeros for those that failed, and `rows_digest` is that of the planned
    rows: None in parts of version 0.1, as `chunks_checksum` (that of the checksums) is in the oldest.
    """

    table: pa.Table
    shard_bytes: int
    chunks_checksum: int | None
    checksums: bytes | None
    rows_digest: str | None
    n_failed: int


@dataclass(frozen=True, slots=True)
class VideoRows:
    """Encodings of one video in one slot: their frames, ascending, and their rows in the array."""

    video_id: str
    frames: tuple[int, ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.video_id}: frames {_spans(self.frames)} (rows {_spans(self.rows)})"


def encode_part(slot: Slot, errors: Sequence[str | None], shard: ShardEncoder, identity: str) -> bytes:
    """Return the index part of an encoded slot of the store `identity`; `errors`: None for what is there."""
    rows = [
        {"array": str(slot.grid), "row": slot.start + number, "slot": slot.index, "error": error}
        | {name: getattr(encoding, name) for name in ("video_id", "frame", "view", "flip")}
        | {"role": str(encoding.role)}
        | {f"crop_{name}": getattr(encoding.crop, name, None) for name in _CROP}
        | {f"shift_{name}": getattr(encoding.shift, name, None) for name in ("ratio", "row", "col")}
        for number, (encoding, error) in enumerate(zip(slot.encodings, errors, strict=True))
    ]
    table = make_table(rows, SCHEMA)
    metadata = {
        "spec_version": str(PART_VERSION),
        "slot_sha256": _slot_digest(identity, slot.index),
        "rows_sha256": rows_digest(table),
        "shard_bytes": str(shard.n_bytes),
        "chunks_crc32c": f"{shard.chunks_checksum:08x}",
        "chunk_checksums": shard.checksums.hex(),
        "n_failed": str(sum(error is not None for error in errors)),
    }
    return seal(with_metadata(table, metadata))


def rows_digest(table: pa.Table) -> str:
    """Return the digest of what was planned for the rows of an index part."""
    return digest(table.drop_columns(["error"]).to_pylist())


def _slot_digest(identity: str, index: int) -> str:
    return sha256(f"{identity} {index}".encode()).hexdigest()


def read_part(
    storage: Storage, place: SlotPlace, header: Header, columns: Sequence[str] | None = None
) -> Part:
    """Read an index part; raise `BytesError` when it is unreadable, damaged, or of another slot or store."""
    try:
        data = storage.read(place.part_name)
    except OSError as error:
        raise BytesError(f"it cannot be read ({error.strerror or 'absent'})") from error
    return decode_part(data, place, header, columns)


def decode_part(data: bytes, place: SlotPlace, header: Header, columns: Sequence[str] | None = None) -> Part:
    """Return the part of `place` in the store of `header`; raise `BytesError` if it is none.

    `columns` are `array`, `row`, `slot` and others, or none at all: then only the metadata is compared.
    """
    table = unseal(data, columns, len(place.rows))
    metadata = read_metadata(table)
    wanted = pa.schema([SCHEMA.field(name) for name in columns]) if columns else SCHEMA
    if not table.schema.equals(wanted):
        raise BytesError("its columns are not those of an index part")
    if columns is None or columns:
        is_here = np.array_equal(table["row"], place.rows) and (table["slot"].to_numpy() == place.index).all()
        if not is_here or not pc.all(pc.equal(table["array"], str(place.layout.grid))).as_py():
            raise BytesError("its rows are those of another slot")
    # Parts of version 0.1 do not say whose they are, and stores made since have none.
    owner = metadata.get("slot_sha256")
    is_old = owner is None and header.part_version < PART_VERSION
    if not is_old and owner != _slot_digest(header.identity, place.index):
        raise BytesError(FOREIGN)
    n_chunks = -(-len(place.rows) // place.layout.chunk_encodings)
    try:
        checksum = metadata.get("chunks_crc32c")
        part = Part(
            table=table,
            shard_bytes=_number(metadata["shard_bytes"]),
            chunks_checksum=None if checksum is None else int.from_bytes(bytes.fromhex(checksum), "big"),
            checksums=None if is_old else bytes.fromhex(metadata["chunk_checksums"]),
            rows_digest=None if is_old else metadata["rows_sha256"],
            n_failed=_number(metadata["n_failed"]),
        )
    except (KeyError, ValueError) as error:
        raise BytesError(f"its metadata is not that of an index part ({error})") from error
    if part.checksums is not None and len(part.checksums) != CHECKSUM_BYTES * n_chunks:
        raise BytesError("it has checksums of another number of chunks")
    return part


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"{text[:20]!r} is no number")
    return int(text)


def check_rows(part: Part, planned: pa.Table | None) -> None:
    """Raise `BytesError` unless a whole part lists what its slot has by the plan, as far as that is known.

    `planned` has some of its columns. Crops are not compared: other machines may round them otherwise.
    """
    table = part.table
    if part.rows_digest not in (None, rows_digest(table)):
        raise BytesError("its rows are not those that it was made with")
    if part.n_failed != len(table) - table["error"].null_count:
        raise BytesError("it does not say how many of its rows failed")
    if planned is not None and not table.select(planned.column_names).equals(planned):
        raise BytesError("its rows are not what the plan says")


def outline(table: pa.Table) -> pa.Table:
    """Return the first encoding of every sample, every plain encoding, and everything that failed."""
    return table.filter(pc.or_(pc.is_in(table["role"], _OUTLINED_ROLES), pc.is_valid(table["error"])))


def committed_shards(storage: Storage, layout: ArrayLayout) -> list[int]:
    """Return the shards of an array that have an index part, in order: one folder listing."""
    folder = part_folder(layout.grid)
    try:
        names = storage.names(folder)
    except OSError as error:
        raise DamagedStoreError(
            f"the index folder {folder} of {storage.path} cannot be read: {error.strerror}"
        ) from error
    # Exactly as `SlotPlace.part_name` writes it: other names are not part of the store.
    stems = [name.removesuffix(PART_SUFFIX) for name in names if name.endswith(PART_SUFFIX)]
    numbers = [
        int(stem) for stem in stems if stem.isdecimal() and len(stem) < 16 and f"{int(stem):06d}" == stem
    ]
    return sorted(shard for shard in numbers if shard < layout.n_slots)


def video_rows(table: pa.Table) -> tuple[VideoRows, ...]:
    """Return which encodings of which videos are in `table`, rows of an index."""
    columns = table.select(["video_id", "row", "frame"]).to_pylist()
    found = []
    for video_id, group in groupby(columns, key=lambda item: item["video_id"]):
        items = list(group)
        frames = tuple(sorted({item["frame"] for item in items}))
        found.append(VideoRows(video_id, frames, tuple(item["row"] for item in items)))
    return tuple(found)


def _spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `3 to 5, 9`."""
    # Neighbours differ from their place in the list by the same number.
    groups = (list(group) for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]))
    ends = ((group[0][1], group[-1][1]) for group in groups)
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ends)


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file; `slot` and `encodings` where it holds tokens or says which there are."""

    file: str
    reason: str
    slot: int | None = None
    encodings: tuple[VideoRows, ...] = ()

    def lines(self) -> list[str]:
        """Return it for people: the file and what is wrong, then a line per video."""
        where = "" if self.slot is None else f" (slot {self.slot})"
        return [f"{self.file}{where}: {self.reason}", *(f"  {video}" for video in self.encodings)]
