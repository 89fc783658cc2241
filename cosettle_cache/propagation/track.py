"""Points through stored tokens: every query of a video is found again in each of its frames, and scored.

A feature store and queries (a benchmark's, from true tracks, or anybody's) go in; tracks, pictures and one
score row per video and kind of tokens come out. What is held of a video are the tokens of the frames in which
queries are given, as far as a limit allows, the frame in hand, and the tracks.

Nearest-token tracking: a point is where the token most like its own lies, refined between tokens.

Tokens of one frame after the other come in, `[row col dim]`; places in cells come out. A cell is a token's
square: (x, y) run from 0 to columns and rows, and a token's centre lies at one half. Nothing grows with the
length of a video but the tokens of the frames in which queries are given.

Tracked points as a table: one row per kind of tokens, query and frame.

In come the queries of one video and where they were found; out go rows for `tracks.parquet`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import (
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    RemoteError,
    UsageError,
)
from cosettle_cache.core.settings import QUERY_MODES, TrackSettings, package_versions
from cosettle_cache.core.tables import stream_table
from cosettle_cache.core.types import Score, Video
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import tracks_row
from cosettle_cache.metrics.tapvid import SIZE, count_tracks, scored_frames
from cosettle_cache.pictures.tracks import DrawnTracks, write_tracks
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.queries import Queries, open_tracks, sample_queries
from cosettle_cache.videos.tapvid import PointTracks

#: How visibility is estimated.
OCCLUSIONS = ("cycle", "cosine", "never")
#: Queries that meet all tokens of a frame at once; bounds the cosines in memory.
_BLOCK = 1024

Frame = Float[Tensor, "row col dim"]
Cells = Float[Tensor, "query 2"]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where the queries are in one frame, in cells, whether they show there, and how alike the tokens are."""

    cells: Float[Tensor, "query 2"]
    visible: Bool[Tensor, " query"]
    cosines: Float[Tensor, " query"]


def check_settings(settings: TrackSettings) -> None:
    """Raise `UsageError` for settings that mean nothing."""
    for name, value, known in (
        ("query mode", settings.query_mode, QUERY_MODES),
        ("occlusion", settings.occlusion, OCCLUSIONS),
    ):
        if value not in known:
            raise UsageError(f"unknown {name}", wanted=" or ".join(known), found=value)
    positive = ("query_stride", "temperature", "cycle_radius")
    for name in positive:
        if not getattr(settings, name) > 0:
            raise UsageError(f"{name} must be positive", wanted="more than 0", found=getattr(settings, name))
    if settings.radius < 0 or not math.isfinite(settings.radius):
        raise UsageError("radius is a distance in tokens", wanted="0 or more", found=settings.radius)


def sample_tokens(tokens: Frame, cells: Cells) -> Float[Tensor, "query dim"]:
    """Return the tokens at places between cells, bilinearly; beyond the outer centres the rim goes on."""
    rows, cols, _ = tokens.shape
    unit = 2 * cells / torch.tensor([cols, rows], dtype=cells.dtype, device=cells.device) - 1
    sampled = grid_sample(
        tokens.permute(2, 0, 1)[None],
        unit[None, None].to(tokens.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[0, :, 0].T


def locate(
    cosines: Float[Tensor, "query row col"], radius: float, temperature: float
) -> tuple[Cells, Float[Tensor, " query"]]:
    """Return where each map is highest, refined, and how high: of equal ones the first in reading order.

    The refined place is the mean of the centres of all cells within `radius` of the highest, weighted by
    the softmax of `cosines / temperature` over them.
    """
    _, rows, cols = cosines.shape
    best, index = cosines.flatten(1).max(dim=1)
    near = _disc(radius, max(rows, cols), cosines.device)
    x = (index % cols)[:, None] + near[:, 0]
    y = (index // cols)[:, None] + near[:, 1]
    inside = (x >= 0) & (x < cols) & (y >= 0) & (y < rows)
    flat = y.clamp(0, rows - 1) * cols + x.clamp(0, cols - 1)
    values = cosines.flatten(1).gather(1, flat).where(inside, -torch.inf)
    weights = torch.softmax(values / temperature, dim=1)
    cells = torch.stack([(weights * x).sum(dim=1), (weights * y).sum(dim=1)], dim=1) + 0.5
    return cells.double(), best


def _disc(radius: float, side: int, device: torch.device) -> Int64[Tensor, "cell 2"]:
    """Return the offsets (x, y) of the cells within `radius` of one, those beyond a grid's `side` aside."""
    farthest = min(math.floor(radius), side - 1)
    reach = torch.arange(-farthest, farthest + 1, device=device)
    x, y = torch.meshgrid(reach, reach, indexing="xy")
    offsets = torch.stack([x.flatten(), y.flatten()], dim=1)
    return offsets[offsets.square().sum(dim=1) <= radius**2]


class Tracker:
    """All queries on their way through the frames of one video, in any order of frames.

    `homes` are the tokens of the frames in which queries are given, by frame; `frames` and `cells` say where.
    """

    def __init__(
        self,
        homes: Mapping[int, Frame],
        frames: Int64[Tensor, " query"],
        cells: Cells,
        settings: TrackSettings,
    ) -> None:
        check_settings(settings)
        self._settings, self._frames, self._cells = settings, frames, cells.double()
        goes_back = settings.occlusion == "cycle"
        self._homes = {frame: normalize(tokens, dim=-1) for frame, tokens in homes.items() if goes_back}
        self._members = {frame: torch.nonzero(frames == frame)[:, 0] for frame in homes}
        self._shape = next(iter(homes.values())).shape
        self._tokens = cells.new_zeros((len(cells), self._shape[-1]), dtype=next(iter(homes.values())).dtype)
        for frame, tokens in homes.items():
            chosen = self._members[frame]
            self._tokens[chosen] = normalize(sample_tokens(tokens, self._cells[chosen]), dim=-1)

    def step(self, tokens: Frame, frame: int) -> Found:
        """Return where every query is in `frame`; a query of this very frame is where it was given."""
        if tokens.shape != self._shape:
            raise InputError(
                f"frame {frame} has tokens of another grid than the frames of the queries",
                wanted=tuple(self._shape),
                found=tuple(tokens.shape),
            )
        cells, cosines = self._locate(self._tokens, normalize(tokens, dim=-1))
        visible = self._shows(tokens, cells, cosines)
        given = self._frames == frame
        cells = torch.where(given[:, None], self._cells, cells)
        return Found(cells, visible | given, cosines)

    def _locate(
        self, queries: Float[Tensor, "query dim"], unit: Frame
    ) -> tuple[Cells, Float[Tensor, " query"]]:
        keys = unit.flatten(0, 1).T
        radius, temperature = self._settings.radius, self._settings.temperature
        parts = [
            locate((block @ keys).view(len(block), *unit.shape[:2]), radius, temperature)
            for block in torch.split(queries, _BLOCK)
        ]
        return torch.cat([cells for cells, _ in parts]), torch.cat([best for _, best in parts])

    def _shows(self, tokens: Frame, cells: Cells, cosines: Float[Tensor, " query"]) -> Bool[Tensor, " query"]:
        if self._settings.occlusion == "never":
            return torch.ones_like(cosines, dtype=torch.bool)
        if self._settings.occlusion == "cosine":
            return cosines >= self._settings.min_cosine
        back = normalize(sample_tokens(tokens, cells), dim=-1)
        visible = torch.zeros_like(cosines, dtype=torch.bool)
        for frame, home in self._homes.items():
            chosen = self._members[frame]
            ends, _ = self._locate(back[chosen], home)
            gap = (ends - self._cells[chosen]).square().sum(dim=1)
            visible[chosen] = gap <= self._settings.cycle_radius**2
        return visible


#: One row per kind of tokens, query and frame; places in pixels of the video from the image's corner. True
#: places are null where nobody knows them.
SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("tokens", pa.string()),
        ("query", pa.int64()),
        ("track", pa.int64()),
        ("query_frame", pa.int64()),
        ("frame", pa.int64()),
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("visible", pa.bool_()),
        ("cosine", pa.float32()),
        ("true_x", pa.float32()),
        ("true_y", pa.float32()),
        ("true_visible", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class TrackCase:
    """One video, what is asked about it and, where that is known, the truth of each query."""

    video: Video
    queries: Queries
    truth: PointTracks | None


@dataclass(frozen=True, slots=True, eq=False)
class FoundTracks:
    """Where the queries of one video were found, in pixels, by one kind of tokens."""

    points: Float64[np.ndarray, "query frame 2"]
    visible: Bool[np.ndarray, "query frame"]
    cosines: Float32[np.ndarray, "query frame"]

    @classmethod
    def empty(cls, n_queries: int, n_frames: int) -> FoundTracks:
        """Return room for so many queries and frames."""
        shape = (n_queries, n_frames)
        return cls(np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape, np.float32))


def track_rows(
    case: TrackCase, kind: str, found: FoundTracks, kept: Bool[np.ndarray, "query frame"]
) -> pa.RecordBatch:
    """Return the rows of the pairs of query and frame that are `kept`."""
    query, frame = np.nonzero(kept)
    places = found.points[query, frame]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([case.video.video_id] * len(query), pa.string()),
            pa.array([kind] * len(query), pa.string()),
            pa.array(query),
            pa.array(case.queries.tracks[query]),
            pa.array(case.queries.frames[query]),
            pa.array(frame),
            *_floats(places),
            pa.array(found.visible[query, frame]),
            pa.array(found.cosines[query, frame]),
            *_truth(case.truth, query, frame),
        ],
        schema=SCHEMA,
    )


def _truth(truth: PointTracks | None, query: np.ndarray, frame: np.ndarray) -> list[pa.Array]:
    if truth is None:
        return [
            pa.nulls(len(query), SCHEMA.field(name).type) for name in ("true_x", "true_y", "true_visible")
        ]
    return [*_floats(truth.points[query, frame]), pa.array(truth.visible[query, frame])]


def _floats(places: Float64[np.ndarray, "row 2"]) -> list[pa.Array]:
    return [pa.array(places[:, axis].astype(np.float32)) for axis in (0, 1)]


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
