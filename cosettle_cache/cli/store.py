"""`cosettle-cache store`: what is in a store."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.entry import exits
from cosettle_cache.cli.options import Json
from cosettle_cache.console import Talk, human_bytes

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into stores.")


@app.callback()
def group() -> None:
    """Look into stores."""


@app.command()
@exits
def info(store: Annotated[Path, typer.Argument(metavar="STORE")], as_json: Json = False) -> None:
    """Print a store's plan, encoder, slots, bytes and failed videos.

    Example: cosettle-cache store info store.zarr
    """
    from cosettle_cache.store import open_store
    from cosettle_cache.store.info import store_summary

    talk = Talk()
    summary = store_summary(open_store(store))
    document = asdict(summary)
    if as_json:
        talk.result(json.dumps(document, indent=2, default=str))
        return
    for key, value in document.items():
        if isinstance(value, dict):
            talk.result(f"{key}:")
            for inner, item in value.items():
                talk.result(f"  {inner}: {item}")
        else:
            talk.result(f"{key}: {human_bytes(value) if key.endswith('bytes') else value}")
