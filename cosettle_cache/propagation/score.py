"""Scores anybody's predictions in a benchmark's own output format, without a store and without an encoder.

A manifest, the data root and a folder of predictions go in; score rows come out. Every file is checked before
anything is scored. Result files that other tools left in the folder are never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.files import inside
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.types import Grid, Manifest, Provenance, Score, Video
from cosettle_cache.metrics import DavisScorer, count_pixels, no_pixels
from cosettle_cache.metrics.rows import clip_row, object_rows, parts_row, video_row
from cosettle_cache.propagation.tasks import TASKS, Task, load
from cosettle_cache.videos.frames import open_image
from cosettle_cache.videos.jhmdb import cells_to_pixels, open_joints, read_predicted_joints
from cosettle_cache.videos.layouts import object_kinds
from cosettle_cache.videos.manifest import manifest_digest
from cosettle_cache.videos.masks import (
    MIN_SCORED_FRAMES,
    PARTS,
    Mask,
    open_parts,
    open_sequence,
    read_mask,
    sample_mask,
)

#: The grid of the released JHMDB protocol.
DEFAULT_GRID = Grid(20, 20)
#: Stands in the rows where propagation puts its protocol: nobody knows how predictions were made.
GIVEN = "as given"

#: Modes of images whose pixels are numbers.
_INDEXED = ("P", "L", "1")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Case:
    """One video to score; `number` is its place among `n_videos`, by which released scripts name joints.

    `grid` is what predicted joints are counted in.
    """

    number: int
    video: Video
    n_videos: int
    data_root: Path
    predictions: Path
    grid: Grid

    @property
    def folder(self) -> Path:
        """The video's own folder of predictions."""
        return inside(self.predictions, self.video.video_id)


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
    row = find_scored(task)
    assert row.check is not None
    if not predictions.is_dir():
        raise InputError(f"{predictions} is not a folder", wanted="a folder of predictions")
    cases = [Case(*item, len(manifest), data_root, predictions, grid) for item in enumerate(manifest)]
    found = _over_videos(load(row.check), cases, progress)
    lines = {video_id: [said] if isinstance(said, str) else said for video_id, said in found.items()}
    return {video_id: said for video_id, said in lines.items() if said}


def score_predictions(
    task: str,
    manifest: Manifest,
    data_root: Path,
    predictions: Path,
    *,
    name: str,
    leave_out: Collection[str] = (),
    grid: Grid = DEFAULT_GRID,
    progress: Progress = SILENT,
) -> tuple[list[Score], dict[str, str]]:
    """Return the rows of every video but those in `leave_out`, and by video id why one was not scored.

    `name` stands in the rows as their tokens. A video is not scored when a file of it turns out not to be
    readable, or shows what does not exist.
    """
    row = find_scored(task)
    assert row.score is not None
    score = load(row.score)
    digest, versions = manifest_digest(manifest), json.dumps({"score": package_versions()}, sort_keys=True)

    def rows(case: Case) -> list[Score]:
        origin = Provenance(case.video.dataset, digest, "", "", "", versions)
        return score(case, video_row(task, case.video, name, GIVEN, {}, origin))  # type: ignore[no-any-return]

    cases = [Case(*item, len(manifest), data_root, predictions, grid) for item in enumerate(manifest)]
    chosen = [case for case in cases if case.video.video_id not in leave_out]
    found = _over_videos(rows, chosen, progress)
    scores = [item for result in found.values() if not isinstance(result, str) for item in result]
    return scores, {video_id: result for video_id, result in found.items() if isinstance(result, str)}


def surplus_folders(manifest: Manifest, predictions: Path) -> list[str]:
    """Return the folders of predictions in which no video of the manifest has its own."""
    known = {video.video_id.partition("/")[0] for video in manifest}
    return sorted(path.name for path in predictions.glob("[!.]*/") if path.name not in known)


def find_scored(task: str) -> Task:
    """Return the row of a task; raise `UsageError` for one without truth to score against."""
    row = TASKS.get(task)
    if row is None or row.score is None:
        scored = [name for name, row in TASKS.items() if row.score is not None]
        raise UsageError(f"nobody scores the task {task}", wanted=", ".join(scored), found=task)
    return row


def _over_videos(
    work: Callable[[Case], _T], cases: Sequence[Case], progress: Progress
) -> dict[str, _T | str]:
    """Do `work` for each video on a few threads (decoding and counting let go of the interpreter).

    Returns by video id what came out, or in one line why nothing did.
    """

    def outcome(case: Case) -> _T | str:
        try:
            return work(case)
        except InputError as error:
            return error.reason

    found: dict[str, _T | str] = {}
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    with counting(progress, len(cases), "videos") as advance, pool:
        for case, result in zip(cases, pool.map(outcome, cases), strict=True):
            found[case.video.video_id] = result
            advance()
    return found


def check_masks(case: Case) -> list[str]:
    """Return what keeps a video of masks from being scored: missing files, other sizes, other kinds.

    The benchmark scores neither the first nor the last frame, so their masks may be missing.
    """
    sequence = open_sequence(case.video, case.data_root)
    if not sequence.scorable:
        found = f"{len(sequence.labelled)} of {case.video.n_frames} frames annotated"
        needed = f"at least {MIN_SCORED_FRAMES} and all needed (where some suffice, one without a new object)"
        return [f"cannot be scored: {found}, {needed}"]
    names = [f"{name}.png" for name in sequence.frame_names]
    scored = sorted(sequence.labelled)[1:-1]
    files = {names[index]: _first_file(case.folder, names[index]) for index in scored}
    return _image_faults("masks", case.folder, files, names, case.video)


def score_masks(case: Case, row: Score) -> list[Score]:
    """Return one row per object that the first annotation shows; raise `InputError` for unknown objects."""
    sequence = open_sequence(case.video, case.data_root)
    video, labelled = case.video, sorted(sequence.labelled)
    scorer = DavisScorer(sequence.n_objects, video.height, video.width, sequence.starts)
    for index in labelled:
        truth = sequence.mask(index)
        assert truth is not None
        scored = labelled[0] < index < labelled[-1]
        path = case.folder / f"{sequence.frame_names[index]}.png"
        scorer.add(truth, sequence.known(read_mask(path)) if scored else truth)
    return object_rows(row, scorer, sequence.begins, object_kinds(video, case.data_root))


def check_parts(case: Case) -> list[str]:
    """Return what keeps a clip of parts from being scored; frames without annotation are not looked for."""
    files = open_parts(case.video, case.data_root)
    names = [_map_names(name) for name in files.frame_names]
    labelled = [names[index] for index in sorted(files.labelled)]
    found = {either[0]: _first_file(case.folder, *either) for either in labelled}
    return _image_faults("maps", case.folder, found, list(chain(*names)))


def score_parts(case: Case, row: Score) -> list[Score]:
    """Return the clip's row; maps are resized by nearest neighbour, the first frame counts (PROTOCOLS 3.3).

    Raises `InputError` for a map with classes that do not exist.
    """
    sequence = open_parts(case.video, case.data_root)
    total = no_pixels(len(PARTS))
    for index in sorted(sequence.labelled):
        truth = sequence.mask(index)
        path = _first_file(case.folder, *_map_names(sequence.frame_names[index]))
        assert truth is not None
        assert path is not None
        total += count_pixels(truth, sample_mask(_read_classes(path), truth.shape), len(PARTS))
    return [parts_row(row, total)]


def _map_names(name: str) -> tuple[str, str]:
    return f"{name}_mask.png", f"{name}.png"  # as released, or like the annotation


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((path for name in names if (path := folder / name).is_file()), None)


def _read_classes(path: Path) -> Mask:
    """Return the classes of a map: numbers of a palette or of grey, or the value of three equal channels."""
    with open_image(path) as image:
        if image.mode != "RGB":
            return read_mask(path)
        channels = np.asarray(image)
    if (channels != channels[..., :1]).any():
        wanted = "a palette or grey PNG, or three equal channels"
        raise MediaError(f"{path} does not hold classes", wanted=wanted, found="colours")
    return channels[..., 0]


def check_joints(case: Case) -> list[str]:
    """Return what keeps the clip from being scored: no file, fewer frames, or another grid."""
    truth = open_joints(case.video, case.data_root).joints
    path = _joint_file(case)
    if path is None:
        return [f"neither {case.number}.dat nor {case.video.video_id}.npy"]
    try:
        points = read_predicted_joints(path)
    except MediaError as error:
        return [error.summary]
    faults = [*_joint_faults(points, truth.shape, case.grid)]
    n_files = sum(item.stem.isdecimal() for item in case.predictions.glob("*.dat"))
    if path.suffix == ".dat" and n_files > case.n_videos:
        faults.append(f"is one of {n_files} numbered files for {case.n_videos} clips: whose is which?")
    return [f"{path.name} {fault}" for fault in faults]


def _joint_faults(
    points: Float[np.ndarray, "2 joint frame"], wanted: tuple[int, ...], grid: Grid
) -> Iterator[str]:
    if points.shape[1] != wanted[1] or points.shape[2] < wanted[2]:
        found, truth = (f"{shape[1]} joints in {shape[2]} frames" for shape in (points.shape, wanted))
        yield f"has {found}, not {truth}"
    if not np.isfinite(points).all():
        yield "has joints that are nowhere: -1 marks a lost one"
    col, row = points.max(axis=(1, 2))
    if col >= grid.cols or row >= grid.rows:
        yield f"goes up to column {col:.1f} and row {row:.1f}: no grid of {grid}"


def score_joints(case: Case, row: Score) -> list[Score]:
    """Return the clip's row."""
    truth = open_joints(case.video, case.data_root).joints
    path = _joint_file(case)
    assert path is not None
    size = (case.video.height, case.video.width)
    return [clip_row(row, truth, cells_to_pixels(read_predicted_joints(path), size, case.grid), size)]


def _joint_file(case: Case) -> Path | None:
    paths = (inside(case.predictions, f"{case.video.video_id}.npy"), case.predictions / f"{case.number}.dat")
    return next(filter(Path.is_file, paths), None)


def _image_faults(
    what: str,
    folder: Path,
    found: Mapping[str, Path | None],
    of_frames: Sequence[str],
    masks_of: Video | None = None,
) -> list[str]:
    """Return a line that names every missing image, neighbours as a range, and what headers have wrong.

    `of_frames` are the names that images of the video's frames have; others mean that frames are numbered
    otherwise, and then images of the right names are of the wrong frames.
    """
    if not folder.is_dir():
        return [f"no folder of {what}"]
    others = sorted({path.name for path in folder.glob("[!.]*.png")}.difference(of_frames))
    named = f"{', '.join(others[:8])}; frames go from {of_frames[0]} to {of_frames[-1]}"
    surplus = f"has {len(others)} {what} of no frame: {named}" if others else None
    runs = [
        list(run) for is_missing, run in groupby(found, key=lambda name: found[name] is None) if is_missing
    ]
    names = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    lacking = f"lacks {sum(map(len, runs))} of {len(found)} {what}: {', '.join(names)}" if runs else None
    faults = (_header_fault(path, masks_of) for path in found.values() if path)
    return [line for line in (lacking, surplus, *faults) if line]


def _header_fault(path: Path, masks_of: Video | None) -> str | None:
    """Return what is wrong with an image's header; object masks have the size and kind of `masks_of`'s."""
    try:
        with open_image(path) as image:
            found, mode = (image.height, image.width), image.mode
    except MediaError as error:
        return f"{path.name}: {error.summary}"
    if masks_of is None:
        return None
    if found != (masks_of.height, masks_of.width):
        return f"{path.name} is {found[0]}x{found[1]}, not {masks_of.height}x{masks_of.width}"
    if mode not in _INDEXED:
        return f"{path.name} holds colours (mode {mode}), not object numbers"
    return None
