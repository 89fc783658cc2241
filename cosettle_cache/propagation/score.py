"""Scoring anybody's results in a benchmark's own output format, without a store and without an encoder.

A manifest, the data it is about and a folder of predictions go in; score rows come out, after a look at
every file, so that nothing is scored while something is missing. Results that other tools left beside are
never read.

What scoring one video needs, whatever the benchmark: its row, its truth, somebody's predictions.

Object masks in the DAVIS layout: `VIDEO/FRAME.png` with object numbers, at the annotation's own size.

In comes a case, out go one J&F row per object of the first annotation. The benchmark scores neither the
first nor the last frame, so their masks may be missing.

Body parts as the released scripts write them: `VIDEO/FRAME_mask.png` at the network's size.

Pixels are classes, as palette, grey or three equal channels. In comes a case, out goes one row with the
clip's confusion. Maps are resized to the annotation by nearest neighbour; the first frame counts (PROTOCOLS
3.3).

Joints as the released scripts write them: `NUMBER.dat`, a pickled `[2 joint frame]` in cells of the grid.

In comes a case, out goes one row with the clip's counts in both readings of PCK. NUMBER is the clip's place
in the list; `CLIP.npy` under the clip's own name is read as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.types import Grid, Manifest, Score, Video
from cosettle_cache.metrics import DavisScorer, count_pixels, no_pixels
from cosettle_cache.metrics.rows import clip_row, object_rows, parts_row
from cosettle_cache.videos.davis import MIN_SCORED_FRAMES, DavisSequence, open_sequence
from cosettle_cache.videos.frames import decode_errors
from cosettle_cache.videos.jhmdb import cells_to_pixels, open_joints, read_predicted_joints
from cosettle_cache.videos.manifest import manifest_digest
from cosettle_cache.videos.masks import Mask, read_mask, sample_mask
from cosettle_cache.videos.vip import PARTS, PartSequence, open_parts


@dataclass(frozen=True, slots=True)
class Case:
    """One video to score; `number` is its place among `n_videos`, by which released scripts name joints.

    `grid` is what predicted joints are counted in.
    """

    video: Video
    number: int
    n_videos: int
    data_root: Path
    predictions: Path
    grid: Grid


def lacking(what: str, missing: Collection[str], wanted: Sequence[str]) -> list[str]:
    """Return no line, or one that names every missing file, neighbours in `wanted` as a range."""
    if not missing:
        return []
    runs = [list(run) for is_missing, run in groupby(wanted, key=set(missing).__contains__) if is_missing]
    names = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return [f"lacks {len(missing)} of {len(wanted)} {what}: {', '.join(names)}"]


#: Modes of images whose pixels are numbers.
_INDEXED = ("P", "L", "1")


def check_masks(case: Case) -> list[str]:
    """Return what keeps the video from being scored, after a look at every file's name, size and kind."""
    sequence = open_sequence(case.video, case.data_root)
    if not sequence.scorable:
        found = f"{len(sequence.labelled)} of {case.video.n_frames} frames annotated"
        return [f"cannot be scored: {found}, at least {MIN_SCORED_FRAMES} and all needed"]
    folder = case.predictions / case.video.video_id
    if not folder.is_dir():
        return ["no folder of masks"]
    names = [f"{name}.png" for name in sequence.frame_names[1:-1]]
    missing = [name for name in names if not (folder / name).is_file()]
    present = [name for name in names if name not in set(missing)]
    faults = [fault for name in present if (fault := _header_fault(folder / name, case))]
    return [*lacking("masks", missing, names), *faults]


def _header_fault(path: Path, case: Case) -> str | None:
    wanted = (case.video.height, case.video.width)
    try:
        with decode_errors(path), Image.open(path) as image:
            found, mode = (image.height, image.width), image.mode
    except MediaError as error:
        return f"{path.name}: {error.summary}"
    if found != wanted:
        return f"{path.name} is {found[0]}x{found[1]}, not {wanted[0]}x{wanted[1]}"
    if mode not in _INDEXED:
        return f"{path.name} holds colours (mode {mode}), not object numbers"
    return None


def score_masks(case: Case, row: Score) -> list[Score]:
    """Return one row per object that the first annotation shows; raise `InputError` for unknown objects."""
    sequence = open_sequence(case.video, case.data_root)
    first = sequence.first_mask()
    scorer = DavisScorer.from_first_mask(first)
    for index in range(case.video.n_frames):
        truth = sequence.mask(index)
        assert truth is not None
        scored = 0 < index < case.video.n_frames - 1
        scorer.add(truth, _prediction(case, sequence, index) if scored else truth)
    return object_rows(row, scorer, set(np.unique(first).tolist()))


def _prediction(case: Case, sequence: DavisSequence, index: int) -> np.ndarray:
    return read_mask(case.predictions / case.video.video_id / f"{sequence.frame_names[index]}.png")


#: How a frame's map may be called: as released, or like its annotation.
_SUFFIXES = ("_mask.png", ".png")


def check_parts(case: Case) -> list[str]:
    """Return what keeps the clip from being scored; frames without annotation are not looked for."""
    sequence = open_parts(case.video, case.data_root)
    folder = case.predictions / case.video.video_id
    if not folder.is_dir():
        return ["no folder of maps"]
    found = {f"{name}{_SUFFIXES[0]}": _find_map(folder, name) for name in _scored_names(sequence)}
    missing = [name for name, path in found.items() if path is None]
    faults = [fault for path in found.values() if path and (fault := _fault(path))]
    return [*lacking("maps", missing, list(found)), *faults]


def _fault(path: Path) -> str | None:
    try:
        with decode_errors(path), Image.open(path):
            return None
    except MediaError as error:
        return f"{path.name}: {error.summary}"


def score_parts(case: Case, row: Score) -> list[Score]:
    """Return the clip's row; raise `InputError` for a map with classes that do not exist."""
    sequence = open_parts(case.video, case.data_root)
    folder = case.predictions / case.video.video_id
    total = no_pixels(len(PARTS))
    for index in sorted(sequence.files.labelled):
        truth, path = sequence.mask(index), _find_map(folder, sequence.files.frame_names[index])
        assert truth is not None
        assert path is not None
        total += count_pixels(truth, sample_mask(_read_classes(path), truth.shape), len(PARTS))
    return [parts_row(row, total)]


def _scored_names(sequence: PartSequence) -> list[str]:
    return [sequence.files.frame_names[index] for index in sorted(sequence.files.labelled)]


def _find_map(folder: Path, name: str) -> Path | None:
    return next(
        (folder / f"{name}{suffix}" for suffix in _SUFFIXES if (folder / f"{name}{suffix}").is_file()), None
    )


def _read_classes(path: Path) -> Mask:
    """Return the classes of a map: numbers of a palette or of grey, or the value of three equal channels."""
    with decode_errors(path), Image.open(path) as image:
        if image.mode != "RGB":
            return read_mask(path)
        channels = np.asarray(image)
    if (channels != channels[..., :1]).any():
        raise MediaError(
            f"{path} does not hold classes",
            wanted="a palette or grey PNG, or three equal channels",
            found="colours",
        )
    return channels[..., 0]


#: Suffix of files that bear a clip's number, not its name.
_NUMBERED = ".dat"


def check_joints(case: Case) -> list[str]:
    """Return what keeps the clip from being scored: no file, fewer frames, or another grid."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find_joints(case)
    if path is None:
        return [f"neither {case.number}.dat nor {case.video.video_id}.npy"]
    try:
        points = read_predicted_joints(path)
    except MediaError as error:
        return [error.summary]
    return [f"{path.name} {fault}" for fault in _faults(points, truth.shape, path, case)]


def _faults(
    points: Float[np.ndarray, "2 joint frame"], wanted: tuple[int, ...], path: Path, case: Case
) -> Iterator[str]:
    if points.shape[1] != wanted[1] or points.shape[2] < wanted[2]:
        counts = (f"{shape[1]} joints in {shape[2]} frames" for shape in (points.shape, wanted))
        yield "has {}, not {}".format(*counts)
    if not np.isfinite(points).all():
        yield "has joints that are nowhere: -1 marks a lost one"
    highest = points.max(axis=(1, 2))
    if highest[0] >= case.grid.cols or highest[1] >= case.grid.rows:
        reach = f"column {highest[0]:.1f} and row {highest[1]:.1f}"
        yield f"goes up to {reach}: no grid of {case.grid}"
    if path.suffix == _NUMBERED and (n_files := _count_numbered(case.predictions)) > case.n_videos:
        yield f"is one of {n_files} numbered files for {case.n_videos} clips: whose is which?"


def score_joints(case: Case, row: Score) -> list[Score]:
    """Return the clip's row."""
    truth = open_joints(case.video, case.data_root).joints
    path = _find_joints(case)
    assert path is not None
    size = (case.video.height, case.video.width)
    pixels = cells_to_pixels(read_predicted_joints(path), size, case.grid)
    return [clip_row(row, truth, pixels, size)]


def _find_joints(case: Case) -> Path | None:
    names = (f"{case.video.video_id}.npy", f"{case.number}{_NUMBERED}")
    return next((path for name in names if (path := case.predictions / name).is_file()), None)


def _count_numbered(folder: Path) -> int:
    return sum(path.stem.isdecimal() for path in folder.glob(f"*{_NUMBERED}"))


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
