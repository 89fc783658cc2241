"""`cosettle-cache export`: stored tokens as files for other programs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.entry import exits
from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    Device,
    DryRun,
    FramesStore,
    Json,
    Quiet,
    open_features,
    pick_device,
    store_title,
)
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode, UncleanError

if TYPE_CHECKING:
    from cosettle_cache.analysis.exporting import ExportPlan
    from cosettle_cache.heads.kinds import TokenKind
    from cosettle_cache.store import FeatureStore

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write vectors for other programs.")


class Format(StrEnum):
    """What is written."""

    NPY = "npy"
    PARQUET = "parquet"
    HDF5 = "hdf5"


class Axes(StrEnum):
    """The order of axes in .npy and HDF5."""

    DIM_FRAME = "dim-frame"
    FRAME_DIM = "frame-dim"


@app.callback()
def group() -> None:
    """Write vectors for other programs."""


@app.command()
@exits
def frames(
    features: FramesStore,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/frames-STORE.")] = None,
    format: Annotated[
        Format, typer.Option("--format", help="A file per video; one table; one file (needs h5py).")
    ] = Format.NPY,
    projection: Annotated[Path | None, typer.Option(help="Through this projection; default: raw.")] = None,
    axes: Annotated[
        Axes, typer.Option(help="dim-frame: FACT on Breakfast, MS-TCN; frame-dim: FACT on new data.")
    ] = Axes.DIM_FRAME,
    repeat: Annotated[
        bool,
        typer.Option("--repeat", help="One vector per frame of the video, where the store skips frames."),
    ] = False,
    unit_tokens: Annotated[
        bool, typer.Option("--unit-tokens", help="Give tokens length one before the mean.")
    ] = False,
    device: Device = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write one vector per frame, the mean over its tokens, for temporal models.

    Example: cosettle-cache export frames --features breakfast.zarr --out breakfast/features
    """
    from cosettle_cache.analysis.exporting import export_frames, plan_export

    talk = Talk(quiet=quiet)
    store = open_features(features, cache_dir, cache_size)
    plan = plan_export(store, format.value, axes=axes.value, unit=unit_tokens, repeat=repeat)
    folder = out or Path("runs") / f"frames-{store_title(store.path)}"
    if dry_run:
        talk.result(json.dumps({"out": str(folder), "videos": len(plan.names), **plan.to_json()}, indent=2))
        return int(ExitCode.DONE)
    place = pick_device(device)
    kind = _kind(projection, store, place)
    _say_what_is_skipped(plan, talk)
    report = export_frames(plan, kind, folder, device=place, progress=talk.progress("export"))
    document = {
        "out": str(folder),
        "tokens": kind.name,
        "videos": report.n_videos,
        "vectors": report.n_vectors,
        "failures": dict(report.failures),
    }
    text = f"{folder}: {report.n_vectors} vectors of {report.n_videos} videos, {kind.name} tokens"
    talk.result(json.dumps(document, indent=2) if as_json else text)
    if report.failures:
        details = [f"{video_id}: {reason}" for video_id, reason in report.failures.items()]
        raise UncleanError(f"{len(report.failures)} videos were not written", details=details)
    return int(ExitCode.DONE)


def _kind(projection: Path | None, store: FeatureStore, device: str) -> TokenKind:
    from cosettle_cache.heads.heads import load_heads
    from cosettle_cache.heads.kinds import make_kinds

    heads = load_heads([projection] if projection else [], store)
    return make_kinds(heads, store.arrays[0].n_channels, device=device)[-1]


def _say_what_is_skipped(plan: ExportPlan, talk: Talk) -> None:
    if plan.every > 1 and not plan.repeat:
        talk.note(
            f"{plan.store.path} holds one frame in {plan.every}: frame labels have to be thinned likewise "
            "(FACT cuts longer labels off without a word), or use --repeat"
        )
