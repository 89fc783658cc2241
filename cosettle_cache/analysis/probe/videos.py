"""Retrieval, k-NN and the linear probe: what one vector per video is worth for telling classes apart.

Mean vectors and labelled videos come in, outcomes go out. Retrieval and k-NN compare directions and learn
nothing; the linear probe learns a multinomial logistic regression.

Which videos take part in a task and what class each is of, before a token is read.

A store and settings come in, optionally a manifest that knows classes and splits better than the store does;
out go labelled videos, and reasons for those that are left out.

Linear probes: multinomial logistic regression on vectors that stay as they are.

Vectors, labels and folds come in; predictions of the held-out vectors go out. Standardisation is learned from
the training part of each fold. The only door to scikit-learn.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cosettle_cache.analysis.probe.outcome import Figure, Outcome, VideoAnswer, mean_figure
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.core.types import Manifest, Video
from cosettle_cache.metrics.retrieval import average_precisions
from cosettle_cache.search.vectors import nearest
from cosettle_cache.store import FeatureStore

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


Classes = Int64[np.ndarray, " video"]

#: Parts of an official split.
TRAIN, TEST = ("train",), ("test", "val")


@dataclass(frozen=True, slots=True)
class Labelled:
    """Videos with a class, in manifest order, and by id why others are left out.

    `missing` are videos that would take part if the store had their tokens.
    """

    videos: tuple[Video, ...]
    left_out: Mapping[str, str]
    missing: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def names(self) -> list[str]:
        """Class names in alphabetical order: the numbers of `classes` count them."""
        return sorted({str(video.class_name) for video in self.videos})

    @property
    def classes(self) -> Classes:
        """The class number of every video."""
        number = {name: index for index, name in enumerate(self.names)}
        return np.array([number[str(video.class_name)] for video in self.videos], np.int64)

    @property
    def digest(self) -> str:
        """Identifies which videos with which classes and splits took part."""
        return digest([[video.video_id, video.class_name, video.split] for video in self.videos])

    def of_split(self, parts: Collection[str]) -> Int64[np.ndarray, " row"]:
        """Return the rows whose split is one of `parts`."""
        return np.flatnonzero([video.split in parts for video in self.videos]).astype(np.int64)

    def without(self, failed: Collection[str]) -> Labelled:
        """Return the rest of the videos."""
        return replace(self, videos=tuple(video for video in self.videos if video.video_id not in failed))

    def official(self) -> Fold:
        """Return the official split as one fold; raise `InputError` where a part of it is empty."""
        fold = Fold(self.of_split(TRAIN), self.of_split(TEST))
        if not len(fold.train) or not len(fold.test):
            found = Counter(video.split or "(none)" for video in self.videos)
            raise InputError(
                "these videos have no official split",
                wanted="rows of the splits train and test",
                found=", ".join(f"{count} {name}" for name, count in found.items()),
                hint="--manifest FILE with them (manifest build ucf101 or hmdb51), or leave --official out",
            )
        unknown = set(self.classes[fold.test]) - set(self.classes[fold.train])
        if unknown:
            raise InputError(
                f"{len(unknown)} classes of the test videos have no video to learn from",
                found=", ".join(self.names[number] for number in sorted(unknown)[:8]),
            )
        return fold


def select_videos(store: FeatureStore, settings: ProbeSettings, manifest: Manifest | None = None) -> Labelled:
    """Return the labelled videos of the store; `manifest` counts for classes and splits where it is given.

    Raises `InputError` when nothing is left, and says why.
    """
    known = {video.video_id: video for video in manifest or store.manifest}
    present = set(store.video_ids)
    listed = [known[video.video_id] for video in store.manifest if video.video_id in known]
    rows = [video for video in listed if video.video_id in present]
    if not rows:
        raise InputError(
            f"{store.path} holds none of the videos",
            wanted=f"ids as {next(iter(known))}",
            found=", ".join(store.video_ids[:4]) or "no complete video",
        )
    rows = _of_split(rows, settings.split)
    labelled = [video for video in rows if video.class_name]
    if not labelled:
        raise InputError(
            f"no video of {store.path} has a class",
            wanted="class_name in the manifest",
            found=f"{len(rows)} videos without",
            hint="--manifest FILE of `cosettle-cache manifest build classes FOLDER`, same ids",
        )
    sizes = Counter(video.class_name for video in labelled)
    kept = tuple(video for video in labelled if sizes[video.class_name] >= settings.min_videos)
    if not kept:
        raise InputError(
            f"no class has {settings.min_videos} videos", found=f"{max(sizes.values())} in the largest"
        )
    left_out = {video.video_id: "it has no class" for video in rows if not video.class_name}
    left_out |= {
        video.video_id: f"its class {video.class_name} has {sizes[video.class_name]} videos"
        for video in labelled
        if sizes[video.class_name] < settings.min_videos
    }
    wanted = [video.video_id for video in listed if video.class_name]
    if settings.split:
        wanted = [video.video_id for video in listed if video.class_name and video.split == settings.split]
    return Labelled(kept, left_out, missing_videos(store, wanted))


def missing_videos(store: FeatureStore, video_ids: Iterable[str]) -> dict[str, str]:
    """Return, by id, why the store lacks tokens of these videos; those that are all there are left out."""
    present = set(store.video_ids)
    return {
        video_id: store.failures.get(video_id, "not extracted yet")
        for video_id in video_ids
        if video_id not in present
    }


def _of_split(rows: Sequence[Video], split: str) -> list[Video]:
    chosen = [video for video in rows if not split or video.split == split]
    if not chosen:
        found = ", ".join(sorted({video.split or "(none)" for video in rows}))
        raise InputError(f"no video is of the split {split}", found=found)
    return chosen


def check_classes(labelled: Labelled, task: str) -> None:
    """Raise `InputError` unless there are two classes to tell apart."""
    if len(labelled.names) < 2:
        raise InputError(
            f"{task} tells classes apart, and all {len(labelled)} videos are of one",
            wanted="two classes or more",
            found=labelled.names[0],
            hint="--task order compares each class with its own reversal",
        )


def check_folds(sizes: Mapping[str, int], settings: ProbeSettings) -> None:
    """Raise `InputError` for classes with fewer videos than there are folds."""
    if settings.folds < 2 or settings.seeds < 1:
        raise UsageError("nothing to cross-validate", wanted="2 folds or more, 1 seed or more")
    small = {name: size for name, size in sizes.items() if size < settings.folds}
    if small:
        least = min(small.values())
        hint = f"--folds {least}, or " if least > 1 else ""
        raise InputError(
            f"{len(small)} of {len(sizes)} classes have fewer videos than there are folds",
            wanted=f"{settings.folds} videos of each class",
            found=", ".join(f"{size} of {name}" for name, size in list(small.items())[:6]),
            hint=f"{hint}--min-videos {settings.folds} leaves these classes out",
        )


def class_sizes(labelled: Labelled) -> dict[str, int]:
    """Return how many videos each class has."""
    counts = np.bincount(labelled.classes, minlength=len(labelled.names))
    return dict(zip(labelled.names, counts.tolist(), strict=True))


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
