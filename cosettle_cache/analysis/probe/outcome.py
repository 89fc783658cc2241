"""What a task says: figures of the whole and of its cases, and an answer per video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure from 0 to 1; see `ProbeScore`."""

    metric: str
    value: float
    n_videos: int
    std: float | None = None
    case: str = ""


@dataclass(frozen=True, slots=True)
class VideoAnswer:
    """What was said about one video; see `ProbeAnswer`."""

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
    warnings: tuple[str, ...] = field(default=())


def mean_figure(metric: str, values: Sequence[float], n_videos: int, case: str = "") -> Figure:
    """Return mean and sample standard deviation of several values."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Figure(metric, float(np.mean(values)), n_videos, std, case)
