"""Point tracks: TAP-Vid's pickles become frames and files of tracks, a data root like any other.

In comes `tapvid_davis.pkl` (a dictionary of clips by name) or `tapvid_rgb_stacking.pkl` (a list); out go
`frames/NAME/00000.png` and `tracks/NAME.npz`, which has shares of the image. In memory positions are (x, y)
in pixels from the corner of the image: the first pixel's centre lies at one half.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from PIL import Image

from cosettle_cache.core.errors import InputError, MediaError
from cosettle_cache.core.files import make_folder, output_errors, write_durably
from cosettle_cache.core.types import Video
from cosettle_cache.videos.frames import decode_errors
from cosettle_cache.videos.manifest import path_fault
from cosettle_cache.videos.safe_pickle import ArrayUnpickler

#: A visible point may lie this share of the image outside it: annotators click on rims.
_SLACK = 0.05
#: Most bytes of the tracks of a video.
_MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True, eq=False)
class PointTracks:
    """Where each point is in every frame, in pixels; where it is not `visible` the place may mean nothing."""

    points: Float64[np.ndarray, "point frame 2"]
    visible: Bool[np.ndarray, "point frame"]

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return int(self.points.shape[1])

    def sha256(self) -> str:
        """Return what identifies these tracks: the digest of visibility and of visible places as float32."""
        seen = np.where(self.visible[..., None], self.points, 0).astype("<f4")
        return hashlib.sha256(self.visible.tobytes() + seen.tobytes()).hexdigest()


def read_shares(path: Path, video: Video) -> PointTracks:
    """Return an unpacked file's tracks in pixels of the video; raise `MediaError` for any that do not fit."""
    errors = decode_errors(path, "holds no tracks", "points and occluded")
    with errors, np.load(path, allow_pickle=False) as content:
        n_bytes = sum(member.file_size for member in content.zip.infolist())
        if n_bytes > _MOST_BYTES:
            raise ValueError(f"{n_bytes} bytes, more than {_MOST_BYTES}")
        points, occluded = content["points"], content["occluded"]
    problem = _shares_problem(points, occluded)
    if problem:
        raise MediaError(f"{path} holds no tracks", wanted="points in 0..1 and flags", found=problem)
    last = video.first_frame + video.n_frames
    if last > points.shape[1]:
        raise MediaError(
            f"{path} has tracks of fewer frames than its video",
            wanted=f"{last} frames",
            found=f"{points.shape[1]} frames",
        )
    own = slice(video.first_frame, last)
    pixels = points[:, own] * np.array([video.width, video.height], np.float64)
    return PointTracks(pixels, occluded[:, own] == 0)


def _shares_problem(points: Any, occluded: Any) -> str | None:
    if not (isinstance(points, np.ndarray) and isinstance(occluded, np.ndarray)):
        return "points or occluded that are no arrays"
    if points.ndim != 3 or points.shape[-1] != 2 or points.dtype.kind != "f":
        return f"points of {points.dtype} {points.shape}"
    if occluded.shape != points.shape[:2] or occluded.dtype.kind not in "bui":
        return f"occluded of {occluded.dtype} {occluded.shape} beside points of {points.shape}"
    seen = points[occluded == 0]
    if not len(seen):
        return "no visible point"
    if not (np.isfinite(seen).all() and seen.min() >= -_SLACK and seen.max() <= 1 + _SLACK):
        return f"visible points from {seen.min():g} to {seen.max():g}: no shares of an image"
    return None


_LAYOUT = "a dictionary or list of clips with video, points and occluded"
_JPEG_MARK = b"\xff\xd8"

Clips = Mapping[str, Mapping[str, Any]]


def read_tapvid(path: str | Path, failures: dict[str, str] | None = None) -> Clips:
    """Return the clips of a TAP-Vid pickle by name, checked whole; those of a list are numbered.

    `video` is uint8 `[frame height width 3]` or a sequence of JPEG files, `points` `[point frame 2]` in
    shares of the image, `occluded` flags `[point frame]`. The whole file is held in memory, as pickles want
    it. Only arrays and plain containers are read, nothing is executed; `MediaError` says what is wrong. One
    bad clip goes into `failures` with the reason; without them, or where all are bad, it is an error too.
    """
    path = Path(path)
    with decode_errors(path, "is no pickle of TAP-Vid", "arrays only"), path.open("rb") as file:
        content = ArrayUnpickler(file).load()
    named = [(str(name), clip) for name, clip in content.items()] if isinstance(content, dict) else []
    if isinstance(content, list | tuple):
        named = [(f"{number:05d}", clip) for number, clip in enumerate(content)]
    clips = dict(named)
    if not clips:
        raise MediaError(f"{path} holds no clips", wanted=_LAYOUT, found=type(content).__name__)
    if len(clips) < len(named):
        raise MediaError(f"{path} has two clips of one name", wanted="a name a clip", found=", ".join(clips))
    problems = {name: problem for name, clip in clips.items() if (problem := _problem(name, clip))}
    if problems and (failures is None or len(problems) == len(clips)):
        name, problem = next(iter(problems.items()))
        raise MediaError(f"{path} has another layout: clip {name}", wanted=_LAYOUT, found=problem)
    if failures is not None:
        failures.update(problems)
    return {name: clip for name, clip in clips.items() if name not in problems}


def _problem(name: str, clip: Any) -> str | None:
    if path_fault(name) or "/" in name:
        return "a name that is no file name"
    if not isinstance(clip, dict) or not {"video", "points", "occluded"} <= clip.keys():
        return f"keys {', '.join(map(str, clip))}" if isinstance(clip, dict) else type(clip).__name__
    video, points, occluded = (clip[key] for key in ("video", "points", "occluded"))
    if fault := _shares_problem(points, occluded):
        return fault
    if not _is_video(video):
        return f"a video of {getattr(video, 'dtype', type(video).__name__)} {getattr(video, 'shape', ())[:4]}"
    if len(video) != points.shape[1]:
        return f"{len(video)} frames and tracks of {points.shape[1]}"
    return None


def _is_video(video: Any) -> bool:
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        return video.ndim == 4 and video.shape[-1] == 3 and video.size > 0
    is_list = isinstance(video, list | tuple) or (isinstance(video, np.ndarray) and video.ndim == 1)
    if not is_list or not len(video):
        return False
    return all(isinstance(frame, bytes) and frame.startswith(_JPEG_MARK) for frame in video)


def check_empty(folder: Path) -> None:
    """Raise `InputError` unless a data set may be written to `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already", wanted="a new or empty folder")


def unpack_tapvid(clips: Clips, folder: str | Path, advance: Callable[[], None] = lambda: None) -> None:
    """Write the clips of `read_tapvid` under `folder`; arrays become PNG, JPEG files stay what they are.

    The tracks of a clip are written after its frames, so that a clip with tracks is whole.
    """
    folder = Path(folder)
    for name, clip in clips.items():
        frames = make_folder(folder / "frames" / name)
        for index, frame in enumerate(clip["video"]):
            path = frames / f"{index:05d}{'.jpg' if isinstance(frame, bytes) else '.png'}"
            with output_errors(path):
                if isinstance(frame, bytes):
                    path.write_bytes(frame)
                else:
                    Image.fromarray(frame).save(path, compress_level=1)
        make_folder(folder / "tracks")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, points=clip["points"], occluded=clip["occluded"] != 0)
        write_durably(folder / "tracks" / f"{name}.npz", [buffer.getbuffer()])
        advance()
