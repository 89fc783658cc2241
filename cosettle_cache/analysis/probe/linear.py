"""Linear probes: multinomial logistic regression on vectors that stay as they are.

Vectors, labels and folds come in; predictions of the held-out vectors go out. Standardisation is learned from
the training part of each fold. The only module that imports scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cosettle_cache.analysis.probe import Figure
from cosettle_cache.core.settings import ProbeSettings

#: Steps of L-BFGS at most; standardised vectors need some dozens.
_MAX_STEPS = 2000
#: Folds inside the training part, by which one of several penalties is chosen.
_INNER_FOLDS = 3

Vectors = Float[np.ndarray, "sample dim"]
Labels = Int64[np.ndarray, " sample"]


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Rows to learn from and rows to be asked about; `seed` is that of the shuffle."""

    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a fold's probe says of its test rows, and whether its fit converged."""

    predicted: Int64[np.ndarray, " row"]
    converged: bool


def stratified_folds(labels: Labels, n_folds: int, n_seeds: int, groups: Labels | None = None) -> list[Fold]:
    """Return `n_folds` folds per seed 0, 1 ... with every class in its share; a group is never split."""
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    return [
        Fold(train, test, seed)
        for seed in range(n_seeds)
        for train, test in splitter(n_folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    ]


def ask_folds(
    vectors: Vectors, labels: Labels, folds: Sequence[Fold], penalties: Sequence[float]
) -> list[Answer]:
    """Return each fold's answer; see `fit_and_ask`."""
    return [
        fit_and_ask(vectors[fold.train], labels[fold.train], vectors[fold.test], penalties, fold.seed)
        for fold in folds
    ]


def fit_and_ask(
    vectors: Vectors,
    labels: Labels,
    asked: Float[np.ndarray, "asked dim"],
    penalties: Sequence[float],
    seed: int = 0,
) -> Answer:
    """Learn from `vectors` and classify `asked`: standardisation, then logistic regression.

    `penalties` are inverse strengths of the L2 penalty (scikit-learn's C); of several the best is chosen by
    three folds inside the training part, or the first where a class is too small for that.
    """
    probe: Pipeline | GridSearchCV = make_pipeline(
        StandardScaler(), LogisticRegression(C=penalties[0], max_iter=_MAX_STEPS)
    )
    if len(penalties) > 1 and np.unique(labels, return_counts=True)[1].min() >= _INNER_FOLDS:
        inner = StratifiedKFold(_INNER_FOLDS, shuffle=True, random_state=seed)
        probe = GridSearchCV(probe, {"logisticregression__C": list(penalties)}, cv=inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(vectors.astype(np.float64), labels)
    converged = not any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return Answer(np.asarray(probe.predict(asked.astype(np.float64)), np.int64), converged)


def convergence_warnings(answers: Sequence[Answer]) -> tuple[str, ...]:
    """Return a sentence about fits that did not converge, if there are any."""
    n_bad = sum(not answer.converged for answer in answers)
    return (f"{n_bad} of {len(answers)} logistic regressions did not converge",) if n_bad else ()


def probe_protocol(settings: ProbeSettings) -> dict[str, object]:
    """Return what decides every linear probe."""
    return {"probe": "standardisation, logistic regression", "C": list(settings.penalties)}


def fold_protocol(settings: ProbeSettings) -> dict[str, object]:
    """Return what decides a cross-validated probe."""
    folds = {"over": "stratified folds", "folds": settings.folds, "seeds": settings.seeds}
    return probe_protocol(settings) | ({"over": "official split"} if settings.official else folds)


def mean_figure(metric: str, values: Sequence[float], n_videos: int, case: str = "") -> Figure:
    """Return mean and sample standard deviation of several values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Figure(metric, float(np.mean(values)), n_videos, std, case)
