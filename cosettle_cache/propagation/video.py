"""One video, all kinds of tokens: read once, searched, carried, written, scored, marked as finished.

The only place that reads the store. A video is a unit of work for this process or for any other that has
the store, the data and the output folder at hand.

Where the neighbours of a video's frames come from: a search, or the lists that an earlier one kept.

A kind of tokens goes in; out comes a function that takes the tokens of the next frame and returns its
neighbours. Neighbours do not depend on labels, so lists serve other labels, temperatures and tasks.

Everything that propagating the videos of a run takes, as one value that can be sent to other processes.

What a propagation says about itself: per video, and per run.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.errors import CosettleError, DamagedStoreError, InputError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.settings import digest, make_provenance
from cosettle_cache.core.types import EvalProtocol, Score, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.propagation.checks import input_size
from cosettle_cache.propagation.context import ContextSearch, Neighbors
from cosettle_cache.propagation.folder import RunFolder
from cosettle_cache.propagation.neighbor_files import NeighborsKey, load_neighbors, neighbor_writer
from cosettle_cache.propagation.propagator import LabelCarrier, check_length
from cosettle_cache.propagation.tasks import find_benchmark
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Setting, Subject
from cosettle_cache.store import FeatureStore


@dataclass(frozen=True, slots=True)
class VideoWork:
    """What a run is about; pickling it sends settings and paths only.

    `device` None is the worker's choice. `memory_limit` bounds the search of all kinds together, in bytes;
    `neighbors` is the folder where neighbour lists are kept and looked for.
    """

    store: FeatureStore
    data_root: Path
    protocol: EvalProtocol
    folder: RunFolder
    task: str
    kinds: tuple[TokenKind, ...]
    search: str
    device: str | None
    memory_limit: int | None
    neighbors: Path | None

    @property
    def videos(self) -> tuple[Video, ...]:
        """The manifest; videos go by their number in it."""
        return self.store.manifest.videos

    @property
    def search_bytes(self) -> int | None:
        """The bytes that the search of one kind of tokens may take."""
        return None if self.memory_limit is None else self.memory_limit // len(self.kinds)

    def check_places(self) -> None:
        """Raise `InputError` on a machine that does not see the data or the output under the run's paths."""
        for path, what in ((self.data_root, "the data root"), (self.folder.progress, "the output folder")):
            if not path.is_dir():
                raise InputError(
                    f"{path} is not a folder on {platform.node()}",
                    wanted=f"{what} under the same path on every worker",
                )

    def setting(self, number: int) -> Setting:
        """Return what labels and maps of a video depend on."""
        video = self.videos[number]
        size = input_size(self.protocol.size, video)
        return Setting(self.protocol, size, self.store.grid(video.video_id), number)

    def torch_device(self) -> torch.device:
        """Return where to compute."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


Tokens = Float[Tensor, "row col dim"]
#: Takes the tokens of the next frame and returns its neighbours, None for the first frame.
FindNeighbors = Callable[[Tokens | None], Neighbors | None]


@dataclass(frozen=True, slots=True)
class Source:
    """Neighbours frame by frame; with `kept` ones no tokens are needed."""

    find: FindNeighbors
    kept: bool = False


def open_source(
    work: VideoWork, kind: TokenKind, number: int, labels_bytes: int, open_files: ExitStack
) -> Source:
    """Return the neighbours of one kind of tokens; lists that are to be kept are open in `open_files`."""
    if work.neighbors is None:
        return Source(_search(work, kind, number, labels_bytes))
    key = _key(work, kind, number)
    path = _path(work.neighbors, key)
    kept = _load(path, key)
    if kept is not None:
        lists = chain([None], kept)
        return Source(lambda tokens: next(lists), kept=True)
    write = open_files.enter_context(neighbor_writer(path, key))
    return Source(partial(_find_and_keep, _search(work, kind, number, labels_bytes), write))


def _search(work: VideoWork, kind: TokenKind, number: int, labels_bytes: int) -> FindNeighbors:
    device, grid = work.torch_device(), work.setting(number).grid
    search = ContextSearch(
        grid,
        work.store.arrays[0].n_channels,
        work.protocol,
        device=device,
        search=work.search,
        memory_limit=work.search_bytes,
        labels_bytes=labels_bytes,
    )
    there = kind.on(device)

    def find(tokens: Tokens | None) -> Neighbors | None:
        assert tokens is not None
        return search.step(there.apply(tokens))

    return find


def _find_and_keep(
    find: FindNeighbors, write: Callable[[Neighbors], None], tokens: Tokens | None
) -> Neighbors | None:
    found = find(tokens)
    if found is not None:
        write(found)
    return found


def _key(work: VideoWork, kind: TokenKind, number: int) -> NeighborsKey:
    video: Video = work.videos[number]
    return NeighborsKey.of(
        work.protocol,
        video_id=video.video_id,
        tokens=digest([work.store.fingerprint.to_json(), kind.sha256]),
        n_frames=video.n_frames,
        grid=work.setting(number).grid,
    )


def _path(folder: Path, key: NeighborsKey) -> Path:
    """Return the file of a video's lists; tokens and searches have folders of their own."""
    return folder / digest([key.tokens, dict(key.search)])[:16] / f"{key.video_id}.parquet"


def _load(path: Path, key: NeighborsKey) -> Iterator[Neighbors] | None:
    """Return kept lists; None where there are none, or none that can be used: then they are made anew."""
    try:
        return load_neighbors(path, key)
    except InputError:
        return None


@dataclass(slots=True)
class StageSeconds:
    """Seconds of the calling thread per stage, and of the whole run; overlays are drawn beside it.

    Over several workers all but `total` are sums.
    """

    read: float = 0.0
    propagate: float = 0.0
    write: float = 0.0
    score: float = 0.0
    wait_overlays: float = 0.0
    total: float = 0.0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)

    def add(self, other: StageSeconds) -> None:
        """Add the stages of another clock."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What became of one video; `failure` says why there is nothing else.

    `n_reused` counts the kinds of tokens whose neighbours had been kept.
    """

    n_frames: int = 0
    scores: tuple[Score, ...] = ()
    failure: str | None = None
    n_reused: int = 0
    seconds: StageSeconds = field(default_factory=StageSeconds)
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """What one run of `propagate_store` did, and what earlier runs in the same folder had done.

    `scores` has the rows of every finished video that could be scored, in the manifest's order; `failures`
    maps video ids to reasons. `n_frames` counts the frames of this run once, however many projections shared
    them, `n_videos_before` the videos that were there already, `n_reused` the neighbour lists of videos that
    were read instead of searched. `error` is what ended the run early (no space left, say, or an object store
    that does not answer); what was finished until then is kept.
    """

    scores: tuple[Score, ...]
    n_frames: int
    failures: Mapping[str, str]
    seconds: StageSeconds
    peak_memory_bytes: int
    interrupted: bool
    error: CosettleError | None = None
    n_videos_before: int = 0
    n_reused: int = 0


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def propagate_video(
    work: VideoWork, number: int, advance: Callable[[], object] = lambda: None
) -> VideoReport:
    """Propagate through video `number` and mark it as finished; `advance` hears of every frame.

    What is wrong with the video or with its tokens becomes the report's `failure`; other errors are raised.
    """
    work.check_places()
    video = work.videos[number]
    work.folder.reopen(video.video_id)
    try:
        return _Passage(work, number, video, StageSeconds()).run(advance)
    except (InputError, DamagedStoreError) as error:
        return VideoReport(failure=error.summary)


def draw_video(work: VideoWork, number: int) -> str | None:
    """Draw the pictures of a finished video; return what went wrong, if anything did."""
    video, draw = work.videos[number], find_benchmark(work.task).draw
    predictions = {kind.name: work.folder.path / kind.name for kind in work.kinds}
    folder = work.folder.pictures(video.video_id)
    try:
        draw(Drawing(video, work.data_root, work.setting(number), predictions, make_folder(folder)))
        work.folder.finish_pictures(video.video_id)
    except CosettleError as error:
        return f"its overlays: {error.summary}"
    except Exception as error:
        # Whatever went wrong in a picture, the scores are worth more.
        return f"its overlays: {error!r}"
    return None


@dataclass(frozen=True, slots=True)
class _Track:
    """One kind of tokens on its way through one video."""

    kind: TokenKind
    source: Source
    carrier: LabelCarrier
    predictions: Predictions


@dataclass(frozen=True, slots=True)
class _Passage:
    """One video on its way."""

    work: VideoWork
    number: int
    video: Video
    seconds: StageSeconds

    @torch.inference_mode()
    def run(self, advance: Callable[[], object]) -> VideoReport:
        check_length(self.video.n_frames)
        setting = self.work.setting(self.number)
        subject = find_benchmark(self.work.task).open(self.video, self.work.data_root, setting)
        with ExitStack() as open_files:
            tracks = [self._track(kind, subject, open_files) for kind in self.work.kinds]
            all_kept = all(track.source.kept for track in tracks)
            for index, tokens in enumerate(self._no_tokens() if all_kept else self._tokens()):
                self._step(tracks, subject, index, tokens)
                advance()
        scores = tuple(score for track in tracks for score in self._close(track))
        self._finish([path for track in tracks for path in track.predictions.files], scores)
        return VideoReport(
            n_frames=self.video.n_frames,
            scores=scores,
            n_reused=sum(track.source.kept for track in tracks),
            seconds=self.seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _track(self, kind: TokenKind, subject: Subject, open_files: ExitStack) -> _Track:
        carrier = LabelCarrier(subject.label_map, self.work.protocol, device=self.work.torch_device())
        source = open_source(self.work, kind, self.number, carrier.nbytes, open_files)
        return _Track(kind, source, carrier, subject.begin(self.work.folder.path / kind.name))

    def _tokens(self) -> Iterator[Tokens]:
        frames = self.work.store.stream_tokens(self.video.video_id)
        for _ in range(self.video.n_frames):
            with self.seconds.timed("read"):
                tokens = torch.from_numpy(next(frames)).to(self.work.torch_device())
            yield tokens

    def _no_tokens(self) -> Iterator[None]:
        return iter([None] * self.video.n_frames)

    def _step(self, tracks: list[_Track], subject: Subject, index: int, tokens: Tokens | None) -> None:
        with self.seconds.timed("read"):
            truth = subject.truth(index)
        for track in tracks:
            with self.seconds.timed("propagate"):
                found = track.source.find(tokens)
                label_map = track.carrier.first if found is None else track.carrier.step(found)
                prediction = subject.decode(label_map)
            with self.seconds.timed("write"):
                track.predictions.write(index, prediction)
            if truth is not None:
                with self.seconds.timed("score"):
                    track.predictions.score(truth, prediction)

    def _close(self, track: _Track) -> list[Score]:
        with self.seconds.timed("write"):
            track.predictions.close()
        with self.seconds.timed("score"):
            return track.predictions.rows(self._row(track.kind))

    def _finish(self, files: list[Path], scores: tuple[Score, ...]) -> None:
        with self.seconds.timed("write"):
            self.work.folder.finish(self.video, self.work.data_root, files, scores)

    def _row(self, kind: TokenKind) -> Score:
        """Return a score row that holds provenance only."""
        protocol = self.work.protocol
        return Score(
            task=self.work.task,
            video_id=self.video.video_id,
            tokens=kind.name,
            n_frames=self.video.n_frames,
            scored_size=f"{self.video.height}x{self.video.width}",
            protocol=protocol.name,
            protocol_json=json.dumps(protocol.to_json(), sort_keys=True),
            provenance=make_provenance(
                "propagate", self.video.dataset, self.work.store.fingerprint, kind.sha256
            ),
        )
