"""What a dry run and a finished extraction print, and the store of a command that was given none."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.core.console import Talk, human_bytes, human_seconds
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.files import is_url
from cosettle_cache.core.settings import LINEAR, EncoderSettings, ExtractSettings, FramesSettings, digest
from cosettle_cache.core.types import Manifest
from cosettle_cache.encoders.registry import weights_file
from cosettle_cache.extraction.run import ExtractReport, StoreJob, extract_store
from cosettle_cache.store import open_store
from cosettle_cache.store.plan import Plan
from cosettle_cache.videos.find import Data
from cosettle_cache.videos.manifest import manifest_digest

#: Where `extract` leaves its result when nothing else is said.
DEFAULT_STORE = Path("store.zarr")
DEFAULT_BACKBONE = "mae_b"


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


@dataclass(frozen=True, slots=True)
class StoreWish:
    """The frames store that a task needs, as far as it was said; the rest as in `EncoderSettings`."""

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
    resampling: str = LINEAR


def make_store(wish: StoreWish, data: Data, talk: Talk) -> tuple[str, dict[str, str]]:
    """Return the store's path, filled if need be, and failed videos; `KeyboardInterrupt` when cut short."""
    encoder = _encoder(wish, talk)
    # The same task with other videos, weights or normalisation is another store.
    other = [] if wish.resampling == LINEAR else [wish.resampling]
    mark = digest([manifest_digest(data.manifest), encoder.weights, encoder.heads, wish.red_std, *other])[:8]
    name = re.sub("[/:]", "-", f"{wish.task}-{encoder.backbone}-{wish.size}-{mark}.zarr")
    talk.note(f"no --features given: encoding {data.origin} with {encoder.backbone} into {name}")
    settings = ExtractSettings(workers=wish.workers, scheduler=wish.scheduler)
    out = str(Path(name).absolute()) if wish.workers or wish.scheduler else name
    job = StoreJob(out, data.root, encoder, FramesSettings(wish.size, resampling=wish.resampling), settings)
    if len(job.stores) > 1:
        raise UsageError("a task takes the tokens of one layer", wanted="NAME@8", found=encoder.backbone)
    plan = job.plan(data.manifest)
    note_plan(summarise_plan(job, plan, data.manifest), talk)
    report = extract_store(job, plan, data.manifest, talk)
    if report.interrupted:
        raise KeyboardInterrupt
    return out, {**data.failures, **report.failures}


def summarise_plan(job: StoreJob, plan: Plan, manifest: Manifest) -> PlanSummary:
    """Return the sizes of a plan beside the space left where it would go."""
    bytes_free = None
    if not is_url(job.out):
        anchor = next(path for path in Path(job.out).absolute().parents if path.exists())
        bytes_free = shutil.disk_usage(anchor).free
    return PlanSummary(
        backbone=job.encoder.backbone,
        plan=str(plan.kind),
        videos=len(manifest),
        encodings=plan.n_encodings,
        grids=tuple(str(layout.grid) for layout in plan.arrays),
        dtype=job.settings.dtype,
        codec=job.settings.codec,
        slots=plan.n_slots * len(job.stores),
        slot_encodings=tuple(layout.slot_encodings for layout in plan.arrays),
        bytes=plan.n_bytes * len(job.stores),
        bytes_free=bytes_free,
        out=" ".join(job.stores),
    )


def note_plan(summary: PlanSummary, talk: Talk) -> None:
    """Say in one line what is about to be made, and warn where it does not fit."""
    room = summary.bytes_free
    free = "" if room is None else f" ({human_bytes(room)} free)"
    talk.note(
        f"{summary.out}: {summary.plan} plan, {summary.videos} videos, {summary.encodings} encodings of "
        f"{' and '.join(summary.grids)} tokens in {summary.slots} slots, {human_bytes(summary.bytes)}{free}"
    )
    if room is not None and room < summary.bytes and not Path(summary.out).exists():
        sizes = f"{human_bytes(summary.bytes)} wanted, {human_bytes(room)} free"
        talk.warn(f"{summary.out} will not fit: {sizes}")


def report_lines(job: StoreJob, report: ExtractReport) -> list[str]:
    """Return what a finished extraction prints."""
    failed = [f"failed: {video_id}: {reason}" for video_id, reason in report.failures.items()]
    if failed and not job.settings.retry_failed:
        failed.append("after mending them, the same command with --retry-failed encodes their slots again")
    if not report.n_slots and not report.interrupted:
        n_others = report.n_slots_before + report.n_slots_elsewhere
        return [f"{' '.join(job.stores)}: all {n_others} slots were there already", *failed]
    seconds = report.seconds
    resumed = f" ({report.n_slots_before} slots were there already)" if report.n_slots_before else ""
    shared = f" ({report.n_slots_elsewhere} slots by other extractions)" if report.n_slots_elsewhere else ""
    across = job.settings.workers or job.settings.scheduler
    over = f" over {report.n_processes} processes" if across else ""
    return [
        f"{' '.join(job.stores)}: {report.n_encodings} encodings in {report.n_slots} slots, "
        f"{human_seconds(seconds.total)}, {report.images_per_s:.1f} images/s{resumed}{shared}",
        f"stages{over}: decode {human_seconds(seconds.decode)}, encode {human_seconds(seconds.encode)}, "
        f"write {human_seconds(seconds.write)}; waited {human_seconds(seconds.wait_images)} for images, "
        f"{human_seconds(seconds.wait_writer)} for the writer",
        *failed,
    ]


def find_weights(weights: str | None, data_root: Path | None) -> str | None:
    """Return `weights`, looked up under the data root when there is no such file here."""
    if weights is None or data_root is None or weights_file(weights)[0].exists():
        return weights
    return str(data_root / weights) if weights_file(data_root / weights)[0].is_file() else weights


def _encoder(wish: StoreWish, talk: Talk) -> EncoderSettings:
    """Return the encoder: as asked for, of the store that `extract` leaves, or the default."""
    name, weights, heads = wish.backbone or DEFAULT_BACKBONE, wish.weights, None
    if wish.backbone is None and DEFAULT_STORE.exists():
        encoder = open_store(DEFAULT_STORE).encoder
        name, heads = encoder["name"], encoder["heads_argument"]
        talk.note(f"encoder of {DEFAULT_STORE}: {name}, weights {encoder['weights_argument']}")
        weights = weights or encoder["weights_argument"]
    weights = find_weights(weights, wish.data_root)
    return EncoderSettings(name, weights, wish.device, wish.precision, red_std=wish.red_std, heads=heads)
