"""Frame vectors for temporal models: the mean over each frame's tokens, raw or through one projection.

A frames store comes in; one vector per stored frame of every video (a .npy per video, one Parquet table, or
one HDF5 file) and `export.json`, which says where they come from, go out. With `npy` these are the features
of Breakfast as FACT and MS-TCN read them. A name never holds half a file. Only this module imports h5py.
"""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.pooling import check_frames_plan, each_video, missing_videos, pool_frames
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import inside, own_folder, replacing, sync, write_durably
from cosettle_cache.core.settings import ExportSettings, package_versions
from cosettle_cache.core.tables import stream_table, write_json
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frame_labels import flat_name

PARQUET_FILE, HDF5_FILE, REPORT_FILE = "frames.parquet", "frames.h5", "export.json"

#: A video's id, its vectors, and the number of the frame that each stands for.
Vectors = tuple[str, Float32[np.ndarray, "frame dim"], Int64[np.ndarray, " frame"]]


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Whose vectors are written, and how they are made and laid out."""

    store: FeatureStore
    settings: ExportSettings

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

    Raises `InputError` for another plan and two videos of one file, `UsageError` for an impossible format.
    """
    check_frames_plan(store, "export frames")
    if settings.format == "hdf5" and importlib.util.find_spec("h5py") is None:
        raise UsageError("h5py is not installed", hint="pip install 'cosettle-cache[hdf5]', or --format npy")
    for name, count in Counter(map(flat_name, store.video_ids)).items():
        inside(Path(), name)
        if count > 1:
            found = ", ".join(video_id for video_id in store.video_ids if flat_name(video_id) == name)
            raise InputError(f"two videos would be called {name}", found=found)
    if not store.video_ids:
        raise InputError(f"{store.path} holds no complete video", hint="run the same extract command again")
    return ExportPlan(store, settings)


def export_frames(
    plan: ExportPlan, kind: TokenKind, out: Path, *, device: str = "cpu", progress: Progress = SILENT
) -> tuple[dict[str, int], dict[str, str]]:
    """Write the vectors of every complete video of the store, and `export.json` last.

    Returns by id how many vectors were written, and why a video could not be read. Raises `OutputError` when
    the folder cannot be written, and `UsageError` when it holds anything else.
    """
    store, fingerprint, settings = plan.store, plan.store.fingerprint, plan.settings
    n_frames = {video.video_id: video.n_frames for video in store.manifest}
    failures, lengths = missing_videos(store, n_frames), dict[str, int]()
    document = plan.to_json() | {
        "tokens": kind.name,
        "projection_sha256": kind.sha256,
        "backbone": fingerprint.backbone,
        "weights_sha256": fingerprint.weights_sha256,
        "manifest_digest": fingerprint.manifest_digest,
        "plan": dict(fingerprint.plan),
        "versions": {"extract": dict(fingerprint.versions), "export": package_versions()},
    }
    pool = partial(pool_frames, store, (kind,), unit=settings.unit, device=device)

    def videos() -> Iterator[Vectors]:
        for video_id, (means,) in each_video(store.video_ids, pool, failures, progress):
            vectors, frames = means, np.arange(len(means), dtype=np.int64) * plan.every
            if settings.repeat:
                frames = np.arange(n_frames[video_id], dtype=np.int64)
                vectors = np.repeat(means, plan.every, axis=0)[: len(frames)]
            yield video_id, vectors, frames
            lengths[video_id] = len(frames)

    with own_folder(out, "export frames"):
        (out / REPORT_FILE).unlink(missing_ok=True)
        _WRITERS[settings.format](plan, out, document, videos())
        write_json(out / REPORT_FILE, document | {"vectors": lengths, "failures": failures})
    return lengths, failures


def _arrange(plan: ExportPlan, vectors: Float32[np.ndarray, "frame dim"]) -> Float32[np.ndarray, "_ _"]:
    return np.ascontiguousarray(vectors.T if plan.settings.axes == "dim-frame" else vectors)


def _write_npy(plan: ExportPlan, folder: Path, _: Mapping[str, Any], videos: Iterable[Vectors]) -> None:
    for video_id, vectors, _frames in videos:
        buffer = io.BytesIO()
        np.save(buffer, _arrange(plan, vectors), allow_pickle=False)
        write_durably(folder / f"{flat_name(video_id)}.npy", [buffer.getbuffer()])


def _write_parquet(plan: ExportPlan, folder: Path, _: Mapping[str, Any], videos: Iterable[Vectors]) -> None:
    kinds = {"video_id": pa.string(), "frame": pa.int64(), "vector": pa.list_(pa.float32(), plan.dim)}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
    with stream_table(folder / PARQUET_FILE, schema) as write:
        for video_id, vectors, frames in videos:
            flat = pa.array(np.ascontiguousarray(vectors).ravel())
            rows = pa.FixedSizeListArray.from_arrays(flat, plan.dim)
            columns = [pa.array([video_id] * len(frames)), pa.array(frames), rows]
            write(pa.RecordBatch.from_arrays(columns, schema=schema))


def _write_hdf5(
    plan: ExportPlan, folder: Path, document: Mapping[str, Any], videos: Iterable[Vectors]
) -> None:
    import h5py

    with replacing(folder / HDF5_FILE) as temporary:
        with h5py.File(temporary, "w") as file:
            texts = {key: str(value) for key, value in document.items()}
            file.attrs.update(texts | {"axes": plan.settings.axes})
            for video_id, vectors, frames in videos:
                dataset = file.create_dataset(flat_name(video_id), data=_arrange(plan, vectors))
                dataset.attrs["video_id"] = video_id
                dataset.attrs["frames"] = frames
        sync(temporary)


_Write = Callable[[ExportPlan, Path, Mapping[str, Any], Iterable[Vectors]], None]
_WRITERS: Mapping[str, _Write] = {"npy": _write_npy, "parquet": _write_parquet, "hdf5": _write_hdf5}
