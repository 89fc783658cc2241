"""Stage one: manifest -> frames -> frozen encoder -> store, in this process or by many workers.

A plan, a manifest and an encoder come in; out go committed slots and a report. Several extractions of one
store share its slots: each is claimed just before it is worked on, and what a dead one left is taken over.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any
from uuid import uuid4

import torch

from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import FramesSettings, PairsSettings, package_versions
from cosettle_cache.core.types import Fingerprint, Manifest, Video
from cosettle_cache.encoders import Backbone, load_backbone
from cosettle_cache.extraction.images import views_rule
from cosettle_cache.extraction.pipeline import Clock, FilledSlot, Filler
from cosettle_cache.store import StoreWriter, open_store, spec_version
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.manifest import manifest_digest

#: Patch tokens per forward pass: 16 images of 224 pixels on a CPU, 128 on a GPU.
BATCH_TOKENS = {"cpu": 16 * 196, "cuda": 128 * 196}
MAX_DECODE_THREADS = 4
#: How often slots that others hold are looked at again.
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds per stage: `decode` and `write` are thread time, the others the encoder's own.

    `wait_images` is time without an image to encode, `wait_writer` time without a free slot buffer (serial
    runs only). Over several workers all but `total` are sums.
    """

    decode: float
    encode: float
    write: float
    wait_images: float
    wait_writer: float
    total: float


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What one run of `extract` did; `failures` maps video ids to reasons, for this run's slots.

    `n_slots_elsewhere` were committed by other extractions meanwhile; `n_processes` had a part in `n_slots`.
    """

    n_slots: int
    n_slots_before: int
    n_slots_elsewhere: int
    n_encodings: int
    n_processes: int
    failures: Mapping[str, str]
    seconds: StageSeconds
    interrupted: bool

    @property
    def images_per_s(self) -> float:
        """Encodings per second of wall time."""
        return self.n_encodings / self.seconds.total if self.seconds.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "images_per_s": self.images_per_s}


@dataclass(frozen=True, slots=True)
class ExtractSpec:
    """What a worker process needs to fill slots of a store that is there; paths are the worker's own.

    `device`, `batch_size` and `decode_threads` None: the worker's choice. `run` tells two extractions apart.
    """

    store: str
    data_root: str
    settings: PairsSettings | FramesSettings
    backbone: str
    weights: str | None = None
    heads: int | None = None
    precision: str = "fp32"
    compiled: bool = False
    device: str | None = None
    batch_size: int | None = None
    decode_threads: int | None = None
    slot_encodings: int | None = None
    dtype: str = "float16"
    codec: str = "none"
    retry_failed: bool = False
    red_std: float | None = None
    run: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What a worker process says about a slot; `filled` is None when another writer has it, or had it."""

    process: str
    filled: FilledSlot | None
    seconds: Mapping[str, float]


#: Hands items to workers and yields each with its result, as they get ready (`distributed.Cluster.run`).
Runner = Callable[[Callable[[int], SlotReport], Iterable[int]], Iterator[tuple[int, SlotReport]]]


def make_fingerprint(backbone: Backbone, plan: Plan, manifest: Manifest) -> Fingerprint:
    """Return everything that decides the tokens of the store about to be written."""
    layout = plan.arrays[0]
    return Fingerprint(
        spec_version=spec_version(layout.dtype, layout.codec),
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        token_rule=backbone.token_rule,
        position_rule=backbone.position_rule,
        preprocessing=views_rule(plan, backbone.mean, backbone.std),
        plan=plan.to_json(),
        dtype=layout.dtype,
        precision=backbone.precision,
        manifest_digest=manifest_digest(manifest),
        versions=package_versions(),
    )


def default_batch(plan: Plan, device: str) -> int:
    """Return how many images of the plan's largest grid make one forward pass on a device."""
    tokens = max(layout.grid.n_tokens for layout in plan.arrays)
    return max(1, BATCH_TOKENS[device.partition(":")[0]] // tokens)


def extract(
    plan: Plan,
    manifest: Manifest,
    data_root: Path,
    backbone: Backbone,
    writer: StoreWriter,
    *,
    batch_size: int = 16,
    decode_threads: int = 2,
    retry_failed: bool = False,
    progress: Progress = SILENT,
    stop: Event | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ExtractReport:
    """Encode every slot of `plan` that is not committed yet; `stop` ends after the slot in hand.

    With `retry_failed` slots that list failed videos are encoded again as well. Slots that other writers
    hold are waited for, which `note` hears of once, and taken over if they are given up.

    A video that cannot be decoded is recorded in the store and in the report and does not end the run.
    Raises `OutputError` when the store cannot be written; committed slots stay.
    """
    work = _Work(plan, writer, retry_failed, progress, stop or Event(), note)
    with ThreadPoolExecutor(decode_threads, "decode") as decoders:
        filler = Filler(
            plan,
            _by_id(manifest),
            data_root,
            backbone,
            writer,
            decoders,
            batch_size,
            encoded=progress.advance,
            clock=work.clock,
        )
        return work.run(partial(_fill_here, filler, work))


def extract_across(
    run: Runner,
    spec: ExtractSpec,
    plan: Plan,
    writer: StoreWriter,
    *,
    progress: Progress = SILENT,
    stop: Event | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ExtractReport:
    """Like `extract`, with the slots handed to worker processes by `run`; `stop` must be the runner's too.

    `writer` is this process's own, of the store that `spec` names. Errors of a worker are raised here.
    """
    work = _Work(plan, writer, spec.retry_failed, progress, stop or Event(), note)
    return work.run(partial(_fill_across, run, spec, work))


def fill_slot(spec: ExtractSpec, index: int) -> SlotReport:
    """In a worker: fill slot `index`, unless somebody has it; the encoder is loaded with the first slot."""
    process = f"{platform.node()}:{os.getpid()}"
    filler = _open_once(spec)
    if not filler.writer.claim(index, retry_failed=spec.retry_failed):
        return SlotReport(process, None, {})
    clock = Clock()
    try:
        filled = replace(filler, clock=clock).fill_one(index)
    finally:
        filler.writer.release(index)
    return SlotReport(process, filled, dict(clock.seconds))


@dataclass(slots=True)
class _Work:
    """The slots of one run, gone over again and again until all are committed, by us or by others."""

    plan: Plan
    writer: StoreWriter
    retry_failed: bool
    progress: Progress
    stop: Event
    note: Callable[[str], object]
    clock: Clock = field(default_factory=Clock)
    processes: set[str] = field(default_factory=set)
    filled: list[FilledSlot] = field(default_factory=list)
    n_elsewhere: int = 0

    def run(self, fill: Callable[[Sequence[int]], Iterator[FilledSlot]]) -> ExtractReport:
        """Return the report of `fill`, which goes over slots once and skips those that others hold."""
        todo = self.writer.todo(retry_failed=self.retry_failed)
        self.progress.start(self._n_images(todo), "images")
        try:
            with self.clock.stage("total"):
                left = self._go_over(todo, fill)
        finally:
            self.progress.finish()
        return ExtractReport(
            n_slots=len(self.filled),
            n_slots_before=self.plan.n_slots - len(todo),
            n_slots_elsewhere=self.n_elsewhere,
            n_encodings=sum(slot.n_encodings for slot in self.filled),
            n_processes=len(self.processes) or 1,
            failures={key: value for slot in self.filled for key, value in slot.failures.items()},
            seconds=StageSeconds(
                **{item.name: self.clock.seconds[item.name] for item in fields(StageSeconds)}
            ),
            interrupted=bool(left),
        )

    def _go_over(
        self, todo: Sequence[int], fill: Callable[[Sequence[int]], Iterator[FilledSlot]]
    ) -> Sequence[int]:
        """Return the slots that are left when all is done, or at `stop`."""
        left, waiting = todo, False
        while left:
            filled = list(fill(left))
            self.filled += filled
            left = self._still_todo(left, {slot.index for slot in filled})
            if self.stop.is_set():
                break
            if left and not filled:
                if not waiting:
                    self.note(f"waiting for another extraction, which holds {len(left)} slots")
                waiting = True
                self.stop.wait(POLL_S)
        return left

    def _still_todo(self, left: Sequence[int], filled: set[int]) -> list[int]:
        open_slots = set(self.writer.todo(retry_failed=self.retry_failed))
        elsewhere = [index for index in left if index not in filled and index not in open_slots]
        self.n_elsewhere += len(elsewhere)
        self.progress.advance(self._n_images(elsewhere))
        return [index for index in left if index not in filled and index in open_slots]

    def _n_images(self, slots: Sequence[int]) -> int:
        return sum(self.plan.slot_length(index) for index in slots)


def _fill_here(filler: Filler, work: _Work, slots: Sequence[int]) -> Iterator[FilledSlot]:
    """Yield the slots that nobody else holds; each is claimed just before its first image is decoded."""
    claimed: list[int] = []

    def claim() -> Iterator[int]:
        for index in slots:
            if work.writer.claim(index, retry_failed=work.retry_failed):
                claimed.append(index)
                yield index

    try:
        yield from filler.fill(claim(), work.stop)
    finally:
        # After an error or an interrupt some are prepared and not committed.
        for index in claimed:
            work.writer.release(index)


def _fill_across(run: Runner, spec: ExtractSpec, work: _Work, slots: Sequence[int]) -> Iterator[FilledSlot]:
    for _, report in run(partial(fill_slot, spec), slots):
        work.clock.add(report.seconds)
        if report.filled is not None:
            work.processes.add(report.process)
            work.progress.advance(report.filled.n_encodings)
            yield report.filled


def _by_id(manifest: Manifest) -> dict[str, Video]:
    return {video.video_id: video for video in manifest}


#: In a worker: what the last spec opened. One is kept, for a worker may outlive many extractions.
_opened: dict[ExtractSpec, Filler] = {}
_opening = Lock()


def _open_once(spec: ExtractSpec) -> Filler:
    with _opening:
        if spec not in _opened:
            _opened.clear()
            _opened[spec] = _open(spec)
        return _opened[spec]


def _open(spec: ExtractSpec) -> Filler:
    """Return encoder, plan and writer of a spec; raise where they would not give the store's own tokens."""
    data_root = Path(spec.data_root)
    if not data_root.is_dir():
        raise InputError(
            f"{data_root} is not a folder on {platform.node()}",
            wanted="the data root under the same path on every worker",
        )
    manifest = open_store(spec.store).manifest
    device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(
        spec.backbone,
        weights=spec.weights,
        device=device,
        precision=spec.precision,
        heads=spec.heads,
        compiled=spec.compiled,
        red_std=spec.red_std,
    )
    plan = make_plan(
        manifest,
        spec.settings,
        patch=backbone.patch,
        dim=backbone.dim,
        slot_encodings=spec.slot_encodings,
        dtype=spec.dtype,
        codec=spec.codec,
    )
    fingerprint = make_fingerprint(backbone, plan, manifest)
    writer = StoreWriter.create_or_resume(spec.store, plan.arrays, fingerprint, manifest, {})
    threads = spec.decode_threads or min(MAX_DECODE_THREADS, len(os.sched_getaffinity(0)))
    return Filler(
        plan,
        _by_id(manifest),
        data_root,
        backbone,
        writer,
        ThreadPoolExecutor(threads, "decode"),
        spec.batch_size or default_batch(plan, device),
    )
