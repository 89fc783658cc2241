"""`cosettle-cache backbones`: the encoders that load by name.

`cosettle-cache protocols`: every field of every propagation preset, and where its values come from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import Json
from cosettle_cache.core.console import Talk
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.encoders.registry import BACKBONES, NamedBackbone
from cosettle_cache.propagation.protocols import Preset, list_presets


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
    talk.table("encoders by name", columns, [_cells(row) for row in rows])
    talk.result("any ViT of timm: timm/MODEL_ID; any size of a family: its name with --weights FILE")


def _cells(row: NamedBackbone) -> list[str]:
    sizes = row.architecture
    numbers = (sizes.width, sizes.depth, sizes.patch, sizes.grid)
    parameters = f"{row.n_parameters / 1e6:.1f}"
    return [row.name, row.family.name, *map(str, numbers), parameters, row.source.licence, str(row.source)]


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
        talk.result(json.dumps([_protocols_document(preset) for preset in presets], indent=2))
        return
    for name in dict.fromkeys(preset.task for preset in presets):
        _print_task(name, [preset for preset in presets if preset.task == name], talk)


def _print_task(task: str, presets: Sequence[Preset], talk: Talk) -> None:
    names = [item.name for item in fields(EvalProtocol) if item.name != "name"]
    rows = [[name, *(_text(getattr(preset.protocol, name)) for preset in presets)] for name in names]
    talk.table(f"protocols of {task}", ["field", *(preset.protocol.name for preset in presets)], rows)
    for preset in presets:
        talk.result(f"{preset.protocol.name}: {preset.source}")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _protocols_document(preset: Preset) -> dict[str, object]:
    return {"task": preset.task, "source": preset.source, "protocol": preset.protocol.to_json()}
