"""`cosettle-cache analyze`: what a projection trades, in the released metrics and the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DryRun,
    FramesStore,
    Json,
    Projections,
    Quiet,
    Scheduler,
    Workers,
    hand_out,
    open_features,
    store_title,
)
from cosettle_cache.core.console import Talk, human_seconds
from cosettle_cache.core.errors import ExitCode, UncleanError
from cosettle_cache.heads.heads import load_heads

if TYPE_CHECKING:
    from cosettle_cache.analysis.analyze import AnalysisPlan
    from cosettle_cache.analysis.files import AnalysisReport
    from cosettle_cache.store import FeatureStore


def analyze(
    features: FramesStore,
    projection: Projections = None,
    compat: Annotated[
        bool, typer.Option("--compat", help="Draw tokens, batch and skip clips as the authors' script does.")
    ] = False,
    gamma: Annotated[float, typer.Option(help="Of the margin D_inter - gamma D_intra.")] = 0.3,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/analyze-STORE.")] = None,
    workers: Workers = 0,
    scheduler: Scheduler = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure consistency within clips against separability between them, raw and projected.

    Example: cosettle-cache analyze --features frames.zarr --projection runs/store/projection.safetensors
    """
    from cosettle_cache.analysis.analyze import analyze_store, plan_analysis
    from cosettle_cache.analysis.files import remove_analysis, summary_json, write_analysis

    talk, store = Talk(quiet=quiet), open_features(features, cache_dir, cache_size)
    heads = load_heads(projection or (), store)
    plan = plan_analysis(store, compat=compat, gamma=gamma)
    folder = out or Path("runs") / f"analyze-{store_title(store.path)}"
    if dry_run:
        talk.result(json.dumps(_dry(plan, [name for name, _ in heads], folder), indent=2))
        return int(ExitCode.DONE)
    remove_analysis(folder)
    with hand_out(workers, scheduler, talk) as run:
        report = analyze_store(store, plan, heads, run=run, progress=talk.progress("analyze"))
    write_analysis(folder, store, report)
    _draw(folder, store, report)
    if as_json:
        talk.result(json.dumps(summary_json(store, report), indent=2))
    else:
        _print(report, folder, talk)
    if report.left_out:
        details = [f"{video_id}: {reason}" for video_id, reason in report.left_out.items()]
        raise UncleanError(
            f"{len(details)} of {len(store.manifest)} clips were left out, the others are measured",
            details=details,
        )
    return int(ExitCode.DONE)


def _dry(plan: AnalysisPlan, heads: list[str], folder: Path) -> dict[str, Any]:
    return {
        "out": str(folder),
        "tokens": ["raw", *heads],
        "definitions": [item.to_json() for item in plan.definitions],
        "clips": len(plan.clips),
        "frames": sum(len(clip.rows) for clip in plan.clips),
        "places": str(plan.places),
        "left_out": plan.left_out,
    }


def _draw(folder: Path, store: FeatureStore, report: AnalysisReport) -> None:
    from cosettle_cache.analysis.files import PLANE_FILE
    from cosettle_cache.pictures.plane import PlanePoint, write_plane

    definition = report.measured[0].definition
    points = [
        PlanePoint(store.fingerprint.backbone, item.tokens, item.total.d_intra_100, item.total.d_inter_100)
        for item in report.measured
        if item.definition == definition
    ]
    title = f"{definition.name}: {len(report.video_ids)} clips, distances in diameters (100 %)"
    write_plane(folder / PLANE_FILE, points, gamma=definition.gamma, title=title)


_HEADER = ["definition", "tokens", "D inter", "D intra", "D", "cycle acc.", "eff. rank", "inter", "intra"]


def _print(report: AnalysisReport, folder: Path, talk: Talk) -> None:
    rows = []
    for item in report.measured:
        total = item.total
        scaled = [total.d_inter_100, total.d_intra_100, total.margin_100]
        others = [total.cycle_accuracy, total.effective_rank, total.inter_distance, total.intra_distance]
        figures = [f"{value:.4f}" for value in scaled + others]
        rows.append([item.definition.name, item.tokens, *figures])
    title = f"{len(report.video_ids)} clips, {sum(report.n_frames)} frames; D in diameters (100 %)"
    talk.table(title, _HEADER, rows)
    talk.result(f"{folder}: {human_seconds(report.seconds)}")
