"""The order of frames: can a linear probe tell a pair of classes, or a video and its reversal, by it?

A few evenly spaced frame vectors per video, joined in order, come in; the accuracy of a linear probe per
pair, and their mean, go out (the paper's Chiral protocol, PROTOCOLS 5.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.probe.outcome import Figure, Outcome, mean_figure
from cosettle_cache.analysis.probe.videos import (
    Answer,
    Fold,
    VideoTask,
    ask_folds,
    check_folds,
    class_sizes,
    convergence_warnings,
    fold_protocol,
    stratified_folds,
)
from cosettle_cache.core.errors import InputError

#: Frames of a video at most where nobody says how many.
DEFAULT_FRAMES = 8

Sampled = Float32[np.ndarray, "video frame dim"]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Samples of two kinds: rows of videos, which of them are reversed, and the kind of each."""

    name: str
    rows: Int64[np.ndarray, " sample"]
    reverse: Int64[np.ndarray, " sample"]
    kinds: Int64[np.ndarray, " sample"]

    @property
    def n_videos(self) -> int:
        """Number of videos behind the samples."""
        return len(np.unique(self.rows))

    def samples(self, sampled: Sampled) -> Float32[np.ndarray, "sample joined"]:
        """Return the frame vectors of every sample, joined in its order."""
        chosen = sampled[self.rows]
        turned = np.where(self.reverse[:, None, None] == 1, chosen[:, ::-1], chosen)
        return np.asarray(turned.reshape(len(chosen), -1), np.float32)


def check_order(task: VideoTask, lengths: Mapping[str, int]) -> None:
    """Raise `InputError` for short videos, unknown classes, and classes smaller than the folds."""
    n_frames = frames_per_video(task, lengths)
    short = [video.video_id for video in task.labelled.videos if lengths[video.video_id] < n_frames]
    if short or n_frames < 2:
        n_short = len(short) or sum(length < 2 for length in lengths.values())
        raise InputError(
            f"{n_short} videos have too few frames to speak of their order",
            wanted=f"{max(n_frames, 2)} stored frames of each",
            found=f"{min(lengths.values())} in the shortest",
            hint="a smaller --frames, a store with more frames (extract --every), or --task linear alone",
        )
    sizes = class_sizes(task.labelled)
    for name in (name for pair in task.settings.pairs for name in pair):
        if name not in sizes:
            raise InputError(f"there is no class {name}", wanted=", ".join(list(sizes)[:12]))
    if task.settings.official:
        task.labelled.official()
        return
    wanted = {name for pair in task.settings.pairs for name in pair} or set(sizes)
    check_folds({name: size for name, size in sizes.items() if name in wanted}, task.settings)


def frames_per_video(task: VideoTask, lengths: Mapping[str, int]) -> int:
    """Return how many frames of each video are joined: as asked for, or what all have, 8 at most."""
    shortest = min(lengths[video.video_id] for video in task.labelled.videos)
    return task.settings.n_frames or min(DEFAULT_FRAMES, shortest)


def spread(n_frames: int, n_wanted: int) -> Int64[np.ndarray, " frame"]:
    """Return evenly spaced places from the first frame to the last; from either end they look the same."""
    half = np.linspace(0, n_frames - 1, n_wanted)[: (n_wanted + 1) // 2].round().astype(np.int64)
    places = np.empty(n_wanted, np.int64)
    places[: len(half)] = half
    places[n_wanted - len(half) :] = n_frames - 1 - half[::-1]
    return places


def make_cases(task: VideoTask) -> list[Case]:
    """Return the pairs of classes, or every class forwards against reversed."""
    classes, names = task.labelled.classes, task.labelled.names
    if task.settings.pairs:
        return [_pair(classes, names, first, second) for first, second in task.settings.pairs]
    return [_reversal(np.flatnonzero(classes == number), name) for number, name in enumerate(names)]


def tell_order(task: VideoTask, sampled: Sampled) -> Outcome:
    """Return the accuracy of a linear probe per case and the mean over cases; chance is one half.

    Folds are stratified and grouped by video: a video and its reversal never stand on both sides.
    """
    figures: list[Figure] = []
    converged: list[bool] = []
    cases = make_cases(task)
    for case in cases:
        folds = _folds(task, case)
        if not folds:
            continue
        answers = list(ask_folds(case.samples(sampled), case.kinds, folds, task.settings.penalties))
        figures.append(mean_figure("accuracy", _shares(case, folds, answers), case.n_videos, case.name))
        converged += [answer.converged for answer in answers]
    over_cases = mean_figure("accuracy", [figure.value for figure in figures], len(task.labelled))
    protocol = {
        "vector": f"mean of {'unit ' if task.settings.unit else ''}tokens per frame, joined",
        "frames": sampled.shape[1],
        "pairs": "classes" if task.settings.pairs else "forwards against reversed",
        "split": task.settings.split,
        **fold_protocol(task.settings),
    }
    warnings = convergence_warnings(converged)
    return Outcome((over_cases, *figures), len(task.labelled.names), protocol, warnings=warnings)


def _pair(classes: np.ndarray, names: Sequence[str], first: str, second: str) -> Case:
    rows = np.flatnonzero(np.isin(classes, [names.index(first), names.index(second)]))
    kinds = (classes[rows] == names.index(second)).astype(np.int64)
    return Case(f"{first} / {second}", rows, np.zeros_like(rows), kinds)


def _reversal(rows: np.ndarray, name: str) -> Case:
    reverse = np.repeat([0, 1], len(rows))
    return Case(name, np.tile(rows, 2), reverse, reverse)


def _folds(task: VideoTask, case: Case) -> list[Fold]:
    settings = task.settings
    if not settings.official:
        return stratified_folds(case.kinds, settings.folds, settings.seeds, groups=case.rows)
    fold = task.labelled.official()
    train, test = (np.flatnonzero(np.isin(case.rows, part)) for part in (fold.train, fold.test))
    # A case may have videos in one part of the split only; there is nothing to learn or to ask then.
    useful = len(np.unique(case.kinds[train])) == 2 and len(test) > 0
    return [Fold(train, test)] if useful else []


def _shares(case: Case, folds: Sequence[Fold], answers: Sequence[Answer]) -> list[float]:
    return [
        float((answer.predicted == case.kinds[fold.test]).mean())
        for fold, answer in zip(folds, answers, strict=True)
    ]
