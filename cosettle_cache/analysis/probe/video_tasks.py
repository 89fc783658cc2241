"""Retrieval, k-NN and the linear probe: what one vector per video is worth for telling classes apart.

Mean vectors and labelled videos come in, outcomes go out. Retrieval and k-NN compare directions and learn
nothing; the linear probe learns a multinomial logistic regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cosettle_cache.analysis.probe.classifiers import Fold, ask_folds, stratified_folds
from cosettle_cache.analysis.probe.outcome import Figure, Outcome, VideoAnswer, mean_figure
from cosettle_cache.analysis.probe.selection import Labelled, check_classes, check_folds, class_sizes
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import ProbeSettings
from cosettle_cache.metrics.retrieval import average_precisions
from cosettle_cache.search.vectors import nearest

Means = Float32[np.ndarray, "video dim"]
Rows = Int64[np.ndarray, " row"]

#: Ranks at which recall is reported.
_RECALLS = (1, 5)


@dataclass(frozen=True, slots=True)
class VideoTask:
    """What the three tasks are given besides vectors."""

    labelled: Labelled
    settings: ProbeSettings
    search: str = "auto"


def check_retrieval(task: VideoTask) -> None:
    """Raise `InputError` unless there are two classes and a class with two videos."""
    check_classes(task.labelled, "retrieval")
    if max(class_sizes(task.labelled).values()) < 2:
        raise InputError(
            "no class has a second video to be found",
            wanted="two videos of a class",
            found=f"{len(task.labelled)} classes of one video",
        )


def retrieve(task: VideoTask, means: Means) -> Outcome:
    """Let every video query all others by the cosine of the mean vectors (leave-one-out).

    `map` is the mean over queries of the average precision, `recall_at_k` the share of queries with a video
    of their class among the k nearest. A video alone in its class is found by others but asks nothing.
    """
    labelled, vectors, classes = task.labelled, _unit(means), task.labelled.classes
    precision = average_precisions(vectors, classes)
    queries = np.flatnonzero(~np.isnan(precision))
    n_found = min(max(_RECALLS), len(labelled) - 1)
    found = nearest(vectors[queries], vectors, n_found, own=queries, search=task.search)
    hits = classes[found.index] == classes[queries, None]
    recalls = (Figure(f"recall_at_{k}", float(hits[:, :k].any(1).mean()), len(queries)) for k in _RECALLS)
    figures = (Figure("map", float(precision[queries].mean()), len(queries)), *recalls)
    predicted = classes[found.index[:, 0]]
    answers = _answers(labelled, queries, predicted, precision[queries])
    protocol = {**_pooling(task.settings), "similarity": "cosine", "over": "leave-one-out"}
    return Outcome(figures, len(labelled.names), protocol, answers)


def check_knn(task: VideoTask) -> None:
    """Raise `InputError` unless there are two classes, and the official split if it is asked for."""
    check_classes(task.labelled, "k-NN")
    if task.settings.official:
        task.labelled.official()


def vote(task: VideoTask, means: Means) -> Outcome:
    """Classify by the nearest videos, each voting with weight exp(cosine / temperature) (DINO's k-NN).

    Every video is asked about with all others as neighbours, or those of the split test with those of train.
    Of classes with equal votes the first in the alphabet wins.
    """
    labelled, settings, classes = task.labelled, task.settings, task.labelled.classes
    vectors = _unit(means)
    fold = labelled.official() if settings.official else None
    asked = fold.test if fold else np.arange(len(labelled))
    keys = fold.train if fold else asked
    k = min(settings.neighbors, len(keys) - (fold is None))
    own = None if fold else asked
    found = nearest(vectors[asked], vectors[keys], k, own=own, search=task.search)
    votes = np.zeros((len(asked), len(labelled.names)))
    # Relative to the nearest one: the weights of far neighbours would underflow together.
    weights = np.exp((found.similarity - found.similarity[:, :1]) / settings.temperature)
    np.add.at(votes, (np.arange(len(asked))[:, None], classes[keys][found.index]), weights)
    predicted = votes.argmax(1)
    right = predicted == classes[asked]
    figures = (
        Figure("accuracy", float(right.mean()), len(asked)),
        Figure("class_accuracy", _class_mean(right, classes[asked]), len(asked)),
    )
    answers = _answers(labelled, asked, predicted, right.astype(np.float64))
    protocol = {
        **_pooling(settings),
        "neighbors": k,
        "temperature": settings.temperature,
        "over": "official split" if fold else "leave-one-out",
    }
    return Outcome(figures, len(labelled.names), protocol, answers)


def check_linear(task: VideoTask) -> None:
    """Raise `InputError` unless there are two classes with a video for every fold."""
    check_classes(task.labelled, "the linear probe")
    if task.settings.official:
        task.labelled.official()
    else:
        check_folds(class_sizes(task.labelled), task.settings)


def fit_linear(task: VideoTask, means: Means) -> Outcome:
    """Cross-validate a multinomial logistic regression on the mean vectors, standardised inside each fold.

    Mean and standard deviation of the accuracy are over folds and seeds; the official split is one fold.
    """
    labelled, settings, classes = task.labelled, task.settings, task.labelled.classes
    folds = folds_of(task)
    answers = list(ask_folds(means, classes, folds, settings.penalties))
    right = [answer.predicted == classes[fold.test] for fold, answer in zip(folds, answers, strict=True)]
    asked = np.unique(np.concatenate([fold.test for fold in folds]))
    figures = (
        mean_figure("accuracy", [float(item.mean()) for item in right], len(asked)),
        mean_figure(
            "class_accuracy",
            [_class_mean(item, classes[fold.test]) for fold, item in zip(folds, right, strict=True)],
            len(asked),
        ),
    )
    times = np.zeros((len(labelled), len(labelled.names)), np.int64)
    for fold, answer in zip(folds, answers, strict=True):
        np.add.at(times, (fold.test, answer.predicted), 1)
    shares = times[asked, classes[asked]] / times[asked].sum(1)
    return Outcome(
        figures,
        len(labelled.names),
        {**_pooling(settings), **fold_protocol(settings)},
        _answers(labelled, asked, times[asked].argmax(1), shares),
        convergence_warnings([answer.converged for answer in answers]),
    )


def folds_of(task: VideoTask) -> list[Fold]:
    """Return the folds of the linear probe."""
    if task.settings.official:
        return [task.labelled.official()]
    return stratified_folds(task.labelled.classes, task.settings.folds, task.settings.seeds)


def fold_protocol(settings: ProbeSettings) -> dict[str, object]:
    """Return what decides a cross-validated probe."""
    folds = {"over": "stratified folds", "folds": settings.folds, "seeds": settings.seeds}
    return {
        "probe": "standardisation, logistic regression",
        "C": list(settings.penalties),
        **({"over": "official split"} if settings.official else folds),
    }


def convergence_warnings(converged: Sequence[bool]) -> tuple[str, ...]:
    """Return a sentence about fits that did not converge, if there are any."""
    n_bad = len(converged) - sum(converged)
    return (f"{n_bad} of {len(converged)} logistic regressions did not converge",) if n_bad else ()


def _pooling(settings: ProbeSettings) -> dict[str, object]:
    tokens = "mean of unit tokens" if settings.unit else "mean of tokens"
    return {"vector": f"{tokens} and frames", "split": settings.split}


def _unit(means: Means) -> Means:
    lengths = np.linalg.norm(means.astype(np.float64), axis=1, keepdims=True)
    return (means / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _class_mean(right: np.ndarray, classes: Rows) -> float:
    """Return the mean over classes of the share of right answers."""
    counts = np.bincount(classes)
    hits = np.bincount(classes, right)
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def _answers(
    labelled: Labelled, rows: Rows, predicted: Rows, values: Float64[np.ndarray, " row"]
) -> tuple[VideoAnswer, ...]:
    names = labelled.names
    return tuple(
        VideoAnswer(labelled.videos[row].video_id, str(labelled.videos[row].class_name), names[number], value)
        for row, number, value in zip(rows.tolist(), predicted.tolist(), values.tolist(), strict=True)
    )
