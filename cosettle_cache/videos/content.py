"""What the media of a manifest row held when it was made: a digest of all bytes, and a cheap sign of change.

While names, sizes and times of a video's files are as recorded (its stamp), the bytes are not read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.files import sha256_file
from cosettle_cache.core.parallel import map_ahead, share_of_cores
from cosettle_cache.core.settings import digest
from cosettle_cache.core.types import Manifest, Video
from cosettle_cache.videos.frames import decode_errors, frame_names

#: Videos that an error names.
_LISTED = 8


def media_stamp(path: Path) -> str:
    """Return the bytes that a clip's files have together, and a digest of their names, sizes and times."""
    with decode_errors(path):
        found = [(file.name, file.stat()) for file in _files(path)]
    lines = [[name, status.st_size, status.st_mtime_ns] for name, status in found]
    return f"{sum(status.st_size for _, status in found)}-{digest(lines)[:16]}"


def media_content(path: Path) -> str:
    """Return the hex SHA-256 of a video file, or of the digests of a folder's frames in order."""
    with decode_errors(path):
        if not path.is_dir():
            return sha256_file(path)
        return hashlib.sha256("".join(map(sha256_file, _files(path))).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return [path / name for name in frame_names(path)] if path.is_dir() else [path]


def present_row(video: Video, data_root: Path, *, read: bool | None = None) -> Video:
    """Return a row with its media's stamp of today, and its content of today where bytes are read.

    By default they are where content is known and the stamp differs. Unreadable media leave the row as it is.
    """
    path = data_root / video.media
    try:
        stamp = media_stamp(path)
        if read is None:
            read = video.content is not None and stamp != video.stamp
        return replace(video, stamp=stamp, content=media_content(path) if read else video.content)
    except MediaError:  # decoding will say why
        return video


def is_other(recorded: Video, present: Video) -> bool:
    """Say whether a row's media are known to be others than recorded: by content, else by bytes in all."""
    if recorded.content and present.content:
        return recorded.content != present.content
    sizes = [(video.stamp or "").partition("-")[0] for video in (recorded, present)]
    return all(sizes) and sizes[0] != sizes[1]


def look_again(
    manifest: Manifest, data_root: Path, *, read: bool = False, progress: Progress = SILENT
) -> tuple[Manifest, list[str]]:
    """Return the manifest with the stamps and contents of today, and the videos whose media are others.

    Bytes are read with `read`, and of videos whose stamp has changed; `progress` is of these.
    """
    n_threads = share_of_cores(1)
    look = partial(present_row, data_root=data_root)
    rows = list(map_ahead(partial(look, read=False), manifest, n_threads))
    pairs = list(zip(manifest, rows, strict=True))
    places = [
        place for place, (old, new) in enumerate(pairs) if read or (old.content and old.stamp != new.stamp)
    ]
    if places:
        with counting(progress, len(places), "videos") as advance:
            found = map_ahead(partial(look, read=True), [rows[place] for place in places], n_threads)
            for place, row in zip(places, found, strict=True):
                rows[place] = row
                advance()
    changed = [old.video_id for old, row in zip(manifest, rows, strict=True) if is_other(old, row)]
    return replace(manifest, videos=tuple(rows)), changed


def name_changed(what: str, video_ids: Sequence[str]) -> str:
    """Return the sentence that names the videos whose media are not those that `what` was made from."""
    more = f" and {len(video_ids) - _LISTED} others" if len(video_ids) > _LISTED else ""
    return f"{what} was made from other media of {', '.join(video_ids[:_LISTED])}{more} than there are now"
