"""Reading a store: which slots are committed, what they hold, and the tokens themselves.

The index decides what exists, never Zarr; every chunk is checked against its checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float16, Int, Int64

from cosettle_cache.core.errors import DamagedStoreError, InputError, UsageError, masked
from cosettle_cache.core.types import ArrayLayout, Fingerprint, Grid, Manifest, PlanKind, Video
from cosettle_cache.store._cache import DEFAULT_CACHE_BYTES, CachedStorage
from cosettle_cache.store._chunks import ChunkSource
from cosettle_cache.store._local import cached_property
from cosettle_cache.store.create import HEADER_COPY, header_copy
from cosettle_cache.store.format import MANIFEST, ROOT_METADATA, BytesError, SlotState
from cosettle_cache.store.header import check_array, read_header, repair_hint
from cosettle_cache.store.index import unseal
from cosettle_cache.store.plan import ENCODINGS_PER_SAMPLE, plan_of_store
from cosettle_cache.store.remote import ObjectStorage, Storage, open_storage
from cosettle_cache.videos.manifest import manifest_digest, manifest_from_table

SampleIds = Sequence[int] | Int[np.ndarray, " n"]


def open_store(
    path: str | Path, *, cache_dir: Path | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
) -> FeatureStore:
    """Open a store read-only, local or at a URL; it shows the slots that are committed now.

    With `cache_dir` the shards of a remote store are kept in that folder, `cache_bytes` of them at most.

    Raises `InputError` when there is none or a newer one, `DamagedStoreError` when its metadata is damaged.
    """
    storage = open_storage(path)
    if cache_dir is not None and isinstance(storage, ObjectStorage):
        return FeatureStore(CachedStorage(storage.path, cache_dir, cache_bytes))
    return FeatureStore(storage)


class FeatureStore:
    """A store open for reading; any number of threads may share it, and pickling opens it anew.

    Tokens are float16 `[... row col channel]`, as the encoder gave them.
    """

    def __init__(self, storage: Storage) -> None:
        header = read_header(storage)
        for layout in header.arrays:
            check_array(storage, layout)
        self.path = masked(storage.path)
        self._storage = storage
        self.fingerprint: Fingerprint = header.fingerprint
        self.encoder: Mapping[str, Any] = header.encoder
        self.arrays: tuple[ArrayLayout, ...] = header.arrays
        self.plan_kind = PlanKind(header.fingerprint.plan["kind"])
        self._header = header
        self._chunks = ChunkSource(storage, header)
        self.n_slots = len(self._chunks.slots)

    def __reduce__(self) -> tuple[object, ...]:
        return (FeatureStore, (self._storage,))

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest the store was made from."""
        name = f"{self.path}/{MANIFEST}"
        try:
            manifest = manifest_from_table(unseal(self._storage.read(MANIFEST)), name)
            copy = header_copy(manifest.provenance, self.path)
            is_ours = copy is not None and copy.identity == self._header.identity
            # Stores of the first release have no copy.
            if not is_ours and (copy or manifest_digest(manifest) != self.fingerprint.manifest_digest):
                raise BytesError(f"it is of another store than {ROOT_METADATA}")
        except (BytesError, OSError) as error:
            raise DamagedStoreError(
                f"the manifest {name} is damaged: {error}", hint=repair_hint(self.path)
            ) from error
        origin = {key: value for key, value in manifest.provenance.items() if key != HEADER_COPY}
        return replace(manifest, provenance=origin)

    def unlike_every_frame(self) -> tuple[str, str] | None:
        """Return what is wanted and what is found, unless the plan has every frame of every video."""
        if self.plan_kind is not PlanKind.FRAMES:
            return f"a {PlanKind.FRAMES} plan", f"a {self.plan_kind} plan"
        every = int(self.fingerprint.plan["every"])
        return None if every == 1 else ("every frame", f"one frame in {every}")

    @property
    def complete(self) -> bool:
        """Whether every slot is done: none to do, none with failed encodings."""
        return self.slot_states()[SlotState.DONE] == self.n_slots

    @property
    def n_bytes(self) -> int:
        """Bytes of every file of the store."""
        return sum(size for _, size in self._storage.walk())

    def slot_states(self) -> Mapping[str, int]:
        """Return the number of slots that are todo, done and failed."""
        n_committed = int(self._chunks.committed.sum())
        n_failed = pc.count_distinct(self._outlined[1]["slot"]).as_py()
        return {
            str(SlotState.TODO): self.n_slots - n_committed,
            str(SlotState.DONE): n_committed - n_failed,
            str(SlotState.FAILED): n_failed,
        }

    @cached_property
    def failures(self) -> dict[str, str]:
        """Reason by video id, for every video with an encoding that failed; of several the first."""
        videos, errors = (self._outlined[1][name].to_pylist() for name in ("video_id", "error"))
        return dict(zip(reversed(videos), reversed(errors), strict=True))

    @cached_property
    def index(self) -> pa.Table:
        """One row per encoding of the committed slots, in array and row order; see docs/store.md."""
        return self._chunks.read_index()

    @cached_property
    def video_ids(self) -> tuple[str, ...]:
        """Videos whose plain encodings are all present, in manifest order."""
        return tuple(video.video_id for video in self.manifest if self._is_present(video))

    def grid(self, video_id: str) -> Grid:
        """Return the grid of a video's tokens."""
        return self.arrays[self._plain_rows(video_id)[0]].grid

    def n_frames(self, video_id: str) -> int:
        """Return the number of plain encodings of a video (frames plan)."""
        return len(self._plain_rows(video_id)[1])

    def video_rows(self, video_id: str) -> tuple[Grid, Int64[np.ndarray, " frame"]]:
        """Return grid and rows of a video's plain encodings in frame order, for `read_encodings`."""
        array, rows = self._plain_rows(video_id)
        return self.arrays[array].grid, rows

    def content_digest(self, video_id: str) -> str:
        """Return a digest that another store, or this one made anew, has for equal tokens of a video only.

        It covers whole shards, so it may change with videos that share one (frames plan).
        """
        return self._chunks.parts_digest(*self._plain_rows(video_id))

    def tokens(
        self, video_id: str, frames: Sequence[int] | None = None
    ) -> Float16[np.ndarray, "frame row col dim"]:
        """Return the plain tokens of a video in frame order, or of its encodings `frames` (frames plan).

        In a store of every k-th frame `frames` counts the encodings, from 0.
        """
        array, rows = self._plain_rows(video_id)
        if frames is not None:
            if len(frames) and not 0 <= min(frames) <= max(frames) < len(rows):
                wanted, found = f"0 to {len(rows) - 1}", f"{min(frames)} to {max(frames)}"
                raise InputError(f"{self.path} has no such frames of {video_id}", wanted=wanted, found=found)
            rows = rows[np.asarray(frames, np.int64)]
        layout = self.arrays[array]
        out = np.empty((len(rows), *_token_shape(layout)), np.float16)
        self._chunks.read_many(array, rows, out)
        return out

    def iter_tokens(self, video_id: str) -> Iterator[Float16[np.ndarray, "row col dim"]]:
        """Yield the plain tokens of a video frame by frame, reading some frames ahead (frames plan).

        A frame stays as it is; one that is kept may hold up to 4 MiB of its neighbours in memory.
        """
        array, rows = self._plain_rows(video_id)
        shape = _token_shape(self.arrays[array])
        return (flat.reshape(shape) for flat in self._chunks.stream(array, rows))

    stream_tokens = iter_tokens

    @cached_property
    def sample_ids(self) -> Int64[np.ndarray, " n"]:
        """Ids of the samples that exist, ascending (pairs plan)."""
        return np.asarray(self.sample_table["sample"], np.int64)

    @cached_property
    def sample_table(self) -> pa.Table:
        """Columns `sample`, `video_id`, `view`, one row per id in `sample_ids` (pairs plan)."""
        self._check_plan(PlanKind.PAIRS)
        present, _ = self._outlined
        samples = pc.divide(present["row"], ENCODINGS_PER_SAMPLE)
        columns = {"sample": samples, "video_id": present["video_id"], "view": present["view"]}
        return pa.table(columns).combine_chunks()

    def samples(self, ids: SampleIds) -> Float16[np.ndarray, "n 3 row col dim"]:
        """Return samples in the order of `ids`: plain a, plain b, shifted a (pairs plan)."""
        self._check_plan(PlanKind.PAIRS)
        out = np.empty((len(ids), *self._sample_shape), np.float16)
        self.read_into(ids, out)
        return out

    def read_into(self, ids: SampleIds, out: Float16[np.ndarray, "n 3 row col dim"]) -> None:
        """Fill `out`, C-contiguous, with the samples `ids`; its memory may be used again and again."""
        self._check_plan(PlanKind.PAIRS)
        _check_buffer("samples", (len(ids), *self._sample_shape), out)
        self._chunks.read_many(0, np.asarray(ids, np.int64), out)

    def will_need(self, slots: Sequence[int] | Int64[np.ndarray, " n"]) -> None:
        """Let the shards of slots that are read soon come into the page cache, in the background.

        Behind a URL it is the shard cache, if any. Nothing is done where there is no room for them twice.
        """
        self._chunks.will_need(slots)

    def read_encodings(self, grid: Grid, rows: SampleIds, out: Float16[np.ndarray, "n row col dim"]) -> None:
        """Fill `out`, C-contiguous, with rows of the array of `grid`, in any order (frames plan)."""
        self._check_plan(PlanKind.FRAMES)
        grids = [layout.grid for layout in self.arrays]
        if grid not in grids:
            found = ", ".join(map(str, grids))
            raise InputError(f"{self.path} has no array of {grid} tokens", found=found)
        array = grids.index(grid)
        _check_buffer("encodings", (len(rows), *_token_shape(self.arrays[array])), out)
        self._chunks.read_many(array, np.asarray(rows, np.int64), out)

    def sample_slots(self, ids: SampleIds) -> Int64[np.ndarray, " n"]:
        """Return the slot in which each sample lies (pairs plan); reading slot by slot is in order."""
        self._check_plan(PlanKind.PAIRS)
        return np.asarray(ids, np.int64) * ENCODINGS_PER_SAMPLE // self.arrays[0].slot_encodings

    @cached_property
    def _outlined(self) -> tuple[pa.Table, pa.Table]:
        """What is present and what failed, of the index's outline."""
        table = self._chunks.read_index(outlined=True)
        if self.plan_kind is PlanKind.FRAMES:
            self._check_rows(table)
        is_present = pc.is_null(table["error"])
        return table.filter(is_present), table.filter(pc.invert(is_present))

    def _check_rows(self, table: pa.Table) -> None:
        """Raise `DamagedStoreError` for an index part that gives a frame to another video, or another number.

        The rows of pairs only name samples, which lie where their number says; `verify` compares them.
        """
        plan = plan_of_store(self._header, self.manifest)
        if plan is None:
            return
        for number, layout in enumerate(self.arrays):
            rows = table.filter(pc.equal(table["array"], str(layout.grid)))
            planned = plan.frame_columns(number, rows["row"].to_numpy())
            wrong = [pc.not_equal(rows[name], column).to_numpy() for name, column in planned.items()]
            for row in np.flatnonzero(np.logical_or.reduce(wrong))[:1]:
                place = self._chunks.slots.place(rows["slot"][int(row)].as_py())
                raise DamagedStoreError(
                    f"the index part {place.part_name} of {self.path} is damaged: its rows are not what the "
                    f"plan says",
                    hint=repair_hint(self.path),
                )

    @cached_property
    def _n_present(self) -> dict[str, int]:
        """Number of samples, or of plain encodings in a frames plan, by video id."""
        counts = self._outlined[0].group_by("video_id").aggregate([([], "count_all")])
        return dict(zip(counts["video_id"].to_pylist(), counts["count_all"].to_pylist(), strict=True))

    @cached_property
    def _rows_of_videos(self) -> dict[str, tuple[int, Int64[np.ndarray, " frame"]]]:
        """Array number and rows, in frame order, of each video's plain encodings."""
        table = self._outlined[0].sort_by([("video_id", "ascending"), ("frame", "ascending")])
        videos, starts = np.unique(table["video_id"].to_numpy(), return_index=True)
        numbers = {str(layout.grid): number for number, layout in enumerate(self.arrays)}
        arrays = [numbers[table["array"][int(start)].as_py()] for start in starts]
        pieces = zip(arrays, np.split(table["row"].to_numpy(), starts[1:]), strict=True)
        return dict(zip(map(str, videos), pieces, strict=True))

    @property
    def _sample_shape(self) -> tuple[int, int, int, int]:
        return (ENCODINGS_PER_SAMPLE, *_token_shape(self.arrays[0]))

    def _plain_rows(self, video_id: str) -> tuple[int, Int64[np.ndarray, " frame"]]:
        """Return the array and the rows of a video's plain encodings; raise `InputError` unless all exist."""
        self._check_plan(PlanKind.FRAMES)
        if video_id not in self._videos:
            known = ", ".join(list(self._videos)[:8])
            raise InputError(f"{self.path} has no video {video_id}", found=known)
        if not self._is_present(self._videos[video_id]):
            reason = self.failures.get(video_id, "some of its slots have not been extracted yet")
            hint = "run the same extract command again; it goes on with the slots that are missing"
            raise InputError(f"{self.path} does not hold all tokens of {video_id}: {reason}", hint=hint)
        return self._rows_of_videos[video_id]

    @cached_property
    def _videos(self) -> dict[str, Video]:
        return {video.video_id: video for video in self.manifest}

    def _is_present(self, video: Video) -> bool:
        plan = self.fingerprint.plan
        n_kept = -(-video.n_frames // int(plan.get("every", 1)))
        n_planned = int(plan.get("n_views", 1)) if self.plan_kind is PlanKind.PAIRS else n_kept
        return self._n_present.get(video.video_id, 0) == n_planned

    def _check_plan(self, kind: PlanKind) -> None:
        if self.plan_kind is not kind:
            raise InputError(
                f"{self.path} is a store of another plan",
                wanted=f"a {kind} plan",
                found=f"a {self.plan_kind} plan",
                hint=f"cosettle-cache extract --plan {kind} makes one",
            )


def _token_shape(layout: ArrayLayout) -> tuple[int, int, int]:
    return (layout.grid.rows, layout.grid.cols, layout.n_channels)


def _check_buffer(what: str, wanted: tuple[int, ...], out: Float16[np.ndarray, "..."]) -> None:
    if out.shape != wanted or out.dtype != np.float16 or not out.flags.c_contiguous:
        found = f"{out.dtype} {out.shape}" + ("" if out.flags.c_contiguous else ", not contiguous")
        raise UsageError(f"the buffer for {what} does not fit", wanted=f"float16 {wanted}", found=found)
