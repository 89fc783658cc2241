"""`cosettle-cache probe`: what stored tokens are worth for whole videos and single frames."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    Device,
    DryRun,
    FramesStore,
    Json,
    Projections,
    Quiet,
    open_features,
    pick_device,
    store_title,
)
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode, UncleanError, UsageError
from cosettle_cache.core.settings import ProbeSettings
from cosettle_cache.heads.heads import load_heads

if TYPE_CHECKING:
    from cosettle_cache.analysis.probe import ProbePlan, ProbeReport
    from cosettle_cache.heads.projection import Projection
    from cosettle_cache.store import FeatureStore

_DEFAULT = ProbeSettings()


class Task(StrEnum):
    """What vectors are put to."""

    RETRIEVAL = "retrieval"
    KNN = "knn"
    LINEAR = "linear"
    ORDER = "order"
    SEGMENTS = "segments"


class Search(StrEnum):
    """Who finds neighbours."""

    AUTO = "auto"
    FAISS = "faiss"
    TORCH = "torch"


def probe(
    features: FramesStore,
    task: Annotated[
        list[Task] | None,
        typer.Option(help="Repeatable; default all but segments, or segments with --labels."),
    ] = None,
    projection: Projections = None,
    manifest: Annotated[Path | None, typer.Option(help="Classes and splits; default: the store's.")] = None,
    split: Annotated[str, typer.Option(help="Only the videos of this split.")] = _DEFAULT.split,
    official: Annotated[
        bool, typer.Option("--official", help="Learn from split train, ask about test; no folds.")
    ] = _DEFAULT.official,
    folds: Annotated[int, typer.Option(help="Folds of linear and order.")] = _DEFAULT.folds,
    seeds: Annotated[int, typer.Option(help="Shuffles of the folds.")] = _DEFAULT.seeds,
    min_videos: Annotated[
        int, typer.Option(help="Leave out classes with fewer videos.")
    ] = _DEFAULT.min_videos,
    neighbors: Annotated[int, typer.Option("--k", min=1, help="Neighbours of knn.")] = _DEFAULT.neighbors,
    penalty: Annotated[
        list[float] | None,
        typer.Option("--c", help="Inverse L2 penalty; of several the best inside each fold."),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=0, help="Frames that order joins; 0: as all have, 8 at most.")
    ] = _DEFAULT.n_frames,
    pair: Annotated[
        list[str] | None, typer.Option(help="FIRST,SECOND: classes for order; default: reversal.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Frame labels: groundTruth/, mapping.txt, splits/ (segments).")
    ] = None,
    bundle: Annotated[str, typer.Option(help="Split of the frame labels.")] = _DEFAULT.bundle,
    background: Annotated[
        list[str] | None, typer.Option(help="Class that makes no segment; repeatable.")
    ] = None,
    unit_tokens: Annotated[
        bool, typer.Option("--unit-tokens", help="Give tokens length one before the mean.")
    ] = _DEFAULT.unit,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/probe-STORE.")] = None,
    search: Annotated[Search, typer.Option(help="All are exact.")] = Search.AUTO,
    device: Device = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure retrieval, k-NN, linear probes and order of frames, raw and projected.

    Example: cosettle-cache probe --features frames.zarr --projection runs/store/projection.safetensors
    """
    settings = ProbeSettings(
        split=split,
        official=official,
        folds=folds,
        seeds=seeds,
        min_videos=min_videos,
        unit=unit_tokens,
        neighbors=neighbors,
        penalties=_penalties(penalty),
        n_frames=frames,
        pairs=tuple(map(_pair, pair or ())),
        bundle=bundle,
        background=tuple(background or ()),
    )
    talk = Talk(quiet=quiet)
    store = open_features(features, cache_dir, cache_size)
    plan = _plan(store, _tasks(task, labels), settings, manifest, labels)
    folder = out or Path("runs") / f"probe-{store_title(store.path)}"
    heads = load_heads(projection or (), store)
    if dry_run:
        names = [name for name, _ in heads]
        talk.result(json.dumps({"out": str(folder), **plan.to_json(), "projections": names}, indent=2))
        return int(ExitCode.DONE)
    return _run(plan, heads, folder, search.value, pick_device(device), talk, as_json)


def _tasks(tasks: Sequence[Task] | None, labels: Path | None) -> list[str]:
    if tasks:
        return [task.value for task in tasks]
    return ["segments"] if labels else [task.value for task in Task if task is not Task.SEGMENTS]


def _penalties(penalties: Sequence[float] | None) -> tuple[float, ...]:
    chosen = tuple(penalties or _DEFAULT.penalties)
    if min(chosen) <= 0:
        raise UsageError("an inverse penalty is a positive number", found=min(chosen))
    return chosen


def _pair(text: str) -> tuple[str, str]:
    first, comma, second = (part.strip() for part in text.partition(","))
    if not comma or not first or not second or first == second:
        raise UsageError(f"{text!r} is no pair of classes", wanted="FIRST,SECOND")
    return first, second


def _plan(
    store: FeatureStore,
    tasks: Sequence[str],
    settings: ProbeSettings,
    manifest: Path | None,
    labels: Path | None,
) -> ProbePlan:
    from cosettle_cache.analysis.probe import plan_probe
    from cosettle_cache.videos.frame_labels import open_frame_labels
    from cosettle_cache.videos.manifest import read_manifest

    return plan_probe(
        store,
        tasks,
        settings,
        manifest=read_manifest(manifest, listed=True) if manifest else None,
        frame_labels=open_frame_labels(labels) if labels else None,
    )


def _run(
    plan: ProbePlan,
    heads: Sequence[tuple[str, Projection]],
    folder: Path,
    search: str,
    device: str,
    talk: Talk,
    as_json: bool,
) -> int:
    from cosettle_cache.analysis.probe import run_probe
    from cosettle_cache.analysis.probe.probe_results import remove_probe, write_probe

    left_out = dict(plan.labelled.left_out) if plan.labelled else {}
    _say_left_out(left_out, talk)
    remove_probe(folder)
    report = run_probe(plan, projections=heads, search=search, device=device, progress=talk.progress("read"))
    for warning in report.warnings:
        talk.warn(warning)
    write_probe(folder, report.scores, report.answers, left_out, report.failures)
    _print_probe(report, left_out, folder, talk, as_json)
    if report.failures:
        details = [f"{video_id}: {reason}" for video_id, reason in report.failures.items()]
        raise UncleanError(f"{len(report.failures)} videos could not be read", details=details)
    return int(ExitCode.DONE)


def _say_left_out(left_out: Mapping[str, str], talk: Talk) -> None:
    if left_out:
        first, reason = next(iter(left_out.items()))
        talk.warn(f"{len(left_out)} videos are left out, {first} because {reason}; summary.json names all")


def _print_probe(
    report: ProbeReport, left_out: Mapping[str, str], folder: Path, talk: Talk, as_json: bool
) -> None:
    from cosettle_cache.analysis.probe.probe_results import probe_tables, summary_json

    if as_json:
        talk.result(json.dumps(summary_json(report.scores, left_out, report.failures), indent=2))
        return
    for title, header, rows in probe_tables(report.scores):
        # Above the table, because a title is folded to its width.
        talk.result(title)
        talk.table("", header, rows)
    talk.result(f"rows, answers and summary: {folder}")
