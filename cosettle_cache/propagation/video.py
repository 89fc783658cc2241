"""One video, all kinds of tokens: read once, searched, carried, written, scored, marked as finished.

The only place that reads the store. A video is a unit of work for this process or for any other that has
the store, the data and the output folder at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from cosettle_cache.core.errors import CosettleError, DamagedStoreError, InputError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.types import Score, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.propagation.propagator import LabelCarrier, check_length
from cosettle_cache.propagation.report import StageSeconds, VideoReport, peak_memory_bytes
from cosettle_cache.propagation.searching import Source, Tokens, open_source
from cosettle_cache.propagation.tasks import find_benchmark
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Subject
from cosettle_cache.propagation.work import VideoWork


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
        fingerprint, protocol = self.work.store.fingerprint, self.work.protocol
        versions = {"extract": dict(fingerprint.versions), "propagate": package_versions()}
        return Score(
            task=self.work.task,
            dataset=self.video.dataset,
            video_id=self.video.video_id,
            tokens=kind.name,
            n_frames=self.video.n_frames,
            scored_size=f"{self.video.height}x{self.video.width}",
            protocol=protocol.name,
            protocol_json=json.dumps(protocol.to_json(), sort_keys=True),
            manifest_digest=fingerprint.manifest_digest,
            backbone=fingerprint.backbone,
            weights_sha256=fingerprint.weights_sha256,
            projection_sha256=kind.sha256,
            versions_json=json.dumps(versions, sort_keys=True),
        )
