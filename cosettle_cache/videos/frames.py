"""Decoding to RGB uint8: frame folders through Pillow, video files through PyAV; and rules for image sizes.

A frame is addressed by its index in the manifest row's own range. Everything that cannot be decoded whole
raises `MediaError` with the file's name; nothing is padded, repeated or skipped. A size rule is text, so that
it can stand in a protocol, a fingerprint and on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.types import Grid, MediaKind, Video

_FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".avi", ".gif", ".webm", ".mov", ".m4v"}
    | {".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}
)

#: What the decoders raise for files that are broken, something else, or absurdly large.
_UNDECODABLE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError, av.FFmpegError)

Image8 = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a folder or file of frames holds; `fps` is frames per second where the container says."""

    kind: MediaKind
    n_frames: int
    height: int
    width: int
    fps: float | None


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts `2.jpg` before `10.jpg`."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)


def frame_names(folder: str | Path) -> list[str]:
    """Return the image files of `folder` in natural order; raise `MediaError` when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MediaError(f"{folder} does not exist", wanted="a folder of frames")
    names = [entry.name for entry in folder.iterdir() if entry.suffix.lower() in _FRAME_SUFFIXES]
    if not names:
        suffixes = " ".join(sorted(_FRAME_SUFFIXES))
        raise MediaError(f"{folder} holds no frames", wanted=f"image files ({suffixes})", found="none")
    return sorted(names, key=natural_key)


def probe(path: str | Path) -> MediaInfo:
    """Return what `path` holds, without decoding more than its first frame.

    Frames of a video file are counted by its packets. Raises `MediaError` for a missing, empty, undecodable
    file and for a folder whose frames differ in size.
    """
    path = Path(path)
    if path.is_dir():
        sizes = {name: image_size(path / name) for name in frame_names(path)}
        first, (height, width) = next(iter(sizes.items()))
        for name, size in sizes.items():
            if size != (height, width):
                raise MediaError(
                    f"{path} mixes frame sizes",
                    wanted=f"{height}x{width} as in {first}",
                    found=f"{size[0]}x{size[1]} in {name}",
                )
        return MediaInfo(MediaKind.FRAMES, len(sizes), height, width, None)
    with decode_errors(path), av.open(str(path)) as container:
        stream = _video_stream(container, path)
        n_frames = sum(1 for packet in container.demux(stream) if packet.size)
        rate = stream.average_rate
    height, width, _ = next(_decode_file(path)).shape
    return MediaInfo(MediaKind.FILE, n_frames, height, width, float(rate) if rate else None)


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file; raise `MediaError` when it is missing or no image."""
    with decode_errors(path), Image.open(path) as image:
        return image.height, image.width


def iter_frames(
    video: Video, data_root: str | Path, indices: Sequence[int] | None = None
) -> Iterator[Image8]:
    """Yield the frames `indices` (ascending; default all of the row), each `[height width 3]` RGB.

    Raises `MediaError` when a frame is missing, cannot be decoded, or differs from the row's size.
    """
    wanted = range(video.n_frames) if indices is None else indices
    if len(wanted) and not 0 <= min(wanted) <= max(wanted) < video.n_frames:
        raise MediaError(
            f"{video.media} has no frame {max(wanted)}",
            wanted=f"0 to {video.n_frames - 1}",
            found=str(max(wanted)),
        )
    path = Path(data_root) / video.media
    absolute = [video.first_frame + index for index in wanted]
    source = _folder_frames if video.media_kind is MediaKind.FRAMES else _file_frames
    for image in source(path, absolute):
        if image.shape[:2] != (video.height, video.width):
            raise MediaError(
                f"{path} has a frame of another size",
                wanted=f"{video.height}x{video.width} as in the manifest",
                found=f"{image.shape[0]}x{image.shape[1]}",
                hint="a video must keep one size; rebuild the manifest if the media changed",
            )
        yield image


class FrameReader:
    """Frames of one video for callers that come back for later frames: a video file is not decoded anew.

    Threads may share it; those that read a video file take turns.
    """

    def __init__(self, video: Video, data_root: Path) -> None:
        self.video = video
        self._lock = Lock()
        self._data_root = data_root
        self._frames, self._next = iter_frames(video, data_root), 0

    def read(self, indices: Sequence[int]) -> Iterator[Image8]:
        """Yield the frames `indices` (ascending); see `iter_frames` for the errors."""
        if self.video.media_kind is MediaKind.FRAMES:
            yield from iter_frames(self.video, self._data_root, indices)
            return
        with self._lock:
            for index in indices:
                yield self._seek(index)

    def _seek(self, index: int) -> Image8:
        if index < self._next:
            self._frames, self._next = iter_frames(self.video, self._data_root), 0
        for image in self._frames:
            self._next += 1
            if self._next == index + 1:
                return image
        found = f"{self._next} frames"
        raise MediaError(f"{self.video.media} ends early", wanted=f"frame {index}", found=found)


def _folder_frames(folder: Path, indices: Sequence[int]) -> Iterator[Image8]:
    names = frame_names(folder)
    for index in indices:
        if index >= len(names):
            raise MediaError(f"{folder} ends early", wanted=f"frame {index}", found=f"{len(names)} frames")
        with decode_errors(folder / names[index]), Image.open(folder / names[index]) as image:
            frame = np.asarray(image.convert("RGB"))
        yield frame


def _file_frames(path: Path, indices: Sequence[int]) -> Iterator[Image8]:
    pending = list(reversed(indices))
    number = -1
    for number, image in enumerate(_decode_file(path)):
        while pending and pending[-1] == number:
            pending.pop()
            yield image
        if not pending:
            return
    if pending:
        raise MediaError(f"{path} ends early", wanted=f"frame {pending[-1]}", found=f"{number + 1} frames")


def _decode_file(path: Path) -> Iterator[Image8]:
    with decode_errors(path), av.open(str(path)) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        frame = None
        for frame in container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            turns = round(getattr(frame, "rotation", 0) / 90) % 4
            yield np.ascontiguousarray(np.rot90(image, turns)) if turns else image
        if frame is None:
            raise MediaError(
                f"{path} holds no frames", wanted="a video with at least one frame", found="none"
            )


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    if not container.streams.video:
        raise MediaError(f"{path} has no video stream", wanted="a video file", found="other streams only")
    return container.streams.video[0]


@contextmanager
def decode_errors(path: Path) -> Iterator[None]:
    """Turn whatever decoding `path` raises into a `MediaError` that names it."""
    # FileNotFoundError first: PyAV's own errors derive from OSError as well.
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise MediaError(f"{path} is empty", wanted="an image or a video", found="0 bytes")
        yield
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist", hint="cosettle-cache manifest check MANIFEST") from error
    except _UNDECODABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MediaError(f"{path} cannot be decoded", found=reason) from error


def resolve_size(rule: str, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that a size rule gives for frames of `height` x `width`.

    Rules: `480x880` (exactly, aspect ignored), `native`, `short:480/64` (short side 480, long side floored
    to a multiple of 64, as DINO does), `long:880/64` (long side 880, short side floored, as T-CORE does for
    VIP).
    """
    if rule == "native":
        return height, width
    side, _, numbers = rule.rpartition(":")
    try:
        first, second = (int(number) for number in numbers.split("/" if side else "x"))
        if min(first, second) < 1 or side not in ("", "short", "long"):
            raise ValueError
    except ValueError as error:
        wanted = "HEIGHTxWIDTH, native, short:S/M or long:S/M"
        raise UsageError(f"{rule!r} is no size", wanted=wanted, found=rule) from error
    if not side:
        return first, second
    anchor, other = sorted((height, width), reverse=side == "long")
    fitted = other * first // anchor // second * second
    return (first, fitted) if height == anchor else (fitted, first)


def check_grid(height: int, width: int, patch: int, what: str, hint: str = "--size {below}") -> Grid:
    """Return the grid of an image size in pixels; raise `InputError` if the patch does not divide it.

    `what` is encoded at that size; `{below}` and `{above}` in `hint` become the nearest sizes that fit.
    """
    if height >= patch and width >= patch and height % patch == 0 and width % patch == 0:
        return Grid(height // patch, width // patch)
    below = f"{max(height // patch, 1) * patch}x{max(width // patch, 1) * patch}"
    above = f"{max(-(-height // patch), 1) * patch}x{max(-(-width // patch), 1) * patch}"
    raise InputError(
        f"{what} would be encoded at a size that is not a multiple of the patch",
        wanted=f"multiples of {patch} pixels",
        found=f"{height}x{width}",
        hint=hint.format(below=below, above=above),
    )
