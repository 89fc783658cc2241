"""The journal of a run: what its members write while they learn, and the checkpoint that covers it.

Figures come in step by step; lines, TensorBoard scalars and checkpoints go out. A process that is not the
first of its run has an empty journal and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from cosettle_cache.core.files import make_folder
from cosettle_cache.training.learner import Learner
from cosettle_cache.training.run_state import (
    Checkpoint,
    FiguresLog,
    RunFiles,
    StepFigures,
    ValidationFigures,
    write_checkpoint,
)


class Journal:
    """Open files of a run's members, in their order, from step `step` on.

    `n_bytes` says how much of each member's figures is kept.
    """

    def __init__(
        self, files: RunFiles, names: Sequence[str], step: int, n_bytes: Sequence[tuple[int, int]]
    ) -> None:
        self._checkpoint = files.checkpoint
        self._pages = [_Page(files.member(a), step, *b) for a, b in zip(names, n_bytes, strict=True)]

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for page in self._pages:
            page.close()

    def steps(self, figures: Sequence[StepFigures | None]) -> None:
        """Write the figures of a step, one line per member that still learns."""
        for page, item in zip(self._pages, figures, strict=False):
            if item is not None:
                page.metrics.append(item)
                page.scalars.add("train", item)

    def validation(self, figures: Sequence[ValidationFigures | None]) -> None:
        """Write the figures of an epoch on held-out clips, one line per member that still learns."""
        for page, item in zip(self._pages, figures, strict=False):
            if item is not None:
                page.validation.append(item)
                page.scalars.add("validation", item)

    def save(self, step: int, origin: Mapping[str, str], learners: Sequence[Learner]) -> None:
        """Write a checkpoint after `step` steps, once all lines before it are safely on disk."""
        if self._pages:
            n_bytes = [(page.metrics.sync(), page.validation.sync()) for page in self._pages]
            states = [learner.state() for learner in learners]
            write_checkpoint(self._checkpoint, Checkpoint(step, dict(origin), n_bytes, states))


class _Page:
    """The open files of one member."""

    def __init__(self, files: RunFiles, step: int, n_metrics: int, n_validation: int) -> None:
        make_folder(files.folder)
        self.metrics = FiguresLog(files.metrics, n_metrics)
        self.validation = FiguresLog(files.validation, n_validation)
        self.scalars = Scalars(files.scalars, step)

    def close(self) -> None:
        self.metrics.close()
        self.validation.close()
        self.scalars.close()


class Scalars:
    """TensorBoard's view of the figures; nothing is written where the `tensorboard` package is absent."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, group: str, figures: StepFigures | ValidationFigures) -> None:
        """Write every figure under `group/name`."""
        if self._writer is not None:
            for name, value in asdict(figures).items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, figures.step)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()
