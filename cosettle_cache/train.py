"""Stage two, training: Co-Settle's projection on the samples of a pairs store, with the released schedule.

A store and settings come in; a folder with the projection, the figures of every step, their curves and a
checkpoint goes out. One thread reads ahead while steps run; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from cosettle_cache.config import TrainSettings, digest, package_versions, settings_json
from cosettle_cache.console import SILENT, Progress
from cosettle_cache.errors import InputError
from cosettle_cache.feeding import Batch, BatchRing, ViewOrder, make_steps
from cosettle_cache.files import make_folder
from cosettle_cache.losses import check_window, find_regularizer
from cosettle_cache.pictures.curves import write_curves
from cosettle_cache.projection import Projection, find_head, projection_sha256, released_init, save_projection
from cosettle_cache.run_state import (
    Checkpoint,
    FiguresLog,
    RunFiles,
    StepFigures,
    check_origin,
    flat_text,
    read_checkpoint,
    read_figures,
    write_checkpoint,
)
from cosettle_cache.store import FeatureStore, SlotState
from cosettle_cache.tables import write_json
from cosettle_cache.trainer import Trainer
from cosettle_cache.types import Grid, PlanKind

#: Tokens of a sample over channels in the released setting: what the default separability weight is made for.
RELEASED_TOKENS_PER_DIM = 588 / 768


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do; `n_dropped` counts samples that fill no batch in the epochs that pass them by."""

    n_clips: int
    n_views: int
    epochs: int
    batch_size: int
    n_steps: int
    n_samples: int
    n_dropped: int
    grid: Grid
    dim: int
    lr: float
    init: str
    read_bytes: int
    warnings: tuple[str, ...]

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """Encodings, rows, columns and channels of a sample."""
        return (3, self.grid.rows, self.grid.cols, self.dim)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"grid": str(self.grid), "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did. `steps`, `samples` and `seconds` are this call's; `first` and `last` the whole run's.

    `waiting_share` is the share of `seconds` without a batch to work on; `projection_sha256` is empty until
    the run is complete.
    """

    folder: Path
    epochs: int
    steps: int
    steps_before: int
    samples: int
    first: StepFigures | None
    last: StepFigures | None
    seconds: float
    waiting_share: float
    interrupted: bool
    projection_sha256: str
    warnings: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Samples per second of this call."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def first_cycle_accuracy(self) -> float:
        """Cycle accuracy of the first step, before any update."""
        return self.first.cycle_accuracy if self.first else float("nan")

    @property
    def last_cycle_accuracy(self) -> float:
        """Cycle accuracy of the last step."""
        return self.last.cycle_accuracy if self.last else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"folder": str(self.folder), "samples_per_s": self.samples_per_s}


def make_train_plan(store: FeatureStore, settings: TrainSettings) -> TrainPlan:
    """Return what `train` would do; raise what it would raise before its first step."""
    order = _make_order(store, settings)
    layout = store.arrays[0]
    find_head(settings.head)
    find_regularizer(settings.regularizer)
    check_window(layout.grid.rows, layout.grid.cols, settings.window)
    sizes = [[len(ids) for ids in order(epoch)] for epoch in range(settings.epochs)]
    n_samples = sum(map(sum, sizes))
    n_views = len(order.ids_by_view)
    visited = sum(len(order.ids_by_view[epoch % n_views]) for epoch in range(settings.epochs))
    return TrainPlan(
        n_clips=max(map(len, order.ids_by_view)),
        n_views=n_views,
        epochs=settings.epochs,
        batch_size=max(map(max, sizes)),
        n_steps=sum(map(len, sizes)),
        n_samples=n_samples,
        n_dropped=visited - n_samples,
        grid=layout.grid,
        dim=layout.n_channels,
        lr=settings.lr,
        init=released_init(store.fingerprint.backbone),
        read_bytes=n_samples * 3 * layout.encoding_bytes,
        warnings=tuple(_warnings(store, settings, order)),
    )


def train(
    store: FeatureStore,
    settings: TrainSettings,
    out: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    resume: bool = True,
    stop: Event | None = None,
) -> TrainReport:
    """Train a projection on `store` into the folder `out`, going on from the checkpoint there if `resume`.

    On one device a resumed run ends with the same bits as one that was never stopped. Setting `stop` ends
    after the step in hand, with a checkpoint. Raises `InputError` for a store without shifted views or with
    tokens that are not finite, `FingerprintError` when `out` holds a run of other settings or another store.
    """
    plan = make_train_plan(store, settings)
    files = RunFiles(make_folder(out))
    if not resume:
        files.clear()
    projection = Projection(plan.dim, settings.head, init=plan.init, seed=settings.seed).to(device)
    trainer = Trainer(projection, settings, _SampleNames(store))
    run = _Run(
        store, plan, files, trainer, _make_origin(store, settings), progress or SILENT, stop or Event()
    )
    return run.run()


@dataclass(slots=True)
class _Run:
    """One call of `train`: from the checkpoint, if there is one, to the end or to where it was stopped."""

    store: FeatureStore
    plan: TrainPlan
    files: RunFiles
    trainer: Trainer
    origin: Mapping[str, str]
    progress: Progress
    stop: Event
    steps_before: int = 0
    steps: int = 0
    samples: int = 0

    def run(self) -> TrainReport:
        n_metrics_bytes = self._restore()
        started = time.perf_counter()
        with FiguresLog(self.files.metrics, n_metrics_bytes) as log, self._ring() as ring:
            self.progress.start(self.plan.n_steps - self.steps_before, "steps")
            try:
                self._steps(ring, log)
            finally:
                self.progress.finish()
        return self._finish(time.perf_counter() - started, ring.waited_s)

    def _restore(self) -> int:
        """Take up the checkpoint, if there is one; return how much of the figures it covers."""
        if not self.files.checkpoint.exists():
            self.files.clear()
            return 0
        checkpoint = read_checkpoint(self.files.checkpoint)
        check_origin(self.files.checkpoint, self.origin, checkpoint.origin)
        self.trainer.projection.load_state_dict(checkpoint.projection)
        self.trainer.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.steps_before = checkpoint.step
        return checkpoint.n_metrics_bytes

    def _ring(self) -> BatchRing:
        order = _make_order(self.store, self.trainer.settings)
        steps = make_steps(order, self.plan.epochs, self.steps_before)
        pin = next(self.trainer.projection.parameters()).is_cuda
        return BatchRing(self.store, steps, self.plan.sample_shape, self.plan.batch_size, pin=pin)

    def _steps(self, ring: BatchRing, log: FiguresLog) -> None:
        for batch in ring:
            self._step(batch, log)
            if self.stop.is_set():
                self._save(log)
                return

    def _step(self, batch: Batch, log: FiguresLog) -> None:
        figures = self.trainer.step(batch)
        log.append(figures)
        self.steps += 1
        self.samples += len(batch.samples)
        self.progress.advance(1, loss=figures.total, cycle_accuracy=figures.cycle_accuracy)
        due = (batch.step.number + 1) % self.trainer.settings.checkpoint_every == 0
        if due or batch.step.ends_epoch:
            self._save(log)

    def _save(self, log: FiguresLog) -> None:
        checkpoint = Checkpoint(
            step=self.steps_before + self.steps,
            origin=self.origin,
            n_metrics_bytes=log.sync(),
            projection=self.trainer.projection.state_dict(),
            optimizer=self.trainer.optimizer.state_dict(),
        )
        write_checkpoint(self.files.checkpoint, checkpoint)

    def _finish(self, seconds: float, waited_s: float) -> TrainReport:
        figures = read_figures(self.files.metrics)
        complete = self.steps_before + self.steps == self.plan.n_steps
        window = self.trainer.settings.window
        if figures:
            write_curves(self.files.curves, figures, self.plan.grid.n_tokens // window**2)
        if complete:
            provenance = _provenance(self.store, self.plan, self.trainer.settings, figures[-1])
            save_projection(self.files.projection, self.trainer.projection, provenance)
        report = TrainReport(
            folder=self.files.folder,
            epochs=self.plan.epochs,
            steps=self.steps,
            steps_before=self.steps_before,
            samples=self.samples,
            first=figures[0] if figures else None,
            last=figures[-1] if figures else None,
            seconds=seconds,
            waiting_share=waited_s / seconds if seconds else 0.0,
            interrupted=not complete,
            projection_sha256=projection_sha256(self.trainer.projection) if complete else "",
            warnings=self.plan.warnings,
        )
        write_json(self.files.report, report.to_json())
        return report


class _SampleNames:
    """Names a sample of a store by its clip and view set."""

    def __init__(self, store: FeatureStore) -> None:
        self._table = store.sample_table

    def __call__(self, sample: int) -> str:
        row = int(np.searchsorted(self._table["sample"].to_numpy(), sample))
        return f"sample {sample}: {self._table['video_id'][row]}, view set {self._table['view'][row]}"


def _make_order(store: FeatureStore, settings: TrainSettings) -> ViewOrder:
    if store.plan_kind is not PlanKind.PAIRS:
        raise InputError(
            "training needs samples with a shifted view, and this store has none",
            wanted="a store of the pairs plan",
            found=f"a store of the {store.plan_kind} plan",
            hint="cosettle-cache extract --plan pairs makes one",
        )
    samples = store.sample_table["sample"].to_numpy().astype(np.int64)
    views = store.sample_table["view"].to_numpy()
    if not len(samples):
        raise InputError("this store holds no samples yet", hint="run the extract command to its end")
    by_view = tuple(samples[views == view] for view in np.unique(views))
    return ViewOrder(by_view, settings.batch_size, settings.seed)


def _warnings(store: FeatureStore, settings: TrainSettings, order: ViewOrder) -> Iterator[str]:
    layout = store.arrays[0]
    ratio = 3 * layout.grid.n_tokens / layout.n_channels / RELEASED_TOKENS_PER_DIM
    if settings.regularizer == "kl" and abs(ratio - 1) > 0.01:
        yield (
            f"the separability weight acts {ratio:.3g} times as strongly on these tokens as on the released "
            f"588 of 768 channels; {settings.separability_weight / ratio:.3g} would act as "
            f"{settings.separability_weight:.3g} did there"
        )
    smallest = min(map(len, order.ids_by_view))
    if smallest < settings.batch_size:
        yield (
            f"a view set has {smallest} samples, fewer than the batch of {settings.batch_size}: each is one "
            f"step, {settings.epochs} steps in all, at the learning rate of the full batch"
        )
    if settings.epochs <= settings.warmup_epochs:
        yield f"the warm-up of {settings.warmup_epochs:g} epochs is never left in {settings.epochs} epochs"
    states = store.slot_states()
    todo, failed = states.get(SlotState.TODO, 0), states.get(SlotState.FAILED, 0)
    if todo or failed:
        yield f"the store is not complete: {todo} slots to do, {failed} with failed clips"


def _make_origin(store: FeatureStore, settings: TrainSettings) -> dict[str, str]:
    """Return what decides the parameters of a run; how often it saves does not."""
    decisive = {name: value for name, value in settings_json(settings).items() if name != "checkpoint_every"}
    samples = {"n": len(store.sample_ids), "digest": digest(store.sample_ids.tolist())}
    return flat_text({"settings": decisive, "store": store.fingerprint.to_json(), "samples": samples})


def _provenance(
    store: FeatureStore, plan: TrainPlan, settings: TrainSettings, last: StepFigures
) -> dict[str, str]:
    return {
        "backbone": store.fingerprint.backbone,
        "weights_sha256": store.fingerprint.weights_sha256,
        "manifest_digest": store.fingerprint.manifest_digest,
        "store_digest": digest(store.fingerprint.to_json()),
        "settings": json.dumps(settings_json(settings), sort_keys=True),
        "plan": json.dumps(plan.to_json(), sort_keys=True),
        "last_step": json.dumps(asdict(last), sort_keys=True),
        "versions": json.dumps(package_versions(), sort_keys=True),
    }
