"""Trains Co-Settle's projection on stored samples, with the released schedule.

Stores and settings come in; a folder with projections, the figures of every step, their curves and a
checkpoint goes out. One stream of batches, read ahead by one thread, teaches all members of a sweep; a run
without a sweep has one member. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event

import torch

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import CheckpointError, FingerprintError, InputError
from cosettle_cache.core.files import make_folder, own_folder
from cosettle_cache.core.precision import check_precision
from cosettle_cache.core.settings import LinearSettings, TrainSettings, differing
from cosettle_cache.core.tables import make_table, write_json, write_table
from cosettle_cache.heads.projection import Projection, projection_sha256, save_projection
from cosettle_cache.store import FeatureStore
from cosettle_cache.training.batches import ALONE, BatchRing, Replicas, Step
from cosettle_cache.training.closed_form import linear_map
from cosettle_cache.training.learner import Finished, Learner, Trainer
from cosettle_cache.training.log import (
    CURVES_SCHEMA,
    START_OVER,
    Checkpoint,
    FiguresLog,
    RunFiles,
    StepFigures,
    TrainReport,
    ValidationFigures,
    comparison,
    figure_columns,
    projection_provenance,
    read_checkpoint,
    read_figures,
    read_validation,
    report_member,
    write_checkpoint,
)
from cosettle_cache.training.plan import (
    RELEASED,
    Axis,
    Member,
    Stream,
    TrainPlan,
    make_members,
    make_stream,
    plan_stream,
)
from cosettle_cache.training.samples import JoinedSamples, find_not_finite
from cosettle_cache.training.trackers import Opening, TrackerKind, Tracking, find_tracker

#: Samples that an error names.
_LISTED = 8

#: Seconds between two checkpoints, at least, unless the run ends or is stopped.
CHECKPOINT_SECONDS = 60.0


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
    tracker: str = "auto",
) -> TrainReport:
    """Train projections on the samples of `stores` into the folder `out`, going on from the checkpoint there.

    Every combination of the values in `sweep` is trained at the same time, each in its own folder in `out`;
    the result is that of its single run. On one device a resumed run ends with the same bits as one that was
    never stopped. Setting `stop` ends after the step in hand (of several processes, and on a GPU, the one
    after it), with a checkpoint. `tracker` shows the figures meanwhile: a row of `trackers.TRACKERS`, `none`,
    or `auto`. Raises `InputError` for stores without shifted views or with tokens that are not finite,
    `FingerprintError` when `out` holds a run of other settings or other stores, or when the stores are of
    several encoders; `UsageError` when `out` holds anything but a training run, another process trains into
    it, or the tracker is not installed.
    """
    kind = find_tracker(tracker)
    stream, members = make_stream(stores, settings), make_members(settings, sweep)
    plan, origin = plan_stream(stream, members), stream.origin(members)
    check_precision(settings.precision, torch.device(device))
    with ExitStack() as stack:
        files = RunFiles(out)
        folders = [files.member(member.name) for member in members]
        # What is gone on with comes from the checkpoint: nothing need be read from the store for a start.
        goes_on = resume and files.checkpoint.exists()
        learners = _make_learners(stream, members, plan, device, goes_on=goes_on)
        with replicas.together():  # the others would wait for a first one that has failed
            if replicas.is_first:
                stack.enter_context(own_folder(out, "train"))
                _begin([files, *folders], resume)
        before = _restore(files.checkpoint, learners, origin)
        trainer, started = Trainer(learners, replicas), time.perf_counter()
        steps, samples, waited_s = _learn(
            stream, plan, trainer, files, before, progress or SILENT, stop or Event(), kind
        )
        seconds = time.perf_counter() - started
        replicas.wait()
        complete = before.step + steps == plan.n_steps
        digests = [
            projection_sha256(a.projection) if complete and a.diverged_at is None else "" for a in learners
        ]
        ends = [learner.diverged_at for learner in learners]
        report = TrainReport(
            folder=files.folder,
            epochs=plan.epochs,
            steps=steps,
            steps_before=before.step,
            samples=samples,
            read_bytes=samples * plan.sample_bytes,
            seconds=seconds,
            waiting_share=waited_s / seconds if seconds else 0.0,
            interrupted=not complete,
            members=tuple(map(report_member, folders, plan.members, ends, digests)),
            warnings=plan.warnings,
        )
        if replicas.is_first:
            _write(files, report, stream, members, plan, learners)
        return report


def _make_learners(
    stream: Stream, members: Sequence[Member], plan: TrainPlan, device: str, *, goes_on: bool
) -> list[Learner]:
    """Return a learner per member at its start; the tokens' components are computed once for all."""
    all_settings, learners = [member.settings for member in members], []
    principal = None
    if not goes_on and any(item.init == "pca" for item in all_settings):
        principal = linear_map(stream.stores[0], LinearSettings("pca"), device)
    for item in all_settings:
        init = plan.released_init if item.init == RELEASED else "identity"
        head = Projection(plan.sample_shape[-1], item.head, init=init, seed=item.seed)
        if principal is not None and item.init == "pca":
            head.linears[0].load_state_dict({"weight": principal.matrix, "bias": principal.bias})
        learners.append(Learner(head.to(device), item))
    return learners


def _begin(folders: Sequence[RunFiles], resume: bool) -> None:
    """Remove what an earlier run left, unless it is gone on with; the first folder is the run's.

    Raises `InputError` when a projection stands where no checkpoint says which run it is the end of.
    """
    if resume and folders[0].checkpoint.exists():
        return
    for folder in folders:
        if resume and folder.projection.exists():
            raise InputError(
                f"{folder.projection} is finished, but the checkpoint of its run is gone",
                wanted=folders[0].checkpoint,
                hint=START_OVER,
            )
    for folder in folders:
        folder.clear()


def _restore(path: Path, learners: Sequence[Learner], origin: dict[str, str]) -> Checkpoint:
    """Take up the checkpoint at `path`; without one, return that of a run before its first step.

    Raises `FingerprintError` listing every key in which it differs from this run's, and `CheckpointError` for
    states of another width or that are not finite.
    """
    if not path.exists():
        return Checkpoint(0, origin, [(0, 0)] * len(learners), [])
    checkpoint = read_checkpoint(path)
    if details := differing(origin, checkpoint.origin):
        raise FingerprintError(
            f"{path} was made with other settings or on another store", details=details, hint=START_OVER
        )
    for learner, state in zip(learners, checkpoint.learners, strict=True):
        try:
            learner.load_state(state)
        except (RuntimeError, KeyError, ValueError) as error:
            found = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{path} does not fit this run", found=found, hint=START_OVER) from error
        finite = all(item.isfinite().all() for item in learner.projection.parameters())
        if learner.diverged_at is None and not finite:
            raise CheckpointError(
                f"{path} holds weights that are not finite",
                hint="remove this folder to start over, with a lower base_lr",
            )
    return replace(checkpoint, origin=origin)


def _learn(
    stream: Stream,
    plan: TrainPlan,
    trainer: Trainer,
    files: RunFiles,
    before: Checkpoint,
    progress: Progress,
    stop: Event,
    tracker: TrackerKind | None,
) -> tuple[int, int, float]:
    """Go through the steps after `before`; return their number, their samples and seconds of waiting."""
    learners, replicas, samples = trainer.learners, trainer.replicas, stream.samples
    n_steps, n_samples, told, started, saved = 0, 0, False, time.perf_counter(), -math.inf
    with ExitStack() as stack:
        pages = _open_pages(stack, stream, plan, trainer, files, before, tracker)
        portions, device = stream.portions(before.step, replicas), learners[0].device
        ring = BatchRing(samples, portions, plan.sample_shape, stream.capacity(replicas), device=device)
        stack.enter_context(ring)
        n_left = (plan.n_steps - before.step) * plan.n_samples // plan.n_steps
        advance = stack.enter_context(counting(progress, n_left, "samples"))

        def settle(finished: Sequence[Finished]) -> None:
            nonlocal n_steps, n_samples, told
            for done in finished:
                _check_finite(samples, learners, done.step)
                _append(pages, "train", done.figures)
                n_steps, n_samples = n_steps + 1, n_samples + len(done.step.ids)
                line = next(item for item in done.figures if item is not None)
                speed = n_samples * plan.sample_bytes / (time.perf_counter() - started) / 1e9
                shown = {"loss": line.total, "cycle_accuracy": line.cycle_accuracy, "GB_per_s": speed}
                advance(len(done.step.ids), **shown)
                told = told or done.stopped

        for batch in ring:
            settle(trainer.feed(batch, stop.is_set()))
            step = batch.portion.step
            if not batch.portion.ends_step:
                continue
            validates, is_last = step.ends_epoch and plan.n_held_out > 0, step.number + 1 == plan.n_steps
            # Several processes stop together, after the step in which they tell each other.
            stopped = told if replicas.count > 1 else stop.is_set()
            due = step.ends_epoch or (step.number + 1) % stream.settings.checkpoint_every == 0
            due = due and time.perf_counter() - saved >= CHECKPOINT_SECONDS
            if validates or due or stopped or is_last or _is_kept(stream, step):
                settle(trainer.flush())
            if validates:
                _append(pages, "validation", trainer.validate(samples, stream.held_out.ids, step))
            _keep(files, step, stream, plan.members[: len(pages)], learners)
            if pages and (due or stopped or is_last):
                _save(files, step, before.origin, pages, learners)
                saved = time.perf_counter()
            if stopped:
                break
    return n_steps, n_samples, ring.waited_s


def _open_pages(
    stack: ExitStack,
    stream: Stream,
    plan: TrainPlan,
    trainer: Trainer,
    files: RunFiles,
    before: Checkpoint,
    tracker: TrackerKind | None,
) -> list[_Page]:
    """Open every member's figures, and its run of the tracker where steps are left; on the first replica."""
    tracking = Tracking(tracker if before.step < plan.n_steps else None)
    features, pages = [store.path for store in stream.stores], list[_Page]()
    members = zip(plan.members, before.n_bytes, trainer.learners, strict=True)
    for name, n_bytes, learner in members if trainer.replicas.is_first else ():
        page = stack.enter_context(closing(_Page(files.member(name), n_bytes, tracking)))
        config = {"features": features, **asdict(learner.settings)}
        tracking.open(Opening(page.files, before.step, files.folder.absolute().name, config))
        pages.append(page)
    return pages


def _save(
    files: RunFiles,
    step: Step,
    origin: Mapping[str, str],
    pages: Sequence[_Page],
    learners: Sequence[Learner],
) -> None:
    # The checkpoint counts lines of figures: these must be safely on disk before it.
    n_bytes = [page.sync() for page in pages]
    states = [learner.state() for learner in learners]
    write_checkpoint(files.checkpoint, Checkpoint(step.number + 1, origin, n_bytes, states))


def _is_kept(stream: Stream, step: Step) -> bool:
    every = stream.settings.keep_every
    return every > 0 and (step.number + 1) % every == 0


def _keep(
    files: RunFiles, step: Step, stream: Stream, names: Sequence[str], learners: Sequence[Learner]
) -> None:
    """Keep the heads of these members where the settings say so: the best is not always the last."""
    n_steps = step.number + 1
    for name, learner in zip(names, learners, strict=False):
        if _is_kept(stream, step) and learner.diverged_at is None:
            provenance = projection_provenance(stream.stores, learner.settings, n_steps=n_steps)
            save_projection(files.member(name).kept(n_steps), learner.projection, provenance)


class _Page:
    """Open files of a member's figures, `n_bytes` of each kept, and whoever shows the figures."""

    def __init__(self, files: RunFiles, n_bytes: tuple[int, int], tracking: Tracking) -> None:
        self.files, self._tracking = files, tracking
        make_folder(files.folder)
        logs = map(FiguresLog, (files.metrics, files.validation), n_bytes)
        self._logs = dict(zip(("train", "validation"), logs, strict=True))

    def append(self, group: str, figures: StepFigures | ValidationFigures) -> None:
        log = self._logs[group]
        again = log.n_again > 0
        log.append(figures)
        shown = {f"{group}/{name}": float(value) for name, value in asdict(figures).items() if name != "step"}
        self._tracking.log(self.files.folder, shown, figures.step, again=again)

    def sync(self) -> tuple[int, int]:
        return self._logs["train"].sync(), self._logs["validation"].sync()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        self._tracking.finish(self.files.folder)


def _append(
    pages: Sequence[_Page], group: str, figures: Sequence[StepFigures | ValidationFigures | None]
) -> None:
    """Write one line per member that still learns; there are no pages but on the first replica."""
    for page, item in zip(pages, figures, strict=False):
        if item is not None:
            page.append(group, item)


def _check_finite(samples: JoinedSamples, learners: Sequence[Learner], step: Step) -> None:
    """Raise `InputError` when tokens of a step are to blame for a divergence, or no learner is left."""
    if not any(learner.diverged_at == step.number for learner in learners):
        return
    where = f"at step {step.number} (epoch {step.epoch})"
    bad = find_not_finite(samples, step.ids)
    ids = bad or step.ids.tolist()
    names = [samples.name(sample) for sample in ids[:_LISTED]]
    names += [f"... and {len(ids) - _LISTED} more"] if len(ids) > _LISTED else []
    if bad:
        raise InputError(
            f"{len(bad)} samples of the batch {where} hold tokens that are not finite",
            details=names,
            hint="extract these clips again into another store",
        )
    if all(learner.diverged_at is not None for learner in learners):
        raise InputError(
            f"training diverged {where}: the loss or its gradient is not finite, the tokens are",
            details=names,
            hint="lower base_lr or raise the temperature; the last checkpoint is kept",
        )


def _write(
    files: RunFiles,
    report: TrainReport,
    stream: Stream,
    members: Sequence[Member],
    plan: TrainPlan,
    learners: Sequence[Learner],
) -> None:
    """Leave each member's picture and, when it is done, its projection; then the report of the run."""
    # With matplotlib, which takes a while: not before the start.
    from cosettle_cache.pictures.charts import curves_chart, save_chart

    folders = {member.name: files.member(member.name) for member in members}
    figures = {name: read_figures(mine.metrics) for name, mine in folders.items()}
    steps = {name: figure_columns(lines) for name, lines in figures.items()}
    held_out = {name: figure_columns(read_validation(mine.validation)) for name, mine in folders.items()}
    for found, member, learner in zip(report.members, members, learners, strict=True):
        name, mine = found.name, folders[found.name]
        if not found.last:
            continue
        n_tokens = plan.grid.n_tokens // member.settings.window**2
        chart = curves_chart({name: steps[name]}, {name: held_out[name]}, n_tokens)
        save_chart(chart, mine.curves, mine.curves_svg)
        if found.projection_sha256:
            documents = {"plan": plan.to_json(), "last_step": asdict(found.last)}
            provenance = projection_provenance(stream.stores, member.settings, **documents)
            save_projection(mine.projection, learner.projection, provenance)
    write_json(files.report, report.to_json())
    if members[0].name:
        rows = [{"member": name, **asdict(line)} for name, lines in figures.items() for line in lines]
        write_table(files.table, make_table(rows, CURVES_SCHEMA))
        save_chart(curves_chart(steps, held_out), files.curves, files.curves_svg)
        header, ranked = comparison(report.members)
        write_json(files.comparison, {"header": header, "rows": ranked})
