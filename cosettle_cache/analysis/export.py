"""Frame vectors for temporal models: the mean over each frame's tokens, raw or through one projection.

A frames store comes in; one vector per stored frame of every video (a .npy per video, one Parquet table, or
one HDF5 file) and `export.json`, which says where they come from, go out. With `npy` these are the features
of Breakfast as FACT and MS-TCN read them. A name never holds half a file. Only this module imports h5py.
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

from cosettle_cache.analysis.pooling import FramePooler, check_frames_plan, each_video, missing_videos
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import make_folder, replacing, sync, write_durably
from cosettle_cache.core.settings import ExportSettings, check_choices, package_versions
from cosettle_cache.core.tables import stream_table, write_json
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import flat_name

PARQUET_FILE, HDF5_FILE, REPORT_FILE = "frames.parquet", "frames.h5", "export.json"

#: Writes one more video: its id, its vectors, and the number of the frame that each stands for.
Add = Callable[[str, Float32[np.ndarray, "frame dim"], Int64[np.ndarray, " frame"]], None]


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What is written: a file name per video, how long it is, and how vectors are made and laid out."""

    store: FeatureStore
    settings: ExportSettings
    names: Mapping[str, str]
    n_frames: Mapping[str, int]

    @property
    def every(self) -> int:
        """One frame in so many is stored."""
        return int(self.store.fingerprint.plan["every"])

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.store.arrays[0].n_channels

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        settings = self.settings
        return {
            "store": str(self.store.path),
            "format": settings.format,
            "axes": settings.axes if settings.format != "parquet" else "one row per frame",
            "vector": f"mean of {'unit ' if settings.unit else ''}tokens",
            "every": 1 if settings.repeat else self.every,
            "repeated": self.every if settings.repeat else 1,
            "dim": self.dim,
        }


def plan_export(store: FeatureStore, settings: ExportSettings) -> ExportPlan:
    """Return what `export_frames` will write, after every check that needs no tokens.

    Raises `InputError` for a store of another plan and when two videos would share a file, `UsageError` for a
    format that cannot be written here.
    """
    check_frames_plan(store, "export frames")
    check_choices(settings)
    if settings.format == "hdf5" and importlib.util.find_spec("h5py") is None:
        raise UsageError("h5py is not installed", hint="pip install 'cosettle-cache[hdf5]', or --format npy")
    names = {video_id: flat_name(video_id) for video_id in store.video_ids}
    shared = [name for name, count in Counter(names.values()).items() if count > 1]
    if shared:
        found = ", ".join(video_id for video_id, name in names.items() if name == shared[0])
        raise InputError(f"two videos would be called {shared[0]}", found=found)
    if not names:
        raise InputError(f"{store.path} holds no complete video", hint="run the same extract command again")
    return ExportPlan(store, settings, names, {video.video_id: video.n_frames for video in store.manifest})


def export_frames(
    plan: ExportPlan, kind: TokenKind, out: Path, *, device: str = "cpu", progress: Progress = SILENT
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the vectors of every complete video of the store, and `export.json` last.

    Returns by id how many vectors were written, and why a video could not be read. Raises `OutputError` when
    the folder cannot be written.
    """
    failures = missing_videos(plan.store, plan.n_frames)
    document = plan.to_json() | _origin(plan.store, kind)
    (make_folder(out) / REPORT_FILE).unlink(missing_ok=True)
    pooler = FramePooler(plan.store, (kind,), plan.settings.unit, device)
    lengths: dict[str, int] = {}
    with _WRITERS[plan.settings.format](plan, out, document) as add:
        for video_id, (means,) in each_video(list(plan.names), pooler.pool, failures, progress):
            if plan.settings.repeat:
                frames = np.arange(plan.n_frames[video_id], dtype=np.int64)
                add(video_id, np.repeat(means, plan.every, axis=0)[: len(frames)], frames)
            else:
                frames = np.arange(len(means), dtype=np.int64) * plan.every
                add(video_id, means, frames)
            lengths[video_id] = len(frames)
    write_json(out / REPORT_FILE, document | {"vectors": lengths, "failures": failures})
    return lengths, failures


def _origin(store: FeatureStore, kind: TokenKind) -> dict[str, Any]:
    fingerprint = store.fingerprint
    return {
        "tokens": kind.name,
        "projection_sha256": kind.sha256,
        "backbone": fingerprint.backbone,
        "weights_sha256": fingerprint.weights_sha256,
        "manifest_digest": fingerprint.manifest_digest,
        "plan": dict(fingerprint.plan),
        "versions": {"extract": dict(fingerprint.versions), "export": package_versions()},
    }


def _arrange(plan: ExportPlan, vectors: Float32[np.ndarray, "frame dim"]) -> Float32[np.ndarray, "_ _"]:
    return np.ascontiguousarray(vectors.T if plan.settings.axes == "dim-frame" else vectors)


@contextmanager
def _write_npy(plan: ExportPlan, folder: Path, document: Mapping[str, Any]) -> Iterator[Add]:
    def add(video_id: str, vectors: np.ndarray, frames: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, _arrange(plan, vectors), allow_pickle=False)
        write_durably(folder / f"{plan.names[video_id]}.npy", [buffer.getbuffer()])

    yield add


@contextmanager
def _write_parquet(plan: ExportPlan, folder: Path, document: Mapping[str, Any]) -> Iterator[Add]:
    kinds = {"video_id": pa.string(), "frame": pa.int64(), "vector": pa.list_(pa.float32(), plan.dim)}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
    with stream_table(folder / PARQUET_FILE, schema) as write:

        def add(video_id: str, vectors: np.ndarray, frames: np.ndarray) -> None:
            flat = pa.array(np.ascontiguousarray(vectors).ravel())
            columns = [
                pa.array([video_id] * len(frames)),
                pa.array(frames),
                pa.FixedSizeListArray.from_arrays(flat, plan.dim),
            ]
            write(pa.RecordBatch.from_arrays(columns, schema=schema))

        yield add


@contextmanager
def _write_hdf5(plan: ExportPlan, folder: Path, document: Mapping[str, Any]) -> Iterator[Add]:
    import h5py

    with replacing(folder / HDF5_FILE) as temporary:
        with h5py.File(temporary, "w") as file:
            texts = {key: str(value) for key, value in document.items()}
            file.attrs.update(texts | {"axes": plan.settings.axes})

            def add(video_id: str, vectors: np.ndarray, frames: np.ndarray) -> None:
                dataset = file.create_dataset(plan.names[video_id], data=_arrange(plan, vectors))
                dataset.attrs["video_id"] = video_id
                dataset.attrs["frames"] = frames

            yield add
        sync(temporary)


_WRITERS: Mapping[str, Callable[[ExportPlan, Path, Mapping[str, Any]], AbstractContextManager[Add]]] = {
    "npy": _write_npy,
    "parquet": _write_parquet,
    "hdf5": _write_hdf5,
}
