"""The index of a store: one sealed Parquet file per slot, whose presence commits it; one row per encoding.

A sealed file carries a checksum of itself, so that any flipped byte is found: a metadata entry whose eight
hex digits are the CRC-32C of the whole file computed with these digits as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from awscrt.checksums import crc32c

from cosettle_cache.core.errors import DamagedStoreError
from cosettle_cache.core.tables import encode_parquet, make_table, read_metadata, with_metadata
from cosettle_cache.core.types import ArrayLayout, Role, Slot
from cosettle_cache.store.format import PART_SUFFIX, BytesError, SlotPlace, part_folder
from cosettle_cache.store.remote import Storage

_SEAL_KEY = "seal"
_MARK = b"file-crc32c="
_DIGITS = 8
_BLANK = _MARK + b"0" * _DIGITS


def seal(table: pa.Table) -> bytes:
    """Return `table` as a sealed Parquet file; equal tables give equal bytes."""
    blank = encode_parquet(with_metadata(table, {**read_metadata(table), _SEAL_KEY: _BLANK.decode()}))
    start = _digits_start(blank)
    return blank[:start] + b"%08x" % crc32c(blank) + blank[start + _DIGITS :]


def unseal(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table of a sealed file, or some columns; raise `BytesError` when any byte has changed."""
    start = _digits_start(data)
    blank = data[:start] + b"0" * _DIGITS + data[start + _DIGITS :]
    if data[start : start + _DIGITS] != b"%08x" % crc32c(blank):
        raise BytesError("its checksum does not match")
    try:
        # Thrice as fast as `read_table`, which looks for data sets: a store has thousands of small parts.
        file = pa.parquet.ParquetFile(pa.BufferReader(data))
        table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise BytesError(f"it is not Parquet ({error})") from error
    return with_metadata(table, {k: v for k, v in read_metadata(table).items() if k != _SEAL_KEY})


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
    """One index part: its rows, bytes and checksum of the shard it commits, and how many encodings failed.

    `chunks_checksum` is None in the oldest stores.
    """

    table: pa.Table
    shard_bytes: int
    chunks_checksum: int | None
    n_failed: int


@dataclass(frozen=True, slots=True)
class VideoRows:
    """Encodings of one video in one slot: their frames, ascending, and their rows in the array."""

    video_id: str
    frames: tuple[int, ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.video_id}: frames {_spans(self.frames)} (rows {_spans(self.rows)})"


def encode_part(slot: Slot, errors: Sequence[str | None], shard_bytes: int, chunks_checksum: int) -> bytes:
    """Return the index part of `slot`; `errors` has one entry per encoding, None where it is present."""
    rows = [
        {"array": str(slot.grid), "row": slot.start + number, "slot": slot.index, "error": error}
        | {name: getattr(encoding, name) for name in ("video_id", "frame", "view", "flip")}
        | {"role": str(encoding.role)}
        | {f"crop_{name}": getattr(encoding.crop, name, None) for name in _CROP}
        | {f"shift_{name}": getattr(encoding.shift, name, None) for name in ("ratio", "row", "col")}
        for number, (encoding, error) in enumerate(zip(slot.encodings, errors, strict=True))
    ]
    metadata = {
        "spec_version": "1",  # parts are the same in both versions of the format
        "shard_bytes": str(shard_bytes),
        "chunks_crc32c": f"{chunks_checksum:08x}",
        "n_failed": str(sum(error is not None for error in errors)),
    }
    return seal(with_metadata(make_table(rows, SCHEMA), metadata))


def read_part(storage: Storage, place: SlotPlace, columns: Sequence[str] | None = None) -> Part:
    """Read an index part; raise `BytesError` when it is unreadable, damaged, or another slot's."""
    try:
        data = storage.read(place.part_name)
    except OSError as error:
        raise BytesError(f"it cannot be read ({error.strerror or 'absent'})") from error
    return decode_part(data, place, columns)


def decode_part(data: bytes, place: SlotPlace, columns: Sequence[str] | None = None) -> Part:
    """Return the part of `place`, or columns with `row` and `slot`; raise `BytesError` if it is none."""
    table = unseal(data, columns)
    metadata = read_metadata(table)
    wanted = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    if not table.schema.equals(wanted) or not {"shard_bytes", "n_failed"} <= metadata.keys():
        raise BytesError("its columns are not those of an index part")
    if not np.array_equal(table["row"], place.rows) or (table["slot"].to_numpy() != place.index).any():
        raise BytesError("its rows are those of another slot")
    checksum = metadata.get("chunks_crc32c")
    return Part(
        table=table,
        shard_bytes=int(metadata["shard_bytes"]),
        chunks_checksum=None if checksum is None else int(checksum, 16),
        n_failed=int(metadata["n_failed"]),
    )


def outline(table: pa.Table) -> pa.Table:
    """Return the first encoding of every sample, every plain encoding, and everything that failed."""
    return table.filter(pc.or_(pc.is_in(table["role"], _OUTLINED_ROLES), pc.is_valid(table["error"])))


def committed_shards(storage: Storage, layout: ArrayLayout) -> list[int]:
    """Return the shards of an array that have an index part, in order: one folder listing."""
    folder = part_folder(layout.grid)
    try:
        names = set(storage.names(folder))
    except OSError as error:
        raise DamagedStoreError(
            f"the index folder {folder} of {storage.path} cannot be read: {error.strerror}"
        ) from error
    # Exactly as `SlotPlace.part_name` writes it: other names are not part of the store.
    return [shard for shard in range(layout.n_slots) if f"{shard:06d}{PART_SUFFIX}" in names]


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
