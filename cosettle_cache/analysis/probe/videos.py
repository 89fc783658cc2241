"""Tasks on videos with classes: retrieval, k-NN and the linear probe on one vector each, and order of frames.

A store, settings and optionally a manifest that knows classes and splits better give the labelled videos;
with their vectors outcomes go out. Retrieval and k-NN compare directions and learn nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cosettle_cache.analysis.pooling import missing_videos
from cosettle_cache.analysis.probe import Figure, Outcome, VideoAnswer
from cosettle_cache.analysis.probe.linear import (
    Answer,
    Fold,
    ask_folds,
    convergence_warnings,
    fold_protocol,
    mean_figure,
    stratified_folds,
)
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.core.types import Manifest, Video
from cosettle_cache.metrics.retrieval import average_precisions
from cosettle_cache.search.vectors import nearest
from cosettle_cache.store import FeatureStore

Means = Float32[np.ndarray, "video dim"]
Sampled = Float32[np.ndarray, "video frame dim"]
Rows = Int64[np.ndarray, " row"]

#: Parts of an official split.
_TRAIN, _TEST = ("train",), ("test", "val")
#: Ranks at which recall is reported.
_RECALLS = (1, 5)
#: Videos that vote where nobody says how many.
_NEIGHBORS = 20
#: Frames of a video at most whose order is told where nobody says how many.
_DEFAULT_FRAMES = 8


@dataclass(frozen=True, slots=True)
class Labelled:
    """Videos with a class, in manifest order, and what they are asked with; by id why others are left out.

    `missing` are videos that would take part if the store had their tokens; `n_stored` has the stored frames
    of each video; `device` is where they are searched.
    """

    videos: tuple[Video, ...]
    settings: ProbeSettings
    left_out: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    n_stored: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def video_ids(self) -> tuple[str, ...]:
        """Ids in the order of `videos`."""
        return tuple(video.video_id for video in self.videos)

    @property
    def names(self) -> list[str]:
        """Class names in alphabetical order: the numbers of `classes` count them."""
        return list(self.sizes)

    @property
    def classes(self) -> Int64[np.ndarray, " video"]:
        """The class number of every video."""
        return np.unique([str(video.class_name) for video in self.videos], return_inverse=True)[1]

    @property
    def sizes(self) -> dict[str, int]:
        """How many videos each class has, in the order of `names`."""
        return dict(sorted(Counter(str(video.class_name) for video in self.videos).items()))

    @property
    def lengths(self) -> list[int]:
        """The stored frames of each video."""
        return [self.n_stored[video.video_id] for video in self.videos]

    @property
    def order_frames(self) -> int:
        """The frames of each video whose order is told: as asked for, or what all have, 8 at most."""
        return self.settings.n_frames or min(_DEFAULT_FRAMES, *self.lengths)

    @property
    def digest(self) -> str:
        """Identifies which videos with which classes and splits took part."""
        return digest([[video.video_id, video.class_name, video.split] for video in self.videos])

    def without(self, failed: Collection[str]) -> Labelled:
        """Return the rest of the videos."""
        return replace(self, videos=tuple(video for video in self.videos if video.video_id not in failed))

    def official(self) -> Fold:
        """Return the official split as one fold; raise `InputError` where a part of it is empty."""
        splits = [video.split for video in self.videos]
        train, test = (np.flatnonzero(np.isin(splits, part)) for part in (_TRAIN, _TEST))
        if not len(train) or not len(test):
            found = Counter(split or "(none)" for split in splits)
            raise InputError(
                "these videos have no official split",
                wanted="rows of the splits train and test",
                found=", ".join(f"{count} {name}" for name, count in found.items()),
                hint="--manifest FILE with them (manifest build ucf101 or hmdb51), or leave --official out",
            )
        unknown = set(self.classes[test]) - set(self.classes[train])
        if unknown:
            raise InputError(
                f"{len(unknown)} classes of the test videos have no video to learn from",
                found=", ".join(self.names[number] for number in sorted(unknown)[:8]),
            )
        return Fold(train, test)


def select_videos(store: FeatureStore, settings: ProbeSettings, manifest: Manifest | None = None) -> Labelled:
    """Return the store's labelled videos, by `manifest` where given; raise `InputError` when none is left."""
    known = {video.video_id: video for video in manifest or store.manifest}
    present, split = set(store.video_ids), settings.split
    listed = [known[video.video_id] for video in store.manifest if video.video_id in known]
    rows = [video for video in listed if video.video_id in present]
    if not rows:
        raise InputError(
            f"{store.path} holds none of the videos",
            wanted=f"ids as {next(iter(known))}",
            found=", ".join(store.video_ids[:4]) or "no complete video",
        )
    of_split = [video for video in rows if split in ("", video.split)]
    if not of_split:
        found = ", ".join(sorted({video.split or "(none)" for video in rows}))
        raise InputError(f"no video is of the split {split}", found=found)
    labelled = [video for video in of_split if video.class_name]
    if not labelled:
        raise InputError(
            f"no video of {store.path} has a class",
            wanted="class_name in the manifest",
            found=f"{len(of_split)} videos without",
            hint="--manifest FILE of `cosettle-cache manifest build classes FOLDER`, same ids",
        )
    sizes = Counter(video.class_name for video in labelled)
    kept = tuple(video for video in labelled if sizes[video.class_name] >= settings.min_videos)
    if not kept:
        raise InputError(
            f"no class has {settings.min_videos} videos", found=f"{max(sizes.values())} in the largest"
        )
    left_out = {video.video_id: "it has no class" for video in of_split if not video.class_name}
    left_out |= {
        video.video_id: f"its class {video.class_name} has {sizes[video.class_name]} videos"
        for video in labelled
        if sizes[video.class_name] < settings.min_videos
    }
    wanted = [video.video_id for video in listed if video.class_name and split in ("", video.split)]
    n_stored = {video.video_id: store.n_frames(video.video_id) for video in kept}
    return Labelled(kept, settings, left_out, missing_videos(store, wanted), n_stored)


def check_task(labelled: Labelled, task: str) -> None:
    """Raise `InputError` for videos that `task` cannot use: of one class, too few, too short, no splits."""
    settings, names, sizes = labelled.settings, labelled.names, labelled.sizes
    if task == "order":
        _check_order(labelled)
    elif len(names) < 2:
        raise InputError(
            f"{task} tells classes apart, and all {len(labelled.videos)} videos are of one",
            wanted="two classes or more",
            found=names[0],
            hint="--task order compares each class with its own reversal",
        )
    if task == "retrieval":
        if max(sizes.values()) < 2:
            found = f"{len(names)} classes of one video"
            raise InputError(
                "no class has a second video to be found", wanted="two videos of a class", found=found
            )
    elif settings.official:
        labelled.official()
    elif task != "knn":
        asked = [name for pair in settings.pairs for name in pair] if task == "order" else []
        _check_folds(settings, {name: size for name, size in sizes.items() if name in (asked or names)})


def _check_order(labelled: Labelled) -> None:
    n_frames, names, lengths = labelled.order_frames, labelled.names, labelled.lengths
    n_short = sum(length < max(n_frames, 2) for length in lengths)
    if n_short or n_frames < 2:
        raise InputError(
            f"{n_short} videos have too few frames to speak of their order",
            wanted=f"{max(n_frames, 2)} stored frames of each",
            found=f"{min(lengths)} in the shortest",
            hint="a smaller --frames, a store with more frames (extract --every), or --task linear alone",
        )
    unknown = [name for pair in labelled.settings.pairs for name in pair if name not in names]
    if unknown:
        raise InputError(f"there is no class {unknown[0]}", wanted=", ".join(names[:12]))


def _check_folds(settings: ProbeSettings, sizes: Mapping[str, int]) -> None:
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


def retrieve(labelled: Labelled, means: Means) -> Outcome:
    """Let every video query all others by the cosine of the mean vectors (leave-one-out).

    `map` is the mean over queries of the average precision, `recall_at_k` the share of queries with a video
    of their class among the k nearest. A video alone in its class is found by others but asks nothing.
    """
    vectors, classes = _unit(means), labelled.classes
    precision = average_precisions(vectors, classes)
    queries = np.flatnonzero(~np.isnan(precision))
    n_found = min(max(_RECALLS), len(vectors) - 1)
    options: dict[str, Any] = {"search": labelled.settings.search, "device": labelled.device}
    found = nearest(vectors[queries], vectors, n_found, own=queries, **options)
    hits = classes[found.index] == classes[queries, None]
    recalls = (Figure(f"recall_at_{k}", float(hits[:, :k].any(1).mean()), len(queries)) for k in _RECALLS)
    figures = (Figure("map", float(precision[queries].mean()), len(queries)), *recalls)
    answers = _answers(labelled, queries, classes[found.index[:, 0]], precision[queries])
    protocol = _pooling(labelled.settings) | {"similarity": "cosine", "over": "leave-one-out"}
    return Outcome(figures, len(labelled.names), protocol, answers)


def vote(labelled: Labelled, means: Means) -> Outcome:
    """Classify by the nearest videos, each voting with weight exp(cosine / temperature) (DINO's k-NN).

    Every video is asked about with all others as neighbours, or those of the split test with those of train.
    Of classes with equal votes the first in the alphabet wins.
    """
    settings, classes, vectors = labelled.settings, labelled.classes, _unit(means)
    fold = labelled.official() if settings.official else None
    asked = fold.test if fold else np.arange(len(vectors))
    keys = fold.train if fold else asked
    k = min(settings.neighbors or _NEIGHBORS, len(keys) - (fold is None))
    own = None if fold else asked
    found = nearest(vectors[asked], vectors[keys], k, own=own, search=settings.search, device=labelled.device)
    votes = np.zeros((len(asked), len(labelled.names)))
    # Relative to the nearest one: the weights of far neighbours would underflow together.
    weights = np.exp((found.similarity - found.similarity[:, :1]) / settings.temperature)
    np.add.at(votes, (np.arange(len(asked))[:, None], classes[keys][found.index]), weights)
    predicted = votes.argmax(1)
    right = predicted == classes[asked]
    values = {"accuracy": float(right.mean()), "class_accuracy": _class_mean(right, classes[asked])}
    figures = tuple(Figure(name, value, len(asked)) for name, value in values.items())
    protocol: dict[str, Any] = {"neighbors": k, "temperature": settings.temperature}
    protocol["over"] = "official split" if fold else "leave-one-out"
    answers = _answers(labelled, asked, predicted, right.astype(np.float64))
    return Outcome(figures, len(labelled.names), _pooling(settings) | protocol, answers)


def fit_linear(labelled: Labelled, means: Means) -> Outcome:
    """Cross-validate a multinomial logistic regression on the mean vectors, standardised inside each fold.

    Mean and standard deviation of the accuracy are over folds and seeds; the official split is one fold.
    """
    settings, classes = labelled.settings, labelled.classes
    folds = [labelled.official()] if settings.official else []
    folds = folds or stratified_folds(classes, settings.folds, settings.seeds)
    answers = ask_folds(means, classes, folds, settings.penalties)
    times = np.zeros((len(means), len(labelled.names)), np.int64)
    accuracies, class_accuracies = [], []
    for fold, answer in zip(folds, answers, strict=True):
        right = answer.predicted == classes[fold.test]
        accuracies.append(float(right.mean()))
        class_accuracies.append(_class_mean(right, classes[fold.test]))
        np.add.at(times, (fold.test, answer.predicted), 1)
    asked = np.flatnonzero(times.any(1))
    shares = times[asked, classes[asked]] / times[asked].sum(1)
    values = {"accuracy": accuracies, "class_accuracy": class_accuracies}
    figures = tuple(mean_figure(name, of_folds, len(asked)) for name, of_folds in values.items())
    answered = _answers(labelled, asked, times[asked].argmax(1), shares)
    protocol = _pooling(settings) | fold_protocol(settings)
    return Outcome(figures, len(labelled.names), protocol, answered, convergence_warnings(answers))


def spread(n_frames: int, n_wanted: int) -> Int64[np.ndarray, " frame"]:
    """Return evenly spaced places from the first frame to the last; from either end they look the same."""
    half = np.linspace(0, n_frames - 1, n_wanted)[: (n_wanted + 1) // 2].round().astype(np.int64)
    places = np.empty(n_wanted, np.int64)
    places[: len(half)] = half
    places[n_wanted - len(half) :] = n_frames - 1 - half[::-1]
    return places


def tell_order(labelled: Labelled, sampled: Sampled) -> Outcome:
    """Return the accuracy of a linear probe per case and the mean over cases; chance is one half.

    A case is a pair of classes, or a class forwards against reversed: evenly spaced frame vectors, joined in
    order (the paper's Chiral protocol, PROTOCOLS 5.4). Folds are stratified and grouped by video: a video and
    its reversal never stand on both sides.
    """
    settings, figures, answers = labelled.settings, list[Figure](), list[Answer]()
    for name, rows, reverse, kinds in _cases(labelled):
        folds = _folds(labelled, rows, kinds)
        if not folds:
            continue
        chosen = sampled[rows]
        turned = np.where(reverse[:, None, None] == 1, chosen[:, ::-1], chosen)
        of_case = ask_folds(turned.reshape(len(chosen), -1), kinds, folds, settings.penalties)
        pairs = zip(folds, of_case, strict=True)
        shares = [float((answer.predicted == kinds[fold.test]).mean()) for fold, answer in pairs]
        figures.append(mean_figure("accuracy", shares, len(np.unique(rows)), name))
        answers += of_case
    over_cases = mean_figure("accuracy", [figure.value for figure in figures], len(sampled))
    protocol = {
        "vector": f"mean of {'unit ' if settings.unit else ''}tokens per frame, joined",
        "frames": sampled.shape[1],
        "pairs": "classes" if settings.pairs else "forwards against reversed",
        "split": settings.split,
    } | fold_protocol(settings)
    warnings = convergence_warnings(answers)
    return Outcome((over_cases, *figures), len(labelled.names), protocol, warnings=warnings)


def _cases(labelled: Labelled) -> Iterator[tuple[str, Rows, Rows, Rows]]:
    """Yield name and, by sample, the row of its video, whether it is reversed (0, 1), and its kind (0, 1)."""
    classes, names = labelled.classes, labelled.names
    for first, second in labelled.settings.pairs:
        rows = np.flatnonzero(np.isin(classes, [names.index(first), names.index(second)]))
        kinds = (classes[rows] == names.index(second)).astype(np.int64)
        yield f"{first} / {second}", rows, np.zeros_like(rows), kinds
    for number, name in enumerate([] if labelled.settings.pairs else names):
        rows = np.flatnonzero(classes == number)
        reverse = np.repeat([0, 1], len(rows))
        yield name, np.tile(rows, 2), reverse, reverse


def _folds(labelled: Labelled, rows: Rows, kinds: Rows) -> list[Fold]:
    settings = labelled.settings
    if not settings.official:
        return stratified_folds(kinds, settings.folds, settings.seeds, groups=rows)
    fold = labelled.official()
    train, test = (np.flatnonzero(np.isin(rows, part)) for part in (fold.train, fold.test))
    # A case may have videos in one part of the split only; there is nothing to learn or to ask then.
    return [Fold(train, test)] if len(np.unique(kinds[train])) == 2 and len(test) else []


def _pooling(settings: ProbeSettings) -> dict[str, Any]:
    tokens = "mean of unit tokens" if settings.unit else "mean of tokens"
    return {"vector": f"{tokens} and frames", "split": settings.split}


def _unit(means: Means) -> Means:
    lengths = np.linalg.norm(means.astype(np.float64), axis=1, keepdims=True)
    return (means / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _class_mean(right: np.ndarray, classes: Rows) -> float:
    """Return the mean over classes of the share of right answers."""
    counts, hits = np.bincount(classes), np.bincount(classes, right)
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def _answers(
    labelled: Labelled, rows: Rows, predicted: Rows, values: Float64[np.ndarray, " row"]
) -> tuple[VideoAnswer, ...]:
    names, chosen = labelled.names, [labelled.videos[row] for row in rows.tolist()]
    return tuple(
        VideoAnswer(video.video_id, str(video.class_name), names[number], value)
        for video, number, value in zip(chosen, predicted.tolist(), values.tolist(), strict=True)
    )
