"""All videos of a store, in this process or by many workers; finished ones are kept and not done again.

A store, a protocol and settings come in; out go the folder of the run and a report. Pictures are drawn from
what is on disk, beside the propagation or, by workers, after it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from threading import Event, Lock

import torch

from cosettle_cache.core.console import SILENT, Progress, counting, human_bytes
from cosettle_cache.core.errors import CosettleError, FingerprintError, UsageError
from cosettle_cache.core.files import own_folder
from cosettle_cache.core.parallel import Run, map_ahead, share_of_cores
from cosettle_cache.core.settings import LINEAR, PropagateSettings, replace_red_std
from cosettle_cache.core.types import EvalProtocol, Score
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import (
    Mean,
    mean_scores,
    remove_scores,
    row_origins,
    sequence_means,
    write_scores,
)
from cosettle_cache.propagation.context import check_candidates
from cosettle_cache.propagation.folder import RESERVED, RunFolder, run_origin
from cosettle_cache.propagation.protocols import check_protocol
from cosettle_cache.propagation.tasks import Task, find_task
from cosettle_cache.propagation.video import (
    VideoReport,
    VideoWork,
    draw_video,
    peak_memory_bytes,
    propagate_video,
    store_patch,
)
from cosettle_cache.search.choose import make_ranker
from cosettle_cache.search.masked import Ranker, SearchSize, limit_on
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import resolve_size

#: Videos that are under way at once for a GPU, one of them on it.
_VIDEOS_AT_ONCE = 6


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """What one run of `propagate_store` did, and what earlier runs in the same folder had done.

    `scores` has the rows of every finished video that could be scored, in the manifest's order; `failures`
    maps video ids to reasons, `earlier_failures` included. `n_frames` counts the frames of this run once,
    however many projections shared them, `n_videos_before` the videos that were there already, `n_reused` the
    neighbour lists of videos that were read instead of searched. `error` is what ended the run early (no
    space left, say, or an object store that does not answer); what was finished until then is kept.
    """

    scores: tuple[Score, ...]
    n_frames: int
    failures: Mapping[str, str]
    seconds: float
    peak_memory_bytes: int
    interrupted: bool
    error: CosettleError | None = None
    n_videos_before: int = 0
    n_reused: int = 0

    @property
    def complete(self) -> bool:
        """Say whether every video had its turn and none failed."""
        return not (self.interrupted or self.error or self.failures)


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
    earlier_failures: Mapping[str, str] = {},
) -> PropagationReport:
    """Propagate the first labels of every video of `store`; raw and projected tokens share each read.

    Writes predictions below `out/TOKENS` as the benchmark `task` reads them, pictures of no, the first or
    all videos, score rows and their summary. A video that an earlier run with the same settings finished in
    `out` is not done again. A video that cannot be read is recorded in the report and does not end the run;
    setting `stop` ends it after the videos in hand. With a `runner` workers do the videos: all paths are
    theirs too, and `stop` must be the runner's. `on_start` is called with the number of videos that are
    finished already, once the folder is taken and before anything is done. `earlier_failures` says by id
    which videos did not come as far as this and why.

    Raises `FingerprintError` when the store was made for another size, and when `out` holds results of other
    settings, unless `settings.restart` removes them; `UsageError` when `out` is not a run's own folder, or
    another run is at work there.
    """
    row = find_task(task)
    check_store(store, protocol)
    _check_labels(store, row)
    here = "cpu" if runner or device is None else device
    kinds = tuple(make_kinds(projections, store.arrays[0].n_channels, device=here, reserved=RESERVED))
    ranker = make_ranker(settings.search, torch.device(device or "cpu"))
    limit = limit_on(torch.device(here), settings.memory_limit)
    _check_memory(store, protocol, limit, n_kinds=len(kinds), ranker=ranker)
    folder = RunFolder(out.absolute())
    work = VideoWork(store, data_root.absolute(), protocol, folder, settings, row, kinds, device)
    started, reports, n_before, error = time.perf_counter(), dict[int, VideoReport](), 0, None
    try:
        folder.settings()  # what is not a run's is refused before it is marked as one
        with own_folder(folder.path, "propagate"):
            origin = run_origin(store, task, protocol, kinds)
            folder.begin(origin, [kind.name for kind in kinds], settings.restart)
            # Figures of an earlier run must not pass for those of a run that fails.
            remove_scores(folder.path)
            for number, video in enumerate(work.videos):
                if (rows := folder.finished(video, work.data_root)) is not None:
                    reports[number] = VideoReport(scores=rows)
            n_before = len(reports)
            on_start(n_before)
            todo = [video.n_frames for number, video in enumerate(work.videos) if number not in reports]
            try:
                with counting(progress, sum(todo), "frames"):
                    if runner is None:
                        _propagate_here(work, reports, progress, stop or Event())
                    else:
                        _propagate_across(work, reports, progress, runner)
            finally:
                _write_scores(work, reports, earlier_failures)
    except (FingerprintError, UsageError):
        raise
    except CosettleError as caught:
        error = caught
    ordered = [(video.video_id, reports[i]) for i, video in enumerate(work.videos) if i in reports]
    failures = {video_id: report.failure or report.not_drawn for video_id, report in ordered}
    return PropagationReport(
        scores=_scores(reports),
        n_frames=sum(report.n_frames for _, report in ordered),
        failures={
            **earlier_failures,
            **{video_id: reason for video_id, reason in failures.items() if reason is not None},
        },
        seconds=time.perf_counter() - started,
        peak_memory_bytes=max(peak_memory_bytes(), *(report.peak_memory_bytes for _, report in ordered), 0),
        interrupted=error is None and len(reports) < len(work.videos),
        error=error,
        n_videos_before=n_before,
        n_reused=sum(report.n_reused for _, report in ordered),
    )


def check_store(store: FeatureStore, protocol: EvalProtocol) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos as the protocol has them."""
    check_protocol(protocol)
    if unlike := store.unlike_every_frame():
        raise _wrong_store(store, *unlike, protocol)
    found = tuple(store.encoder.get("std", ()))
    if found and replace_red_std(found, protocol.red_std) != found:
        raise FingerprintError(
            f"the images of {store.path} were normalised otherwise than in the protocol {protocol.name}",
            wanted=f"red_std {protocol.red_std:g}",
            found=f"red_std {found[0]:g}",
            hint=f"cosettle-cache extract --red-std {protocol.red_std:g}, or keep to the store with "
            f"--set red_std={found[0]:g}; the protocol's name then says so",
        )
    resampling = store.fingerprint.plan.get("resampling", LINEAR)
    if resampling != protocol.resampling:
        raise _wrong_store(store, f"resampling {protocol.resampling}", f"resampling {resampling}", protocol)
    size, patch = str(store.fingerprint.plan["size"]), store_patch(store)
    for video in store.manifest:
        at = [resolve_size(rule, video.height, video.width, patch) for rule in (protocol.size, size)]
        if at[0] != at[1]:
            wanted, found_at = (f"{video.video_id} at {height}x{width}" for height, width in at)
            raise _wrong_store(store, wanted, found_at, protocol)
    for layout in store.arrays:
        check_candidates(layout.grid, protocol)


def _check_labels(store: FeatureStore, task: Task) -> None:
    """Raise `UsageError` when the videos of a store are annotated otherwise than a task needs."""
    others = {
        str(video.label_kind) for video in store.manifest if video.label_kind not in (None, task.labels)
    }
    if others:
        raise UsageError(
            f"the videos of {store.path} are annotated otherwise than the task {task.name} needs",
            wanted=str(task.labels),
            found=", ".join(sorted(others)),
        )


def _check_memory(
    store: FeatureStore, protocol: EvalProtocol, limit: int | None, *, n_kinds: int, ranker: Ranker
) -> None:
    """Raise `UsageError` when the search of `n_kinds` kinds of tokens side by side exceeds `limit` bytes."""
    if limit is None:
        return
    most_classes = 1 + max((video.n_objects for video in store.manifest), default=0)
    for layout in store.arrays:
        labels = torch.float32.itemsize * (1 + protocol.n_context) * layout.grid.n_tokens * most_classes
        size = SearchSize(layout.grid, layout.n_channels, protocol, ranker.n_parallel, labels, ranker.dtype)
        needed = n_kinds * size.needed_bytes(1)
        if needed > limit:
            raise UsageError(
                f"the search among {layout.grid} tokens needs more memory for {n_kinds} kinds of tokens",
                wanted=f"at least {human_bytes(needed)}",
                found=human_bytes(limit),
                hint="a larger --memory-limit, fewer projections at a time, or a smaller n_context",
            )


def _wrong_store(store: FeatureStore, wanted: str, found: str, protocol: EvalProtocol) -> FingerprintError:
    return FingerprintError(
        f"{store.path} does not fit the protocol {protocol.name}",
        wanted=wanted,
        found=found,
        hint=f"cosettle-cache extract --plan frames --size {protocol.size}"
        + ("" if protocol.resampling == LINEAR else f" --resampling {protocol.resampling}"),
    )


def _scores(reports: Mapping[int, VideoReport]) -> tuple[Score, ...]:
    return tuple(score for _, report in sorted(reports.items()) for score in report.scores)


def _write_scores(
    work: VideoWork, reports: Mapping[int, VideoReport], earlier_failures: Mapping[str, str]
) -> None:
    clean = sum(report.failure is None and report.not_drawn is None for report in reports.values())
    complete = clean == len(work.videos) and not earlier_failures
    write_scores(work.folder.path, _scores(reports), complete=complete)


def _propagate_here(
    work: VideoWork, reports: dict[int, VideoReport], progress: Progress, stop: Event
) -> None:
    """Add the reports of the videos that have none; pictures are drawn beside, from what is on disk.

    For a GPU some videos are under way at once: one is searched, others are read, written and scored.
    """
    drawings: dict[int, Future[str | None]] = {}
    painter, telling = ThreadPoolExecutor(1, "overlays"), Lock()

    def advance() -> None:
        with telling:
            progress.advance()

    def do(number: int) -> tuple[int, VideoReport]:
        return number, reports.get(number) or propagate_video(work, number, advance)

    numbers = takewhile(lambda _: not stop.is_set(), range(len(work.videos)))
    on_cpu = work.torch_device().type == "cpu"
    n_videos = min(_VIDEOS_AT_ONCE, share_of_cores(1))
    try:
        for number, report in map(do, numbers) if on_cpu else map_ahead(do, numbers, n_videos):
            reports[number] = report
            if _is_to_be_drawn(work, reports, number):
                drawings[number] = painter.submit(draw_video, work, number)
    finally:
        # What was not begun is drawn by the next run.
        painter.shutdown(wait=False, cancel_futures=stop.is_set())
        for number, job in drawings.items():
            if not job.cancelled():
                reports[number] = replace(reports[number], not_drawn=job.result())


def _propagate_across(
    work: VideoWork, reports: dict[int, VideoReport], progress: Progress, runner: Run
) -> None:
    """Add the reports of the videos that have none, by workers, which then draw."""
    work = replace(work, kinds=tuple(kind.saved(work.folder.progress / "projections") for kind in work.kinds))
    todo = [number for number in range(len(work.videos)) if number not in reports]
    for number, report in runner(partial(propagate_video, work), todo):
        reports[number] = report
        progress.advance(work.videos[number].n_frames)
    to_draw = [number for number in sorted(reports) if _is_to_be_drawn(work, reports, number)]
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
