"""Store jobs: everything that `extract`, and `propagate` on its way, need to fill a store.

A store made on the way, for commands that were given none: by which encoder, at which size, where.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_cache.core.cluster import pick_device
from cosettle_cache.core.console import Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import FramesSettings, PairsSettings, digest
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.find import Data

if TYPE_CHECKING:
    from cosettle_cache.encoders import Backbone
    from cosettle_cache.extraction.run import ExtractReport, ExtractSpec
    from cosettle_cache.store import StoreWriter


MAX_DECODE_THREADS = 4


@dataclass(frozen=True, slots=True)
class StoreJob:
    """One store to fill: which videos, which encoder, which plan, where to (path or URL), by whom.

    Without `workers` (processes on this machine) or a `scheduler` (address) this process does the work.
    `red_std` replaces ImageNet's red deviation, where the encoder normalises with that.
    """

    data: Data
    backbone: str
    weights: str | None
    settings: PairsSettings | FramesSettings
    out: str
    device: str | None = None
    precision: str = "fp32"
    batch_size: int | None = None
    decode_threads: int | None = None
    slot_encodings: int | None = None
    dtype: str = "float16"
    codec: str = "none"
    heads: int | None = None
    retry_failed: bool = False
    compiled: bool = False
    workers: int = 0
    scheduler: str | None = None
    red_std: float | None = None


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a dry run prints; `bytes` are those of the tokens before compression, checksums not counted.

    `slot_encodings` has one number per grid; `bytes_free` is None where nobody can say.
    """

    backbone: str
    plan: str
    videos: int
    encodings: int
    grids: tuple[str, ...]
    dtype: str
    codec: str
    slots: int
    slot_encodings: tuple[int, ...]
    bytes: int
    bytes_free: int | None
    out: str


def find_weights(weights: str | None, data_root: Path | None) -> str | None:
    """Return `weights`, looked up under the data root when there is no such file here."""
    if weights is None or data_root is None or Path(weights).exists():
        return weights
    return str(data_root / weights) if (data_root / weights).is_file() else weights


def plan_job(job: StoreJob) -> Plan:
    """Return the plan of a job; reads at most the shapes of the weights."""
    from cosettle_cache.encoders import describe_backbone

    info = describe_backbone(job.backbone, weights=job.weights, heads=job.heads)
    return make_plan(
        job.data.manifest,
        job.settings,
        patch=info.patch,
        dim=info.dim,
        slot_encodings=job.slot_encodings,
        dtype=job.dtype,
        codec=job.codec,
    )


def summarise_plan(job: StoreJob, plan: Plan) -> PlanSummary:
    """Return the sizes of a plan beside the space left where it would go."""
    return PlanSummary(
        backbone=job.backbone,
        plan=str(plan.kind),
        videos=len(job.data.manifest),
        encodings=plan.n_encodings,
        grids=tuple(str(layout.grid) for layout in plan.arrays),
        dtype=job.dtype,
        codec=job.codec,
        slots=plan.n_slots,
        slot_encodings=tuple(layout.slot_encodings for layout in plan.arrays),
        bytes=plan.n_bytes,
        bytes_free=_bytes_free(job.out),
        out=job.out,
    )


def note_plan(summary: PlanSummary, talk: Talk) -> None:
    """Say in one line what is about to be made."""
    free = "" if summary.bytes_free is None else f" ({human_bytes(summary.bytes_free)} free)"
    talk.note(
        f"{summary.out}: {summary.plan} plan, {summary.videos} videos, {summary.encodings} encodings of "
        f"{' and '.join(summary.grids)} tokens in {summary.slots} slots, {human_bytes(summary.bytes)}{free}"
    )
    room = summary.bytes_free
    if room is not None and room < summary.bytes and not Path(summary.out).exists():
        sizes = f"{human_bytes(summary.bytes)} wanted, {human_bytes(room)} free"
        talk.warn(f"{summary.out} will not fit: {sizes}")


def run_job(job: StoreJob, talk: Talk) -> ExtractReport:
    """Fill the store of a job, resuming what is there; the report's failures are those of the whole store."""
    from cosettle_cache.store import open_store

    plan = plan_job(job)
    note_plan(summarise_plan(job, plan), talk)
    report = _run_across(job, plan, talk) if job.workers or job.scheduler else _run_here(job, plan, talk)
    return replace(report, failures=dict(open_store(job.out).failures))


def report_lines(job: StoreJob, report: ExtractReport) -> list[str]:
    """Return what a finished extraction prints."""
    failed = [f"failed: {video_id}: {reason}" for video_id, reason in report.failures.items()]
    if failed and not job.retry_failed:
        failed.append("after mending them, the same command with --retry-failed encodes their slots again")
    n_others = report.n_slots_before + report.n_slots_elsewhere
    if not report.n_slots and not report.interrupted:
        return [f"{job.out}: all {n_others} slots were there already", *failed]
    seconds = report.seconds
    resumed = f" ({report.n_slots_before} slots were there already)" if report.n_slots_before else ""
    shared = f" ({report.n_slots_elsewhere} slots by other extractions)" if report.n_slots_elsewhere else ""
    over = f" over {report.n_processes} processes" if job.workers or job.scheduler else ""
    stages = (
        f"stages{over}: decode {human_seconds(seconds.decode)}, encode {human_seconds(seconds.encode)}, "
        f"write {human_seconds(seconds.write)}; waited {human_seconds(seconds.wait_images)} for images, "
        f"{human_seconds(seconds.wait_writer)} for the writer"
    )
    done = (
        f"{job.out}: {report.n_encodings} encodings in {report.n_slots} slots, "
        f"{human_seconds(seconds.total)}, {report.images_per_s:.1f} images/s{resumed}{shared}"
    )
    return [done, stages, *failed]


def _run_here(job: StoreJob, plan: Plan, talk: Talk) -> ExtractReport:
    from cosettle_cache.extraction.run import default_batch, extract

    device = pick_device(job.device)
    backbone = _load(job, device)
    # A run of several commands is one process: the store's lock goes with the job, not with the process.
    with closing(_writer(job, plan, backbone)) as writer, interruptible(talk, "slot") as stop:
        return extract(
            plan,
            job.data.manifest,
            job.data.root,
            backbone,
            writer,
            batch_size=job.batch_size or default_batch(plan, device),
            decode_threads=job.decode_threads or min(MAX_DECODE_THREADS, os.cpu_count() or 1),
            retry_failed=job.retry_failed,
            progress=talk.progress("extract"),
            stop=stop,
            note=talk.note,
        )


def _run_across(job: StoreJob, plan: Plan, talk: Talk) -> ExtractReport:
    from cosettle_cache.core.cluster import connect
    from cosettle_cache.extraction.run import extract_across

    gpus = check_workers(job.workers, job.scheduler, job.device)
    with connect(workers=job.workers, scheduler=job.scheduler, gpus=gpus, note=talk.note) as cluster:
        # Loaded here only to say what the tokens depend on; workers load their own, and compare.
        backbone = _load(job, "cpu")
        on_gpus = job.device == "cuda" or (job.device is None and cluster.has_gpus())
        with closing(_writer(job, plan, backbone)) as writer, interruptible(talk, "slots") as stop:
            del backbone
            return extract_across(
                partial(cluster.run, stop=stop, on_gpus=on_gpus),
                _spec(job),
                plan,
                writer,
                progress=talk.progress("extract"),
                stop=stop,
                note=talk.note,
            )


def check_workers(workers: int, scheduler: str | None, device: str | None) -> Sequence[str]:
    """Return the GPUs of this machine to be dealt to workers; raise `UsageError` for what cannot be."""
    if workers and scheduler:
        raise UsageError("--workers and --scheduler exclude each other", wanted="one of the two")
    if device not in (None, "cpu", "cuda"):
        raise UsageError("workers are dealt their GPUs", wanted="--device cpu or cuda", found=device)
    if scheduler or pick_device(device) == "cpu":
        return ()
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _spec(job: StoreJob) -> ExtractSpec:
    """Return what workers need, with absolute paths: they may have been started anywhere."""
    from cosettle_cache.core.cluster import share_of_cores
    from cosettle_cache.extraction.run import ExtractSpec
    from cosettle_cache.store._local import is_url

    is_file = job.weights is not None and Path(job.weights).is_file()
    threads = min(MAX_DECODE_THREADS, share_of_cores(job.workers)) if job.workers else None
    return ExtractSpec(
        store=job.out if is_url(job.out) else str(Path(job.out).absolute()),
        data_root=str(job.data.root.absolute()),
        settings=job.settings,
        backbone=job.backbone,
        weights=str(Path(job.weights).absolute()) if job.weights and is_file else job.weights,
        heads=job.heads,
        precision=job.precision,
        compiled=job.compiled,
        device=job.device,
        batch_size=job.batch_size,
        decode_threads=job.decode_threads or threads,
        slot_encodings=job.slot_encodings,
        dtype=job.dtype,
        codec=job.codec,
        retry_failed=job.retry_failed,
        red_std=job.red_std,
    )


def _load(job: StoreJob, device: str) -> Backbone:
    from cosettle_cache.encoders import load_backbone

    return load_backbone(
        job.backbone,
        weights=job.weights,
        device=device,
        precision=job.precision,
        heads=job.heads,
        compiled=job.compiled,
        red_std=job.red_std,
    )


def _writer(job: StoreJob, plan: Plan, backbone: Backbone) -> StoreWriter:
    from cosettle_cache.extraction.run import make_fingerprint
    from cosettle_cache.store import StoreWriter

    manifest = job.data.manifest
    encoder = {
        "name": backbone.name,
        "weights_source": backbone.weights_source,
        "weights_argument": job.weights,
        "heads_argument": job.heads,
        "patch": backbone.patch,
        "dim": backbone.dim,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
    fingerprint = make_fingerprint(backbone, plan, manifest)
    return StoreWriter.create_or_resume(job.out, plan.arrays, fingerprint, manifest, encoder)


def _bytes_free(out: str) -> int | None:
    """Return the free bytes where a local store would go."""
    from cosettle_cache.store._local import is_url

    if is_url(out):
        return None
    anchor = next(path for path in Path(out).absolute().parents if path.exists())
    return shutil.disk_usage(anchor).free


#: Where `extract` leaves its result when nothing else is said.
DEFAULT_STORE = Path("store.zarr")
DEFAULT_BACKBONE = "mae_b"


@dataclass(frozen=True, slots=True)
class StoreWish:
    """The frames store that a task needs, as far as it was said; `red_std` as in `StoreJob`."""

    task: str
    size: str
    backbone: str | None
    weights: str | None
    data_root: Path | None
    device: str | None
    precision: str
    workers: int = 0
    scheduler: str | None = None
    red_std: float | None = None


def make_store(wish: StoreWish, data: Data, talk: Talk) -> tuple[str, dict[str, str]]:
    """Return the path of the store of `data`, filled if it is not there yet, and what failed on the way.

    Raises `KeyboardInterrupt` when filling it was interrupted.
    """
    from cosettle_cache.videos.manifest import manifest_digest

    backbone, weights, heads = _encoder(wish, talk)
    # The same task with other videos, weights or normalisation is another store.
    mark = digest([manifest_digest(data.manifest), weights, heads, wish.red_std])[:8]
    name = re.sub("[/:]", "-", f"{wish.task}-{backbone}-{wish.size}-{mark}.zarr")
    talk.note(f"no --features given: encoding {data.origin} with {backbone} into {name}")
    job = StoreJob(
        data,
        backbone,
        weights,
        FramesSettings(size=wish.size),
        str(Path(name).absolute()) if wish.workers or wish.scheduler else name,
        device=wish.device,
        precision=wish.precision,
        heads=heads,
        workers=wish.workers,
        scheduler=wish.scheduler,
        red_std=wish.red_std,
    )
    report = run_job(job, talk)
    if report.interrupted:
        raise KeyboardInterrupt
    return job.out, {**data.failures, **report.failures}


def _encoder(wish: StoreWish, talk: Talk) -> tuple[str, str | None, int | None]:
    """Return name, weights and heads: as asked for, of the store `extract` leaves, or the default."""
    from cosettle_cache.store import open_store

    if wish.backbone is not None or not DEFAULT_STORE.exists():
        return wish.backbone or DEFAULT_BACKBONE, find_weights(wish.weights, wish.data_root), None
    encoder = open_store(DEFAULT_STORE).encoder
    talk.note(f"encoder of {DEFAULT_STORE}: {encoder['name']}, weights {encoder['weights_argument']}")
    weights = find_weights(wish.weights or encoder["weights_argument"], wish.data_root)
    return encoder["name"], weights, encoder["heads_argument"]
