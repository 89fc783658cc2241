"""Store jobs: everything that `extract`, and `propagate` on its way, need to fill a store."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_cache.cli.data import Data
from cosettle_cache.cli.options import interruptible, pick_device
from cosettle_cache.config import FramesSettings, PairsSettings
from cosettle_cache.console import Talk, human_bytes, human_seconds
from cosettle_cache.plan import Plan, make_plan

if TYPE_CHECKING:
    from cosettle_cache.extract import ExtractReport

#: Patch tokens per forward pass: 16 images of 224 pixels on a CPU, 128 on a GPU.
BATCH_TOKENS = {"cpu": 16 * 196, "cuda": 128 * 196}


@dataclass(frozen=True, slots=True)
class StoreJob:
    """One store to fill: which videos, which encoder, which plan, where to."""

    data: Data
    backbone: str
    weights: str | None
    settings: PairsSettings | FramesSettings
    out: Path
    device: str | None = None
    precision: str = "fp32"
    batch_size: int | None = None
    decode_threads: int | None = None
    slot_encodings: int | None = None
    heads: int | None = None
    retry_failed: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a dry run prints."""

    backbone: str
    plan: str
    videos: int
    encodings: int
    slots: int
    bytes: int
    bytes_free: int
    grids: tuple[str, ...]
    out: str


def find_weights(weights: str | None, data_root: Path | None) -> str | None:
    """Return `weights`, looked up under the data root when there is no such file here."""
    if weights is None or data_root is None or Path(weights).exists():
        return weights
    return str(data_root / weights) if (data_root / weights).is_file() else weights


def plan_job(job: StoreJob) -> Plan:
    """Return the plan of a job; reads at most the shapes of the weights."""
    from cosettle_cache.backbones import describe_backbone

    info = describe_backbone(job.backbone, weights=job.weights, heads=job.heads)
    return make_plan(
        job.data.manifest, job.settings, patch=info.patch, dim=info.dim, slot_encodings=job.slot_encodings
    )


def summarise_plan(job: StoreJob, plan: Plan) -> PlanSummary:
    """Return the sizes of a plan beside the space left where it would go."""
    anchor = next(path for path in job.out.absolute().parents if path.exists())
    return PlanSummary(
        backbone=job.backbone,
        plan=str(plan.kind),
        videos=len(job.data.manifest),
        encodings=plan.n_encodings,
        slots=plan.n_slots,
        bytes=plan.n_bytes,
        bytes_free=shutil.disk_usage(anchor).free,
        grids=tuple(str(layout.grid) for layout in plan.arrays),
        out=str(job.out),
    )


def note_plan(summary: PlanSummary, talk: Talk) -> None:
    """Say in one line what is about to be made."""
    talk.note(
        f"{summary.out}: {summary.plan} plan, {summary.videos} videos, {summary.encodings} encodings of "
        f"{' and '.join(summary.grids)} tokens in {summary.slots} slots, {human_bytes(summary.bytes)} "
        f"({human_bytes(summary.bytes_free)} free)"
    )


def run_job(job: StoreJob, talk: Talk) -> ExtractReport:
    """Fill the store of a job, resuming what is there; the report's failures are those of the whole store."""
    from cosettle_cache.backbones import load_backbone
    from cosettle_cache.extract import extract, make_fingerprint
    from cosettle_cache.store import StoreWriter, open_store

    plan = plan_job(job)
    note_plan(summarise_plan(job, plan), talk)
    device = pick_device(job.device)
    backbone = load_backbone(
        job.backbone,
        weights=job.weights,
        device=device,
        precision=job.precision,
        heads=job.heads,
        compiled=job.compiled,
    )
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
    writer = StoreWriter.create_or_resume(job.out, plan.arrays, fingerprint, manifest, encoder)
    # A run of several commands is one process: the store's lock goes with the job, not with the process.
    with closing(writer), interruptible(talk, "slot") as stop:
        report = extract(
            plan,
            manifest,
            job.data.root,
            backbone,
            writer,
            batch_size=job.batch_size or _batch_size(plan, device),
            decode_threads=job.decode_threads or min(4, os.cpu_count() or 1),
            retry_failed=job.retry_failed,
            progress=talk.progress("extract"),
            stop=stop,
        )
    return replace(report, failures=dict(open_store(job.out).failures))


def report_lines(job: StoreJob, report: ExtractReport) -> list[str]:
    """Return what a finished extraction prints."""
    failed = [f"failed: {video_id}: {reason}" for video_id, reason in report.failures.items()]
    if failed and not job.retry_failed:
        failed.append("after mending them, the same command with --retry-failed encodes their slots again")
    if not report.n_slots and not report.interrupted:
        return [f"{job.out}: all {report.n_slots_before} slots were there already", *failed]
    seconds = report.seconds
    resumed = f" ({report.n_slots_before} slots were there already)" if report.n_slots_before else ""
    stages = (
        f"stages: decode {human_seconds(seconds.decode)}, encode {human_seconds(seconds.encode)}, "
        f"write {human_seconds(seconds.write)}; waited {human_seconds(seconds.wait_images)} for images, "
        f"{human_seconds(seconds.wait_writer)} for the writer"
    )
    done = (
        f"{job.out}: {report.n_encodings} encodings in {report.n_slots} slots, "
        f"{human_seconds(seconds.total)}, {report.images_per_s:.1f} images/s{resumed}"
    )
    return [done, stages, *failed]


def _batch_size(plan: Plan, device: str) -> int:
    tokens = max(layout.grid.n_tokens for layout in plan.arrays)
    return max(1, BATCH_TOKENS[device.split(":", maxsplit=1)[0]] // tokens)
