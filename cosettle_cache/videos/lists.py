"""Lists of videos as benchmarks publish them, and the manifests that they make without any data at hand.

A list is text (one name, or a pair of image and label paths, a line), a CSV file with sizes, or a manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pyarrow as pa

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import find_file, read_text, sha256_file
from cosettle_cache.core.tables import read_table, table_rows
from cosettle_cache.core.types import Manifest, MediaKind, Video
from cosettle_cache.videos.datasets import DATASETS, listable
from cosettle_cache.videos.manifest import OURS

#: Folders that begin the place of a clip; what follows is its name.
_MEDIA_FOLDERS = ("Images", "Rename_Images", "JPEGImages")
_LABEL_FOLDERS = ("Category_ids", "Annotations", "joint_positions")

#: Columns that may name a clip, 0001 among others.
_NAMES = pa.schema([(column, pa.string()) for column in ("video_id", "sequence", "name")])

#: Columns of frames, height, width and objects in a manifest, and in a list with a header.
_SIZE_COLUMNS = (("n_frames", "frames"), ("height",), ("width",), ("n_objects", "objects"))


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a list: the clip's name, its two paths where given, and what is said of its size."""

    name: str
    media: str | None = None
    labels: str | None = None
    n_frames: int = 0
    height: int = 0
    width: int = 0
    n_objects: int = 0


def read_list(path: str | Path) -> tuple[Listed, ...]:
    """Return the lines of a list, a file or ours by name; raise `InputError` for an empty or odd one."""
    path = find_file(Path(path), OURS)
    if path.suffix in (".csv", ".parquet"):
        listed = [_from_row(row, path) for row in table_rows(read_table(path, _NAMES), path)]
    else:
        listed = [_from_line(line, path) for line in read_lines(path)]
    if not listed:
        raise InputError(f"{path} lists no videos", wanted="one name per line")
    return tuple({item.name: item for item in listed}.values())


def list_manifest(
    dataset: str, path: str | Path, *, folder: str | None, split: str | None, source: str
) -> Manifest:
    """Return the manifest of a list: rows at the data set's usual places under `folder`, unknown sizes 0.

    `source` says in words where the list comes from; it stands in the provenance with the list's digest.
    Raises `UsageError` for a data set whose places are not known.
    """
    if dataset not in listable():
        raise UsageError(
            f"no list makes a manifest of {dataset}", wanted=", ".join(listable()), found=dataset
        )
    row, path = DATASETS[dataset], find_file(Path(path), OURS)
    root = PurePosixPath(folder or row.list_folder or next(iter(row.folders), dataset))
    split = split or row.list_split or row.split or ""
    videos = tuple(
        Video(
            video_id=item.name,
            media=str(root / row.media.format(name=item.name)),
            media_kind=MediaKind.FRAMES,
            n_frames=item.n_frames,
            height=item.height,
            width=item.width,
            dataset=dataset,
            split=split,
            labels=str(root / row.labels.format(name=item.name)) if row.labels else None,
            label_kind=row.label_kind,
            labelled_frames=item.n_frames if row.labels else 0,
            n_objects=item.n_objects,
            class_name=item.name.rpartition("/")[0] or None,
        )
        for item in read_list(path)
    )
    told = {"list": path.name, "list_sha256": sha256_file(path), "source": source}
    provenance = made_today(dataset, str(root), split, **told)
    return Manifest(videos, {key: text for key, text in provenance.items() if text})


def made_today(builder: str, root: str, split: str, **more: str) -> dict[str, str]:
    """Return the provenance of a manifest that is made now."""
    date = datetime.now(UTC).date().isoformat()
    return {"builder": builder, "root": root, "split": split, **more, "date": date}


def read_lines(path: Path) -> list[str]:
    """Return the stripped lines of a UTF-8 text that are not blank; raise `InputError` for other files."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _from_line(line: str, path: Path) -> Listed:
    """Read a name, which may have spaces, or an image folder and its labels in either order."""
    # Labels are a MATLAB file or lie under one of their folders; media are the other of the two.
    labels = [
        part
        for part in line.split()
        if part.endswith(".mat") or {*_LABEL_FOLDERS} & {*PurePosixPath(part).parts}
    ]
    if not labels:
        return Listed(line)
    media = [part for part in line.split() if part not in labels]
    if len(labels) > 1 or len(media) > 1:
        raise InputError(f"{path} is not a list of videos", wanted="one name or two paths a line", found=line)
    if not media:
        return Listed(line)
    places = PurePosixPath(media[0]).parts
    for folder in _MEDIA_FOLDERS[:2]:
        if folder in places[:-1]:  # what follows is a class and a clip, or a clip alone
            return Listed("/".join(places[places.index(folder) + 1 :]), media[0], labels[0])
    return Listed(places[-1], media[0], labels[0])


def _from_row(row: dict[str, object], path: Path) -> Listed:
    name = next((row[column] for column in _NAMES.names if row.get(column)), None)
    if name is None:
        found = ", ".join(row)
        raise InputError(f"{path} names no videos", wanted="a column video_id or sequence", found=found)
    try:
        # A row says a size under one of the names, or not at all.
        sizes = [[row[name] for name in names if row.get(name) is not None] for names in _SIZE_COLUMNS]
        return Listed(str(name), None, None, *(int(str(found[0])) if found else 0 for found in sizes))
    except ValueError as error:
        raise InputError(f"{path} has a size that is no number", found=error) from error


def locate(root: Path, listed: str) -> Path:
    """Return the place under `root` of a path in a list, which may begin with its author's own folders."""
    path = PurePosixPath(listed)
    starts = [index for index, part in enumerate(path.parts) if part in (*_MEDIA_FOLDERS, *_LABEL_FOLDERS)]
    if path.is_absolute() or ".." in path.parts or not (root / listed).exists():
        path = PurePosixPath(*path.parts[starts[0] :]) if starts else PurePosixPath(path.name)
    return root / path
