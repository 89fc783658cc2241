"""`cosettle-cache protocols`: every field of every propagation preset, and where its values come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated

import typer

from cosettle_cache.cli.options import Json
from cosettle_cache.core.console import Talk
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.protocols import Preset, list_presets


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
