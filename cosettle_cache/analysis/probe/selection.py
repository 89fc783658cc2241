"""Which videos take part in a task and what class each is of, before a token is read.

A store and settings come in, optionally a manifest that knows classes and splits better than the store does;
out go labelled videos, and reasons for those that are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int64

from cosettle_cache.analysis.probe.classifiers import Fold
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.core.types import Manifest, Video
from cosettle_cache.store import FeatureStore

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
