"""Point tracking by nearest tokens: every query of a video is found in each of its frames, and scored.

A store of every frame and queries (a benchmark's, from true tracks, or anybody's) go in; `tracks.parquet`,
pictures and one score row per video and kind of tokens come out. Held of a video are the tokens of the frames
in which queries are given, up to a limit, one frame, and the tracks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import (
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    RemoteError,
    UsageError,
)
from cosettle_cache.core.files import inside, own_folder
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.settings import TrackSettings, make_provenance
from cosettle_cache.core.tables import open_table, stream_table
from cosettle_cache.core.types import Score, Video
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import remove_scores, tracks_row, video_row, write_scores
from cosettle_cache.metrics.tapvid import SIZE, count_tracks, scored_frames
from cosettle_cache.pictures.drawing import DrawnTracks, write_tracks
from cosettle_cache.propagation.context import FRAMES_AT_ONCE
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.queries import Queries, open_tracks, sample_queries
from cosettle_cache.videos.tapvid import PointTracks

#: Stands in score rows as the protocol; the settings stand beside it.
PROTOCOL = "nearest-token"
TRACKS_FILE, PICTURE_FOLDER = "tracks.parquet", "pictures"
#: Bytes of the tokens of query frames that are held at once; more of them take more passes over the video.
DEFAULT_MEMORY_BYTES = 512 * 10**6
#: Queries that meet all tokens of a frame at once; bounds the cosines in memory.
_BLOCK = 1024

#: One row per kind of tokens, query and frame; places in pixels of the video from the image's corner. True
#: places are null where nobody knows them.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("video_id", "tokens")),
        *((name, pa.int64()) for name in ("query", "track", "query_frame", "frame")),
        *(("x", pa.float32()), ("y", pa.float32()), ("visible", pa.bool_()), ("cosine", pa.float32())),
        *(("true_x", pa.float32()), ("true_y", pa.float32()), ("true_visible", pa.bool_())),
    ]
)

Frame = Float[Tensor, "row col dim"]
Cells = Float[Tensor, "query 2"]


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

    @property
    def complete(self) -> bool:
        """Say whether every video had its turn and none failed."""
        return not (self.interrupted or self.error or self.failures)


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """One video, what is asked about it and, where that is known, the truth of each query."""

    video: Video
    queries: Queries
    truth: PointTracks | None


@dataclass(frozen=True, slots=True, eq=False)
class _FoundTracks:
    """Where the queries of one video were found, in pixels, by one kind of tokens."""

    kind: TokenKind
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
    earlier_failures: Mapping[str, str] = {},
) -> TrackReport:
    """Track the queries of every video of `store`; raw and projected tokens share each read.

    Without `queries` (by video id) they are sampled from true tracks, which are then scored. Writes
    `out/tracks.parquet`, scores, and pictures of no, the first or all videos, for which frames lie under
    `data_root`. A video that cannot be tracked is recorded in the report and does not end the run; setting
    `stop` ends it after the video in hand. `earlier_failures` says by id which videos did not come as far as
    this and why. Raises `FingerprintError` for a store that does not hold every frame, and `UsageError` when
    `out` is not a run's own folder, or another run is at work there.
    """
    check_store(store)
    videos = [video for video in store.manifest if queries is None or video.video_id in queries]
    n_pictures = {"none": 0, "first": 1, "all": len(videos)}
    if pictures not in n_pictures:
        raise UsageError(f"{pictures!r} says nothing about pictures", wanted=", ".join(n_pictures))
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=(PICTURE_FOLDER,))
    report, started, to_draw = TrackReport(), time.perf_counter(), n_pictures[pictures]
    report.failures |= earlier_failures
    try:
        with counting(progress, len(videos), "videos") as advance, _writing(out, report) as write:
            for video in videos:
                if stop is not None and stop.is_set():
                    report.interrupted = True
                    break
                try:
                    folder = inside(out / PICTURE_FOLDER, video.video_id)
                    case = _open(video, data_root, queries, settings)
                    with exact_float32(torch.device(device).type):
                        found = _find(case, store, kinds, settings, device, memory_bytes)
                    report.n_queries += len(case.queries)
                    report.n_frames += video.n_frames
                    _keep(case, found, store, settings, task, write, report)
                except (InputError, DamagedStoreError) as error:
                    report.failures[video.video_id] = error.reason
                except RemoteError as error:
                    report.error = error
                    break
                else:
                    if to_draw:
                        to_draw -= 1
                        _draw(case, found, data_root, folder, report)
                advance()
    except OutputError as error:
        report.error = report.error or error
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def _writing(out: Path, report: TrackReport) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Hold `out` for a run and give what writes rows there; the report's scores follow in the end."""
    if (out / TRACKS_FILE).exists() and open_table(out / TRACKS_FILE).schema_arrow.names != SCHEMA.names:
        raise UsageError(f"{out / TRACKS_FILE} is another table", hint="choose another folder with --out")
    with own_folder(out, "track"):
        remove_scores(out)
        try:
            with stream_table(out / TRACKS_FILE, SCHEMA) as write:
                yield write
        except OutputError as error:
            report.error = report.error or error
        if report.scores:
            write_scores(out, report.scores, complete=report.complete)


def check_store(store: FeatureStore) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos."""
    if unlike := store.unlike_every_frame():
        raise FingerprintError(
            f"points cannot be tracked in {store.path}",
            wanted=unlike[0],
            found=unlike[1],
            hint="cosettle-cache extract --plan frames",
        )


def _open(
    video: Video, data_root: Path | None, queries: Mapping[str, Queries] | None, settings: TrackSettings
) -> _Case:
    if video.n_frames == 1:
        raise InputError(f"{video.video_id} has one frame: there is nothing to track")
    if queries is not None:
        return _Case(video, queries[video.video_id], None)
    assert data_root is not None
    truth = open_tracks(video, data_root)
    sampled = sample_queries(truth, settings.query_mode, settings.query_stride)
    if not scored_frames(sampled.frames, video.n_frames, settings.query_mode).any():
        raise InputError(f"{video.video_id} shows no point before its last frame: nothing is scored")
    return _Case(video, sampled, _choose(truth, sampled.tracks))


@torch.inference_mode()
def _find(
    case: _Case,
    store: FeatureStore,
    kinds: Sequence[TokenKind],
    settings: TrackSettings,
    device: str,
    memory_bytes: int,
) -> list[_FoundTracks]:
    """Track all queries; the tokens of their frames, of all kinds, stay below the limit."""
    video, queries = case.video, case.queries
    shape = (len(queries), video.n_frames)
    found = [
        _FoundTracks(kind, np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape, np.float32))
        for kind in kinds
    ]
    grid, dim = store.grid(video.video_id), store.arrays[0].n_channels
    pixels = np.array([video.width / grid.cols, video.height / grid.rows])
    n_at_once = max(1, memory_bytes // (len(kinds) * grid.n_tokens * dim * np.dtype(np.float32).itemsize))
    asked, there = np.unique(queries.frames), torch.device(device)
    for first in range(0, len(asked), n_at_once):
        homes = asked[first : first + n_at_once].tolist()
        members = np.flatnonzero(np.isin(queries.frames, homes))
        places = (queries.frames[members], queries.points[members] / pixels)
        frames, cells = (torch.from_numpy(array).to(there) for array in places)
        at_home = torch.from_numpy(store.tokens(video.video_id, homes)).to(there)
        trackers = []
        for kind in kinds:
            of_kind = {frame: kind.apply(home.float()) for frame, home in zip(homes, at_home, strict=True)}
            trackers.append(Tracker(of_kind, frames, cells, settings))
        del at_home, of_kind  # trackers keep what they need of them
        waiting: list[list[Found]] = [[] for _ in kinds]
        for index, frame in enumerate(store.stream_tokens(video.video_id)):
            tokens = upload(torch.from_numpy(frame), there).float()
            for tracker, tracks, steps in zip(trackers, found, waiting, strict=True):
                steps.append(tracker.step(tracks.kind.apply(tokens), index))
            if len(waiting[0]) == FRAMES_AT_ONCE or index == video.n_frames - 1:
                span = slice(index + 1 - len(waiting[0]), index + 1)
                for tracks, steps in zip(found, waiting, strict=True):
                    tracks.points[members, span] = _on_host(steps, "cells") * pixels
                    tracks.visible[members, span] = _on_host(steps, "visible")
                    tracks.cosines[members, span] = _on_host(steps, "cosines")
                    steps.clear()
    return found


def _on_host(frames: Sequence[Found], name: str) -> Any:
    """Return what was found in frames as `[query frame ...]`; the device is waited for once."""
    return torch.stack([getattr(frame, name) for frame in frames], dim=1).cpu().numpy()


def _table(case: _Case, found: _FoundTracks, query_mode: str) -> pa.RecordBatch:
    """Return the rows of the frames that count, and of the query's own; of free points all."""
    kept, n_frames = np.ones(found.visible.shape, np.bool_), case.video.n_frames
    if case.truth is not None:
        own = np.arange(n_frames) == case.queries.frames[:, None]
        kept = own | scored_frames(case.queries.frames, n_frames, query_mode)
    query, frame = np.nonzero(kept)
    columns: dict[str, object] = {
        "video_id": [case.video.video_id] * len(query),
        "tokens": [found.kind.name] * len(query),
        "query": query,
        "track": case.queries.tracks[query],
        "query_frame": case.queries.frames[query],
        "frame": frame,
        "cosine": found.cosines[query, frame],
    }
    for prefix, tracks in (("", found), ("true_", case.truth)):
        if tracks is not None:
            x, y = tracks.points[query, frame].astype(np.float32).T
            visible = tracks.visible[query, frame]
            columns |= {f"{prefix}x": x, f"{prefix}y": y, f"{prefix}visible": visible}
    unknown = {item.name: pa.nulls(len(query), item.type) for item in SCHEMA}
    return pa.RecordBatch.from_pydict({**unknown, **columns}, schema=SCHEMA)


def _keep(
    case: _Case,
    found: Sequence[_FoundTracks],
    store: FeatureStore,
    settings: TrackSettings,
    task: str,
    write: Callable[[pa.RecordBatch], None],
    report: TrackReport,
) -> None:
    """Write the rows of a video and score it where its truth is known."""
    video, frames, truth = case.video, case.queries.frames, case.truth
    # The benchmark counts in pixels of a square picture, whatever the video's shape.
    square = np.array([SIZE / video.width, SIZE / video.height])
    for tracks in found:
        write(_table(case, tracks, settings.query_mode))
        if truth is None:
            continue
        points, places = truth.points * square, tracks.points * square
        counts = count_tracks(points, truth.visible, places, tracks.visible, frames, settings.query_mode)
        origin = make_provenance("track", video.dataset, store.fingerprint, tracks.kind.sha256)
        row = video_row(task, video, tracks.kind.name, PROTOCOL, asdict(settings), origin, (SIZE, SIZE))
        report.scores.append(tracks_row(row, counts, truth.sha256()))


def _draw(
    case: _Case, found: Sequence[_FoundTracks], data_root: Path | None, folder: Path, report: TrackReport
) -> None:
    """Draw each track once, from its earliest query; what goes wrong is a failure of the video."""
    assert data_root is not None
    video, (_, chosen) = case.video, np.unique(case.queries.tracks, return_index=True)
    truth = case.truth and _choose(case.truth, chosen)
    for tracks in found:
        drawn = DrawnTracks(_choose(tracks, chosen), case.queries.frames[chosen], truth)
        try:
            write_tracks(iter_frames(video, data_root), drawn, video.fps, folder, tracks.kind.name)
        except (InputError, OutputError) as error:
            report.failures[video.video_id] = f"its pictures: {error.summary}"


def _choose(tracks: PointTracks | _FoundTracks, chosen: Int64[np.ndarray, " chosen"]) -> PointTracks:
    return PointTracks(tracks.points[chosen], tracks.visible[chosen])


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
        asked = frames.cpu()
        self._members = {frame: upload(torch.nonzero(asked == frame)[:, 0], frames.device) for frame in homes}
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
        given, occlusion = self._frames == frame, self._settings.occlusion
        if occlusion == "cycle":
            visible = self._comes_back(tokens, cells)
        elif occlusion == "cosine":
            visible = cosines >= self._settings.min_cosine
        else:
            visible = torch.ones_like(given)
        return Found(torch.where(given[:, None], self._cells, cells), visible | given, cosines)

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

    def _comes_back(self, tokens: Frame, cells: Cells) -> Bool[Tensor, " query"]:
        back = normalize(sample_tokens(tokens, cells), dim=-1)
        visible = torch.zeros_like(self._frames, dtype=torch.bool)
        for frame, home in self._homes.items():
            chosen = self._members[frame]
            ends, _ = self._locate(back[chosen], home)
            gap = (ends - self._cells[chosen]).square().sum(dim=1)
            visible[chosen] = gap <= self._settings.cycle_radius**2
        return visible


def sample_tokens(tokens: Frame, cells: Cells) -> Float[Tensor, "query dim"]:
    """Return the tokens at places between cells, bilinearly; beyond the outer centres the rim goes on."""
    rows, cols, _ = tokens.shape
    unit = torch.stack([2 * cells[:, 0] / cols, 2 * cells[:, 1] / rows], dim=1) - 1
    sampled = grid_sample(
        tokens.permute(2, 0, 1)[None],
        unit[None, None].to(tokens.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[0, :, 0].T


@lru_cache(maxsize=8)
def _disc(radius: float, farthest: int, device: torch.device) -> Int64[Tensor, "place 2"]:
    """Return the steps (x, y) of at most `farthest` a side within `radius`, row by row."""
    reach = torch.arange(-farthest, farthest + 1)
    near = torch.cartesian_prod(reach, reach).flip(1)
    return near[near.square().sum(dim=1) <= radius**2].to(device)


def locate(
    cosines: Float[Tensor, "query row col"], radius: float, temperature: float
) -> tuple[Cells, Float[Tensor, " query"]]:
    """Return where each map is highest, refined, and how high: of equal ones the first in reading order.

    The refined place is the mean of the centres of all cells within `radius` of the highest, weighted by
    the softmax of `cosines / temperature` over them.
    """
    _, rows, cols = cosines.shape
    best, index = cosines.flatten(1).max(dim=1)
    near = _disc(radius, min(math.floor(radius), max(rows, cols) - 1), cosines.device)
    x = (index % cols)[:, None] + near[:, 0]
    y = (index // cols)[:, None] + near[:, 1]
    inside = (x >= 0) & (x < cols) & (y >= 0) & (y < rows)
    flat = y.clamp(0, rows - 1) * cols + x.clamp(0, cols - 1)
    values = cosines.flatten(1).gather(1, flat).where(inside, -torch.inf)
    weights = torch.softmax(values / temperature, dim=1)
    cells = torch.stack([(weights * x).sum(dim=1), (weights * y).sum(dim=1)], dim=1) + 0.5
    return cells.double(), best
