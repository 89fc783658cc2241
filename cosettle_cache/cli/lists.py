"""`cosettle-cache backbones` and `protocols`: the encoders that load by name, the propagation presets."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import Json
from cosettle_cache.core.console import Talk
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.encoders.registry import BACKBONES, NamedBackbone
from cosettle_cache.propagation.protocols import list_presets


def backbones(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None, as_json: Json = False
) -> None:
    """List the published encoders that load by name; any ViT of timm loads as timm/MODEL_ID.

    Example: cosettle-cache backbones --family dino
    """
    talk = Talk()
    rows = [row for row in BACKBONES.values() if family in (None, row.family.name)]
    if as_json:
        talk.result(json.dumps([_document(row) for row in rows], indent=2))
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


def protocols(
    task: Annotated[
        str | None, typer.Option(help="Only this task: davis, vip, jhmdb, sprites, masks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the propagation protocols: all constants of all presets, per task, with their sources.

    Any of them is set by propagate with --set FIELD=VALUE.

    Example: cosettle-cache protocols --task davis
    """
    talk = Talk()
    presets = list_presets(task)
    if as_json:
        documents = [
            {"task": preset.task, "source": preset.source, "protocol": preset.protocol.to_json()}
            for preset in presets
        ]
        talk.result(json.dumps(documents, indent=2))
        return
    names = [item.name for item in fields(EvalProtocol) if item.name != "name"]
    for shown in dict.fromkeys(preset.task for preset in presets):
        of_task = [preset for preset in presets if preset.task == shown]
        rows = [[name, *(_text(getattr(preset.protocol, name)) for preset in of_task)] for name in names]
        talk.table(f"protocols of {shown}", ["field", *(preset.protocol.name for preset in of_task)], rows)
        for preset in of_task:
            talk.result(f"{preset.protocol.name}: {preset.source}")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
