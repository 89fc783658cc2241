"""Points through stored tokens: every query of a video is found again in each of its frames, and scored.

A feature store and queries (a benchmark's, from true tracks, or anybody's) go in; tracks, pictures and one
score row per video and kind of tokens come out. What is held of a video are the tokens of the frames in which
queries are given, as far as a limit allows, the frame in hand, and the tracks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float64, Int64

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import (
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    RemoteError,
    UsageError,
)
from cosettle_cache.core.settings import TrackSettings, package_versions
from cosettle_cache.core.tables import stream_table
from cosettle_cache.core.types import Score, Video
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import tracks_row
from cosettle_cache.metrics.tapvid import SIZE, count_tracks, scored_frames
from cosettle_cache.pictures.tracks import DrawnTracks, write_tracks
from cosettle_cache.propagation.track_tables import SCHEMA, FoundTracks, TrackCase, track_rows
from cosettle_cache.propagation.tracker import Tracker, check_settings
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.point_tracks import PointTracks
from cosettle_cache.videos.queries import Queries, open_tracks, sample_queries

#: Stands in score rows as the protocol; its fields stand beside it.
PROTOCOL = "nearest-token"
PICTURES = ("none", "first", "all")
TRACKS_FILE, PICTURE_FOLDER = "tracks.parquet", "pictures"
#: Bytes of the tokens of query frames that are held at once; more of them take more passes over the video.
DEFAULT_MEMORY_BYTES = 512 * 10**6


@dataclass(frozen=True, slots=True)
class TrackReport:
    """What one run of `track_store` did.

    `scores` has one row per video and kind of tokens, for videos with true tracks; `n_frames` counts frames
    once, however many projections and passes shared them; `failures` maps video ids to reasons. `error` is
    what ended the run early; the scores until then are kept.
    """

    scores: tuple[Score, ...]
    n_queries: int
    n_frames: int
    failures: Mapping[str, str]
    seconds: float
    interrupted: bool
    error: OutputError | RemoteError | None = None


def track_store(
    store: FeatureStore,
    data_root: Path | None,
    settings: TrackSettings,
    out: Path,
    *,
    task: str,
    queries: Mapping[str, Queries] | None = None,
    projections: Sequence[tuple[str, Projection]] = (),
    pictures: str = "first",
    device: str = "cpu",
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    progress: Progress = SILENT,
    stop: Event | None = None,
) -> TrackReport:
    """Track the queries of every video of `store`; raw and projected tokens share each read.

    Without `queries` (by video id) they are sampled from true tracks, which are then scored. Writes
    `out/tracks.parquet` and pictures of no, the first or all videos, for which frames lie under `data_root`.
    A video that cannot be tracked is recorded in the report and does not end the run; setting `stop` ends it
    after the video in hand. Raises `UsageError` for settings that mean nothing and `FingerprintError` for a
    store that does not hold every frame.
    """
    check_settings(settings)
    check_store(store)
    if pictures not in PICTURES:
        raise UsageError(f"{pictures!r} says nothing about pictures", wanted=", ".join(PICTURES))
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=(PICTURE_FOLDER,))
    run = _Run(store, data_root, settings, out, task, kinds, device, memory_bytes, progress, queries)
    return run.track(pictures, stop or Event())


def check_store(store: FeatureStore) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos."""
    if unlike := store.unlike_every_frame():
        wanted, found = unlike
        raise FingerprintError(
            f"points cannot be tracked in {store.path}",
            wanted=wanted,
            found=found,
            hint="cosettle-cache extract --plan frames",
        )


@dataclass(slots=True)
class _Run:
    """One call of `track_store`: what it was given, and what comes of it."""

    store: FeatureStore
    data_root: Path | None
    settings: TrackSettings
    out: Path
    task: str
    kinds: list[TokenKind]
    device: str
    memory_bytes: int
    progress: Progress
    queries: Mapping[str, Queries] | None
    scores: list[Score] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    n_videos: int = 0
    n_queries: int = 0
    n_frames: int = 0
    n_drawn: int = 0
    error: OutputError | RemoteError | None = None

    def track(self, pictures: str, stop: Event) -> TrackReport:
        asked = self.store.manifest.videos
        videos = [video for video in asked if self.queries is None or video.video_id in self.queries]
        started = time.perf_counter()
        self.progress.start(len(videos), "videos")
        try:
            with stream_table(self.out / TRACKS_FILE, SCHEMA) as write:
                self._track_videos(videos, pictures, stop, write)
        except OutputError as error:
            self.error = self.error or error
        finally:
            self.progress.finish()
        return TrackReport(
            scores=tuple(self.scores),
            n_queries=self.n_queries,
            n_frames=self.n_frames,
            failures=self.failures,
            seconds=time.perf_counter() - started,
            interrupted=self.n_videos < len(videos) and self.error is None,
            error=self.error,
        )

    def _track_videos(
        self,
        videos: Sequence[Video],
        pictures: str,
        stop: Event,
        write: Callable[[pa.RecordBatch], None],
    ) -> None:
        for video in videos:
            if stop.is_set() or self.error:
                break
            self.n_videos += 1
            try:
                case = self._open(video)
                found = self._track_video(case)
                for kind, tracks in zip(self.kinds, found, strict=True):
                    self._keep(case, kind, tracks, write)
            except (InputError, DamagedStoreError) as error:
                self.failures[video.video_id] = error.summary
            except RemoteError as error:
                self.error = error
            else:
                if pictures == "all" or (pictures == "first" and not self.n_drawn):
                    self._draw(case, found)
            self.progress.advance()

    def _open(self, video: Video) -> TrackCase:
        if video.n_frames == 1:
            raise InputError(f"{video.video_id} has one frame: there is nothing to track")
        if self.queries is not None:
            return TrackCase(video, self.queries[video.video_id], None)
        assert self.data_root is not None
        truth = open_tracks(video, self.data_root)
        queries = sample_queries(truth, self.settings.query_mode, self.settings.query_stride)
        if not scored_frames(queries.frames, video.n_frames, self.settings.query_mode).any():
            raise InputError(f"{video.video_id} shows no point before its last frame: nothing is scored")
        chosen = PointTracks(truth.points[queries.tracks], truth.visible[queries.tracks])
        return TrackCase(video, queries, chosen)

    @torch.inference_mode()
    def _track_video(self, case: TrackCase) -> list[FoundTracks]:
        n_frames = case.video.n_frames
        found = [FoundTracks.empty(len(case.queries), n_frames) for _ in self.kinds]
        for members in self._blocks(case):
            self._track_block(case, members, found)
        self.n_queries += len(case.queries)
        self.n_frames += n_frames
        return found

    def _blocks(self, case: TrackCase) -> Iterator[Int64[np.ndarray, " member"]]:
        """Yield queries whose frames' tokens, of all kinds, stay below the limit; at least one frame's."""
        grid, dim = self.store.grid(case.video.video_id), self.store.arrays[0].n_channels
        frame_bytes = len(self.kinds) * grid.n_tokens * dim * np.dtype(np.float32).itemsize
        frames = np.unique(case.queries.frames)
        n_at_once = max(1, self.memory_bytes // frame_bytes)
        for first in range(0, len(frames), n_at_once):
            yield np.flatnonzero(np.isin(case.queries.frames, frames[first : first + n_at_once]))

    def _track_block(
        self, case: TrackCase, members: Int64[np.ndarray, " member"], found: Sequence[FoundTracks]
    ) -> None:
        video_id = case.video.video_id
        grid = self.store.grid(video_id)
        pixels = np.array([case.video.width / grid.cols, case.video.height / grid.rows])
        trackers = self._make_trackers(case, members, pixels)
        for index, frame in enumerate(self.store.stream_tokens(video_id)):
            tokens = torch.from_numpy(frame).to(self.device).float()
            for kind, tracker, tracks in zip(self.kinds, trackers, found, strict=True):
                at = tracker.step(kind.apply(tokens), index)
                tracks.points[members, index] = at.cells.cpu().numpy() * pixels
                tracks.visible[members, index] = at.visible.cpu().numpy()
                tracks.cosines[members, index] = at.cosines.cpu().numpy()

    def _make_trackers(
        self, case: TrackCase, members: Int64[np.ndarray, " member"], pixels: Float64[np.ndarray, "2"]
    ) -> list[Tracker]:
        frames = case.queries.frames[members]
        cells = torch.from_numpy(case.queries.points[members] / pixels).to(self.device)
        homes = np.unique(frames).tolist()
        tokens = torch.from_numpy(self.store.tokens(case.video.video_id, homes)).to(self.device)
        asked = torch.from_numpy(frames).to(self.device)
        return [
            Tracker(
                {frame: kind.apply(home.float()) for frame, home in zip(homes, tokens, strict=True)},
                asked,
                cells,
                self.settings,
            )
            for kind in self.kinds
        ]

    def _keep(
        self, case: TrackCase, kind: TokenKind, tracks: FoundTracks, write: Callable[[pa.RecordBatch], None]
    ) -> None:
        write(track_rows(case, kind.name, tracks, self._kept_frames(case)))
        if case.truth is None:
            return
        # The benchmark counts in pixels of a square picture, whatever the video's shape.
        square = np.array([SIZE / case.video.width, SIZE / case.video.height])
        counts = count_tracks(
            case.truth.points * square,
            case.truth.visible,
            tracks.points * square,
            tracks.visible,
            case.queries.frames,
            self.settings.query_mode,
        )
        self.scores.append(tracks_row(self._row(case.video, kind), counts, case.truth.sha256()))

    def _kept_frames(self, case: TrackCase) -> Bool[np.ndarray, "query frame"]:
        """Say which frames of each query are written: its own and those that count; of free points all."""
        n_frames = case.video.n_frames
        if case.truth is None:
            return np.ones((len(case.queries), n_frames), np.bool_)
        own = np.arange(n_frames) == case.queries.frames[:, None]
        return np.asarray(own | scored_frames(case.queries.frames, n_frames, self.settings.query_mode))

    def _row(self, video: Video, kind: TokenKind) -> Score:
        fingerprint = self.store.fingerprint
        versions = {"extract": dict(fingerprint.versions), "track": package_versions()}
        return Score(
            task=self.task,
            dataset=video.dataset,
            video_id=video.video_id,
            tokens=kind.name,
            n_frames=video.n_frames,
            scored_size=f"{SIZE}x{SIZE}",
            protocol=PROTOCOL,
            protocol_json=json.dumps(asdict(self.settings), sort_keys=True),
            manifest_digest=fingerprint.manifest_digest,
            backbone=fingerprint.backbone,
            weights_sha256=fingerprint.weights_sha256,
            projection_sha256=kind.sha256,
            versions_json=json.dumps(versions, sort_keys=True),
        )

    def _draw(self, case: TrackCase, found: Sequence[FoundTracks]) -> None:
        """Draw each track once, from its earliest query; what goes wrong is a failure of the video."""
        assert self.data_root is not None
        _, chosen = np.unique(case.queries.tracks, return_index=True)
        self.n_drawn += 1
        truth = case.truth and PointTracks(case.truth.points[chosen], case.truth.visible[chosen])
        for kind, tracks in zip(self.kinds, found, strict=True):
            drawn = DrawnTracks(
                PointTracks(tracks.points[chosen], tracks.visible[chosen]), case.queries.frames[chosen], truth
            )
            try:
                images = iter_frames(case.video, self.data_root)
                folder = self.out / PICTURE_FOLDER / case.video.video_id
                write_tracks(images, drawn, case.video.fps, folder, kind.name)
            except (InputError, OutputError) as error:
                self.failures[case.video.video_id] = f"its pictures: {error.summary}"
