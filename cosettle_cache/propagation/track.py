"""Point tracking by nearest tokens: every query of a video is found in each of its frames, and scored.

A store of every frame and queries (a benchmark's, from true tracks, or anybody's) go in; `tracks.parquet`,
pictures and one score row per video and kind of tokens come out. Held of a video are the tokens of the frames
in which queries are given, up to a limit, one frame, and the tracks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from cosettle_cache.core.settings import TrackSettings, make_provenance
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

#: Stands in score rows as the protocol; the settings stand beside it.
PROTOCOL = "nearest-token"
PICTURES = ("none", "first", "all")
TRACKS_FILE, PICTURE_FOLDER = "tracks.parquet", "pictures"
#: Bytes of the tokens of query frames that are held at once; more of them take more passes over the video.
DEFAULT_MEMORY_BYTES = 512 * 10**6
#: Queries that meet all tokens of a frame at once; bounds the cosines in memory.
_BLOCK = 1024

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

Frame = Float[Tensor, "row col dim"]
Cells = Float[Tensor, "query 2"]
Kept = Bool[np.ndarray, "query frame"]


@dataclass(slots=True)
class TrackReport:
    """What one run of `track_store` did.

    `scores` has one row per video and kind of tokens, for videos with true tracks; `n_frames` counts frames
    once, however many projections and passes shared them; `failures` maps video ids to reasons. `error` is
    what ended the run early; the scores until then are kept.
    """

    scores: list[Score] = field(default_factory=list)
    n_queries: int = 0
    n_frames: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    error: OutputError | RemoteError | None = None


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
    after the video in hand. Raises `FingerprintError` for a store that does not hold every frame.
    """
    check_store(store)
    if pictures not in PICTURES:
        raise UsageError(f"{pictures!r} says nothing about pictures", wanted=", ".join(PICTURES))
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=(PICTURE_FOLDER,))
    run = _Run(store, data_root, settings, out, task, kinds, device, memory_bytes, queries)
    videos = [video for video in store.manifest if queries is None or video.video_id in queries]
    started = time.perf_counter()
    progress.start(len(videos), "videos")
    try:
        run.track(videos, pictures, progress, stop or Event())
    except OutputError as error:
        run.report.error = run.report.error or error
    finally:
        progress.finish()
    run.report.seconds = time.perf_counter() - started
    return run.report


def check_store(store: FeatureStore) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos."""
    if unlike := store.unlike_every_frame():
        raise FingerprintError(
            f"points cannot be tracked in {store.path}",
            wanted=unlike[0],
            found=unlike[1],
            hint="cosettle-cache extract --plan frames",
        )


@dataclass(frozen=True, slots=True)
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
    queries: Mapping[str, Queries] | None
    report: TrackReport = field(default_factory=TrackReport)

    def track(self, videos: Sequence[Video], pictures: str, progress: Progress, stop: Event) -> None:
        to_draw = {"none": 0, "first": 1, "all": len(videos)}[pictures]
        with stream_table(self.out / TRACKS_FILE, SCHEMA) as write:
            for video in videos:
                if stop.is_set():
                    self.report.interrupted = True
                    break
                try:
                    case = self._open(video)
                    found = self._find(case)
                    for kind, tracks in zip(self.kinds, found, strict=True):
                        write(self._table(case, kind, tracks))
                        self._score(case, kind, tracks)
                except (InputError, DamagedStoreError) as error:
                    self.report.failures[video.video_id] = error.summary
                except RemoteError as error:
                    self.report.error = error
                    break
                else:
                    if to_draw:
                        to_draw -= 1
                        self._draw(case, found)
                progress.advance()

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
        return TrackCase(video, queries, _choose(truth, queries.tracks))

    @torch.inference_mode()
    def _find(self, case: TrackCase) -> list[FoundTracks]:
        """Track all queries; the tokens of their frames, of all kinds, stay below the limit."""
        shape = (len(case.queries), case.video.n_frames)
        found = [
            FoundTracks(np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape, np.float32))
            for _ in self.kinds
        ]
        grid, dim = self.store.grid(case.video.video_id), self.store.arrays[0].n_channels
        frame_bytes = len(self.kinds) * grid.n_tokens * dim * np.dtype(np.float32).itemsize
        frames, n_at_once = np.unique(case.queries.frames), max(1, self.memory_bytes // frame_bytes)
        for first in range(0, len(frames), n_at_once):
            members = np.flatnonzero(np.isin(case.queries.frames, frames[first : first + n_at_once]))
            self._find_block(case, members, found)
        self.report.n_queries += shape[0]
        self.report.n_frames += shape[1]
        return found

    def _find_block(
        self, case: TrackCase, members: Int64[np.ndarray, " member"], found: Sequence[FoundTracks]
    ) -> None:
        video_id = case.video.video_id
        grid = self.store.grid(video_id)
        pixels = np.array([case.video.width / grid.cols, case.video.height / grid.rows])
        frames, cells = case.queries.frames[members], case.queries.points[members] / pixels
        trackers = list(self._trackers(video_id, frames, cells))
        for index, frame in enumerate(self.store.stream_tokens(video_id)):
            tokens = torch.from_numpy(frame).to(self.device).float()
            for kind, tracker, tracks in zip(self.kinds, trackers, found, strict=True):
                at = tracker.step(kind.apply(tokens), index)
                tracks.points[members, index] = at.cells.cpu().numpy() * pixels
                tracks.visible[members, index] = at.visible.cpu().numpy()
                tracks.cosines[members, index] = at.cosines.cpu().numpy()

    def _trackers(
        self, video_id: str, frames: Int64[np.ndarray, " member"], cells: Float64[np.ndarray, "member 2"]
    ) -> Iterator[Tracker]:
        homes = np.unique(frames).tolist()
        tokens = torch.from_numpy(self.store.tokens(video_id, homes)).to(self.device)
        asked, places = (torch.from_numpy(array).to(self.device) for array in (frames, cells))
        for kind in self.kinds:
            of_kind = {frame: kind.apply(home.float()) for frame, home in zip(homes, tokens, strict=True)}
            yield Tracker(of_kind, asked, places, self.settings)

    def _table(self, case: TrackCase, kind: TokenKind, found: FoundTracks) -> pa.RecordBatch:
        """Return the rows of the frames that count, and of the query's own; of free points all."""
        kept: Kept = np.ones(found.visible.shape, np.bool_)
        if case.truth is not None:
            own = np.arange(kept.shape[1]) == case.queries.frames[:, None]
            kept = own | scored_frames(case.queries.frames, kept.shape[1], self.settings.query_mode)
        query, frame = np.nonzero(kept)
        truth: dict[str, object] = {
            name: pa.nulls(len(query), SCHEMA.field(name).type)
            for name in ("true_x", "true_y", "true_visible")
        }
        if case.truth is not None:
            truth = _places("true_", case.truth, query, frame)
        columns = {
            "video_id": [case.video.video_id] * len(query),
            "tokens": [kind.name] * len(query),
            "query": query,
            "track": case.queries.tracks[query],
            "query_frame": case.queries.frames[query],
            "frame": frame,
            "cosine": found.cosines[query, frame],
            **_places("", found, query, frame),
            **truth,
        }
        return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)

    def _score(self, case: TrackCase, kind: TokenKind, found: FoundTracks) -> None:
        if case.truth is None:
            return
        video = case.video
        # The benchmark counts in pixels of a square picture, whatever the video's shape.
        square = np.array([SIZE / video.width, SIZE / video.height])
        counts = count_tracks(
            case.truth.points * square,
            case.truth.visible,
            found.points * square,
            found.visible,
            case.queries.frames,
            self.settings.query_mode,
        )
        row = Score(
            task=self.task,
            video_id=video.video_id,
            tokens=kind.name,
            n_frames=video.n_frames,
            scored_size=f"{SIZE}x{SIZE}",
            protocol=PROTOCOL,
            protocol_json=json.dumps(asdict(self.settings), sort_keys=True),
            provenance=make_provenance("track", video.dataset, self.store.fingerprint, kind.sha256),
        )
        self.report.scores.append(tracks_row(row, counts, case.truth.sha256()))

    def _draw(self, case: TrackCase, found: Sequence[FoundTracks]) -> None:
        """Draw each track once, from its earliest query; what goes wrong is a failure of the video."""
        assert self.data_root is not None
        video = case.video
        _, chosen = np.unique(case.queries.tracks, return_index=True)
        truth = case.truth and _choose(case.truth, chosen)
        for kind, tracks in zip(self.kinds, found, strict=True):
            drawn = DrawnTracks(_choose(tracks, chosen), case.queries.frames[chosen], truth)
            try:
                images = iter_frames(video, self.data_root)
                write_tracks(images, drawn, video.fps, self.out / PICTURE_FOLDER / video.video_id, kind.name)
            except (InputError, OutputError) as error:
                self.report.failures[video.video_id] = f"its pictures: {error.summary}"


def _choose(tracks: PointTracks | FoundTracks, chosen: Int64[np.ndarray, " chosen"]) -> PointTracks:
    return PointTracks(tracks.points[chosen], tracks.visible[chosen])


def _places(
    prefix: str, tracks: PointTracks | FoundTracks, query: np.ndarray, frame: np.ndarray
) -> dict[str, object]:
    x, y = tracks.points[query, frame].astype(np.float32).T
    return {f"{prefix}x": x, f"{prefix}y": y, f"{prefix}visible": tracks.visible[query, frame]}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where the queries are in one frame, in cells, whether they show there, and how alike the tokens are."""

    cells: Cells
    visible: Bool[Tensor, " query"]
    cosines: Float[Tensor, " query"]


class Tracker:
    """Finds all queries of one video in one frame after the other, in any order.

    A cell is a token's square: (x, y) run from 0 to columns and rows, and a token's centre lies at one half.
    `homes` are the tokens of the frames in which queries are given, by frame; `frames` and `cells` say where.
    """

    def __init__(
        self,
        homes: Mapping[int, Frame],
        frames: Int64[Tensor, " query"],
        cells: Cells,
        settings: TrackSettings,
    ) -> None:
        self._settings, self._frames, self._cells = settings, frames, cells.double()
        goes_back = settings.occlusion == "cycle"
        self._homes = {frame: normalize(tokens, dim=-1) for frame, tokens in homes.items() if goes_back}
        self._members = {frame: torch.nonzero(frames == frame)[:, 0] for frame in homes}
        some = next(iter(homes.values()))
        self._shape = some.shape
        self._tokens = some.new_zeros((len(cells), self._shape[-1]))
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
