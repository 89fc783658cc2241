"""All videos of a store, in this process or by many workers; finished ones are kept and not done again.

A store, a protocol and settings come in; out go the folder of the run and a report. Pictures are drawn from
what is on disk, beside the propagation or, by workers, after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import CosettleError, FingerprintError, UsageError
from cosettle_cache.core.parallel import Run
from cosettle_cache.core.settings import OVERLAYS, PropagateSettings
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
    seconds, reports, n_before, error = StageSeconds(), dict[int, VideoReport](), 0, None
    with seconds.timed("total"):
        try:
            folder.begin(
                run_origin(store, task, protocol, kinds),
                [kind.name for kind in kinds],
                restart=settings.restart,
            )
            for number, video in enumerate(work.videos):
                if (rows := folder.finished(video, work.data_root)) is not None:
                    reports[number] = VideoReport(scores=rows)
            n_before = len(reports)
            on_start(n_before)
            n_frames = (video.n_frames for i, video in enumerate(work.videos) if i not in reports)
            progress.start(sum(n_frames), "frames")
            try:
                if runner is None:
                    _propagate_here(work, reports, seconds, progress, stop or Event())
                else:
                    saved = tuple(kind.saved(folder.progress / "projections") for kind in kinds)
                    _propagate_across(replace(work, kinds=saved), reports, seconds, progress, runner)
            finally:
                progress.finish()
        except FingerprintError:
            raise
        except CosettleError as caught:
            error = caught
    return _summary(work, reports, seconds, n_before, error)


def _propagate_here(
    work: VideoWork, reports: dict[int, VideoReport], seconds: StageSeconds, progress: Progress, stop: Event
) -> None:
    """Add the reports of the videos that have none; pictures are drawn beside, from what is on disk."""
    drawings: dict[int, Future[str | None]] = {}
    painter = ThreadPoolExecutor(1, "overlays")
    try:
        for number in range(len(work.videos)):
            if stop.is_set():
                break
            if number not in reports:
                reports[number] = propagate_video(work, number, progress.advance)
            if _is_to_be_drawn(work, reports, number):
                drawings[number] = painter.submit(draw_video, work, number)
    finally:
        # What was not begun is drawn by the next run.
        painter.shutdown(wait=False, cancel_futures=stop.is_set())
        with seconds.timed("wait_overlays"):
            for number, job in drawings.items():
                if not job.cancelled():
                    reports[number] = replace(reports[number], not_drawn=job.result())


def _propagate_across(
    work: VideoWork, reports: dict[int, VideoReport], seconds: StageSeconds, progress: Progress, runner: Run
) -> None:
    """Add the reports of the videos that have none, by workers, which then draw."""
    todo = [number for number in range(len(work.videos)) if number not in reports]
    for number, report in runner(partial(propagate_video, work), todo):
        reports[number] = report
        progress.advance(work.videos[number].n_frames)
    to_draw = [number for number in sorted(reports) if _is_to_be_drawn(work, reports, number)]
    with seconds.timed("wait_overlays"):
        for number, failure in runner(partial(draw_video, work), to_draw):
            reports[number] = replace(reports[number], not_drawn=failure)


def _is_to_be_drawn(work: VideoWork, reports: Mapping[int, VideoReport], number: int) -> bool:
    """Say whether pictures of a video are wanted and not there."""
    overlays = work.settings.overlays
    if overlays == "none" or number not in reports or reports[number].failure is not None:
        return False
    if overlays == "first" and any(reports[i].failure is None for i in reports if i < number):
        return False
    return not work.folder.is_drawn(work.videos[number].video_id)


def _summary(
    work: VideoWork,
    reports: Mapping[int, VideoReport],
    seconds: StageSeconds,
    n_before: int,
    error: CosettleError | None,
) -> PropagationReport:
    ordered = [(video.video_id, reports[i]) for i, video in enumerate(work.videos) if i in reports]
    for _, report in ordered:
        seconds.add(report.seconds)
    failures = {video_id: report.failure or report.not_drawn for video_id, report in ordered}
    return PropagationReport(
        scores=tuple(score for _, report in ordered for score in report.scores),
        n_frames=sum(report.n_frames for _, report in ordered),
        failures={video_id: reason for video_id, reason in failures.items() if reason is not None},
        seconds=seconds,
        peak_memory_bytes=max(peak_memory_bytes(), *(report.peak_memory_bytes for _, report in ordered), 0),
        interrupted=error is None and len(reports) < len(work.videos),
        error=error,
        n_videos_before=n_before,
        n_reused=sum(report.n_reused for _, report in ordered),
    )


def write_score_chart(scores: Sequence[Score], *paths: Path) -> None:
    """Draw the main figure of every sequence by kind of tokens as PNG or SVG; no files without rows."""
    from cosettle_cache.pictures.charts import save_chart, score_chart

    means = mean_scores(scores)
    if means:
        by_sequence = {video_id: _main_percent(of_video) for video_id, of_video in sequence_means(scores)}
        origins = row_origins(scores)
        title = f"{'; '.join(origins['dataset'])}, protocol {'; '.join(origins['protocol'])}"
        unit = f"{means[0].main_name}, percent"
        save_chart(score_chart(title, unit, by_sequence, _main_percent(means)), *paths)


def _main_percent(means: Sequence[Mean]) -> dict[str, float]:
    return {mean.tokens: math.nan if mean.main is None else 100 * mean.main for mean in means}
