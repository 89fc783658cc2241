"""The benchmarks: which labels a task has, how a video is opened, and what is drawn of it.

One row per task; a new benchmark is a row, and a module if its labels are of a new kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import LabelKind, Video
from cosettle_cache.propagation.tasks.base import Drawing, Setting, Subject
from cosettle_cache.propagation.tasks.joints import draw_joint_clip, open_joint_clip
from cosettle_cache.propagation.tasks.masks import draw_masks, open_masks
from cosettle_cache.propagation.tasks.parts import draw_parts, open_part_clip


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`open` may raise `InputError`, which costs the video; `draw` finds all predictions on disk."""

    labels: LabelKind
    open: Callable[[Video, Path, Setting], Subject]
    draw: Callable[[Drawing], None]


_MASKS = Benchmark(LabelKind.MASKS, open_masks, draw_masks)

BENCHMARKS = {
    "davis": _MASKS,
    "vip": Benchmark(LabelKind.PARTS, open_part_clip, draw_parts),
    "jhmdb": Benchmark(LabelKind.KEYPOINTS, open_joint_clip, draw_joint_clip),
    "sprites": _MASKS,
    "masks": _MASKS,
}


def find_benchmark(task: str) -> Benchmark:
    """Return the row of a task; raise `UsageError` for one that nobody knows."""
    if task not in BENCHMARKS:
        raise UsageError(f"there is no task {task}", wanted=", ".join(BENCHMARKS), found=task)
    return BENCHMARKS[task]
