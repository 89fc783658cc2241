"""What frozen tokens are worth for whole videos, single frames and single tokens: the table of tasks.

The command's choices and help, headings and what is kept of every video follow from it. Nothing heavy is
imported here, as the command line reads this table whenever it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure from 0 to 1.

    `std` is its standard deviation over folds and seeds, or over the cases of a mean; None where neither is.
    `case` is one pair of classes; empty for the task as a whole. `n_videos` were asked about.
    """

    metric: str
    value: float
    n_videos: int
    std: float | None = None
    case: str = ""


@dataclass(frozen=True, slots=True)
class VideoAnswer:
    """What a task said about one video, image or pair of images.

    `value` is the query's average precision (retrieval), the share of its answers that were right (knn,
    linear), or the share of its frames (segments), pixels (segmentation) or key points (spair); `predicted`
    is the class of the nearest video or of most answers.
    """

    video_id: str
    class_name: str
    predicted: str
    value: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task found for one kind of tokens, measured with `protocol`; `warnings` are sentences."""

    figures: tuple[Figure, ...]
    n_classes: int
    protocol: Mapping[str, Any]
    answers: tuple[VideoAnswer, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """One task; `metrics` maps the names of its figures to their headings.

    `needs` says what every video gives: its `mean` vector, evenly spaced frames (`order`), or all `frames`
    and their labels; without frame labels it needs classes. Tasks on `tokens` read their images themselves.
    `counted` is what figures are over.
    """

    name: str
    help: str
    metrics: Mapping[str, str]
    needs: str
    counted: str = "videos"


_RECALL = {"map": "mAP", "recall_at_1": "R@1", "recall_at_5": "R@5"}
_CLASSES = {"accuracy": "accuracy", "class_accuracy": "by class"}
_SEGMENTS = {"accuracy": "accuracy", "foreground_accuracy": "foreground", "edit": "edit"}
_SEGMENTS |= {"f1_10": "F1@10", "f1_25": "F1@25", "f1_50": "F1@50"}
_POINTS = {"recall": "recall@0.1", "pck": "PCK@0.1 per pair"}

_ROWS = (
    ProbeTask("retrieval", "rank of videos", _RECALL, "mean"),
    ProbeTask("knn", "votes of near videos", _CLASSES, "mean"),
    ProbeTask("linear", "a hyperplane", _CLASSES, "mean"),
    ProbeTask("order", "frames in time", {"accuracy": "accuracy"}, "order"),
    ProbeTask("segments", "classes of frames", _SEGMENTS, "frames"),
    ProbeTask("segmentation", "classes of pixels", {"miou": "mIoU"}, "tokens", "images"),
    ProbeTask("spair", "key points", _POINTS, "tokens", "pairs of images"),
)
#: Every task by name.
TASKS: Mapping[str, ProbeTask] = {row.name: row for row in _ROWS}
