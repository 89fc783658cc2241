"""All videos of a store, in this process or by many workers; finished ones are kept and not done again.

A store, a protocol and settings come in; out go the folder of the run and a report. Pictures are drawn from
what is on disk, beside the propagation or, by workers, after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import CosettleError, FingerprintError, UsageError
from cosettle_cache.core.parallel import Run
from cosettle_cache.core.settings import PropagateSettings
from cosettle_cache.core.types import EvalProtocol, Score
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import Mean, mean_scores, row_origins, sequence_means
from cosettle_cache.propagation.checks import check_labels, check_memory, check_store
from cosettle_cache.propagation.folder import RESERVED, RunFolder, run_origin
from cosettle_cache.propagation.tasks import find_task
from cosettle_cache.propagation.video import (
    StageSeconds,
    VideoReport,
    VideoWork,
    draw_video,
    peak_memory_bytes,
    propagate_video,
)
from cosettle_cache.search.masked import make_ranker
from cosettle_cache.store import FeatureStore

OVERLAYS = ("none", "first", "all")


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


def propagate_store(
    store: FeatureStore,
    data_root: Path,
    protocol: EvalProtocol,
    out: Path,
    settings: PropagateSettings = PropagateSettings(),  # noqa: B008 - frozen
    *,
    task: str = "davis",
    projections: Sequence[tuple[str, Projection]] = (),
    device: str | None = "cpu",
    runner: Run | None = None,
    progress: Progress = SILENT,
    stop: Event | None = None,
    on_start: Callable[[int], object] = lambda n_finished: None,
) -> PropagationReport:
    """Propagate the first labels of every video of `store`; raw and projected tokens share each read.

    Writes predictions below `out/TOKENS` as the benchmark `task` reads them, and pictures of no, the first or
    all videos. A video that an earlier run with the same settings finished in `out` is not done again. A
    video that cannot be read is recorded in the report and does not end the run; setting `stop` ends it after
    the videos in hand. With a `runner` workers do the videos: all paths are theirs too, and `stop` must be
    the runner's. `on_start` is called with the number of videos that are finished already, once the folder is
    taken and before anything is done.

    Raises `FingerprintError` when the store was made for another size, and when `out` holds results of other
    settings, unless `settings.restart` removes them.
    """
    if settings.overlays not in OVERLAYS:
        raise UsageError(
            f"{settings.overlays!r} says nothing about overlays",
            wanted=", ".join(OVERLAYS),
            found=settings.overlays,
        )
    row = find_task(task)
    check_store(store, protocol)
    check_labels(store, row)
    here = "cpu" if runner or device is None else device
    kinds = tuple(make_kinds(projections, store.arrays[0].n_channels, device=here, reserved=RESERVED))
    ranker = make_ranker(settings.search, torch.device(device or "cpu"))
    check_memory(store, protocol, settings.memory_limit, n_kinds=len(kinds), ranker=ranker)
    folder = RunFolder(out.absolute())
    work = VideoWork(store, data_root.absolute(), protocol, folder, settings, row, kinds, device)
    run = _Run(work, progress)
    with run.seconds.timed("total"):
        try:
            todo = run.begin(save_projections=runner is not None)
            on_start(run.n_before)
            with run.reporting(todo):
                if runner is None:
                    run.propagate_here(todo, stop or Event())
                else:
                    run.propagate_across(todo, runner)
        except FingerprintError:
            raise
        except CosettleError as error:
            run.error = error
    return run.report()


@dataclass(slots=True)
class _Run:
    """One call of `propagate_store`: its videos by number, and what became of them."""

    work: VideoWork
    progress: Progress
    seconds: StageSeconds = field(default_factory=StageSeconds)
    scores: dict[int, tuple[Score, ...]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    n_before: int = 0
    n_frames: int = 0
    n_reused: int = 0
    peak_memory: int = 0
    error: CosettleError | None = None

    def begin(self, *, save_projections: bool) -> list[int]:
        """Take the folder, recall what is finished in it, and return what is left to do."""
        work, folder = self.work, self.work.folder
        origin = run_origin(work.store, work.task.name, work.protocol, work.kinds)
        folder.begin(origin, [kind.name for kind in work.kinds], restart=work.settings.restart)
        if save_projections:
            kinds = tuple(kind.saved(folder.progress / "projections") for kind in work.kinds)
            self.work = replace(work, kinds=kinds)
        marks = [folder.finished(video, work.data_root) for video in work.videos]
        self.scores = {number: mark.scores for number, mark in enumerate(marks) if mark is not None}
        self.n_before = len(self.scores)
        return [number for number, mark in enumerate(marks) if mark is None]

    @contextmanager
    def reporting(self, todo: Sequence[int]) -> Iterator[None]:
        self.progress.start(sum(self.work.videos[number].n_frames for number in todo), "frames")
        try:
            yield
        finally:
            self.progress.finish()

    def propagate_here(self, todo: Sequence[int], stop: Event) -> None:
        """Propagate in this thread; pictures are drawn beside it, from what is on disk."""
        drawings: dict[int, Future[str | None]] = {}
        painter = ThreadPoolExecutor(1, "overlays")
        try:
            for number in range(len(self.work.videos)):
                if stop.is_set():
                    break
                if number in todo:
                    self.add(number, propagate_video(self.work, number, self.progress.advance))
                if self.is_to_be_drawn(number):
                    drawings[number] = painter.submit(draw_video, self.work, number)
        finally:
            # What was not begun is drawn by the next run.
            painter.shutdown(wait=False, cancel_futures=stop.is_set())
            with self.seconds.timed("wait_overlays"):
                self.add_drawings((n, job.result()) for n, job in drawings.items() if not job.cancelled())

    def propagate_across(self, todo: Sequence[int], runner: Run) -> None:
        """Propagate by workers, which then draw."""
        for number, report in runner(partial(propagate_video, self.work), todo):
            self.add(number, report)
            self.progress.advance(self.work.videos[number].n_frames)
        to_draw = [number for number in sorted(self.scores) if self.is_to_be_drawn(number)]
        with self.seconds.timed("wait_overlays"):
            self.add_drawings(runner(partial(draw_video, self.work), to_draw))

    def add(self, number: int, report: VideoReport) -> None:
        self.seconds.add(report.seconds)
        self.peak_memory = max(self.peak_memory, report.peak_memory_bytes)
        self.n_reused += report.n_reused
        self.n_frames += report.n_frames
        if report.failure is None:
            self.scores[number] = report.scores
        else:
            self.failures[number] = report.failure

    def is_to_be_drawn(self, number: int) -> bool:
        """Say whether pictures of a video are wanted and not there."""
        wanted = {"none": (), "first": (min(self.scores, default=None),), "all": self.scores}
        if number not in self.scores or number not in wanted[self.work.settings.overlays]:
            return False
        return not self.work.folder.is_drawn(self.work.videos[number].video_id)

    def add_drawings(self, results: Iterable[tuple[int, str | None]]) -> None:
        self.failures |= {number: failure for number, failure in results if failure is not None}

    def report(self) -> PropagationReport:
        videos = self.work.videos
        done = self.scores.keys() | self.failures.keys()
        return PropagationReport(
            scores=tuple(score for number in sorted(self.scores) for score in self.scores[number]),
            n_frames=self.n_frames,
            failures={videos[number].video_id: self.failures[number] for number in sorted(self.failures)},
            seconds=self.seconds,
            peak_memory_bytes=max(self.peak_memory, peak_memory_bytes()),
            interrupted=self.error is None and len(done) < len(videos),
            error=self.error,
            n_videos_before=self.n_before,
            n_reused=self.n_reused,
        )


def write_score_chart(path: Path, scores: Sequence[Score]) -> None:
    """Draw the main figure of every sequence by kind of tokens as PNG or SVG; no file without rows."""
    from cosettle_cache.pictures.charts import save_chart, score_chart

    means = mean_scores(scores)
    if means:
        by_sequence = {video_id: _main_percent(of_video) for video_id, of_video in sequence_means(scores)}
        origins = row_origins(scores)
        title = f"{'; '.join(origins['dataset'])}, protocol {'; '.join(origins['protocol'])}"
        unit = f"{means[0].main_name}, percent"
        save_chart(score_chart(title, unit, by_sequence, _main_percent(means)), path)


def _main_percent(means: Sequence[Mean]) -> dict[str, float]:
    return {mean.tokens: math.nan if mean.main is None else 100 * mean.main for mean in means}
