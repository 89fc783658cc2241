"""The order of frames: can a linear probe tell a pair of classes, or a video and its reversal, by it?

A few evenly spaced frame vectors per video, joined in order, come in; the accuracy of a linear probe per
pair, and their mean, go out (the paper's Chiral protocol, PROTOCOLS 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from cosettle_cache.analysis.probe import Figure, Outcome
from cosettle_cache.analysis.probe.linear import (
    Answer,
    Fold,
    ask_folds,
    convergence_warnings,
    fold_protocol,
    mean_figure,
    stratified_folds,
)
from cosettle_cache.analysis.probe.videos import Labelled, check_folds
from cosettle_cache.core.errors import InputError

#: Frames of a video at most where nobody says how many.
DEFAULT_FRAMES = 8

Sampled = Float32[np.ndarray, "video frame dim"]


def order_frames(labelled: Labelled) -> int:
    """Return how many frames of each video are joined: as asked for, or what all have, 8 at most."""
    shortest = min(labelled.n_stored[video_id] for video_id in labelled.video_ids)
    return labelled.settings.n_frames or min(DEFAULT_FRAMES, shortest)


def check_order(labelled: Labelled) -> None:
    """Raise `InputError` for short videos, unknown classes, and classes smaller than the folds."""
    n_frames = order_frames(labelled)
    lengths = [labelled.n_stored[video_id] for video_id in labelled.video_ids]
    n_short = sum(length < max(n_frames, 2) for length in lengths)
    if n_short or n_frames < 2:
        raise InputError(
            f"{n_short} videos have too few frames to speak of their order",
            wanted=f"{max(n_frames, 2)} stored frames of each",
            found=f"{min(lengths)} in the shortest",
            hint="a smaller --frames, a store with more frames (extract --every), or --task linear alone",
        )
    names = labelled.names
    asked = [name for pair in labelled.settings.pairs for name in pair]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise InputError(f"there is no class {unknown[0]}", wanted=", ".join(names[:12]))
    check_folds(labelled, asked or names)


def spread(n_frames: int, n_wanted: int) -> Int64[np.ndarray, " frame"]:
    """Return evenly spaced places from the first frame to the last; from either end they look the same."""
    half = np.linspace(0, n_frames - 1, n_wanted)[: (n_wanted + 1) // 2].round().astype(np.int64)
    places = np.empty(n_wanted, np.int64)
    places[: len(half)] = half
    places[n_wanted - len(half) :] = n_frames - 1 - half[::-1]
    return places


def tell_order(labelled: Labelled, sampled: Sampled) -> Outcome:
    """Return the accuracy of a linear probe per case and the mean over cases; chance is one half.

    Folds are stratified and grouped by video: a video and its reversal never stand on both sides.
    """
    settings = labelled.settings
    figures: list[Figure] = []
    answers: list[Answer] = []
    for case in _cases(labelled):
        folds = _folds(labelled, case)
        if not folds:
            continue
        of_case = ask_folds(case.samples(sampled), case.kinds, folds, settings.penalties)
        shares = [
            float((answer.predicted == case.kinds[fold.test]).mean())
            for fold, answer in zip(folds, of_case, strict=True)
        ]
        figures.append(mean_figure("accuracy", shares, len(np.unique(case.rows)), case.name))
        answers += of_case
    over_cases = mean_figure("accuracy", [figure.value for figure in figures], len(sampled))
    protocol = {
        "vector": f"mean of {'unit ' if settings.unit else ''}tokens per frame, joined",
        "frames": sampled.shape[1],
        "pairs": "classes" if settings.pairs else "forwards against reversed",
        "split": settings.split,
        **fold_protocol(settings),
    }
    figures.insert(0, over_cases)
    return Outcome(tuple(figures), len(labelled.names), protocol, warnings=convergence_warnings(answers))


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """Samples of two kinds: rows of videos, which of them are reversed, and the kind of each."""

    name: str
    rows: Int64[np.ndarray, " sample"]
    reverse: Int64[np.ndarray, " sample"]
    kinds: Int64[np.ndarray, " sample"]

    def samples(self, sampled: Sampled) -> Float32[np.ndarray, "sample joined"]:
        """Return the frame vectors of every sample, joined in its order."""
        chosen = sampled[self.rows]
        turned = np.where(self.reverse[:, None, None] == 1, chosen[:, ::-1], chosen)
        return np.asarray(turned.reshape(len(chosen), -1), np.float32)


def _cases(labelled: Labelled) -> list[_Case]:
    """Return the pairs of classes, or every class forwards against reversed."""
    classes, names = labelled.classes, labelled.names
    cases = []
    for first, second in labelled.settings.pairs:
        rows = np.flatnonzero(np.isin(classes, [names.index(first), names.index(second)]))
        kinds = (classes[rows] == names.index(second)).astype(np.int64)
        cases.append(_Case(f"{first} / {second}", rows, np.zeros_like(rows), kinds))
    for number, name in enumerate([] if cases else names):
        rows = np.flatnonzero(classes == number)
        reverse = np.repeat([0, 1], len(rows))
        cases.append(_Case(name, np.tile(rows, 2), reverse, reverse))
    return cases


def _folds(labelled: Labelled, case: _Case) -> list[Fold]:
    settings = labelled.settings
    if not settings.official:
        return stratified_folds(case.kinds, settings.folds, settings.seeds, groups=case.rows)
    fold = labelled.official()
    train, test = (np.flatnonzero(np.isin(case.rows, part)) for part in (fold.train, fold.test))
    # A case may have videos in one part of the split only; there is nothing to learn or to ask then.
    useful = len(np.unique(case.kinds[train])) == 2 and len(test) > 0
    return [Fold(train, test)] if useful else []
