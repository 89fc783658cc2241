"""The tasks of `propagate` and `score`, one row each: what is annotated, data and functions.

The command line makes its choices and help from the table, so nothing heavy is imported here: a row names
its functions as "module:function", and `load` imports them when they are used. A new task is a row; it may
be added at run time, `TASKS["mine"] = Task(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import LabelKind

#: A function, or where it is: "module:function".
Function = Callable[..., Any] | str


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    `labels` is what its videos are annotated with, `folder` the layout in `videos` that finds and reads
    them. The functions: `open(video, data_root, setting)` returns a `tasks.base.Subject` and may raise
    `InputError`, which costs the video; `draw(drawing)` draws a video of which all predictions are on disk;
    `check(case)` returns what is wrong with somebody's predictions and `score(case, row)` their score rows,
    both None where there is no truth to score against.
    """

    name: str
    labels: LabelKind
    folder: str
    open: Function
    draw: Function
    check: Function | None = None
    score: Function | None = None


_HERE, _SCORE = "cosettle_cache.propagation.tasks", "cosettle_cache.propagation.score"


def _mask_task(name: str, *, scored: bool = True) -> Task:
    check, score = (f"{_SCORE}:check_masks", f"{_SCORE}:score_masks") if scored else (None, None)
    functions = (f"{_HERE}.masks:open_masks", f"{_HERE}.masks:draw_masks", check, score)
    return Task(name, LabelKind.MASKS, name, *functions)


#: Every task by name, in the order of help texts and tables.
TASKS = {
    task.name: task
    for task in (
        _mask_task("davis"),
        Task(
            name="vip",
            labels=LabelKind.PARTS,
            folder="vip",
            open=f"{_HERE}.parts:open_part_clip",
            draw=f"{_HERE}.parts:draw_parts",
            check=f"{_SCORE}:check_parts",
            score=f"{_SCORE}:score_parts",
        ),
        Task(
            name="jhmdb",
            labels=LabelKind.KEYPOINTS,
            folder="jhmdb",
            open=f"{_HERE}.joints:open_joint_clip",
            draw=f"{_HERE}.joints:draw_joint_clip",
            check=f"{_SCORE}:check_joints",
            score=f"{_SCORE}:score_joints",
        ),
        _mask_task("sprites"),
        _mask_task("masks", scored=False),
    )
}


def find_task(name: str) -> Task:
    """Return the row of a task; raise `UsageError` for one that is not in the table."""
    if name not in TASKS:
        raise UsageError(f"there is no task {name}", wanted=", ".join(TASKS), found=name)
    return TASKS[name]


def load(function: Function) -> Callable[..., Any]:
    """Return a function that a row names, imported where it is given as text."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]
