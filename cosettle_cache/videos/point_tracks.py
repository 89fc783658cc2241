"""Points and where they are in every frame; on disk in TAP-Vid's terms, shares of the image, as `.npz`.

Positions are (x, y) in pixels from the corner of the image: the first pixel's centre lies at one half.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Float64

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.files import write_durably
from cosettle_cache.core.types import Video

Points = Float64[np.ndarray, "point frame 2"]
Flags = Bool[np.ndarray, "point frame"]

#: A visible point may lie this share of the image outside it: annotators click on rims.
_SLACK = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class PointTracks:
    """Where each point is in every frame, in pixels; where it is not `visible` the place may mean nothing."""

    points: Points
    visible: Flags

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return int(self.points.shape[1])

    def sha256(self) -> str:
        """Return what identifies these tracks: the digest of visibility and of visible places as float32."""
        seen = np.where(self.visible[..., None], self.points, 0).astype("<f4")
        return hashlib.sha256(self.visible.tobytes() + seen.tobytes()).hexdigest()


def write_shares(
    path: Path, points: Float[np.ndarray, "point frame 2"], occluded: Bool[np.ndarray, "point frame"]
) -> None:
    """Write tracks as shares of the image's width and height, as TAP-Vid has them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, points=points, occluded=occluded)
    write_durably(path, [buffer.getbuffer()])


def read_shares(path: Path, video: Video) -> PointTracks:
    """Return the tracks of a file that `write_shares` wrote, in pixels of the video.

    Raises `MediaError` when the file is missing, holds something else, or other frames than the video.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            points, occluded = content["points"], content["occluded"]
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist", wanted="a file of tracks") from error
    except (KeyError, ValueError, OSError, EOFError, BadZipFile, TypeError) as error:
        raise MediaError(f"{path} holds no tracks", wanted="points and occluded", found=str(error)) from error
    problem = shares_problem(points, occluded)
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


def shares_problem(points: np.ndarray, occluded: np.ndarray) -> str | None:
    """Say what keeps two arrays from being tracks as shares of the image; None when nothing does."""
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
