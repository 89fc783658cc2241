"""`cosettle-cache train`: the projection on a store of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.options import Device, DryRun, Json, Quiet
from cosettle_cache.config import TrainSettings
from cosettle_cache.console import Talk, human_seconds
from cosettle_cache.errors import ExitCode

_DEFAULT = TrainSettings()


def train(
    features: Annotated[Path, typer.Option(help="A store of the pairs plan.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/STORE.")] = None,
    head: Annotated[str, typer.Option(help="linear, affine, mlp2 or mlp3.")] = _DEFAULT.head,
    regularizer: Annotated[str, typer.Option(help="kl or mse.")] = _DEFAULT.regularizer,
    temperature: Annotated[float, typer.Option(help="Of the cycle's transitions.")] = _DEFAULT.temperature,
    separability_weight: Annotated[
        float, typer.Option(help="Weight of the semantic-separability loss.")
    ] = _DEFAULT.separability_weight,
    window: Annotated[int, typer.Option(min=1, help="Tokens pooled per side.")] = _DEFAULT.window,
    epochs: Annotated[int, typer.Option(min=1, help="One view set of every clip each.")] = _DEFAULT.epochs,
    warmup_epochs: Annotated[float, typer.Option(min=0, help="Linear warm-up.")] = _DEFAULT.warmup_epochs,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = _DEFAULT.batch_size,
    base_lr: Annotated[float, typer.Option(help="Learning rate per 256 samples.")] = _DEFAULT.base_lr,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = _DEFAULT.weight_decay,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation and order.")] = _DEFAULT.seed,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.")] = _DEFAULT.checkpoint_every,
    device: Device = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Train Co-Settle's projection on stored tokens. Run it again to resume.

    Example: cosettle-cache train --features store.zarr
    """
    settings = TrainSettings(
        head=head,
        regularizer=regularizer,
        temperature=temperature,
        separability_weight=separability_weight,
        window=window,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        batch_size=batch,
        base_lr=base_lr,
        weight_decay=weight_decay,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    return _train(features, out or Path("runs") / features.stem, settings, device, dry_run, as_json, quiet)


def _train(
    features: Path,
    out: Path,
    settings: TrainSettings,
    device: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    from cosettle_cache.cli.options import interruptible, pick_device
    from cosettle_cache.store import open_store
    from cosettle_cache.train import make_train_plan
    from cosettle_cache.train import train as train_room

    talk = Talk(quiet=quiet)
    store = open_store(features)
    plan = make_train_plan(store, settings)
    if dry_run:
        talk.result(json.dumps({"out": str(out), **plan.to_json()}, indent=2))
        return int(ExitCode.DONE)
    talk.note(f"{out}: {settings.head} head, {plan.n_steps} steps of {plan.batch_size} samples of {features}")
    for warning in plan.warnings:
        talk.warn(warning)
    with interruptible(talk, "step") as stop:
        report = train_room(
            store, settings, out, device=pick_device(device), progress=talk.progress("train"), stop=stop
        )
    if as_json:
        talk.result(json.dumps(report.to_json(), indent=2))
    elif report.interrupted:
        talk.result(
            f"{out}: stopped after {report.steps_before + report.steps} of {plan.n_steps} steps; run again"
        )
    elif report.steps == 0:
        talk.result(f"{out / 'projection.safetensors'}: all {plan.n_steps} steps were done already")
    else:
        talk.result(
            f"{out / 'projection.safetensors'}: {report.steps} steps, {report.samples} samples, "
            f"{human_seconds(report.seconds)}, cycle accuracy "
            f"{report.first_cycle_accuracy:.3f} -> {report.last_cycle_accuracy:.3f}"
        )
        talk.result(f"curves: {out / 'curves.png'}")
    return int(ExitCode.INTERRUPTED if report.interrupted else ExitCode.DONE)
