"""`cosettle-cache extract` and `backbones`: encode videos into a store; the encoders that load by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import DataRoot, Json, Mode
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode
from cosettle_cache.core.settings import EncoderSettings, ExtractSettings, FramesSettings, PairsSettings
from cosettle_cache.core.types import PlanKind
from cosettle_cache.encoders.registry import BACKBONES, NORMS, NamedBackbone


def extract(
    encoder: EncoderSettings,
    pairs: PairsSettings,
    frames: FramesSettings,
    settings: ExtractSettings,
    mode: Mode,
    manifest: Annotated[
        Path | None, typer.Option(help="Which videos; default: all in the data root.")
    ] = None,
    data_root: DataRoot = None,
    out: Annotated[str, typer.Option(help="The store to write or resume: path or URL.")] = "store.zarr",
    plan: Annotated[PlanKind, typer.Option(help="Training samples, or every k-th frame.")] = PlanKind.PAIRS,
    size: Annotated[
        str | None,
        typer.Option(help="Pixels: 224; 480x880, short:480/64, dinov3-m."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of frame choice, crops and shifts.")] = 0,
    layers: Annotated[
        str | None, typer.Option(metavar="N,N", help="Blocks (from 0) to keep, a store each.")
    ] = None,
    norm: Annotated[str, typer.Option(help="Final norm: last, each, none.")] = "last",
) -> int:
    """Encode videos once into a store. Run it again to resume; finished slots are kept.

    Example: cosettle-cache extract --backbone mae_b --manifest clips.parquet --data-root /data
    """
    from cosettle_cache.extraction.jobs import find_weights, note_plan, report_lines, summarise_plan
    from cosettle_cache.extraction.run import StoreJob, extract_store
    from cosettle_cache.videos.find import manifest_data, training_data, without_stills

    talk = Talk(quiet=mode.quiet)
    data = manifest_data(manifest, data_root) if manifest else training_data(data_root, talk)
    if layers is not None or norm != NORMS[0]:
        encoder = replace(encoder, backbone=f"{encoder.backbone}@{layers or ''}:{norm}")
    encoder = replace(encoder, weights=find_weights(encoder.weights, data_root))
    if plan is PlanKind.FRAMES:
        views: PairsSettings | FramesSettings = replace(frames, size=size or frames.size, seed=seed)
    else:
        data = without_stills(data, talk)
        views = replace(pairs, size=_side(size, pairs.size), seed=seed)
    job = StoreJob(out, data.root, encoder, views, settings)
    made = job.plan(data.manifest)
    summary = summarise_plan(job, made, data.manifest)
    if mode.dry_run:
        lines = [f"{key}: {value}" for key, value in asdict(summary).items()]
        talk.result(json.dumps(asdict(summary), indent=2) if mode.as_json else "\n".join(lines))
        return ExitCode.DONE
    note_plan(summary, talk)
    report = extract_store(job, made, data.manifest, talk)
    lines = report_lines(job, report)
    talk.result(json.dumps(report.to_json(), indent=2) if mode.as_json else "\n".join(lines))
    if report.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.UNCLEAN if report.failures or data.failures else ExitCode.DONE


def _side(size: str | None, default: int) -> int:
    side, _, other = (size or str(default)).partition("x")
    if not side.isdecimal() or other not in ("", side):
        raise typer.BadParameter(f"a pairs plan has square images: --size 224, not {size}")
    return int(side)


def backbones(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None, as_json: Json = False
) -> None:
    """List the published encoders that load by name; any ViT of timm loads as timm/MODEL_ID.

    Example: cosettle-cache backbones --family dino
    """
    talk = Talk()
    rows = [row for row in BACKBONES.values() if family in (None, row.family.name)]
    if as_json:
        talk.json([_document(row) for row in rows])
        return
    columns = ["name", "family", "width", "depth", "patch", "grid", "M parameters", "licence", "weights"]
    cells = []
    for row in rows:
        sizes = (getattr(row.architecture, name) for name in columns[2:6])
        parameters = f"{row.n_parameters / 1e6:.1f}"
        source = row.source.licence, str(row.source)
        cells.append([row.name, row.family.name, *map(str, sizes), parameters, *source])
    talk.table("encoders by name", columns, cells)
    talk.result("any ViT of timm: timm/MODEL_ID; any size of a family: its name with --weights FILE")


def _document(row: NamedBackbone) -> dict[str, Any]:
    return {
        "name": row.name,
        "family": row.family.name,
        "parameters": row.n_parameters,
        "architecture": asdict(row.architecture),
        "source": {**asdict(row.source), "address": str(row.source)},
        "tokens": row.family.token_rule,
        "quirks": list(row.family.quirks),
        "citation": row.family.citation,
    }
