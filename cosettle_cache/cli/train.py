"""`cosettle-cache train`: projections on stored samples, one or a sweep of them.

`cosettle-cache projection`: make the closed-form head, look into any, write the authors' layout.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cosettle_cache.cli.options import (
    Device,
    DryRun,
    Json,
    Quiet,
    Scheduler,
    Workers,
    exits,
)
from cosettle_cache.core.cluster import pick_device, work_on
from cosettle_cache.core.console import Talk, human_bytes, human_seconds
from cosettle_cache.core.errors import ExitCode, UsageError
from cosettle_cache.core.files import store_title
from cosettle_cache.core.settings import SpectralSettings, TrainSettings

if TYPE_CHECKING:
    from cosettle_cache.core.parallel import Run
    from cosettle_cache.heads.projection import ProjectionInfo
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.training.run import TrainPlan, TrainReport
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
    with work_on(workers, scheduler, note=talk.note) as run:
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


_DEFAULT = TrainSettings()


@dataclass(frozen=True, slots=True)
class _Request:
    """What was typed; `must_fill` says that the batch was."""

    features: list[str]
    out: Path
    settings: TrainSettings
    sweep: list[str]
    cache_dir: Path | None
    device: str | None
    must_fill: bool

    def check_batch(self, plan: TrainPlan) -> None:
        """Raise `UsageError` when the batch that was asked for is larger than an epoch."""
        wanted = self.settings.step_samples
        if self.must_fill and plan.batch_size < wanted:
            raise UsageError(
                "the batch is larger than an epoch, which visits one sample of every clip",
                wanted=f"--batch times --accumulate of at most {plan.batch_size}",
                found=wanted,
            )


def train(
    features: Annotated[
        list[str],
        typer.Option(help="A store with shifted views; repeat for more."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/STORE.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE; repeat for all combinations."),
    ] = None,
    head: Annotated[str, typer.Option(help="linear, affine, mlp2, mlp3, spectral.")] = _DEFAULT.head,
    regularizer: Annotated[str, typer.Option(help="kl, mse or cosine.")] = _DEFAULT.regularizer,
    reduction: Annotated[str, typer.Option(help="released or token-mean.")] = _DEFAULT.reduction,
    temperature: Annotated[float, typer.Option(help="Of the cycle's transitions.")] = _DEFAULT.temperature,
    separability_weight: Annotated[str, typer.Option(help="Of its loss, or auto.")] = str(
        _DEFAULT.separability_weight
    ),
    gradient_ratio: Annotated[float, typer.Option(help="With auto.")] = _DEFAULT.gradient_ratio,
    window: Annotated[int, typer.Option(min=1, help="Tokens pooled per side.")] = _DEFAULT.window,
    epochs: Annotated[int, typer.Option(min=1, help="One sample of every clip each.")] = _DEFAULT.epochs,
    warmup_epochs: Annotated[float, typer.Option(min=0, help="Linear warm-up.")] = _DEFAULT.warmup_epochs,
    batch: Annotated[
        int | None, typer.Option(min=1, help=f"Samples read in one go; default {_DEFAULT.batch_size}.")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = _DEFAULT.accumulate,
    base_lr: Annotated[float, typer.Option(help="Per 256 samples of a step.")] = _DEFAULT.base_lr,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = _DEFAULT.weight_decay,
    clip_gradient: Annotated[float, typer.Option(min=0, help="Its length; 0: any.")] = _DEFAULT.clip_gradient,
    precision: Annotated[str, typer.Option(help="float32, bf16 or fp16.")] = _DEFAULT.precision,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and order.")] = _DEFAULT.seed,
    order: Annotated[str, typer.Option(help="samples, or shards (URLs).")] = _DEFAULT.order,
    shard_window: Annotated[int, typer.Option(min=1, help="Shards to mix.")] = _DEFAULT.shard_window,
    validation: Annotated[float, typer.Option(help="Share of clips held out.")] = _DEFAULT.validation,
    palindrome: Annotated[int, typer.Option(min=2, help="Frames of a walk.")] = _DEFAULT.palindrome,
    gap: Annotated[float, typer.Option(help="Share of a clip, in frames stores.")] = _DEFAULT.gap,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.")] = _DEFAULT.checkpoint_every,
    spectral_lambda: Annotated[float | None, typer.Option(help="Default: by the margin.")] = None,
    correspondence: Annotated[
        str, typer.Option(help="Spectral: nearest, position.")
    ] = _SPECTRAL.correspondence,
    cache_dir: Annotated[Path | None, typer.Option(help="For shards of remote stores.")] = None,
    device: Device = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train Co-Settle's projection on stored tokens. Run it again to resume.

    Example: cosettle-cache train --features store.zarr --sweep window=1,2
    """
    settings = TrainSettings(
        head=head,
        regularizer=regularizer,
        reduction=reduction,
        temperature=temperature,
        separability_weight=_weight(separability_weight),
        gradient_ratio=gradient_ratio,
        window=window,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        batch_size=batch or _DEFAULT.batch_size,
        accumulate=accumulate,
        base_lr=base_lr,
        weight_decay=weight_decay,
        clip_gradient=clip_gradient,
        precision=precision,
        seed=seed,
        order=order,
        shard_window=shard_window,
        validation=validation,
        palindrome=palindrome,
        gap=gap,
        checkpoint_every=checkpoint_every,
    )
    if head == "spectral":
        _check_spectral(features, settings, sweep)
        fit(
            features[0],
            out=out,
            correspondence=correspondence,
            spectral_lambda=spectral_lambda,
            seed=seed,
            device=device,
            dry_run=dry_run,
            as_json=as_json,
            quiet=quiet,
        )
    request = _Request(
        features=features,
        out=out or Path("runs") / store_title(features[0]),
        settings=settings,
        sweep=sweep or [],
        cache_dir=cache_dir,
        device=device,
        must_fill=batch is not None,
    )
    return _train(request, Talk(quiet=quiet), dry_run, as_json)


def _check_spectral(features: list[str], settings: TrainSettings, sweep: list[str] | None) -> None:
    default = TrainSettings(head=settings.head, seed=settings.seed)
    names = [field.name for field in fields(default)]
    useless = [name for name in names if getattr(settings, name) != getattr(default, name)]
    if len(features) > 1 or sweep or useless:
        raise UsageError(
            "the spectral head is computed from one store, without training",
            wanted="one --features, no --sweep, no setting of training",
            found=", ".join([f"{len(features)} stores", f"{len(sweep or [])} axes", *useless]),
        )


def _weight(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise UsageError("no separability weight", wanted="a number or auto", found=text) from error


def _train(request: _Request, talk: Talk, dry_run: bool, as_json: bool) -> int:
    from cosettle_cache.core.cluster import pick_device
    from cosettle_cache.core.console import SILENT, interruptible
    from cosettle_cache.store import open_store
    from cosettle_cache.training.batches import join_replicas
    from cosettle_cache.training.plan import parse_axis
    from cosettle_cache.training.run import make_train_plan
    from cosettle_cache.training.run import train as train_room

    axes = [parse_axis(text) for text in request.sweep]
    stores = [open_store(path, cache_dir=request.cache_dir) for path in request.features]
    plan = make_train_plan(stores, request.settings, axes)
    request.check_batch(plan)
    if dry_run:
        talk.result(json.dumps({"out": str(request.out), **plan.to_json()}, indent=2))
        return int(ExitCode.DONE)
    with join_replicas(pick_device(request.device)) as (replicas, place), interruptible(talk, "step") as stop:
        if replicas.is_first:
            _announce(talk, request, plan)
        report = train_room(
            stores,
            request.settings,
            request.out,
            sweep=axes,
            device=place,
            progress=talk.progress("train") if replicas.is_first else SILENT,
            stop=stop,
            replicas=replicas,
        )
        if replicas.is_first:
            _tell(talk, report, plan, as_json)
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.UNCLEAN if report.diverged else ExitCode.DONE)


def _announce(talk: Talk, request: _Request, plan: TrainPlan) -> None:
    heads = f"{len(plan.members)} members" if plan.members[0] else f"{request.settings.head} head"
    stores = " and ".join(request.features)
    talk.note(f"{request.out}: {heads}, {plan.n_steps} steps of {plan.batch_size} samples of {stores}")
    if plan.n_held_out:
        talk.note(f"{plan.n_held_out} of {plan.n_clips} clips are held out for validation")
    if plan.n_dropped:
        left_out = plan.n_dropped / plan.epochs
        talk.note(f"{left_out:.3g} samples of an epoch fill no batch and are left out, others in each epoch")
    for warning in plan.warnings:
        talk.warn(warning)


def _tell(talk: Talk, report: TrainReport, plan: TrainPlan, as_json: bool) -> None:
    steps = report.steps_before + report.steps
    for member in report.diverged:
        talk.warn(f"{member.name} diverged at step {member.diverged_at} and has no projection")
    if as_json:
        talk.result(json.dumps(report.to_json(), indent=2))
    elif report.interrupted:
        talk.result(f"{report.folder}: stopped after {steps} of {plan.n_steps} steps; run again")
    elif report.steps == 0:
        talk.result(f"{_result(report)}: all {plan.n_steps} steps were done already")
    else:
        _tell_result(talk, report)


def _tell_result(talk: Talk, report: TrainReport) -> None:
    done = f"{report.steps} steps, {report.samples} samples, {human_seconds(report.seconds)}"
    first, last = report.first, report.last
    if not report.members[0].name and first and last:
        done += f", cycle accuracy {first.cycle_accuracy:.3f} -> {last.cycle_accuracy:.3f}"
    talk.result(f"{_result(report)}: {done}")
    speed = f"{report.samples_per_s:.1f} samples/s, {human_bytes(report.read_bytes / report.seconds)}/s"
    talk.result(f"{speed}, {100 * report.waiting_share:.1f} % of the time waiting for data")
    _tell_members(talk, report)
    talk.result(f"curves: {report.folder / 'curves.png'}")


def _result(report: TrainReport) -> Path:
    is_sweep = bool(report.members[0].name)
    return report.folder / ("sweep.json" if is_sweep else "projection.safetensors")


def _tell_members(talk: Talk, report: TrainReport) -> None:
    from cosettle_cache.training.log import comparison

    if report.members[0].name:
        talk.table("members of the sweep, best first", *comparison(report.members))
        return
    (member,) = report.members
    if member.first_validation and member.last_validation:
        first, last = member.first_validation, member.last_validation
        talk.result(
            f"held-out clips: cycle accuracy {first.cycle_accuracy:.3f} -> {last.cycle_accuracy:.3f}, "
            f"margin {first.margin:.4f} -> {last.margin:.4f}"
        )
