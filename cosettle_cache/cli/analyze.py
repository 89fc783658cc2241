"""`cosettle-cache analyze`: what a projection trades, in the released metrics and the paper's.

`cosettle-cache probe`: what stored tokens are worth for whole videos and single frames.

`cosettle-cache export`: stored tokens as files for other programs.

`cosettle-cache pca`: stored tokens as colours, raw and projected, beside their frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DataRoot,
    Device,
    DryRun,
    FramesStore,
    Json,
    Projections,
    Quiet,
    Scheduler,
    Workers,
    exits,
    open_features,
)
from cosettle_cache.core.cluster import pick_device, work_on
from cosettle_cache.core.console import Talk, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, UncleanError, UsageError
from cosettle_cache.core.files import make_folder, store_title
from cosettle_cache.core.settings import ProbeSettings

if TYPE_CHECKING:
    from cosettle_cache.analysis.export import ExportPlan
    from cosettle_cache.analysis.files import AnalysisReport
    from cosettle_cache.analysis.pca import PcaReport
    from cosettle_cache.analysis.probe import ProbePlan, ProbeReport
    from cosettle_cache.analysis.run import AnalysisPlan
    from cosettle_cache.heads.kinds import TokenKind
    from cosettle_cache.heads.projection import Projection
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
    from cosettle_cache.analysis.files import remove_analysis, summary_json, write_analysis
    from cosettle_cache.analysis.run import analyze_store, plan_analysis

    talk, store = Talk(quiet=quiet), open_features(features, cache_dir, cache_size)
    from cosettle_cache.heads.kinds import load_heads

    heads = load_heads(projection or (), store)
    plan = plan_analysis(store, compat=compat, gamma=gamma)
    folder = out or Path("runs") / f"analyze-{store_title(store.path)}"
    if dry_run:
        talk.result(json.dumps(_dry(plan, [name for name, _ in heads], folder), indent=2))
        return int(ExitCode.DONE)
    remove_analysis(folder)
    with work_on(workers, scheduler, note=talk.note) as run:
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
    from cosettle_cache.pictures.charts import PlanePoint, write_plane

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
    from cosettle_cache.heads.kinds import load_heads

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
    from cosettle_cache.analysis.probe import remove_probe, run_probe, write_probe

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
    from cosettle_cache.analysis.probe import probe_tables, summary_json

    if as_json:
        talk.result(json.dumps(summary_json(report.scores, left_out, report.failures), indent=2))
        return
    for title, header, rows in probe_tables(report.scores):
        # Above the table, because a title is folded to its width.
        talk.result(title)
        talk.table("", header, rows)
    talk.result(f"rows, answers and summary: {folder}")


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
    from cosettle_cache.analysis.export import export_frames, plan_export

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
    from cosettle_cache.heads.kinds import load_heads, make_kinds

    heads = load_heads([projection] if projection else [], store)
    return make_kinds(heads, store.arrays[0].n_channels, device=device)[-1]


def _say_what_is_skipped(plan: ExportPlan, talk: Talk) -> None:
    if plan.every > 1 and not plan.repeat:
        talk.note(
            f"{plan.store.path} holds one frame in {plan.every}: frame labels have to be thinned likewise "
            "(FACT cuts longer labels off without a word), or use --repeat"
        )


class Per(StrEnum):
    """Whose tokens share their components."""

    VIDEO = "video"
    STORE = "store"


class Foreground(StrEnum):
    """Which side of the first component is drawn."""

    NONE = "none"
    AUTO = "auto"
    HIGH = "high"
    LOW = "low"


class FilmFormat(StrEnum):
    """What the film is."""

    MP4 = "mp4"
    WEBP = "webp"
    NONE = "none"


def pca(
    features: FramesStore,
    video: Annotated[list[str] | None, typer.Option(help="Video; repeatable; default: all.")] = None,
    projection: Projections = None,
    per: Annotated[Per, typer.Option(help="Components of each video, or one set for the store.")] = Per.VIDEO,
    foreground: Annotated[
        Foreground, typer.Option(help="One side of the first component alone; auto: that of the middle.")
    ] = Foreground.NONE,
    film: Annotated[FilmFormat, typer.Option(help="Frame and colours beside each other.")] = FilmFormat.MP4,
    stills: Annotated[bool, typer.Option(help="A PNG per frame and kind of tokens.")] = True,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/pca-STORE.")] = None,
    device: Device = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw the first three principal components of tokens as red, green and blue.

    Example: cosettle-cache pca --features davis.zarr --video dog --data-root /data
    """
    from cosettle_cache.analysis.pca import PcaSettings, check_request, chosen_videos, draw_store
    from cosettle_cache.heads.kinds import load_heads
    from cosettle_cache.videos.find import media_root

    talk = Talk(quiet=quiet)
    store = open_features(features, cache_dir, cache_size)
    settings = PcaSettings(per.value, foreground.value, film.value, stills)
    names = list(video or ())
    check_request(store, names, settings)
    heads = load_heads(projection or (), store)
    root = media_root(store.manifest, data_root)
    out = out or Path("runs") / f"pca-{store_title(store.path)}"
    if dry_run:
        document = {
            "videos": [row.video_id for row in chosen_videos(store, names)],
            "tokens": ["raw", *(name for name, _ in heads)],
            "settings": asdict(settings),
            "out": str(out),
        }
        talk.result(json.dumps(document, indent=2))
        return int(ExitCode.DONE)
    make_folder(out)
    with interruptible(talk, "video") as stop:
        report = draw_store(
            store,
            root,
            out,
            videos=names,
            projections=heads,
            settings=settings,
            device=pick_device(device),
            progress=talk.progress("draw"),
            stop=stop,
        )
    _print_pca(report, out, talk, as_json)
    return _end(report, {} if names else store.failures)


def _print_pca(report: PcaReport, out: Path, talk: Talk, as_json: bool) -> None:
    if as_json:
        document = {
            "out": str(out),
            "videos": report.n_videos,
            "frames": report.n_frames,
            "seconds": report.seconds,
            "components": [asdict(item) for item in report.shares],
        }
        talk.result(json.dumps(document, indent=2))
        return
    rows = [
        [item.video_id, item.tokens, *(f"{100 * share:.1f}" for share in item.shares)]
        for item in report.shares
    ]
    talk.table("share of the variance, percent", ["video", "tokens", "red", "green", "blue"], rows)
    talk.result(f"{report.n_frames} frames in {human_seconds(report.seconds)}: {out}")


def _end(report: PcaReport, store_failures: Mapping[str, str]) -> int:
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    failures = {**store_failures, **report.failures}
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)
