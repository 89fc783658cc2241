"""`cosettle-cache analyze`, `probe`, `export frames` and `pca`: what stored tokens and heads are worth."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.analysis.probe import TASKS
from cosettle_cache.cli.options import (
    Cache,
    DataRoot,
    Device,
    FramesStore,
    Mode,
    Projections,
    Work,
    check_clean,
    exits,
    finish,
)
from cosettle_cache.core.console import Talk, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode
from cosettle_cache.core.files import own_folder, store_title
from cosettle_cache.core.settings import AnalyzeSettings, ExportSettings, PcaSettings, ProbeSettings

if TYPE_CHECKING:
    from cosettle_cache.analysis.pca import PcaReport
    from cosettle_cache.analysis.run import AnalysisReport
    from cosettle_cache.store import FeatureStore

    TaskName = str
else:
    # typer takes lists of enums, not of literals.
    TaskName = StrEnum("TaskName", {name: name for name in TASKS})


def analyze(
    features: FramesStore,
    settings: AnalyzeSettings,
    work: Work,
    cache: Cache,
    mode: Mode,
    projection: Projections = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/analyze-STORE.")] = None,
    device: Device = None,
) -> None:
    """Measure consistency within clips against separability between them, raw and projected.

    Example: cosettle-cache analyze --features frames.zarr --projection runs/store/projection.safetensors
    """
    from cosettle_cache.analysis import run as analysis
    from cosettle_cache.core.cluster import work_on
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import load_heads

    talk, store = Talk(quiet=mode.quiet), cache.open(features)
    heads = load_heads(projection or (), store)
    plan = analysis.plan_analysis(store, settings)
    folder = out or _folder("analyze", store)
    if mode.dry_run:
        names = [name for name, _ in heads]
        talk.json({"out": str(folder), "tokens": ["raw", *names], **plan.to_json()})
        return
    place = device if work.workers or work.scheduler else pick_device(device)
    with own_folder(folder, "analyze"):
        analysis.remove_analysis(folder)
        with work_on(work.workers, work.scheduler, place, note=talk.note) as run:
            report = analysis.analyze_store(
                store, plan, heads, device=place, run=run, progress=talk.progress("analyze")
            )
        analysis.write_analysis(folder, store, report)
    if mode.as_json:
        talk.json(analysis.summary_json(store, report))
    else:
        _print_analysis(report, folder, talk)
    left_out = report.plan.left_out
    n_left_out = f"{len(left_out)} of {len(store.manifest)}"
    check_clean(left_out, f"{n_left_out} clips were left out, the others are measured")


_HEADER = ["definition", "tokens", "D inter", "D intra", "D", "cycle acc.", "eff. rank", "inter", "intra"]


def _print_analysis(report: AnalysisReport, folder: Path, talk: Talk) -> None:
    names = "d_inter_100 d_intra_100 margin_100 cycle_accuracy effective_rank inter_distance intra_distance"
    rows = [
        [item.definition.name, item.tokens, *(f"{getattr(item.total, name):.4f}" for name in names.split())]
        for item in report.measured
    ]
    total = report.measured[0].total
    title = f"{total.n_videos} clips, {total.n_frames} frames; D in diameters (100 %)"
    talk.table(title, _HEADER, rows)
    talk.result(f"{folder}: {human_seconds(report.seconds)}")


def probe(
    features: FramesStore,
    *,
    task: Annotated[
        list[TaskName] | None,
        typer.Option(
            help=", ".join(f"{name} ({row.help})" for name, row in TASKS.items())
            + "; repeatable; default: the first four, or segments with --labels."
        ),
    ] = None,
    projection: Annotated[
        list[Path] | None, typer.Option(help="FILE or hf:OWNER/NAME/FILE, beside raw; repeatable.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="Classes and splits; default: the store's.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Folder with groundTruth/ (segments) or PairAnnotation/ (spair)."),
    ] = None,
    data_root: DataRoot = None,
    settings: ProbeSettings,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/probe-STORE.")] = None,
    device: Device = None,
    cache: Cache,
    mode: Mode,
) -> None:
    """Measure what tokens of videos, frames and images are worth, raw and projected.

    Example: cosettle-cache probe --features frames.zarr --projection runs/store/projection.safetensors
    """
    from cosettle_cache.analysis.probe import run as probes
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import load_heads
    from cosettle_cache.videos.manifest import read_manifest

    talk, store = Talk(quiet=mode.quiet), cache.open(features)
    plan = probes.plan_probe(
        store,
        list(map(str, task or ())),
        settings,
        manifest=read_manifest(manifest, listed=True) if manifest else None,
        labels=labels,
        data_root=data_root,
    )
    folder = out or _folder("probe", store)
    heads = load_heads(projection or (), store, blended=False)
    if mode.dry_run:
        names = [name for name, _ in heads]
        talk.json({"out": str(folder), **plan.to_json(), "projections": names})
        return
    if plan.left_out:
        first, reason = next(iter(plan.left_out.items()))
        n_videos = f"{len(plan.left_out)} videos are left out"
        talk.warn(f"{n_videos}, {first} because {reason}; summary.json names all")
    place = pick_device(device)
    with own_folder(folder, "probe"):
        probes.remove_probe(folder)
        report = probes.run_probe(plan, projections=heads, device=place, progress=talk.progress("read"))
        for item in report.measured:
            for text in item.outcome.warnings:
                talk.warn(f"{item.task}, {item.tokens}: {text}")
        probes.write_probe(folder, report)
    if mode.as_json:
        talk.json(probes.summary_json(report))
    else:
        for title, header, rows in probes.probe_tables(report):
            # Above the table, because a title is folded to its width.
            talk.result(title)
            talk.table("", header, rows)
        talk.result(f"rows, answers and summary: {folder}")
    check_clean(report.failures, f"{len(report.failures)} videos or pairs could not be used")


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write vectors for other programs.")


@app.callback()
def group() -> None:
    """Write vectors for other programs."""


@app.command()
@exits
def frames(
    features: FramesStore,
    settings: ExportSettings,
    cache: Cache,
    mode: Mode,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/frames-STORE.")] = None,
    projection: Annotated[Path | None, typer.Option(help="Through this projection; default: raw.")] = None,
    device: Device = None,
) -> None:
    """Write one vector per frame, the mean over its tokens, for temporal models.

    Example: cosettle-cache export frames --features breakfast.zarr --out breakfast/features
    """
    from cosettle_cache.analysis.export import export_frames, plan_export
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import load_heads, make_kinds

    talk, store = Talk(quiet=mode.quiet), cache.open(features)
    plan = plan_export(store, settings)
    folder = out or _folder("frames", store)
    if mode.dry_run:
        talk.json({"out": str(folder), "videos": len(store.video_ids), **plan.to_json()})
        return
    place = pick_device(device)
    heads = load_heads([projection] if projection else [], store, blended=False)
    kind = make_kinds(heads, plan.dim, device=place)[-1]
    if plan.every > 1 and not settings.repeat:
        talk.note(
            f"{store.path} holds one frame in {plan.every}: frame labels have to be thinned likewise "
            "(FACT cuts longer labels off without a word), or use --repeat"
        )
    lengths, failures = export_frames(plan, kind, folder, device=place, progress=talk.progress("export"))
    n_vectors = sum(lengths.values())
    if mode.as_json:
        document = {"out": str(folder), "tokens": kind.name, "videos": len(lengths)}
        talk.json(document | {"vectors": n_vectors, "failures": failures})
    else:
        talk.result(f"{folder}: {n_vectors} vectors of {len(lengths)} videos, {kind.name} tokens")
    check_clean(failures, f"{len(failures)} videos were not written")


def pca(
    features: FramesStore,
    settings: PcaSettings,
    cache: Cache,
    mode: Mode,
    video: Annotated[list[str] | None, typer.Option(help="Video; repeatable; default: all.")] = None,
    projection: Projections = None,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/pca-STORE.")] = None,
    device: Device = None,
) -> int:
    """Draw the first three principal components of tokens as red, green and blue.

    Example: cosettle-cache pca --features davis.zarr --video dog --data-root /data
    """
    from cosettle_cache.analysis.pca import draw_store, plan_pca
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import load_heads
    from cosettle_cache.videos.find import media_root

    talk, store = Talk(quiet=mode.quiet), cache.open(features)
    videos = plan_pca(store, settings, video or ())
    heads = load_heads(projection or (), store)
    root = media_root(store.manifest, data_root)
    folder = out or _folder("pca", store)
    if mode.dry_run:
        names, tokens = [row.video_id for row in videos], ["raw", *(name for name, _ in heads)]
        document = {"videos": names, "tokens": tokens, "settings": asdict(settings), "out": str(folder)}
        talk.json(document)
        return ExitCode.DONE
    with interruptible(talk, "video") as stop:
        report = draw_store(
            store,
            videos,
            settings,
            root,
            folder,
            projections=heads,
            device=pick_device(device),
            progress=talk.progress("draw"),
            stop=stop,
        )
    _print_pca(report, folder, talk, mode.as_json)
    return finish(report, report.failures if video else {**store.failures, **report.failures})


def _print_pca(report: PcaReport, folder: Path, talk: Talk, as_json: bool) -> None:
    if as_json:
        counts = {"videos": report.n_videos, "frames": report.n_frames, "seconds": report.seconds}
        components = [asdict(item) for item in report.shares]
        talk.json({"out": str(folder), **counts, "components": components})
        return
    rows = [
        [row.video_id, row.tokens, *(f"{100 * part:.1f}" for part in row.shares)] for row in report.shares
    ]
    talk.table("share of the variance, percent", ["video", "tokens", "red", "green", "blue"], rows)
    talk.result(f"{report.n_frames} frames in {human_seconds(report.seconds)}: {folder}")


def _folder(stage: str, store: FeatureStore) -> Path:
    return Path("runs") / f"{stage}-{store_title(store.path)}"
