"""Manifests: which videos a job is about, one row per video, as Parquet or CSV.

Paths are safe (relative, no `..`) and ids unique. The digest of the rows identifies the list wherever a
number is reported. A published list may leave sizes open; the manifest that a job works from may not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import find_file, name_fault, own_file
from cosettle_cache.core.settings import digest
from cosettle_cache.core.tables import (
    make_table,
    read_metadata,
    read_table,
    table_rows,
    with_metadata,
    write_table,
)
from cosettle_cache.core.types import LabelKind, Manifest, MediaKind, Video

#: Column order and types of a manifest file; the first six are required.
SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("media", pa.string(), nullable=False),
        pa.field("media_kind", pa.string(), nullable=False),
        pa.field("n_frames", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("first_frame", pa.int64()),
        pa.field("fps", pa.float64()),
        pa.field("labels", pa.string()),
        pa.field("label_kind", pa.string()),
        pa.field("labelled_frames", pa.int64()),
        pa.field("n_objects", pa.int32()),
        pa.field("class_name", pa.string()),
        pa.field("content", pa.string()),
        pa.field("stamp", pa.string()),
    ]
)
#: The lists that come with the package.
OURS = "data_manifests/*.parquet"
#: What a published list may not know of a video: 0 in its row, empty in its file.
_MEASURES = ("n_frames", "height", "width")
LISTED_SCHEMA = pa.schema(
    [field.with_nullable(field.nullable or field.name in _MEASURES) for field in SCHEMA]
)
_REQUIRED = [field.name for field in SCHEMA if not field.nullable]
#: What was seen of the media when the row was made.
_SEEN = {"content", "stamp"}
#: Letters of a path below the data root; systems take 4096 with it.
_MOST_PATH = 2000


def _text(cell: Any) -> str:
    if not isinstance(cell, str | int) or isinstance(cell, bool):
        raise ValueError(f"{cell!r} is no text")
    return str(cell)


def _whole(cell: Any) -> int:
    if isinstance(cell, bool) or not isinstance(cell, int | float) or cell % 1 or abs(cell) >= 2**31:
        raise ValueError(f"{cell!r} is no whole number")
    return int(cell)


def _finite(cell: Any) -> float:
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
        raise ValueError(f"{cell!r} is no finite number")
    return float(cell)


#: What makes a cell of a column the field of a `Video`.
_TYPES: dict[str, Callable[[Any], Any]] = {
    **{field.name: {pa.string(): _text, pa.float64(): _finite}.get(field.type, _whole) for field in SCHEMA},
    **{"media_kind": MediaKind, "label_kind": LabelKind},
}


def manifest_table(manifest: Manifest) -> pa.Table:
    """Return the manifest as a table whose file metadata is the provenance; an unknown size is null."""
    rows = [asdict(video) for video in manifest]
    listed = any(not row[name] for row in rows for name in _MEASURES)
    if listed:
        rows = [row | {name: row[name] or None for name in _MEASURES} for row in rows]
    table = make_table(rows, LISTED_SCHEMA if listed else SCHEMA)
    return with_metadata(table, manifest.provenance)


def manifest_from_table(table: pa.Table, origin: str = "the manifest", *, listed: bool = False) -> Manifest:
    """Return the manifest in `table`; raise `InputError` that names the row and what is wrong with it.

    Rows of a published list (`listed`) may leave their number of frames and their size open: those are 0.
    """
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise InputError(
            f"{origin} lacks the column {missing[0]}",
            wanted=", ".join(_REQUIRED),
            found=", ".join(table.column_names),
        )
    rows = table_rows(table, origin)
    if listed:
        rows = [row | {name: row[name] or 0 for name in _MEASURES} for row in rows]
    else:
        _check_measured(rows, origin)
    least = 0 if listed else 1
    videos = tuple(_video(row, number, origin, least) for number, row in enumerate(rows, start=1))
    if not videos:
        raise InputError(f"{origin} lists no videos", wanted="at least one row")
    repeated = [video_id for video_id, count in Counter(v.video_id for v in videos).items() if count > 1]
    if repeated:
        raise InputError(f"{origin} lists {repeated[0]} twice", wanted="unique video_id values")
    return Manifest(videos, read_metadata(table))


def read_manifest(path: str | Path, *, listed: bool = False) -> Manifest:
    """Read a Parquet or CSV manifest, or one of ours by name; only a list (`listed`) may leave sizes open."""
    table = read_table(find_file(Path(path), OURS), SCHEMA)
    return manifest_from_table(table, str(path), listed=listed)


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Write a manifest as Parquet, or as CSV (without provenance) when `path` ends in .csv."""
    write_table(Path(path), manifest_table(manifest))


def manifests_joined(first: Manifest, second: Manifest) -> Manifest:
    """Return the videos of one manifest, then those of another; raise `InputError` for ids in both.

    The provenance is the second's, and says what came first.
    """
    if both := sorted({video.video_id for video in first} & {video.video_id for video in second}):
        raise InputError(
            f"both manifests list {both[0]}", wanted="ids of their own", found=f"{len(both)} in both"
        )
    origin = {**second.provenance, "joined_to": manifest_digest(first)}
    return Manifest((*first, *second), origin)


def leave_out(manifest: Manifest, excluded: Manifest) -> Manifest:
    """Return the videos that `excluded` lacks; raise `InputError` where none is left."""
    there = {video.video_id for video in excluded}
    videos = tuple(video for video in manifest if video.video_id not in there)
    if not videos:
        raise InputError("every video is left out", wanted="videos that --without lacks")
    return Manifest(videos, {**manifest.provenance, "without": manifest_digest(excluded)})


def check_manifest_file(path: Path, inputs: Sequence[Path | None] = ()) -> None:
    """Raise `UsageError` where a command may not write a manifest to `path` (see `own_file`)."""

    def is_manifest(file: Path) -> bool:
        names = {*read_table(file).column_names}
        return names <= {*SCHEMA.names} and names.issuperset(_REQUIRED)

    own_file(path, "a manifest", is_manifest, inputs)


def manifest_digest(manifest: Manifest) -> str:
    """Return the hex SHA-256 of the rows; neither provenance nor what was seen of the media count.

    So a list has one digest, wherever its data lie; contents are compared video by video.
    """
    rows = [asdict(video) for video in manifest]
    return digest([{name: row[name] for name in row.keys() - _SEEN} for row in rows])


def _check_measured(rows: Sequence[Mapping[str, Any]], origin: str) -> None:
    """Raise `InputError` for a list whose videos nobody has measured yet."""
    unknown = [row["video_id"] for row in rows if all(row[name] is None for name in _MEASURES)]
    if unknown:
        raise InputError(
            f"{origin} is a list: it does not say how long and how large {len(unknown)} of its videos are",
            wanted="n_frames, height and width",
            found=f"none of {unknown[0]}",
            hint=f"cosettle-cache manifest build DATASET FOLDER --list {origin}",
        )


def _video(row: Mapping[str, Any], number: int, origin: str, least: int) -> Video:
    empty = [name for name in _REQUIRED if row.get(name) is None]
    if empty:
        raise InputError(f"row {number} of {origin} has no {empty[0]}", wanted=", ".join(_REQUIRED))
    given = {name: row[name] for name in SCHEMA.names if row.get(name) is not None}
    try:
        video = Video(**{name: _TYPES[name](value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number} of {origin} is malformed", found=str(error)) from error
    where = f"row {number} of {origin} ({video.video_id[:80]!r})"
    # The id names the folder that masks go to.
    # The data root itself may be a clip.
    media = None if video.media == "." else video.media
    for path in (video.video_id, media, video.labels):
        fault = None if path is None else path_fault(path)
        if fault:
            raise InputError(f"{where} has an unsafe path: {fault}", found=repr(path))
    if video.n_frames < least or video.first_frame < 0:
        found = f"n_frames={video.n_frames}, first_frame={video.first_frame}"
        wanted = f"n_frames >= {least}, first_frame >= 0"
        raise InputError(f"{where} has no frames", wanted=wanted, found=found)
    if video.height < least or video.width < least:
        found = f"{video.height}x{video.width}"
        raise InputError(f"{where} has no size", wanted="positive pixels", found=found)
    return video


def path_fault(path: str) -> str | None:
    """Return why a manifest may not hold `path`, None where it may: relative, in normal form, printable.

    So two paths never name one file. Colons and backslashes are letters as others are, but for a drive.
    """
    if re.match(r"[A-Za-z]:[\\/]", path):
        return "it begins with a drive"
    return name_fault(path) or (f"it has more than {_MOST_PATH} letters" if len(path) > _MOST_PATH else None)
