"""All videos of a store, in this process or by many workers; finished ones are kept and not done again.

A store and settings come in; out go the folder of the run and a report. Pictures are drawn from what is on
disk, beside the propagation or, by workers, after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import CosettleError, FingerprintError, UsageError
from cosettle_cache.core.parallel import Run
from cosettle_cache.core.types import EvalProtocol, Score
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import Mean, mean_scores, row_origins, sequence_means
from cosettle_cache.propagation.checks import check_labels, check_memory, check_store
from cosettle_cache.propagation.folder import RESERVED, RunFolder, run_origin
from cosettle_cache.propagation.tasks import find_benchmark
from cosettle_cache.propagation.video import (
    PropagationReport,
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


def propagate_store(
    store: FeatureStore,
    data_root: Path,
    protocol: EvalProtocol,
    out: Path,
    *,
    task: str = "davis",
    projections: Sequence[tuple[str, Projection]] = (),
    overlays: str = "first",
    search: str = "auto",
    device: str | None = "cpu",
    memory_limit: int | None = None,
    neighbors: Path | None = None,
    restart: bool = False,
    runner: Run | None = None,
    progress: Progress = SILENT,
    stop: Event | None = None,
    on_start: Callable[[int], object] = lambda n_finished: None,
) -> PropagationReport:
    """Propagate the first labels of every video of `store`; raw and projected tokens share each read.

    Writes predictions below `out/TOKENS` as the benchmark `task` reads them, and pictures of no, the first or
    all videos. A video that an earlier run with the same settings finished in `out` is not done again. A
    video that cannot be read is recorded in the report and does not end the run; setting `stop` ends it after
    the videos in hand. `memory_limit` (bytes) bounds the search; `neighbors` is a folder where neighbour
    lists are kept, and used again for other labels and temperatures. With a `runner` workers do the videos:
    all paths are theirs too, and `stop` must be the runner's. `on_start` hears how many videos are finished
    already, once the folder is taken and before anything is done.

    Raises `FingerprintError` when the store was made for another size, and when `out` holds results of other
    settings, unless `restart` removes them.
    """
    if overlays not in OVERLAYS:
        raise UsageError(f"{overlays!r} says nothing about overlays", wanted=", ".join(OVERLAYS))
    check_labels(store, find_benchmark(task).labels, task)
    check_store(store, protocol)
    here = "cpu" if runner or device is None else device
    kinds = tuple(make_kinds(projections, store.arrays[0].n_channels, device=here, reserved=RESERVED))
    ranker = make_ranker(search, torch.device(device or "cpu"))
    check_memory(store, protocol, memory_limit, n_kinds=len(kinds), ranker=ranker)
    folder = RunFolder(out.absolute())
    work = VideoWork(
        store, data_root.absolute(), protocol, folder, task, kinds, search, device, memory_limit, neighbors
    )
    run = _Run(work, overlays, runner, progress, stop or Event(), on_start)
    return run.report(restart)


@dataclass(slots=True)
class _Run:
    """One call of `propagate_store`: what it was given, and what comes of it."""

    work: VideoWork
    overlays: str
    runner: Run | None
    progress: Progress
    stop: Event
    on_start: Callable[[int], object]
    seconds: StageSeconds = field(default_factory=StageSeconds)
    scores: dict[int, tuple[Score, ...]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    n_before: int = 0
    n_frames: int = 0
    n_reused: int = 0
    peak_memory: int = 0
    error: CosettleError | None = None

    def report(self, restart: bool) -> PropagationReport:
        """Do what is not done yet, and say what is."""
        videos = self.work.videos
        with self.seconds.timed("total"):
            try:
                self._begin(restart)
                self._propagate()
            except FingerprintError:
                raise
            except CosettleError as error:
                self.error = error
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

    def _begin(self, restart: bool) -> None:
        """Take the folder, and recall what is finished in it."""
        work, folder = self.work, self.work.folder
        origin = run_origin(work.store, work.task, work.protocol, work.kinds)
        folder.begin(origin, [kind.name for kind in work.kinds], restart=restart)
        if self.runner is not None:
            kinds = tuple(kind.saved(folder.progress / "projections") for kind in work.kinds)
            self.work = replace(work, kinds=kinds)
        marks = (folder.finished(video, work.data_root) for video in work.videos)
        self.scores = {number: mark.scores for number, mark in enumerate(marks) if mark is not None}
        self.n_before = len(self.scores)
        self.on_start(self.n_before)

    def _propagate(self) -> None:
        videos = self.work.videos
        todo = [number for number in range(len(videos)) if number not in self.scores]
        self.progress.start(sum(videos[number].n_frames for number in todo), "frames")
        try:
            if self.runner is None:
                self._here(todo)
            else:
                self._across(todo, self.runner)
        finally:
            self.progress.finish()

    def _here(self, todo: Sequence[int]) -> None:
        drawings: dict[int, Future[str | None]] = {}
        # Pictures are drawn beside the propagation, from what is on disk.
        painter = ThreadPoolExecutor(1, "overlays")
        try:
            for number in range(len(self.work.videos)):
                if self.stop.is_set():
                    break
                if number in todo:
                    self._add(number, propagate_video(self.work, number, self.progress.advance))
                if self._is_to_be_drawn(number):
                    drawings[number] = painter.submit(draw_video, self.work, number)
        finally:
            # What was not begun is drawn by the next run.
            painter.shutdown(wait=False, cancel_futures=self.stop.is_set())
            with self.seconds.timed("wait_overlays"):
                self._collect(drawings)

    def _across(self, todo: Sequence[int], runner: Run) -> None:
        for number, report in runner(partial(propagate_video, self.work), todo):
            self._add(number, report)
            self.progress.advance(self.work.videos[number].n_frames)
        to_draw = [number for number in sorted(self.scores) if self._is_to_be_drawn(number)]
        with self.seconds.timed("wait_overlays"):
            for number, failure in runner(partial(draw_video, self.work), to_draw):
                self._add_drawing(number, failure)

    def _add(self, number: int, report: VideoReport) -> None:
        self.seconds.add(report.seconds)
        self.peak_memory = max(self.peak_memory, report.peak_memory_bytes)
        self.n_reused += report.n_reused
        self.n_frames += report.n_frames
        if report.failure is None:
            self.scores[number] = report.scores
        else:
            self.failures[number] = report.failure

    def _is_to_be_drawn(self, number: int) -> bool:
        """Say whether pictures of a video are wanted and not there."""
        if number not in self.scores or self.overlays == "none":
            return False
        if self.overlays == "first" and number != min(self.scores):
            return False
        return not self.work.folder.is_drawn(self.work.videos[number].video_id)

    def _collect(self, drawings: Mapping[int, Future[str | None]]) -> None:
        for number, drawing in drawings.items():
            if not drawing.cancelled():
                self._add_drawing(number, drawing.result())

    def _add_drawing(self, number: int, failure: str | None) -> None:
        if failure is not None:
            self.failures[number] = failure


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
