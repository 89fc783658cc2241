"""`cosettle-cache extract`: stage one."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.options import DataRoot, Device, DryRun, Json, Quiet, Weights
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import PlanKind

_PAIRS, _FRAMES = PairsSettings(), FramesSettings()


class Dtype(StrEnum):
    """How tokens are stored."""

    FLOAT16 = "float16"
    INT8 = "int8"


class Codec(StrEnum):
    """How stored tokens are compressed."""

    NONE = "none"
    ZSTD = "zstd"


def extract(
    backbone: Annotated[
        str, typer.Option(help="mae_b, timm/MODEL_ID, or a family name with --weights FILE.")
    ],
    weights: Weights = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Which videos; default: what the data root holds.")
    ] = None,
    data_root: DataRoot = None,
    out: Annotated[str, typer.Option(help="The store to write or resume: path or URL.")] = "store.zarr",
    plan: Annotated[PlanKind, typer.Option(help="Training samples, or every k-th frame.")] = PlanKind.PAIRS,
    views: Annotated[int, typer.Option(min=1, help="View sets per clip (pairs).")] = _PAIRS.n_views,
    gap: Annotated[
        float, typer.Option(min=0, max=1, help="Distance of a pair, share of the clip.")
    ] = _PAIRS.gap,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 224 (pairs); 480x880, native, short:480/64 (frames).")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Take every k-th frame (frames).")] = _FRAMES.every,
    shifted: Annotated[
        int, typer.Option(min=0, help="Shifted encodings per frame (frames).")
    ] = _FRAMES.n_shifted,
    seed: Annotated[int, typer.Option(min=0, help="Seed of frame choice, crops and shifts.")] = 0,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 arithmetic in the encoder.")] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Put the encoder through torch.compile.")
    ] = False,
    red_std: Annotated[
        float | None, typer.Option(help="Red deviation instead of ImageNet's 0.229: 0.228 as DINO evaluates.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where width/64 is wrong.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per forward pass.")] = None,
    decode_threads: Annotated[int | None, typer.Option(min=1, help="Threads that prepare images.")] = None,
    slot_encodings: Annotated[int | None, typer.Option(min=1, help="Encodings per slot (shard).")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of stored tokens; int8 halves the bytes.")] = Dtype.FLOAT16,
    codec: Annotated[Codec, typer.Option(help="Compression of stored tokens.")] = Codec.NONE,
    workers: Annotated[int, typer.Option(min=0, help="Processes here, one per GPU; 0: this one.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="A dask scheduler whose workers do it, as tcp://host:8786.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Encode failed slots again.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Encode videos once into a store. Run it again to resume; finished slots are kept.

    Example: cosettle-cache extract --backbone mae_b --manifest clips.parquet --data-root /data
    """
    from cosettle_cache.extraction.jobs import (
        StoreJob,
        find_weights,
        plan_job,
        report_lines,
        run_job,
        summarise_plan,
    )
    from cosettle_cache.videos.find import manifest_data, training_data

    talk = Talk(quiet=quiet)
    data = manifest_data(manifest, data_root) if manifest else training_data(data_root, talk)
    weights = find_weights(weights, data_root)
    settings = _settings(plan, views, gap, size, every, shifted, seed)
    job = StoreJob(
        data,
        backbone,
        weights,
        settings,
        out,
        device=device,
        precision=precision,
        batch_size=batch,
        decode_threads=decode_threads,
        slot_encodings=slot_encodings,
        dtype=dtype.value,
        codec=codec.value,
        heads=heads,
        retry_failed=retry_failed,
        compiled=compiled,
        workers=workers,
        scheduler=scheduler,
        red_std=red_std,
    )
    if dry_run:
        summary = asdict(summarise_plan(job, plan_job(job)))
        lines = [f"{key}: {value}" for key, value in summary.items()]
        talk.result(json.dumps(summary, indent=2) if as_json else "\n".join(lines))
        return int(ExitCode.DONE)
    report = run_job(job, talk)
    talk.result(json.dumps(report.to_json(), indent=2) if as_json else "\n".join(report_lines(job, report)))
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.UNCLEAN if report.failures or data.failures else ExitCode.DONE)


def _settings(
    plan: PlanKind, views: int, gap: float, size: str | None, every: int, shifted: int, seed: int
) -> PairsSettings | FramesSettings:
    if plan is PlanKind.FRAMES:
        return FramesSettings(size=size or _FRAMES.size, every=every, n_shifted=shifted, seed=seed)
    side, _, other = (size or str(_PAIRS.size)).partition("x")
    if not side.isdigit() or other not in ("", side):
        raise typer.BadParameter(f"a pairs plan has square images: --size 224, not {size}")
    return PairsSettings(n_views=views, gap=gap, size=int(side), seed=seed)
