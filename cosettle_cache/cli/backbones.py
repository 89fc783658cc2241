"""`cosettle-cache backbones`: the encoders that load by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import Json
from cosettle_cache.core.console import Talk
from cosettle_cache.encoders.registry import BACKBONES, NamedBackbone


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
