"""Videos and a frozen encoder in, a store of patch tokens out, by this process or by many workers.

Several extractions share a store's slots: each is claimed just in time, and those of dead ones taken over.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from os import getpid
from pathlib import Path
from threading import Event, Lock
from typing import Any
from uuid import uuid4

import torch

from cosettle_cache.core.cluster import work_on
from cosettle_cache.core.console import SILENT, Progress, Talk, counting, interruptible
from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.core.files import is_url
from cosettle_cache.core.parallel import Run, pick_device, share_of_cores
from cosettle_cache.core.precision import device_versions
from cosettle_cache.core.settings import (
    EncoderSettings,
    ExtractSettings,
    FramesSettings,
    PairsSettings,
    package_versions,
)
from cosettle_cache.core.types import Fingerprint, Manifest
from cosettle_cache.encoders import Backbone, describe_backbone, load_backbone
from cosettle_cache.encoders.registry import split_name, weights_file
from cosettle_cache.extraction.images import views_rule
from cosettle_cache.extraction.layers import LayerWriters, SlotWriter
from cosettle_cache.extraction.pipeline import Clock, FilledSlot, Filler
from cosettle_cache.store import StoreWriter, check_writable, open_store, spec_version
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.content import is_other, look_again, name_changed, present_row
from cosettle_cache.videos.manifest import manifest_digest

#: Patch tokens per forward pass: 16 images of 224 pixels on a CPU, 128 on a GPU.
BATCH_TOKENS = {"cpu": 16 * 196, "cuda": 128 * 196}
#: Cores that decode threads leave to the encoder, its copies and the writers.
OTHER_CORES = 2
#: Slots written at a time at most: one thread, which waits for the disk, writes some 2,000 images/s.
MAX_WRITERS = 3
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
    """What one extraction did; `failures` maps video ids to reasons.

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
class StoreJob:
    """One store to fill: where (path or URL), the folder of the media, the encoder, which views, and how.

    Workers receive it with absolute paths; `run` distinguishes two extractions with equal settings.
    """

    out: str
    data_root: Path
    encoder: EncoderSettings
    views: PairsSettings | FramesSettings
    settings: ExtractSettings = field(default_factory=ExtractSettings)
    run: str = field(default_factory=lambda: uuid4().hex)

    def plan(self, manifest: Manifest) -> Plan:
        """Return the plan of the store; reads at most the shapes of the weights."""
        check_writable(self.out)
        encoder = self.encoder
        info = describe_backbone(encoder.backbone, weights=encoder.weights, heads=encoder.heads)
        return make_plan(
            manifest,
            self.views,
            patch=info.patch,
            dim=info.dim,
            slot_encodings=self.settings.slot_encodings,
            dtype=self.settings.dtype,
            codec=self.settings.codec,
        )

    @property
    def stores(self) -> tuple[str, ...]:
        """Paths or URLs of what is filled: one store, or where several layers are named one for each."""
        _, layers, _ = split_name(self.encoder.backbone)
        stem, dot, suffix = self.out.rstrip("/").rpartition(".zarr")
        before, after = (stem, dot + suffix) if dot else (suffix, "")
        return tuple(f"{before}-layer{layer}{after}" for layer in layers) if len(layers) > 1 else (self.out,)

    def load_encoder(self, device: str) -> Backbone:
        """Return the encoder on a device."""
        options = {**asdict(self.encoder), "device": device}
        return load_backbone(options.pop("backbone"), **options)

    def open_writer(
        self, plan: Plan, manifest: Manifest, backbone: Backbone, device: Mapping[str, str] | None = None
    ) -> SlotWriter:
        """Create the store, or open the one that was made with the same settings; one per layer.

        `device` is that of the processes that will encode (`device_versions`), the encoder's own by default.
        """
        if len(self.stores) > 1:
            each = [replace(self, out=path) for path in self.stores]
            layers = [backbone.one_layer(layer) for layer in backbone.layers]
            pairs = zip(each, layers, strict=True)
            return LayerWriters([job._open_writer(plan, manifest, one, device) for job, one in pairs])
        return self._open_writer(plan, manifest, backbone, device)

    def _open_writer(
        self, plan: Plan, manifest: Manifest, backbone: Backbone, device: Mapping[str, str] | None
    ) -> StoreWriter:
        encoder = {
            "name": backbone.name,
            "weights_source": backbone.weights_source,
            "weights_argument": self.encoder.weights,
            "heads_argument": self.encoder.heads,
            "patch": backbone.patch,
            "dim": backbone.dim,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        }
        fingerprint = make_fingerprint(backbone, plan, manifest)
        if device is not None:
            fingerprint = replace(fingerprint, versions={**fingerprint.versions, **device})
        return StoreWriter.create_or_resume(self.out, plan.arrays, fingerprint, manifest, encoder)


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What a worker says of a slot; `filled` is None where another writer has it, `model` the GPU if any."""

    process: str
    filled: FilledSlot | None
    seconds: Mapping[str, float]
    notes: Sequence[str] = ()
    model: str = ""


def extract_store(job: StoreJob, plan: Plan, manifest: Manifest, talk: Talk) -> ExtractReport:
    """Fill the store of a job, resuming what is there; the report's failures are those of the whole store.

    The first Ctrl-C ends the extraction after the slots in hand. Raises `OutputError` when the store cannot
    be written; committed slots stay. Raises `FingerprintError` for media other than the store was made from.
    """
    settings = job.settings
    progress = talk.progress("compare media")
    manifest, changed = look_again(manifest, job.data_root, read=settings.verify_media, progress=progress)
    if changed:
        talk.warn(name_changed("the manifest", changed))
    if settings.workers or settings.scheduler:
        report = _extract_with_workers(job, plan, manifest, talk)
    else:
        device = pick_device(job.encoder.device)
        backbone = job.load_encoder(device)
        _name_passed_over(backbone, job.encoder.weights, talk)
        # A recipe of several commands is one process: the store's lock goes with the job.
        with (
            closing(job.open_writer(plan, manifest, backbone)) as writer,
            interruptible(talk, "slot") as stop,
        ):
            _check_store(job, plan, manifest, writer)
            report = extract(
                plan,
                manifest,
                job.data_root,
                backbone,
                writer,
                batch_size=settings.batch or default_batch(plan, device),
                decode_threads=settings.decode_threads or decode_threads(),
                retry_failed=settings.retry_failed,
                progress=talk.progress("extract"),
                stop=stop,
                note=talk.note,
            )
    return replace(report, failures=dict(open_store(job.stores[0]).failures))


def extract(
    plan: Plan,
    manifest: Manifest,
    data_root: Path,
    backbone: Backbone,
    writer: SlotWriter,
    *,
    batch_size: int = 16,
    decode_threads: int = 1,
    retry_failed: bool = False,
    progress: Progress = SILENT,
    stop: Event | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ExtractReport:
    """Encode every slot of `plan` that is not committed yet; `stop` ends after the slot in hand.

    With `retry_failed` slots that list failed videos are encoded again as well. Slots that other writers
    hold are waited for, which `note` reports once, and taken over if they are given up.

    A video that cannot be decoded is recorded in the store and in the report and does not end the run.
    Raises `OutputError`, and `UsageError` for a device without room for one image; committed slots stay.
    """
    clock, stop = Clock(), stop or Event()
    filler = Filler(
        plan,
        {video.video_id: video for video in manifest},
        data_root,
        backbone,
        writer,
        batch_size,
        decode_threads,
        max(1, min(MAX_WRITERS, share_of_cores(1) // 4)),
        progress.advance,
        note,
        clock,
    )
    fill = partial(filler.fill, stop=stop, retry_failed=retry_failed)
    return _fill_slots(fill, plan, writer, retry_failed, clock, progress, stop, note)


def extract_across(
    run: Run,
    job: StoreJob,
    plan: Plan,
    writer: SlotWriter,
    *,
    progress: Progress = SILENT,
    stop: Event | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ExtractReport:
    """Like `extract`, by workers through `run` (of the same `stop`); their errors are raised here."""
    clock, processes, models = Clock(), set[str](), set[str]()

    def fill(slots: Sequence[int]) -> Iterator[FilledSlot]:
        for _, report in run(partial(fill_slot, job), slots):
            clock.add(report.seconds)
            for line in report.notes:
                note(f"{report.process}: {line}")
            if report.filled is not None:
                processes.add(report.process)
                if models and report.model not in models:
                    cards = " and ".join(sorted({*models, report.model}))
                    note(f"slots are filled on {cards}: tokens may differ in their last bits")
                models.add(report.model)
                progress.advance(report.filled.n_encodings)
                yield report.filled

    retry_failed = job.settings.retry_failed
    report = _fill_slots(fill, plan, writer, retry_failed, clock, progress, stop or Event(), note)
    return replace(report, n_processes=len(processes) or 1)


def fill_slot(job: StoreJob, index: int) -> SlotReport:
    """In a worker: fill slot `index`, unless somebody has it; the encoder is loaded with the first slot."""
    process = f"{platform.node()}:{getpid()}"
    with _opening:
        if job not in _opened:
            _opened.clear()
            _opened[job] = _open(job)
        filler = _opened[job]
    if not filler.writer.claim(index, retry_failed=job.settings.retry_failed):
        return SlotReport(process, None, {})
    clock, notes = Clock(), list[str]()
    try:
        filled = replace(filler, clock=clock, note=notes.append).fill_one(index)
    finally:
        filler.writer.release(index)
    device = filler.backbone.device
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return SlotReport(process, filled, dict(clock.seconds), notes, model)


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
        versions={**package_versions(), **device_versions(str(backbone.device))},
    )


def default_batch(plan: Plan, device: str) -> int:
    """Return how many images of the plan's largest grid make one forward pass on a device."""
    tokens = max(layout.grid.n_tokens for layout in plan.arrays)
    return max(1, BATCH_TOKENS[device.partition(":")[0]] // tokens)


def decode_threads(n_processes: int = 1) -> int:
    """Return how many threads prepare images in each of so many processes here."""
    return max(1, share_of_cores(n_processes) - OTHER_CORES)


def _extract_with_workers(job: StoreJob, plan: Plan, manifest: Manifest, talk: Talk) -> ExtractReport:
    settings, weights = job.settings, job.encoder.weights
    with (
        interruptible(talk, "slots") as stop,
        work_on(settings.workers, settings.scheduler, job.encoder.device, stop=stop, note=talk.note) as run,
    ):
        assert run is not None
        # Only a worker knows where it computes; the first one's device is the store's, and others compare.
        devices = [device for _, device in run(_worker_device, [job.encoder.device])]
        if not devices:  # interrupted before a worker came
            raise KeyboardInterrupt
        # Loaded here only to say what the tokens depend on; workers load their own, and compare.
        backbone = job.load_encoder("cpu")
        _name_passed_over(backbone, weights, talk)
        with closing(job.open_writer(plan, manifest, backbone, devices[0])) as writer:
            _check_store(job, plan, manifest, writer)
            # Absolute paths: workers may have been started anywhere.
            if weights is not None and weights_file(weights)[0].is_file():
                weights = str(Path(weights).absolute())
            if settings.workers and settings.decode_threads is None:
                settings = replace(settings, decode_threads=decode_threads(settings.workers))
            job = replace(
                job,
                out=job.out if is_url(job.out) else str(Path(job.out).absolute()),
                data_root=job.data_root.absolute(),
                encoder=replace(job.encoder, weights=weights),
                settings=settings,
            )
            progress = talk.progress("extract")
            return extract_across(run, job, plan, writer, progress=progress, stop=stop, note=talk.note)


def _check_store(job: StoreJob, plan: Plan, manifest: Manifest, writer: SlotWriter) -> None:
    """Raise `FingerprintError` when the tokens of a video were made from other media than the manifest's.

    Of a video without tokens (not encoded yet, or to be tried again) the store learns what there is now.
    """
    store = open_store(job.stores[0])
    if store.manifest.videos == manifest.videos:
        return
    rows = [
        (old, new if new.content else present_row(old, job.data_root))
        for old, new in zip(store.manifest, manifest, strict=True)
    ]
    changed = {new.video_id: new for old, new in rows if is_other(old, new)}
    if not changed:
        return
    committed = set(range(plan.n_slots)).difference(writer.todo())
    encoded = {item.video_id for index in committed for item in plan.slot(index).encodings}
    if others := [video_id for video_id in changed if video_id in encoded - store.failures.keys()]:
        hint = "bring them back, remove the store, or write to another one with --out"
        raise FingerprintError(name_changed(store.path, others), hint=hint)
    failed = set[str]() if job.settings.retry_failed else store.failures.keys()
    videos = [old if old.video_id in failed else changed.get(old.video_id, old) for old in store.manifest]
    writer.replace_manifest(replace(store.manifest, videos=tuple(videos)))


def _name_passed_over(backbone: Backbone, weights: str | None, talk: Talk) -> None:
    others = backbone.weights_passed_over
    if weights is not None and others:
        talk.warn(f"{weights} also holds weights under {', '.join(others)}: --weights {weights}#{others[0]}")


def _worker_device(asked: str | None) -> dict[str, str]:
    return device_versions(pick_device(asked))


def _fill_slots(
    fill: Callable[[Sequence[int]], Iterator[FilledSlot]],
    plan: Plan,
    writer: SlotWriter,
    retry_failed: bool,
    clock: Clock,
    progress: Progress,
    stop: Event,
    note: Callable[[str], object],
) -> ExtractReport:
    """Call `fill`, which skips slots that others hold, until all are committed, by us or by others."""
    todo = left = writer.todo(retry_failed=retry_failed)
    filled: list[FilledSlot] = []
    n_elsewhere, waiting = 0, False
    n_images = sum(map(plan.slot_length, todo))
    with counting(progress, n_images, "images") as advance, clock.stage("total"):
        while left:
            ours = list(fill(left))
            filled += ours
            others = set(left).difference(slot.index for slot in ours)
            left = sorted(others.intersection(writer.todo(retry_failed=retry_failed)))
            elsewhere = others.difference(left)
            n_elsewhere += len(elsewhere)
            advance(sum(map(plan.slot_length, elsewhere)))
            if stop.is_set():
                break
            if left and not ours:
                if not waiting:
                    note(f"waiting for another extraction, which holds {len(left)} slots")
                waiting = True
                stop.wait(POLL_S)
    return ExtractReport(
        n_slots=len(filled),
        n_slots_before=plan.n_slots - len(todo),
        n_slots_elsewhere=n_elsewhere,
        n_encodings=sum(slot.n_encodings for slot in filled),
        n_processes=1,
        failures={key: value for slot in filled for key, value in slot.failures.items()},
        seconds=StageSeconds(**{item.name: clock.seconds[item.name] for item in fields(StageSeconds)}),
        interrupted=bool(left),
    )


#: In a worker: what the last job opened. One is kept, for a worker may outlive many extractions.
_opened: dict[StoreJob, Filler] = {}
_opening = Lock()


def _open(job: StoreJob) -> Filler:
    """Return encoder, plan and writer of a job; raise where they would not give the store's own tokens."""
    if not job.data_root.is_dir():
        raise InputError(
            f"{job.data_root} is not a folder on {platform.node()}",
            wanted="the data root under the same path on every worker",
        )
    manifest = open_store(job.stores[0]).manifest
    device = pick_device(job.encoder.device)
    backbone = job.load_encoder(device)
    plan = job.plan(manifest)
    return Filler(
        plan,
        {video.video_id: video for video in manifest},
        job.data_root,
        backbone,
        job.open_writer(plan, manifest, backbone),
        job.settings.batch or default_batch(plan, device),
        job.settings.decode_threads or decode_threads(),
    )
