"""Decoding to RGB uint8: frame folders and images through Pillow, video files through PyAV; and size rules.

A frame is addressed by its index in the manifest row's own range. Everything that cannot be decoded whole
raises `MediaError` with the file's name; nothing is padded, repeated or skipped. Images are opened by
`open_image` and videos by `open_video` alone: regular files in the formats named there. A size rule is text,
so that it can stand in a protocol, a fingerprint and on the command line.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path, PurePath
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps

from cosettle_cache.core.errors import CosettleError, InputError, MediaError, UsageError, first_line
from cosettle_cache.core.files import name_fault
from cosettle_cache.core.settings import MOST_PIXELS
from cosettle_cache.core.types import Grid, MediaKind, Video

try:
    import av
    from av.sidedata.sidedata import Type
    from av.stream import Disposition
except ImportError:  # folders of images, stores and all that works on these do without
    av = None  # type: ignore[assignment]

_FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".avif"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".avi", ".gif", ".webm", ".mov", ".m4v"}
    | {".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp", ".ogv"}
)

#: Folders and files that Windows, macOS and Synology leave among others.
LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})
#: The name of a frame that is a time.
_DECIMAL = re.compile(r"\d+(\.\d+)?")

#: Containers that are read, by the names that FFmpeg gives them.
_CONTAINERS = (
    *("mov", "matroska", "avi", "gif", "mpeg", "mpegts", "mpegvideo", "asf", "flv", "ogg", "webm"),
    *("h264", "hevc", "m4v", "mp4", "3gp", "ivf", "dv", "mxf"),
)
#: Those whose header says how long the file is, and how much of it may be missing.
_HEADED = frozenset({"mov", "matroska", "avi", "flv"})
_SLACK_SECONDS, _SLACK_SHARE = 0.5, 0.05

#: Codecs that start anew at their key frames.
_SEEKABLE = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "ffv1"})
#: Frames to go from which on looking for a key frame is worth the while.
_FAR = 48
#: EXIF's tag of how a picture is held; from 5 on rows are columns.
_ORIENTATION = 0x0112
#: TIFF's tags of how many columns and rows are stored.
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257

#: Pixels of a frame that are decoded: of images Pillow sees to it.
_MOST_PIXELS = 178_956_970

Image8 = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a folder or file of frames holds; `fps` is frames per second where the container says."""

    kind: MediaKind
    n_frames: int
    height: int
    width: int
    fps: float | None


def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Return a sort key that puts `2.jpg` before `10.jpg`, and names of equal numbers in one fixed order."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts), name


def is_hidden(name: str) -> bool:
    """Say whether a name is hidden, or one that systems leave beside files (`._1.jpg`, `Thumbs.db`)."""
    return name.startswith(".") or name in LEFT_BEHIND


def is_image_name(name: str) -> bool:
    """Say whether the name is an image file's that can be a frame."""
    return PurePath(name).suffix.lower() in _FRAME_SUFFIXES and not is_hidden(name)


def frame_names(folder: str | Path) -> list[str]:
    """Return the image files of `folder` in natural order; names that are all decimals in that of numbers.

    Raises `MediaError` when there are none, when two are one frame (`1.jpg`, `1.png`), and for one that is no
    file or has a name that nothing else could be called after.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MediaError(f"{folder} does not exist", wanted="a folder of frames")
    with decode_errors(folder), os.scandir(folder) as found:
        entries = {entry.name: entry for entry in found if is_image_name(entry.name)}
    if not entries:
        suffixes = " ".join(sorted(_FRAME_SUFFIXES))
        raise MediaError(f"{folder} holds no frames", wanted=f"image files ({suffixes})", found="none")
    stems: dict[str, str] = {}
    for name, entry in entries.items():
        stem, fault = PurePath(name).stem, name_fault(name)
        if fault or not (entry.is_file(follow_symlinks=False) or (folder / name).is_file()):
            raise MediaError(f"{folder} holds {name!r}, which is no frame", found=fault or "no file")
        if stem in stems:
            both = ", ".join(sorted((name, stems[stem])))
            raise MediaError(f"{folder} holds frame {stem} twice", wanted="one file a frame", found=both)
        stems[stem] = name
    if all(map(_DECIMAL.fullmatch, stems)):
        return [stems[stem] for stem in sorted(stems, key=lambda stem: (Decimal(stem), stem))]
    return sorted(entries, key=natural_key)


def probe(path: str | Path, *, exact: bool = True) -> MediaInfo:
    """Return what `path` holds; frames of a video file are those that its decoder gives.

    Without `exact` only the first is decoded, and packets are counted: as many or more. Raises `MediaError`
    for a missing, empty, undecodable, damaged or cut file and for a folder whose frames differ in size.
    """
    path = Path(path)
    if not path.is_dir():
        if is_image_name(path.name):
            return MediaInfo(MediaKind.IMAGE, 1, *image_size(path), None)
        return _probe_file(path, exact)
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


def _probe_file(path: Path, exact: bool) -> MediaInfo:
    n_frames, n_packets, end, image = 0, 0, 0.0, None
    with open_video(path) as (container, stream):
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            n_packets += packet.size > 0
            for frame in packet.decode() if exact or image is None else ():
                assert isinstance(frame, av.VideoFrame)
                _check_whole(frame, path)
                n_frames += 1
                image = _to_rgb(frame) if image is None else image
        # Elsewhere the duration is an estimate.
        if _HEADED & {*container.format.name.split(",")} and container.duration is not None:
            duration = container.duration / av.time_base
            held = end - (container.start_time or 0) / av.time_base
            if held < duration - max(_SLACK_SECONDS, _SLACK_SHARE * duration):
                raise MediaError(
                    f"{path} is cut short",
                    wanted=f"{duration:.1f} s, as its header says",
                    found=f"{held:.1f} s",
                    hint="ffmpeg -i FILE -c copy NEW writes a file whose header says what is left",
                )
        rate = stream.average_rate
    if image is None:
        raise MediaError(f"{path} holds no frames", wanted="a video with at least one frame", found="none")
    height, width, _ = image.shape
    n_frames = n_frames if exact else n_packets
    return MediaInfo(MediaKind.FILE, n_frames, height, width, float(rate) if rate else None)


def check_size(title: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise `MediaError` that says `title` unless two (height, width) are equal."""
    if tuple(found) != tuple(wanted):
        texts = ["x".join(map(str, size)) for size in (wanted, found)]
        raise MediaError(title, wanted=texts[0], found=texts[1])


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image as it is shown; raise `MediaError` when it is missing or none."""
    with open_image(path) as image:
        # Pillow would decode a whole PNG to look for an orientation behind the pixels.
        is_looked_up = image.format != "PNG" or "exif" in image.info
        turned = is_looked_up and image.getexif().get(_ORIENTATION, 1) >= 5
        # Newer Pillow opens a TIFF at the size that it is shown at, older at that of its rows.
        rows = getattr(image, "tag_v2", {}).get
        height, width = rows(_TIFF_HEIGHT, image.height), rows(_TIFF_WIDTH, image.width)
        return (width, height) if turned else (height, width)


def iter_frames(
    video: Video, data_root: str | Path, indices: Sequence[int] | None = None
) -> Iterator[Image8]:
    """Yield the frames `indices` (ascending; default all of the row), each `[height width 3]` RGB.

    Raises `MediaError` when a frame is missing, cannot be decoded, or differs from the row's size.
    """
    yield from FrameReader(video, Path(data_root)).read(range(video.n_frames) if indices is None else indices)


class FrameReader:
    """Frames of a video for callers that come back for later ones; threads that read a file take turns."""

    def __init__(self, video: Video, data_root: Path) -> None:
        self.video = video
        self._lock = Lock()
        self._path = data_root / video.media
        self._file = _VideoFile(self._path, video) if video.media_kind is MediaKind.FILE else None

    def read(self, indices: Sequence[int]) -> Iterator[Image8]:
        """Yield the frames `indices` (ascending); see `iter_frames` for the errors."""
        video = self.video
        if len(indices) and not 0 <= min(indices) <= max(indices) < video.n_frames:
            raise MediaError(
                f"{video.media} has no frame {max(indices)}",
                wanted=f"0 to {video.n_frames - 1}",
                found=str(max(indices)),
            )
        absolute = [video.first_frame + index for index in indices]
        for image in self._stills(absolute) if self._file is None else self._decode(absolute):
            if image.shape[:2] != (video.height, video.width):
                raise MediaError(
                    f"{self._path} has a frame of another size",
                    wanted=f"{video.height}x{video.width} as in the manifest",
                    found=f"{image.shape[0]}x{image.shape[1]}",
                    hint="a video must keep one size; rebuild the manifest if the media changed",
                )
            yield image

    def _stills(self, indices: Sequence[int]) -> Iterator[Image8]:
        """Yield images of a folder, which is listed, or the one image that the row is about."""
        path = self._path
        is_image = self.video.media_kind is MediaKind.IMAGE
        folder, names = (path.parent, [path.name]) if is_image else (path, frame_names(path))
        for index in indices:
            if index >= len(names):
                raise MediaError(f"{path} ends early", wanted=f"frame {index}", found=f"{len(names)} frames")
            with open_image(folder / names[index]) as image:
                frame = _read_rgb(image, names[index])
            yield frame

    def _decode(self, indices: Sequence[int]) -> Iterator[Image8]:
        assert self._file is not None
        with self._lock:
            for index in indices:
                yield self._file.read(index)


def _read_rgb(image: Image.Image, name: str) -> Image8:
    """Return an image as it is shown; of 16 bits the high 8, as Pillow reads colours of 16 bits."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise MediaError(f"{name} has numbers for pixels", wanted="8 or 16 bits a channel", found=image.mode)
    return np.asarray(image.convert("RGB"))


class _VideoFile:
    """Frames of a video file by number, decoded forwards; only those asked for become RGB.

    Where it is certain to give the same frames, it goes on from a key frame instead of all frames between.
    """

    def __init__(self, path: Path, video: Video) -> None:
        self._path = path
        # The manifest has counted what the decoder gives: of every packet one frame, or not.
        self._n_frames = 0 if video.first_frame else video.n_frames
        self._index: _KeyIndex | None = None
        self._restart()

    def _restart(self) -> None:
        self._frames, self._number = _decode(self._path), -1
        self._frame: av.VideoFrame | None = None

    def read(self, index: int) -> Image8:
        """Return frame `index`; raise `MediaError` for a file that is damaged or ends before it."""
        if index < self._number:
            self._restart()
        if index - self._number > _FAR and self._n_frames:
            self._jump(index)
        while self._number < index:
            frame = next(self._frames, None)
            number = self._number + 1
            if self._index is not None and not _is_at(frame, self._index.times[number]):
                # The key frame was no place to begin at: decode as if there were none.
                self._index, self._n_frames = None, 0
                self._restart()
                continue
            if frame is None:
                raise MediaError(
                    f"{self._path} ends early", wanted=f"frame {index}", found=f"{number} frames"
                )
            _check_whole(frame, self._path)
            self._frame, self._number = frame, number
        assert self._frame is not None
        with decode_errors(self._path):
            return _to_rgb(self._frame)

    def _jump(self, index: int) -> None:
        """Go to the last key frame up to `index`, if it lies ahead."""
        self._index = self._index or _index_keys(self._path, self._n_frames)
        if self._index is None:
            self._n_frames = 0
            return
        key = self._index.keys[bisect_right(self._index.keys, index) - 1]
        if key > self._number + 1:
            self._frames, self._number = _decode(self._path, self._index.times[key]), key - 1


@dataclass(frozen=True, slots=True)
class _KeyIndex:
    """When each frame is shown, in units of the stream, and which frames are key frames."""

    times: Sequence[int]
    keys: Sequence[int]


def _index_keys(path: Path, n_frames: int) -> _KeyIndex | None:
    """Return the index of a file of `n_frames` frames; None where packets do not say which frame is which."""
    times: list[int] = []
    keys: set[int] = set()
    with open_video(path) as (container, stream):
        if stream.codec_context.name not in _SEEKABLE:
            return None
        for packet in container.demux(stream):
            if packet.size:
                if packet.pts is None or packet.is_discard:
                    return None
                times.append(packet.pts)
                keys |= {packet.pts} if packet.is_keyframe else set()
    times.sort()
    if len(times) != n_frames or len(set(times)) != n_frames or times[0] not in keys:
        return None
    return _KeyIndex(times, [number for number, time in enumerate(times) if time in keys])


def _decode(path: Path, since: int | None = None) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video file, from the key frame shown at `since` on."""
    frame = None
    with open_video(path) as (container, stream):
        if since is not None:
            container.seek(since, stream=stream)
        for frame in container.decode(stream):
            if since is None or (frame.pts is not None and frame.pts >= since):
                yield frame
        if frame is None:
            raise MediaError(
                f"{path} holds no frames", wanted="a video with at least one frame", found="none"
            )


def _is_at(frame: av.VideoFrame | None, time: int) -> bool:
    return frame is not None and frame.pts == time and not frame.is_corrupt


def _check_whole(frame: av.VideoFrame, path: Path) -> None:
    if frame.is_corrupt:
        at = "" if frame.time is None else f" at {frame.time:.2f} s"
        raise MediaError(f"{path} is damaged", wanted="frames that decode whole", found=f"a damaged one{at}")


def _to_rgb(frame: av.VideoFrame) -> Image8:
    """Return a frame as it is shown: turned by right angles and mirrored as its display matrix says."""
    image = frame.to_ndarray(format="rgb24")
    side_data: Any = frame.side_data  # the stubs of some versions of PyAV are too narrow
    if Type.DISPLAYMATRIX not in side_data:
        return image
    matrix = bytes(side_data[Type.DISPLAYMATRIX])
    # x' = a x + c y and y' = b x + d y, so a file's rows become columns where b outweighs a.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
    if abs(b) > abs(a):
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def check_av(path: Path) -> None:
    """Raise `MediaError` where the package is missing that reads and writes films."""
    if av is None:
        raise MediaError(f"{path} is a film, and the package av is not installed", hint="pip install av")


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a video file and its stream: the default one, of several the largest, never a cover picture.

    Playlists and scripts, which would open further files, are none. `decode_errors` says what raises.
    """
    check_av(path)
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_CONTAINERS)}
    # The prefix keeps the part of a name before a colon from being a protocol.
    with decode_errors(path), av.open(f"file:{path}", options=options) as container:
        streams = [s for s in container.streams.video if s.codec_context]  # None: nobody knows the codec
        films = [s for s in streams if not s.disposition & Disposition.attached_pic]
        if not films:
            raise MediaError(f"{path} has no video stream", wanted="a video file", found="other streams only")
        stream = max(films, key=lambda s: (s.disposition & Disposition.default, s.width * s.height))
        # Where a decoder conceals damage, its threads lose the mark of it, always or now and then; so such a
        # file has one thread, and many files have many.
        is_concealing = stream.codec_context.name not in ("hevc", "vp8", "vp9", "av1")
        stream.thread_type = "NONE" if is_concealing else "AUTO"
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        yield container, stream


@contextmanager
def open_image(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file, whatever its name, in one of a few formats; `decode_errors` says what raises."""
    with decode_errors(path), Image.open(path, formats=_image_formats()) as image:
        yield image


@cache
def _image_formats() -> tuple[str, ...]:
    # Pillow would try all that it knows, and start another program for PostScript.
    Image.init()
    return tuple(name for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF") if name in Image.OPEN)


@contextmanager
def decode_errors(path: Path, fault: str = "cannot be decoded", wanted: str | None = None) -> Iterator[None]:
    """Turn whatever decoding `path` raises into a `MediaError` that names it and its `fault`.

    So is a pipe, a device or a socket, before it is opened.
    """
    # FileNotFoundError first: PyAV's own errors derive from OSError as well.
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{path} is not a file", wanted="an image or a video")
        if status.st_size == 0 and not stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{path} is empty", wanted="an image or a video", found="0 bytes")
        yield
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist", hint="cosettle-cache manifest check MANIFEST") from error
    except CosettleError:
        raise
    except Exception as error:  # decoders raise anything for files that are broken or absurdly large
        raise MediaError(f"{path} {fault}", wanted=wanted, found=first_line(error)) from error


#: Patches along the short side of DINOv3's sizes: 480, 960 and 1440 pixels for a patch of 16.
_DINOV3_SIZES = {"dinov3-s": 30, "dinov3-m": 60, "dinov3-l": 90}


def resolve_size(rule: str, height: int, width: int, patch: int = 16) -> tuple[int, int]:
    """Return the (height, width) in pixels that a size rule gives for frames of `height` x `width`.

    Rules: `480x880` (exactly, aspect ignored), `native`, `short:480/64` (short side 480, long side floored
    to a multiple of 64, as DINO does), `long:880/64` (long side 880, short side floored, as T-CORE does for
    VIP), `short-up:960/16` (the short side rounded up to a multiple of 16, then the long side that belongs to
    it, as DINOv3 does), and DINOv3's `dinov3-s`, `dinov3-m` and `dinov3-l`, by the encoder's patch.
    """
    if rule in _DINOV3_SIZES:
        rule = f"short-up:{_DINOV3_SIZES[rule] * patch}/{patch}"
    if rule == "native":
        return height, width
    side, _, numbers = rule.rpartition(":")
    try:
        first, second = (int(number) for number in numbers.split("/" if side else "x"))
        if min(first, second) < 1 or side not in ("", "short", "long", "short-up"):
            raise ValueError
    except ValueError as error:
        wanted = "HEIGHTxWIDTH, native, short:S/M, short-up:S/M, long:S/M or dinov3-s, -m, -l"
        raise UsageError(f"{rule!r} is no size", wanted=wanted, found=rule) from error
    anchor, other = sorted((height, width), reverse=side == "long")
    fitted = other * first // anchor // second * second if side else second
    if side == "short-up":
        first = -(-first // second) * second
        fitted = -(-other * first // (anchor * second)) * second
    if max(first, fitted) > MOST_PIXELS:
        wanted = f"at most {MOST_PIXELS} pixels a side"
        raise UsageError(f"{rule!r} is too large a size", wanted=wanted, found=f"{max(first, fitted)}")
    return (first, fitted) if not side or height == anchor else (fitted, first)


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
