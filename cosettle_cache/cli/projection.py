"""`cosettle-cache projection`: what a projection file holds, and its way into the authors' layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.entry import exits
from cosettle_cache.cli.options import DryRun, Json
from cosettle_cache.console import Talk

if TYPE_CHECKING:
    from cosettle_cache.projection import ProjectionInfo

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into projections and export them.")

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A projection, or a checkpoint of Co-Settle's authors.")
]


@app.callback()
def group() -> None:
    """Look into projections and export them."""


@app.command()
@exits
def info(file: File, as_json: Json = False) -> None:
    """Print a projection's head, width, parameters, digest, singular values and provenance.

    Example: cosettle-cache projection info runs/store/projection.safetensors
    """
    from cosettle_cache.projection import describe_projection

    talk = Talk()
    found = describe_projection(file)
    if as_json:
        talk.result(json.dumps(asdict(found), indent=2))
        return
    for line in _lines(found):
        talk.result(line)


@app.command()
@exits
def export(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    layout: Annotated[
        str, typer.Option("--format", help="cosettle: the authors' checkpoint, projection only.")
    ] = "cosettle",
    dry_run: DryRun = False,
) -> None:
    """Write a projection in the authors' layout.

    Example: cosettle-cache projection export runs/store/projection.safetensors checkpoint.pth
    """
    from cosettle_cache.projection import export_projection, exported_tensors

    talk = Talk()
    if dry_run:
        for name, tensor in exported_tensors(file, layout).items():
            talk.result(f"{name} {'x'.join(map(str, tensor.shape))}")
        return
    export_projection(file, out, layout)
    talk.result(f"{out}: the projection of {file} in the layout {layout}")


def _lines(found: ProjectionInfo) -> list[str]:
    linears = [
        f"linear {number}: singular values {values.largest:.4g} (largest), {values.median:.4g} (median), "
        f"{values.smallest:.4g} (smallest), rank {values.rank} of {found.dim}"
        for number, values in enumerate(found.singular_values, 1)
    ]
    return [
        f"layout: {found.layout}",
        f"head: {found.head}",
        f"dim: {found.dim}",
        f"parameters: {found.n_parameters}",
        f"sha256: {found.sha256}",
        *linears,
        *(f"{key}: {text}" for key, text in found.provenance.items()),
    ]
