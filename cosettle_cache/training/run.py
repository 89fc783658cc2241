"""Trains Co-Settle's projection on stored samples, with the released schedule.

Stores and settings come in; a folder with projections, the figures of every step, their curves and a
checkpoint goes out. One stream of batches, read ahead by one thread, teaches all members of a sweep; a run
without a sweep has one member. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import CheckpointError, InputError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.settings import TrainSettings
from cosettle_cache.core.tables import write_json, write_table
from cosettle_cache.heads.projection import Projection, projection_sha256, save_projection
from cosettle_cache.pictures.charts import curves_chart, save_chart
from cosettle_cache.store import FeatureStore
from cosettle_cache.training.batches import ALONE, Batch, BatchRing, Ids, Replicas, Step
from cosettle_cache.training.learner import Learner, Trainer
from cosettle_cache.training.log import (
    Checkpoint,
    FiguresLog,
    MemberReport,
    RunFiles,
    StepFigures,
    TrainReport,
    ValidationFigures,
    check_origin,
    comparison,
    curves_table,
    figure_columns,
    projection_provenance,
    read_checkpoint,
    read_figures,
    read_validation,
    report_member,
    write_checkpoint,
)
from cosettle_cache.training.plan import (
    Axis,
    Member,
    Stream,
    TrainPlan,
    make_members,
    make_stream,
    make_train_plan,
    plan_stream,
)
from cosettle_cache.training.samples import find_not_finite
from cosettle_cache.training.validate import validate


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


__all__ = ["TrainPlan", "TrainReport", "make_train_plan", "train"]


def train(
    stores: FeatureStore | Sequence[FeatureStore],
    settings: TrainSettings,
    out: Path,
    *,
    sweep: Sequence[Axis] = (),
    device: str = "cpu",
    progress: Progress | None = None,
    resume: bool = True,
    stop: Event | None = None,
    replicas: Replicas = ALONE,
) -> TrainReport:
    """Train projections on the samples of `stores` into the folder `out`, going on from the checkpoint there.

    Every combination of the values in `sweep` is trained at the same time, each in its own folder in `out`;
    the result is that of its single run. On one device a resumed run ends with the same bits as one that was
    never stopped. Setting `stop` ends after the step in hand, with a checkpoint. Raises `InputError` for
    stores without shifted views or with tokens that are not finite, `FingerprintError` when `out` holds a run
    of other settings or other stores, or when the stores are of several encoders.
    """
    stream = make_stream(stores, settings)
    members = make_members(settings, sweep)
    plan = plan_stream(stream, members)
    files = RunFiles(make_folder(out))
    if not resume:
        _clear(files, members, replicas)
        replicas.wait()
    trainer = Trainer([_make_learner(plan, member, device) for member in members], replicas)
    origin = stream.origin(members)
    run = _Run(stream, members, plan, origin, files, trainer, replicas, progress or SILENT, stop or Event())
    return run.run()


@dataclass(slots=True)
class _Run:
    """One call of `train`: from the checkpoint, if there is one, to the end or to where it was stopped."""

    stream: Stream
    members: Sequence[Member]
    plan: TrainPlan
    origin: Mapping[str, str]
    files: RunFiles
    trainer: Trainer
    replicas: Replicas
    progress: Progress
    stop: Event
    steps_before: int = 0
    steps: int = 0
    samples: int = 0

    def run(self) -> TrainReport:
        n_bytes = self._restore()
        self.replicas.wait()
        names = [member.name for member in self.members] if self.replicas.is_first else []
        started = time.perf_counter()
        with Journal(self.files, names, self.steps_before, n_bytes) as journal, self._ring() as ring:
            self.progress.start(self._samples_left(), "samples")
            try:
                for batch in ring:
                    figures = self.trainer.feed(batch)
                    if batch.portion.ends_step:
                        self._end_step(batch, figures, journal, started)
                        if self.replicas.any(self.stop.is_set(), self.trainer.learners[0].device):
                            self._save(journal)
                            break
            finally:
                self.progress.finish()
        return self._finish(time.perf_counter() - started, ring.waited_s)

    def _restore(self) -> Sequence[tuple[int, int]]:
        """Take up the checkpoint, if there is one; return how much of the members' figures it covers."""
        path = self.files.checkpoint
        if not path.exists():
            _clear(self.files, self.members, self.replicas)
            return [(0, 0)] * (len(self.members) if self.replicas.is_first else 0)
        checkpoint = read_checkpoint(path)
        check_origin(path, self.origin, checkpoint.origin)
        for learner, state in zip(self.trainer.learners, checkpoint.learners, strict=True):
            _load(path, learner, state)
        self.steps_before = checkpoint.step
        return checkpoint.n_bytes if self.replicas.is_first else []

    def _ring(self) -> BatchRing:
        return BatchRing(
            self.stream.samples,
            self.stream.portions(self.steps_before, self.replicas),
            self.plan.sample_shape,
            self.stream.capacity(self.replicas),
            pin=self.trainer.learners[0].device.type == "cuda",
        )

    def _samples_left(self) -> int:
        left = self.plan.n_steps - self.steps_before
        return left * self.plan.n_samples // self.plan.n_steps

    def _end_step(
        self, batch: Batch, figures: Sequence[StepFigures | None], journal: Journal, started: float
    ) -> None:
        step = batch.portion.step
        self._check_finite(step)
        journal.steps(figures)
        self.steps += 1
        self.samples += len(step.ids)
        self._advance(step, next(item for item in figures if item is not None), started)
        if step.ends_epoch and self.plan.n_held_out and self.replicas.is_first:
            journal.validation(self._validate(step))
        due = (step.number + 1) % self.stream.settings.checkpoint_every == 0
        if due or step.ends_epoch:
            self._save(journal)

    def _advance(self, step: Step, figures: StepFigures, started: float) -> None:
        seconds = time.perf_counter() - started
        self.progress.advance(
            len(step.ids),
            loss=figures.total,
            cycle_accuracy=figures.cycle_accuracy,
            GB_per_s=self.samples * self.plan.sample_bytes / seconds / 1e9,
        )

    def _validate(self, step: Step) -> list[ValidationFigures | None]:
        active = [learner for learner in self.trainer.learners if learner.diverged_at is None]
        ids = self.stream.held_out.ids
        figures = iter(validate(active, self.stream.samples, ids, step.number, step.epoch))
        return [None if item.diverged_at is not None else next(figures) for item in self.trainer.learners]

    def _check_finite(self, step: Step) -> None:
        """Raise `InputError` when tokens of a step are to blame for a divergence, or no learner is left."""
        learners = self.trainer.learners
        if not any(learner.diverged_at == step.number for learner in learners):
            return
        where = f"at step {step.number} (epoch {step.epoch})"
        bad = find_not_finite(self.stream.samples, step.ids)
        if len(bad):
            raise InputError(
                f"{len(bad)} samples of the batch {where} hold tokens that are not finite",
                details=self._names(bad),
                hint="extract these clips again into another store",
            )
        if all(learner.diverged_at is not None for learner in learners):
            raise InputError(
                f"training diverged {where}: the loss or its gradient is not finite, the tokens are",
                details=self._names(step.ids),
                hint="lower base_lr or raise the temperature; the last checkpoint is kept",
            )

    def _names(self, ids: Ids, limit: int = 8) -> list[str]:
        more = [f"... and {len(ids) - limit} more"] if len(ids) > limit else []
        return [self.stream.samples.name(int(item)) for item in ids[:limit]] + more

    def _save(self, journal: Journal) -> None:
        journal.save(self.steps_before + self.steps, self.origin, self.trainer.learners)

    def _finish(self, seconds: float, waited_s: float) -> TrainReport:
        complete = self.steps_before + self.steps == self.plan.n_steps
        self.replicas.wait()
        report = TrainReport(
            folder=self.files.folder,
            epochs=self.plan.epochs,
            steps=self.steps,
            steps_before=self.steps_before,
            samples=self.samples,
            read_bytes=self.samples * self.plan.sample_bytes,
            seconds=seconds,
            waiting_share=waited_s / seconds if seconds else 0.0,
            interrupted=not complete,
            members=tuple(self._finish_member(number, complete) for number in range(len(self.members))),
            warnings=self.plan.warnings,
        )
        if self.replicas.is_first:
            self._write(report)
        return report

    def _finish_member(self, number: int, complete: bool) -> MemberReport:
        """Leave a member's picture and projection in its folder; return its report."""
        member, learner = self.members[number], self.trainer.learners[number]
        files = self.files.member(member.name)
        done = complete and learner.diverged_at is None
        sha256 = projection_sha256(learner.projection) if done else ""
        report = report_member(files, member.name, learner.diverged_at, sha256)
        if self.replicas.is_first and report.last:
            n_tokens = self.plan.grid.n_tokens // member.settings.window**2
            steps = {member.name: figure_columns(read_figures(files.metrics))}
            held_out = {member.name: figure_columns(read_validation(files.validation))}
            save_chart(curves_chart(steps, held_out, n_tokens), files.curves, files.curves_svg)
            if done:
                provenance = projection_provenance(
                    self.stream.stores,
                    member.settings,
                    plan=self.plan.to_json(),
                    last_step=asdict(report.last),
                )
                save_projection(files.projection, learner.projection, provenance)
        return report

    def _write(self, report: TrainReport) -> None:
        write_json(self.files.report, report.to_json())
        if not self.members[0].name:
            return
        files = {m.name: self.files.member(m.name) for m in self.members}
        figures = {name: read_figures(item.metrics) for name, item in files.items()}
        held_out = {name: figure_columns(read_validation(item.validation)) for name, item in files.items()}
        write_table(self.files.table, curves_table(figures))
        steps = {name: figure_columns(items) for name, items in figures.items()}
        save_chart(curves_chart(steps, held_out), self.files.curves, self.files.curves_svg)
        header, rows = comparison(report.members)
        write_json(self.files.comparison, {"header": header, "rows": rows})


def _make_learner(plan: TrainPlan, member: Member, device: str) -> Learner:
    settings = member.settings
    projection = Projection(plan.dim, settings.head, init=plan.init, seed=settings.seed)
    return Learner(projection.to(device), settings)


def _load(path: Path, learner: Learner, state: Mapping[str, object]) -> None:
    """Give a learner its state; raise `CheckpointError` for one of another width or that is not finite."""
    try:
        learner.load_state(dict(state))
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this run",
            found=str(error).strip().splitlines()[-1].strip(),
            hint="choose another folder with --out, or remove this one to start over",
        ) from error
    if learner.diverged_at is None and not all(p.isfinite().all() for p in learner.projection.parameters()):
        raise CheckpointError(
            f"{path} holds weights that are not finite",
            hint="remove this folder to start over, with a lower base_lr",
        )


def _clear(files: RunFiles, members: Sequence[Member], replicas: Replicas) -> None:
    if replicas.is_first:
        files.clear()
        for member in members:
            files.member(member.name).clear()
