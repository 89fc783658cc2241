"""`cosettle-cache projection`: make the closed-form head, look into any, write the authors' layout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.entry import exits
from cosettle_cache.cli.options import Device, DryRun, Json, Quiet, Scheduler, Workers, hand_out, pick_device
from cosettle_cache.core.console import Talk, human_seconds
from cosettle_cache.core.settings import SpectralSettings

if TYPE_CHECKING:
    from cosettle_cache.core.handing import Run
    from cosettle_cache.heads.projection import ProjectionInfo
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.training.spectral import SpectralReport

_SPECTRAL = SpectralSettings()

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make the closed-form head; look into and export any."
)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A projection, or a checkpoint of Co-Settle's authors.")
]


@app.callback()
def group() -> None:
    """Make the closed-form head; look into and export any."""


@app.command()
@exits
def fit(
    features: Annotated[str, typer.Option(help="A store of either plan, local or at a URL.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/STORE-spectral.")] = None,
    correspondence: Annotated[
        str, typer.Option(help="Which tokens of two frames belong together: nearest or position.")
    ] = _SPECTRAL.correspondence,
    spectral_lambda: Annotated[
        float | None, typer.Option(help="Soft threshold, in eigenvalues; default: by the margin.")
    ] = None,
    n_lambdas: Annotated[int, typer.Option(min=2, help="Lambdas to try.")] = _SPECTRAL.n_lambdas,
    gamma: Annotated[float, typer.Option(help="Of the margin D_inter - gamma D_intra.")] = _SPECTRAL.gamma,
    held_out: Annotated[float, typer.Option(help="Share of clips to choose by.")] = _SPECTRAL.held_out,
    seed: Annotated[int, typer.Option(min=0, help="Which clips are held out.")] = _SPECTRAL.seed,
    workers: Workers = 0,
    scheduler: Scheduler = None,
    device: Device = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute the spectral head: a soft threshold on what changes within clips, without training.

    Example: cosettle-cache projection fit --features store.zarr
    """
    from cosettle_cache.store import open_store

    settings = SpectralSettings(
        correspondence=correspondence,
        spectral_lambda=spectral_lambda,
        n_lambdas=n_lambdas,
        gamma=gamma,
        held_out=held_out,
        seed=seed,
    )
    talk, store = Talk(quiet=quiet), open_store(features)
    folder = out or Path("runs") / f"{Path(features).stem}-spectral"
    if dry_run:
        _dry_fit(store, settings, folder, talk)
        return
    with hand_out(workers, scheduler, talk) as run:
        report = _fit(store, settings, folder, pick_device(device), run, talk)
    if as_json:
        talk.result(json.dumps(report.to_json(), indent=2))
        return
    for line in _fit_lines(report):
        talk.result(line)


def _fit(
    store: FeatureStore, settings: SpectralSettings, folder: Path, device: str, run: Run | None, talk: Talk
) -> SpectralReport:
    from cosettle_cache.training.spectral import fit_spectral

    talk.note(f"{folder}: spectral head, {settings.correspondence} correspondence, from {store.path}")
    report = fit_spectral(store, settings, folder, device=device, run=run, progress=talk.progress("fit"))
    for warning in report.warnings:
        talk.warn(warning)
    return report


def _dry_fit(store: FeatureStore, settings: SpectralSettings, folder: Path, talk: Talk) -> None:
    from cosettle_cache.training.frame_pairs import list_pairs
    from cosettle_cache.training.spectral import check_settings, choose_held_out

    check_settings(settings)
    pairs = list_pairs(store)
    held_out = choose_held_out(pairs.video_ids, settings)
    document = {
        "out": str(folder),
        "clips": len(held_out),
        "held_out": int(held_out.sum()),
        "pairs_of_frames": sum(map(len, pairs.groups)),
        "settings": asdict(settings),
    }
    talk.result(json.dumps(document, indent=2))


def _fit_lines(report: SpectralReport) -> list[str]:
    before, after = report.raw_measured, report.measured
    return [
        f"{report.folder / 'projection.safetensors'}: lambda {report.spectral_lambda:.4g}, "
        f"{report.n_directions} of {report.dim} directions, {report.n_differences} pairs of tokens, "
        f"{human_seconds(report.seconds)}",
        f"{report.n_held_out} clips held out: D_inter {before.d_inter:.4f} -> {after.d_inter:.4f}, "
        f"D_intra {before.d_intra:.4f} -> {after.d_intra:.4f}, margin {before.margin:.4f} -> "
        f"{after.margin:.4f} (predicted {report.raw_predicted.margin:.4f} -> {report.predicted.margin:.4f})",
    ]


@app.command()
@exits
def info(file: File, as_json: Json = False) -> None:
    """Print a projection's head, width, parameters, digest, singular values and provenance.

    Example: cosettle-cache projection info runs/store/projection.safetensors
    """
    from cosettle_cache.heads.projection import describe_projection

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
    from cosettle_cache.heads.projection import export_projection, exported_tensors

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
