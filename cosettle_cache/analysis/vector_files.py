"""Frame vectors as files that temporal models read: one .npy per video, one Parquet table, or one HDF5 file.

Videos with a vector per frame come in one after the other and are written as they come; a name never holds
half a file. The only door to h5py, which is optional.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.files import make_folder, replacing, sync, write_durably
from cosettle_cache.core.tables import stream_table

#: How the axes of a video's array are ordered in .npy and HDF5.
AXES = ("dim-frame", "frame-dim")
PARQUET_FILE, HDF5_FILE = "frames.parquet", "frames.h5"


@dataclass(frozen=True, slots=True, eq=False)
class VideoVectors:
    """A video, the name of its file, and its vectors with the number of the frame that each stands for."""

    video_id: str
    name: str
    vectors: Float32[np.ndarray, "frame dim"]
    frames: Int64[np.ndarray, " frame"]


#: Writes one more video.
Add = Callable[[VideoVectors], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where vectors go: folder, width, order of axes, and what an HDF5 file says of itself."""

    folder: Path
    dim: int
    axes: str = AXES[0]
    provenance: Mapping[str, str] | None = None

    def arrange(self, vectors: Float32[np.ndarray, "frame dim"]) -> Float32[np.ndarray, "_ _"]:
        """Return the array as the file has it."""
        return np.ascontiguousarray(vectors.T if self.axes == "dim-frame" else vectors)


@contextmanager
def _write_npy(target: Target) -> Iterator[Add]:
    folder = make_folder(target.folder)

    def add(video: VideoVectors) -> None:
        buffer = io.BytesIO()
        np.save(buffer, target.arrange(video.vectors), allow_pickle=False)
        write_durably(folder / f"{video.name}.npy", [buffer.getbuffer()])

    yield add


@contextmanager
def _write_parquet(target: Target) -> Iterator[Add]:
    schema = pa.schema(
        [
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("frame", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), target.dim), nullable=False),
        ]
    )
    with stream_table(target.folder / PARQUET_FILE, schema) as write:

        def add(video: VideoVectors) -> None:
            flat = pa.array(np.ascontiguousarray(video.vectors).ravel())
            columns = [
                pa.array([video.video_id] * len(video.frames)),
                pa.array(video.frames),
                pa.FixedSizeListArray.from_arrays(flat, target.dim),
            ]
            write(pa.RecordBatch.from_arrays(columns, schema=schema))

        yield add


@contextmanager
def _write_hdf5(target: Target) -> Iterator[Add]:
    import h5py

    path = make_folder(target.folder) / HDF5_FILE
    with replacing(path) as temporary:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(dict(target.provenance or {}) | {"axes": target.axes})

            def add(video: VideoVectors) -> None:
                dataset = file.create_dataset(video.name, data=target.arrange(video.vectors))
                dataset.attrs["video_id"] = video.video_id
                dataset.attrs["frames"] = video.frames

            yield add
        sync(temporary)


_WRITERS: Mapping[str, Callable[[Target], AbstractContextManager[Add]]] = {
    "npy": _write_npy,
    "parquet": _write_parquet,
    "hdf5": _write_hdf5,
}
FORMATS = tuple(_WRITERS)


def check_format(format: str, axes: str = AXES[0]) -> None:
    """Raise `UsageError` for an unknown format or order of axes, and for HDF5 without h5py."""
    if axes not in AXES:
        raise UsageError(f"there is no order of axes {axes!r}", wanted=" or ".join(AXES), found=axes)
    if format not in _WRITERS:
        raise UsageError(f"there is no format {format!r}", wanted=", ".join(FORMATS), found=format)
    if format == "hdf5" and importlib.util.find_spec("h5py") is None:
        raise UsageError("h5py is not installed", hint="pip install 'cosettle-cache[hdf5]', or --format npy")


def open_writer(format: str, target: Target) -> AbstractContextManager[Add]:
    """Give a function that writes one more video; see `check_format` for the errors."""
    check_format(format, target.axes)
    return _WRITERS[format](target)
