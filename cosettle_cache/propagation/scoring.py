"""Scoring anybody's results in a benchmark's own output format, without a store and without an encoder.

A manifest, the data it is about and a folder of predictions go in; score rows come out, after a look at
every file, so that nothing is scored while something is missing. Results that other tools left beside are
never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.types import Grid, Manifest, Score, Video
from cosettle_cache.propagation.case import Case
from cosettle_cache.propagation.joints import check_joints, score_joints
from cosettle_cache.propagation.masks import check_masks, score_masks
from cosettle_cache.propagation.parts import check_parts, score_parts
from cosettle_cache.videos.manifest import manifest_digest

__all__ = ["BENCHMARKS", "DEFAULT_GRID", "Scoring", "find_problems", "score_predictions"]

_T = TypeVar("_T")

#: The grid of the released JHMDB protocol.
DEFAULT_GRID = Grid(20, 20)
#: Stands in the rows where propagation puts its protocol: nobody knows how predictions were made.
GIVEN = "as given"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a task's predictions are looked at, and how they become rows."""

    check: Callable[[Case], list[str]]
    score: Callable[[Case, Score], list[Score]]


BENCHMARKS = {
    "davis": Benchmark(check_masks, score_masks),
    "vip": Benchmark(check_parts, score_parts),
    "jhmdb": Benchmark(check_joints, score_joints),
    "sprites": Benchmark(check_masks, score_masks),
}


@dataclass(frozen=True, slots=True)
class Scoring:
    """Rows of the videos that were scored, and for each other one, by id, the reason."""

    scores: tuple[Score, ...]
    failures: Mapping[str, str]


def find_problems(
    task: str,
    manifest: Manifest,
    data_root: Path,
    predictions: Path,
    *,
    grid: Grid = DEFAULT_GRID,
    progress: Progress = SILENT,
) -> dict[str, list[str]]:
    """Return, by video id, what is missing or of a wrong size, kind or length; score nothing."""
    check = _benchmark(task).check
    if not predictions.is_dir():
        raise InputError(f"{predictions} is not a folder", wanted="a folder of predictions")

    def problems(case: Case) -> list[str]:
        try:
            return check(case)
        except InputError as error:
            return [error.summary]

    cases = _cases(manifest, data_root, predictions, grid)
    found = _over_videos(problems, cases, progress)
    return {case.video.video_id: lines for case, lines in zip(cases, found, strict=True) if lines}


def score_predictions(
    task: str,
    manifest: Manifest,
    data_root: Path,
    predictions: Path,
    *,
    name: str,
    leave_out: frozenset[str] = frozenset(),
    grid: Grid = DEFAULT_GRID,
    progress: Progress = SILENT,
) -> Scoring:
    """Score every video but those in `leave_out`; `name` stands in the rows as their tokens.

    A file that turns out not to be readable, or shows what does not exist, is a named failure of its video.
    """
    score, digest = _benchmark(task).score, manifest_digest(manifest)

    def rows(case: Case) -> list[Score] | str:
        try:
            return score(case, _provenance(task, case.video, name, digest))
        except InputError as error:
            return error.summary

    cases = _cases(manifest, data_root, predictions, grid)
    cases = [case for case in cases if case.video.video_id not in leave_out]
    results = dict(
        zip((case.video.video_id for case in cases), _over_videos(rows, cases, progress), strict=True)
    )
    return Scoring(
        tuple(row for result in results.values() if not isinstance(result, str) for row in result),
        {video_id: result for video_id, result in results.items() if isinstance(result, str)},
    )


def _benchmark(task: str) -> Benchmark:
    if task not in BENCHMARKS:
        raise UsageError(f"nobody scores the task {task}", wanted=", ".join(BENCHMARKS), found=task)
    return BENCHMARKS[task]


def _cases(manifest: Manifest, data_root: Path, predictions: Path, grid: Grid) -> list[Case]:
    n_videos = len(manifest)
    return [
        Case(video, number, n_videos, data_root, predictions, grid) for number, video in enumerate(manifest)
    ]


def _over_videos(work: Callable[[Case], _T], cases: Sequence[Case], progress: Progress) -> list[_T]:
    """Do `work` for each case on a few threads (decoding and counting let go of the interpreter)."""
    progress.start(len(cases), "videos")
    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            results = []
            for result in pool.map(work, cases):
                results.append(result)
                progress.advance()
            return results
    finally:
        progress.finish()


def _provenance(task: str, video: Video, name: str, digest: str) -> Score:
    return Score(
        task=task,
        dataset=video.dataset,
        video_id=video.video_id,
        tokens=name,
        n_frames=video.n_frames,
        scored_size=f"{video.height}x{video.width}",
        protocol=GIVEN,
        protocol_json="{}",
        manifest_digest=digest,
        backbone="",
        weights_sha256="",
        projection_sha256="",
        versions_json=json.dumps({"score": package_versions()}, sort_keys=True),
    )
