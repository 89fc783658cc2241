"""Joints of one video as JHMDB has them, in pixels; predicted joints as the released scripts keep them.

Of MATLAB files numbers are read and nothing else: SciPy's reader takes lengths and kinds as a file says them,
and ends the process at some that are wrong.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Float64

from cosettle_cache.core.errors import MediaError, first_line
from cosettle_cache.core.files import output_errors, read_file
from cosettle_cache.core.types import Grid, Video
from cosettle_cache.videos.masks import check_numbers, frame_stems
from cosettle_cache.videos.safe_pickle import ArrayUnpickler

#: The joints in the order of `pos_img`.
JOINTS = (
    *("neck", "belly", "face", "right shoulder", "left shoulder", "right hip", "left hip", "right elbow"),
    *("left elbow", "right knee", "left knee", "right wrist", "left wrist", "right ankle", "left ankle"),
)

#: Numbers of an array that is read, and bytes that are unpacked; joints of a clip are thousands.
_MOST_NUMBERS, _MOST_BYTES = 10**7, 8 * 10**7

#: What elements of a file of version 5 hold: packed ones, an array, numbers of these types; classes of arrays
#: of numbers.
_PACKED, _ARRAY, _NUMERIC = 15, 14, range(6, 16)
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}

Joints = Float64[np.ndarray, "2 joint frame"]
#: Key points of one frame or of many: x, then y.
AnyPoints = Float[np.ndarray, "2 ..."]


@dataclass(frozen=True, slots=True, eq=False)
class JointSequence:
    """One clip and its joints: (x, y) in pixels from 0, which may lie outside the image."""

    video: Video
    frame_names: tuple[str, ...]
    joints: Joints


def open_joints(video: Video, data_root: str | Path) -> JointSequence:
    """Return the joints of a row, of the annotated frames; fewer, or a missing number, raise `MediaError`."""
    if video.labels is None:
        raise MediaError(f"{video.video_id} has no labels", hint="add its joints, rebuild the manifest")
    names = frame_stems(video, data_root)
    check_numbers(names, video.media)
    joints = read_joints(Path(data_root) / video.labels)[:, :, video.first_frame :]
    if joints.shape[2] > video.n_frames and not video.first_frame:
        raise MediaError(
            f"{video.media} has fewer frames than joints",
            wanted=f"{joints.shape[2]} frames",
            found=f"{video.n_frames} frames",
        )
    return JointSequence(video, names, joints[:, :, : video.n_frames])


def read_joints(path: str | Path) -> Joints:
    """Return `pos_img` of a MATLAB file in pixels counted from 0; the file counts from 1 (PROTOCOLS 2.1)."""
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path} does not exist", wanted="a file of joints")
    try:
        data = read_file(path)
        content = _read_hdf5(path) if b"MATLAB 7.3" in data[:128] else dict(_read_version_5(data))
    except MediaError:
        raise
    except Exception as error:  # a file that is broken or something else
        raise MediaError(f"{path} is not a readable MATLAB file", found=first_line(error)) from error
    if "pos_img" not in content:
        raise MediaError(f"{path} has no pos_img", wanted="pos_img", found=", ".join(content) or "nothing")
    joints = content["pos_img"]
    # MATLAB drops the last axis of a clip of one frame.
    joints = joints[:, :, None] if np.ndim(joints) == 2 else joints
    if np.ndim(joints) != 3 or joints.shape[:2] != (2, len(JOINTS)) or not joints.shape[2]:
        raise MediaError(
            f"{path} does not hold joints",
            wanted=f"pos_img of 2 x {len(JOINTS)} x frames",
            found=" x ".join(map(str, np.shape(joints))),
        )
    if joints.dtype.kind not in "fiu" or not np.isfinite(joints).all():
        raise MediaError(f"{path} has joints that are nowhere", wanted="finite numbers", found="others")
    return np.asarray(joints, dtype=np.float64) - 1


def _read_version_5(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and arrays of numbers of a MATLAB file of versions 5 to 7; others come empty."""
    order = {b"IM": "<", b"MI": ">"}[data[126:128]]
    for kind, content in _elements(data[128:], order):
        if kind == _ARRAY:
            (_, flags), (_, shape), (_, name), *parts = _elements(content, order)
            array = np.empty(0)
            if struct.unpack_from(order + "I", flags)[0] & 0xFF in _NUMERIC:
                array = np.frombuffer(parts[0][1], order + _NUMBERS[parts[0][0]])
                array = array.reshape(np.frombuffer(shape, order + "i4"), order="F")
            yield name.decode("latin-1"), array


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield kind and content of elements that follow each other, padded to 8 bytes unless packed."""
    end = 0
    while end < len(data):
        begin, start = end, end + 8
        kind, length = struct.unpack_from(order + "II", data, begin)
        if kind >> 16:  # four bytes or less stand in the place of the length
            kind, length, start = kind & 0xFFFF, kind >> 16, begin + 4
        content, end = data[start : start + length], start + length
        if len(content) < length:
            raise ValueError("it ends within an array")
        if kind == _PACKED:
            yield from _elements(zlib.decompressobj().decompress(content, _MOST_BYTES), order)
        else:
            yield kind, content
            end += (begin - end) % 8


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a MATLAB file of version 7.3, which has the axes in the opposite order."""
    try:
        import h5py
    except ImportError as error:
        raise MediaError(
            f"{path} is a MATLAB file of version 7.3, and h5py is not installed",
            hint="pip install 'cosettle-cache[hdf5]', or in MATLAB save(FILE, 'pos_img', '-v7')",
        ) from error
    with h5py.File(path, "r") as file:
        # Data that lie in other files are none of this one.
        found = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
        own = {name: item for name, item in found.items() if not item.external and not item.is_virtual}
        return {name: item[()].T for name, item in own.items() if item.size < _MOST_NUMBERS}


def pixels_to_cells(points: AnyPoints, image_size: tuple[int, int], grid: Grid) -> AnyPoints:
    """Return key points in cells of a grid that spans an image of (height, width) `image_size` pixels."""
    return np.asarray(points * _cells_per_pixel(points, image_size, grid))


def cells_to_pixels(points: AnyPoints, image_size: tuple[int, int], grid: Grid) -> AnyPoints:
    """Return key points in pixels; those that are lost stay left of and above the image."""
    return np.asarray(points / _cells_per_pixel(points, image_size, grid))


def _cells_per_pixel(points: AnyPoints, image_size: tuple[int, int], grid: Grid) -> np.ndarray:
    height, width = image_size
    scale = np.array([grid.cols / width, grid.rows / height], dtype=points.dtype)
    return scale.reshape(2, *(1,) * (points.ndim - 1))


def write_predicted_joints(path: str | Path, points: Float32[np.ndarray, "2 joint frame"]) -> None:
    """Write joints in cells of the grid as the released scripts do, a pickled array (PROTOCOLS 2.4)."""
    path = Path(path)
    with output_errors(path):
        path.write_bytes(pickle.dumps(points, protocol=2))


def read_predicted_joints(path: str | Path) -> Float[np.ndarray, "2 joint frame"]:
    """Return predicted joints from a released script's pickled array or from an `.npy` file.

    Of the pickle only a plain array is accepted: a file may come from a stranger.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path} does not exist", wanted="predicted joints")
    try:
        content = io.BytesIO(path.read_bytes())
        points = np.load(content) if path.suffix == ".npy" else ArrayUnpickler(content).load()
    except Exception as error:  # a pickle of anything raises anything
        reason = str(error) or type(error).__name__
        raise MediaError(f"{path} does not hold an array", found=reason) from error
    if not isinstance(points, np.ndarray) or points.ndim != 3 or len(points) != 2 or points.dtype.kind != "f":
        found = f"{points.dtype} {points.shape}" if isinstance(points, np.ndarray) else type(points).__name__
        raise MediaError(f"{path} does not hold joints", wanted="float 2 x joints x frames", found=found)
    return points
