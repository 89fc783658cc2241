"""Who shows the figures of a run while it goes: TensorBoard, Weights & Biases, Trackio.

A tracker is a row of `TRACKERS`: a function that opens a run, which has `log` and `finish`. Figures go in;
what goes wrong there is told once and never ends the training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import UsageError, first_line
from cosettle_cache.core.files import read_json
from cosettle_cache.core.tables import write_json
from cosettle_cache.training.log import RunFiles

#: Where runs go unless the service's own variable names a project.
_PROJECT = "cosettle-cache"
#: Seconds that the end of a run waits for a service that does not answer; what is unsent stays in its folder.
_PATIENCE_S = 60.0


@runtime_checkable
class TrackedRun(Protocol):
    """An open run of a tracker."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Take the figures of a step."""

    def finish(self) -> None:
        """Hand over what is left."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a tracker learns of a run: its files, the step it begins at, the folder's name, its settings."""

    files: RunFiles
    step: int
    group: str
    config: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The folder, and of a sweep the member."""
        return "-".join(dict.fromkeys((self.group, self.files.folder.name)))

    @property
    def id(self) -> str:
        """What a service knows the run by; a run that starts over has another one."""
        path = self.files.tracker
        if not path.exists():
            write_json(path, {"id": uuid4().hex[:8]})
        return str(read_json(path)["id"])


class _TensorBoard:
    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of events that come again only the later ones are shown.
        self._writer: Any = SummaryWriter(str(opening.files.scalars), purge_step=opening.step)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _wandb(opening: Opening) -> TrackedRun:
    wandb: Any = import_module("wandb")
    run: TrackedRun = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        **{"id": opening.id, "name": opening.title, "group": opening.group, "config": dict(opening.config)},
        dir=str(opening.files.folder),
        resume="allow",
        reinit="create_new",  # the members of a sweep are runs side by side
        settings=wandb.Settings(console="off", finish_timeout=_PATIENCE_S),
    )
    return run


def _trackio(opening: Opening) -> TrackedRun:
    trackio: Any = import_module("trackio")
    # It knows one run per context, and a run by its name.
    run: TrackedRun = copy_context().run(
        trackio.init,
        os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=f"{opening.title}-{opening.id}",
        **{"group": opening.group, "config": dict(opening.config), "resume": "allow"},
    )
    return run


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """A tracker: the package that must be there, and how a run is opened.

    `rewinds` says that figures of a resumed run may come once more: the last ones count.
    """

    package: str
    open: Callable[[Opening], TrackedRun]
    rewinds: bool = False


TRACKERS = {
    kind.package: kind
    for kind in (
        TrackerKind("tensorboard", _TensorBoard, rewinds=True),
        TrackerKind("wandb", _wandb),
        TrackerKind("trackio", _trackio),
    )
}


def find_tracker(name: str) -> TrackerKind | None:
    """Return the tracker of that name: `auto` is TensorBoard where it is installed, `none` is None.

    Raises `UsageError` for other names and for a package that is not installed.
    """
    if name == "none":
        return None
    if name == "auto":
        return TRACKERS["tensorboard"] if _is_installed("tensorboard") else None
    if name not in TRACKERS:
        raise UsageError("unknown tracker", wanted=" or ".join(("auto", *TRACKERS, "none")), found=name)
    if not _is_installed(name):
        raise UsageError(
            f"the tracker {name} needs the package {name}", hint=f"pip install 'cosettle-cache[{name}]'"
        )
    return TRACKERS[name]


def _is_installed(package: str) -> bool:
    """Say whether a package is there; a folder of its name, such as runs leave, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


class Tracking:
    """The runs of one tracker, by folder. After its first error it is left alone; one warning says so."""

    def __init__(self, kind: TrackerKind | None) -> None:
        self._kind = kind
        self._runs: dict[Path, TrackedRun] = {}

    def open(self, opening: Opening) -> None:
        """Open a run for a folder."""
        if self._kind is not None:
            with self._surviving():
                self._runs[opening.files.folder] = self._kind.open(opening)

    def log(self, folder: Path, figures: dict[str, float], step: int, *, again: bool) -> None:
        """Hand figures over; `again` says that the run has had them, before it was resumed."""
        run = self._runs.get(folder)
        if run is not None and self._kind is not None and (self._kind.rewinds or not again):
            with self._surviving():
                run.log(figures, step=step)

    def finish(self, folder: Path) -> None:
        """End the run of a folder."""
        run = self._runs.pop(folder, None)
        if run is not None:
            with self._surviving():
                run.finish()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # stdout has results only
                yield
        except Exception as error:  # whatever the service raises
            name = self._kind.package if self._kind else "the tracker"
            self._kind, self._runs = None, {}
            Talk().warn(f"{name} failed and gets no more figures: {first_line(error)}")
