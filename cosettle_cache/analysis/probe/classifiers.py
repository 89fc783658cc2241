"""Linear probes: multinomial logistic regression on vectors that stay as they are.

Vectors, labels and folds come in; predictions of the held-out vectors go out. Standardisation is learned from
the training part of each fold. The only door to scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

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
    folds = []
    for seed in range(n_seeds):
        if groups is None:
            parts = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)
        else:
            grouped = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
            parts = grouped.split(labels, labels, groups)
        folds += [Fold(train, test, seed) for train, test in parts]
    return folds


def ask_folds(
    vectors: Vectors, labels: Labels, folds: Sequence[Fold], penalties: Sequence[float]
) -> Iterator[Answer]:
    """Yield each fold's answer; see `fit_and_ask`."""
    for fold in folds:
        yield fit_and_ask(vectors[fold.train], labels[fold.train], vectors[fold.test], penalties, fold.seed)


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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe = _fit(vectors.astype(np.float64), labels, penalties, seed)
    converged = not any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return Answer(np.asarray(probe.predict(asked.astype(np.float64)), np.int64), converged)


def _fit(vectors: Vectors, labels: Labels, penalties: Sequence[float], seed: int) -> Pipeline | GridSearchCV:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalties[0], max_iter=_MAX_STEPS))
    smallest = np.unique(labels, return_counts=True)[1].min()
    if len(penalties) > 1 and smallest >= _INNER_FOLDS:
        inner = StratifiedKFold(_INNER_FOLDS, shuffle=True, random_state=seed)
        probe = GridSearchCV(probe, {"logisticregression__C": list(penalties)}, cv=inner)
    return probe.fit(vectors, labels)
