"""Frame vectors for temporal models: the mean over each frame's tokens, raw or through one projection.

A frames store comes in; files with one vector per stored frame of every video, and `export.json` that says
where they come from, go out. With `npy` these are the features of Breakfast as FACT and MS-TCN read them.

Frame vectors as files that temporal models read: one .npy per video, one Parquet table, or one HDF5 file.

Videos with a vector per frame come in one after the other and are written as they come; a name never holds
half a file. The only door to h5py, which is optional.
"""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.pooling import FramePooler, check_frames_plan
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, InputError, UsageError
from cosettle_cache.core.files import make_folder, replacing, sync, write_durably
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.tables import stream_table, write_json
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import flat_name

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


__all__ = ["ExportPlan", "ExportReport", "export_frames", "plan_export"]

REPORT_FILE = "export.json"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What is written: a file name per video, how long it is, and how vectors are made and laid out.

    `axes` is the order in .npy and HDF5: `dim-frame` is what FACT (for Breakfast) and MS-TCN expect. `repeat`
    writes every vector as often as the store skips frames, so that there is one per frame of the video.
    """

    store: FeatureStore
    names: Mapping[str, str]
    n_frames: Mapping[str, int]
    format: str
    axes: str = AXES[0]
    unit: bool = False
    repeat: bool = False

    @property
    def every(self) -> int:
        """One frame in so many is stored."""
        return int(self.store.fingerprint.plan["every"])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "store": str(self.store.path),
            "format": self.format,
            "axes": self.axes if self.format != "parquet" else "one row per frame",
            "vector": f"mean of {'unit ' if self.unit else ''}tokens",
            "every": 1 if self.repeat else self.every,
            "repeated": self.every if self.repeat else 1,
            "dim": self.store.arrays[0].n_channels,
        }


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written; `failures` has by id why a video was not."""

    folder: Path
    n_videos: int
    n_vectors: int
    failures: Mapping[str, str]


def plan_export(
    store: FeatureStore,
    format: str = "npy",
    *,
    axes: str = AXES[0],
    unit: bool = False,
    repeat: bool = False,
) -> ExportPlan:
    """Return what `export_frames` will write, after every check that needs no tokens.

    Raises `InputError` for a store of another plan and when two videos would share a file, `UsageError` for a
    format that cannot be written here.
    """
    check_frames_plan(store, "export frames")
    check_format(format, axes)
    names = {video_id: flat_name(video_id) for video_id in store.video_ids}
    shared = [name for name, count in Counter(names.values()).items() if count > 1]
    if shared:
        found = ", ".join(video_id for video_id, name in names.items() if name == shared[0])
        raise InputError(f"two videos would be called {shared[0]}", found=found)
    if not names:
        raise InputError(f"{store.path} holds no complete video", hint="run the same extract command again")
    n_frames = {video.video_id: video.n_frames for video in store.manifest}
    return ExportPlan(store, names, n_frames, format, axes, unit, repeat)


def export_frames(
    plan: ExportPlan, kind: TokenKind, out: Path, *, device: str = "cpu", progress: Progress = SILENT
) -> ExportReport:
    """Write the vectors of every complete video of the store, and `export.json` last.

    A video that cannot be read is a named failure. Raises `OutputError` when the folder cannot be written.
    """
    store = plan.store
    failures = {
        video.video_id: store.failures.get(video.video_id, "not extracted yet")
        for video in store.manifest
        if video.video_id not in plan.names
    }
    document = plan.to_json() | _provenance(plan, kind)
    (make_folder(out) / REPORT_FILE).unlink(missing_ok=True)
    pooler = FramePooler(store, (kind,), plan.unit, device)
    target = Target(
        out, store.arrays[0].n_channels, plan.axes, {key: str(text) for key, text in document.items()}
    )
    lengths: dict[str, int] = {}
    progress.start(len(plan.names), "videos")
    try:
        with open_writer(plan.format, target) as add:
            for video_id in plan.names:
                try:
                    video = _vectors(plan, pooler, video_id)
                except (InputError, DamagedStoreError) as error:
                    failures[video_id] = error.summary
                else:
                    add(video)
                    lengths[video_id] = len(video.frames)
                progress.advance()
    finally:
        progress.finish()
    write_json(out / REPORT_FILE, document | {"vectors": lengths, "failures": failures})
    return ExportReport(out, len(lengths), sum(lengths.values()), failures)


def _vectors(plan: ExportPlan, pooler: FramePooler, video_id: str) -> VideoVectors:
    (vectors,) = pooler.pool(video_id)
    frames = np.arange(len(vectors), dtype=np.int64) * plan.every
    if plan.repeat:
        n_frames = plan.n_frames[video_id]
        vectors = np.repeat(vectors, plan.every, axis=0)[:n_frames]
        frames = np.arange(n_frames, dtype=np.int64)
    return VideoVectors(video_id, plan.names[video_id], vectors, frames)


def _provenance(plan: ExportPlan, kind: TokenKind) -> dict[str, Any]:
    fingerprint = plan.store.fingerprint
    return {
        "tokens": kind.name,
        "projection_sha256": kind.sha256,
        "backbone": fingerprint.backbone,
        "weights_sha256": fingerprint.weights_sha256,
        "manifest_digest": fingerprint.manifest_digest,
        "plan": dict(fingerprint.plan),
        "versions": {"extract": dict(fingerprint.versions), "export": package_versions()},
    }
