"""`cosettle-cache train`: projections on stored samples, one or a sweep of them.

`cosettle-cache projection`: make the closed-form head, look into any, write the authors' layout or the hub.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.options import Device, DryRun, Json, Mode, Work, exits
from cosettle_cache.core.console import SILENT, Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, UsageError
from cosettle_cache.core.files import store_title
from cosettle_cache.core.settings import LinearSettings, SpectralSettings, TrainSettings
from cosettle_cache.heads.table import find_head

if TYPE_CHECKING:
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.training.log import TrainReport
    from cosettle_cache.training.plan import TrainPlan

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make the closed-form head; look into, export and push any.",
)

File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A projection, or the authors' checkpoint; or hf:OWNER/NAME/FILE."),
]


@app.callback()
def group() -> None:
    """Make the closed-form head; look into, export and push any."""


def fit(
    features: Annotated[str, typer.Option(help="A store of either plan, local or at a URL.")],
    linear: LinearSettings,
    settings: SpectralSettings,
    work: Work,
    mode: Mode,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/STORE-HEAD.")] = None,
    device: Device = None,
) -> None:
    """Compute a head without training: by default a soft threshold on what changes within clips.

    `debias` takes out the position that one black image shows, `pca` keeps components, `whiten` levels them.

    Example: cosettle-cache projection fit --features store.zarr --head debias --components 20
    """
    from cosettle_cache.core.cluster import work_on
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.store import open_store
    from cosettle_cache.training.spectral import fit_spectral, plan_spectral

    talk, store = Talk(quiet=mode.quiet), open_store(features)
    folder = out or Path("runs") / f"{store_title(features)}-{linear.head}"
    if linear.head != "spectral":
        _fit_linear(store, linear, settings, folder, work, mode, device)
        return
    if mode.dry_run:
        talk.json({"out": str(folder), **plan_spectral(store, settings)})
        return
    talk.note(f"{folder}: spectral head, {settings.correspondence} correspondence, from {store.path}")
    with work_on(work.workers, work.scheduler, note=talk.note) as run:
        report = fit_spectral(
            store, settings, folder, device=pick_device(device), run=run, progress=talk.progress("fit")
        )
    for warning in report.warnings:
        talk.warn(warning)
    before, after = report.raw_measured, report.measured
    text = (
        f"{report.folder / 'projection.safetensors'}: lambda {report.spectral_lambda:.4g}, "
        f"{report.n_directions} of {report.dim} directions, {report.n_differences} pairs of tokens, "
        f"{human_seconds(report.seconds)}\n"
        f"{report.n_held_out} clips held out: D_inter {before.d_inter:.4f} -> {after.d_inter:.4f}, "
        f"D_intra {before.d_intra:.4f} -> {after.d_intra:.4f}, margin {before.margin:.4f} -> "
        f"{after.margin:.4f} (predicted {report.raw_predicted.margin:.4f} -> {report.predicted.margin:.4f})"
    )
    talk.result(json.dumps(report.to_json(), indent=2) if mode.as_json else text)


def _fit_linear(
    store: FeatureStore,
    linear: LinearSettings,
    spectral: SpectralSettings,
    folder: Path,
    work: Work,
    mode: Mode,
    device: str | None,
) -> None:
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.training.closed_form import check_components, fit_linear

    if spectral != SpectralSettings() or work.workers or work.scheduler:
        raise UsageError(f"the head {linear.head} has no setting of the spectral one", wanted="--components")
    check_components(linear, store.arrays[0].n_channels)
    if mode.dry_run:
        Talk().json({"out": str(folder), "settings": asdict(linear)})
        return
    talk = Talk(quiet=mode.quiet)
    report = fit_linear(store, linear, folder, device=pick_device(device), progress=talk.progress("fit"))
    text = (
        f"{folder / 'projection.safetensors'}: {linear.head}, {report.n_components} of {report.dim} "
        f"components with {100 * report.share:.1f} % of the variance, {report.n_tokens} tokens, "
        f"{human_seconds(report.seconds)}"
    )
    talk.result(json.dumps(report.to_json(), indent=2) if mode.as_json else text)


#: `train --head spectral` calls the function itself.
app.command("fit")(exits(fit))


@app.command()
@exits
def info(file: File, as_json: Json = False) -> None:
    """Print a projection's head, width, parameters, digest, singular values and provenance.

    Example: cosettle-cache projection info runs/store/projection.safetensors
    """
    from cosettle_cache.heads.projection import describe_projection

    found = describe_projection(file)
    lines = [f"layout: {found.layout}", f"head: {found.head}", f"dim: {found.dim}"]
    lines += [f"parameters: {found.n_parameters}", f"sha256: {found.sha256}"]
    for number, values in enumerate(found.singular_values, 1):
        lines.append(
            f"linear {number}: singular values {values.largest:.4g} (largest), {values.median:.4g} (median), "
            f"{values.smallest:.4g} (smallest), rank {values.rank} of {found.dim}"
        )
    lines += [f"{key}: {text}" for key, text in found.provenance.items()]
    Talk().result(json.dumps(asdict(found), indent=2) if as_json else "\n".join(lines))


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


@app.command()
@exits
def push(
    file: File,
    repository: Annotated[
        str, typer.Argument(metavar="hf:OWNER/NAME", help="Made if it is not there; one projection each.")
    ],
    scores: Annotated[
        list[Path] | None, typer.Option(help="Folder of propagate, for the card; repeatable.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a projection to the hub, with a card: what it was trained on, scores, command.

    Example: cosettle-cache projection push runs/store/projection.safetensors hf:me/mae-b-k400
    """
    from cosettle_cache.core.hub import parse_repository
    from cosettle_cache.heads.card import make_card, push_projection

    talk, repository = Talk(), parse_repository(repository)
    if dry_run:
        talk.result(make_card(file, repository, scores or ()))
        return
    talk.result(push_projection(file, repository, scores or (), private=private))


def train(
    features: Annotated[list[str], typer.Option(help="A store with shifted views; repeat for more.")],
    settings: TrainSettings,
    mode: Mode,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/STORE.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE,VALUE; repeat for all combinations.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help=f"Samples read in one go; default {TrainSettings().batch_size}.")
    ] = None,
    spectral_lambda: Annotated[float | None, typer.Option(help="Default: by the margin.")] = None,
    correspondence: Annotated[str, typer.Option(help="Spectral: nearest, position.")] = "nearest",
    cache_dir: Annotated[Path | None, typer.Option(help="For shards of remote stores.")] = None,
    tracker: Annotated[
        str, typer.Option(help="tensorboard (auto, if installed), wandb, trackio or none.")
    ] = "auto",
    device: Device = None,
) -> int:
    """Train Co-Settle's projection on stored tokens. Run it again to resume.

    Example: cosettle-cache train --features store.zarr --sweep window=1,2
    """
    from cosettle_cache.core.parallel import pick_device

    talk = Talk(quiet=mode.quiet)
    settings = replace(settings, batch_size=batch or settings.batch_size)
    if find_head(settings.head).closed_form:
        _check_computed(features, settings, sweep or [], tracker)
        spectral = SpectralSettings(correspondence, spectral_lambda, seed=settings.seed)
        fit(features[0], LinearSettings(settings.head), spectral, Work(), mode, out, device)
        return ExitCode.DONE

    from cosettle_cache.store import open_store
    from cosettle_cache.training import run as room
    from cosettle_cache.training.batches import join_replicas
    from cosettle_cache.training.plan import make_train_plan, parse_axis
    from cosettle_cache.training.trackers import find_tracker

    find_tracker(tracker)
    axes = [parse_axis(text) for text in sweep or []]
    stores = [open_store(path, cache_dir=cache_dir) for path in features]
    plan = make_train_plan(stores, settings, axes, must_fill=batch is not None)
    folder = out or Path("runs") / store_title(features[0])
    if mode.dry_run:
        talk.json({"out": str(folder), **plan.to_json()})
        return ExitCode.DONE
    with join_replicas(pick_device(device)) as (replicas, place), interruptible(talk, "step") as stop:
        if replicas.is_first:
            _announce(talk, plan, settings.head, folder, features)
        bar = talk.progress("train") if replicas.is_first else SILENT
        report = room.train(
            stores,
            settings,
            folder,
            sweep=axes,
            device=place,
            progress=bar,
            stop=stop,
            replicas=replicas,
            tracker=tracker,
        )
        if replicas.is_first:
            _tell(talk, report, plan, mode.as_json)
    if report.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.UNCLEAN if report.diverged else ExitCode.DONE


def _check_computed(features: list[str], settings: TrainSettings, sweep: list[str], tracker: str) -> None:
    default = asdict(TrainSettings(head=settings.head, seed=settings.seed))
    useless = [name for name, value in asdict(settings).items() if value != default[name]]
    useless += [] if tracker in ("auto", "none") else ["tracker"]
    if len(features) > 1 or sweep or useless:
        raise UsageError(
            f"the {settings.head} head is computed from one store, without training",
            wanted="one --features, no --sweep, no setting of training",
            found=", ".join([f"{len(features)} stores", f"{len(sweep)} axes", *useless]),
        )


def _announce(talk: Talk, plan: TrainPlan, head: str, folder: Path, features: list[str]) -> None:
    heads = f"{len(plan.members)} members" if plan.members[0] else f"{head} head"
    steps = f"{plan.n_steps} steps of {plan.batch_size} samples"
    talk.note(f"{folder}: {heads}, {steps} of {' and '.join(features)}")
    if plan.n_held_out:
        talk.note(f"{plan.n_held_out} of {plan.n_clips} clips are held out for validation")
    if plan.n_dropped:
        left_out = plan.n_dropped / plan.epochs
        talk.note(f"{left_out:.3g} samples of an epoch fill no batch and are left out, others in each epoch")
    for warning in plan.warnings:
        talk.warn(warning)


def _tell(talk: Talk, report: TrainReport, plan: TrainPlan, as_json: bool) -> None:
    for member in report.diverged:
        talk.warn(f"{member.name} diverged at step {member.diverged_at} and has no projection")
    steps = report.steps_before + report.steps
    result = report.folder / ("sweep.json" if report.members[0].name else "projection.safetensors")
    if as_json:
        talk.json(report.to_json())
    elif report.interrupted:
        talk.result(f"{report.folder}: stopped after {steps} of {plan.n_steps} steps; run again")
    elif report.steps == 0:
        talk.result(f"{result}: all {plan.n_steps} steps were done already")
    else:
        _tell_figures(talk, report, result)


def _tell_figures(talk: Talk, report: TrainReport, result: Path) -> None:
    from cosettle_cache.training.log import comparison

    member, is_sweep = report.members[0], bool(report.members[0].name)
    done = f"{report.steps} steps, {report.samples} samples, {human_seconds(report.seconds)}"
    if not is_sweep and report.first and report.last:
        done += f", cycle accuracy {report.first.cycle_accuracy:.3f} -> {report.last.cycle_accuracy:.3f}"
    talk.result(f"{result}: {done}")
    speed = f"{report.samples_per_s:.1f} samples/s, {human_bytes(report.read_bytes / report.seconds)}/s"
    talk.result(f"{speed}, {100 * report.waiting_share:.1f} % of the time waiting for data")
    if is_sweep:
        talk.table("members of the sweep, best first", *comparison(report.members))
    elif member.first_validation and member.last_validation:
        first, last = member.first_validation, member.last_validation
        talk.result(
            f"held-out clips: cycle accuracy {first.cycle_accuracy:.3f} -> {last.cycle_accuracy:.3f}, "
            f"margin {first.margin:.4f} -> {last.margin:.4f}"
        )
    talk.result(f"curves: {report.folder / 'curves.png'}")
