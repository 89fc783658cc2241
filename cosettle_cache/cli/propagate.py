"""`cosettle-cache propagate` and `protocols`: first-frame labels through stored tokens, scores, presets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.options import (
    Cache,
    DataRoot,
    Device,
    FramesStoreOrNone,
    Json,
    Mode,
    Projections,
    Weights,
    Work,
    finish,
)
from cosettle_cache.core.console import Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, InputError, UsageError
from cosettle_cache.core.files import is_url, store_title
from cosettle_cache.core.hub import parse_name
from cosettle_cache.core.settings import FITTING_SIZE, PropagateSettings
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.heads.table import split_share
from cosettle_cache.propagation.protocols import list_presets, make_protocol
from cosettle_cache.propagation.tasks import TASKS, find_task

if TYPE_CHECKING:
    from cosettle_cache.extraction.jobs import StoreWish
    from cosettle_cache.propagation import PropagationReport
    from cosettle_cache.store import FeatureStore


def propagate(
    task: Annotated[
        str,
        typer.Option(
            metavar=f"[{'|'.join(TASKS)}]", help="A benchmark, or masks: one's own clips, each with a mask."
        ),
    ],
    settings: PropagateSettings,
    work: Work,
    cache: Cache,
    mode: Mode,
    features: FramesStoreOrNone = None,
    projection: Projections = None,
    protocol: Annotated[str, typer.Option(help="Preset.")] = "cosettle",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Protocol field, as top_k=10; repeatable.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder of a store made on the way.")] = None,
    weights: Weights = None,
    data_root: DataRoot = None,
    manifest: Annotated[Path | None, typer.Option(help="Videos of a store made on the way.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for predictions, overlays, scores.")] = None,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="Of an encoder run on the way.")] = "fp32",
) -> int:
    """Propagate first-frame labels, raw and projected, and score them. Finished videos are kept.

    Example: cosettle-cache propagate --task davis --features davis.zarr
    """
    talk = Talk(quiet=mode.quiet)
    chosen = make_protocol(protocol, task=find_task(task).name, **_overrides(override or []))
    heads = list(projection or ())
    if mode.dry_run:
        # After a look at the files that are named.
        if features is not None:
            replace(cache, cache_dir=None).open(features)
        for path in filter(None, [*(split_share(head)[0] for head in heads), manifest]):
            if parse_name(path) is None and not path.exists():
                raise InputError(f"{path} does not exist", wanted="a file")
        wanted: dict[str, Any] = {
            "task": task,
            "features": features,
            "projection": projection,
            "backbone": backbone,
            "weights": weights,
            "data_root": data_root,
            "manifest": manifest,
            "out": out,
            "device": device,
            "precision": precision,
        }
        told = asdict(work) | asdict(cache) | asdict(settings)
        talk.json({"protocol": chosen.to_json(), **wanted, **told})
        return ExitCode.DONE

    from cosettle_cache.core.cluster import work_on
    from cosettle_cache.core.parallel import pick_device
    from cosettle_cache.heads.kinds import default_projection, load_heads
    from cosettle_cache.metrics.rows import CHART_FILE, CHART_SVG
    from cosettle_cache.propagation.run import propagate_store, write_score_chart

    if features is None:
        # An encoder brings in timm and torchvision: seconds, and 200 MB, that a store at hand does without.
        from cosettle_cache.extraction.jobs import StoreWish

        encoder = (backbone, weights, data_root, device, precision)
        views = (chosen.red_std, chosen.resampling)
        wish = StoreWish(task, chosen.size, *encoder, work.workers, work.scheduler, *views)
        store, root, failures = _make_store(wish, manifest, talk)
        heads = heads or default_projection(store, talk)
    else:
        store, root, failures = _open_store(features, chosen, data_root, work, cache)
    # The protocol stands in the name where it is not the default.
    mark = "" if chosen == make_protocol(task=task) else "-" + re.sub("[ /:]+", "-", chosen.name)
    out = out or Path("runs") / f"{task}-{store_title(store.path)}{mark}"
    projections = load_heads(heads, store)
    talk.note(f"protocol: {json.dumps(chosen.to_json())}")

    def start(n_finished: int) -> None:
        if n_finished:
            talk.note(f"{out}: {n_finished} of {len(store.manifest)} videos are finished already")

    with (
        interruptible(talk, "videos") as stop,
        # A video keeps all cores of its worker busy: one at a time.
        work_on(work.workers, work.scheduler, device, threads=1, stop=stop, note=talk.note) as runner,
    ):
        report = propagate_store(
            store,
            root,
            chosen,
            out,
            settings,
            task=task,
            projections=projections,
            device=device if runner else pick_device(device),
            runner=runner,
            progress=talk.progress("propagate"),
            stop=stop,
            on_start=start,
            earlier_failures=failures,
        )
    _print(report, out, talk, as_json=mode.as_json)
    if settings.overlays != "none":
        write_score_chart(report.scores, out / CHART_FILE, out / CHART_SVG)
    return finish(report, report.failures)


def _make_store(
    wish: StoreWish, manifest: Path | None, talk: Talk
) -> tuple[FeatureStore, Path, dict[str, str]]:
    """Return a store that is filled for the task, the root of its media, and what failed on the way."""
    from cosettle_cache.extraction.jobs import make_store
    from cosettle_cache.store import open_store
    from cosettle_cache.videos.find import evaluation_data, manifest_data

    if manifest is None:
        data = evaluation_data(TASKS[wish.task].folder, wish.data_root, talk)
    else:
        data = manifest_data(manifest, wish.data_root)
    try:
        path, failures = make_store(wish, data, talk)
    except InputError as error:
        if error.hint is not None and error.hint.startswith("--size "):
            error.hint = f"--set size={FITTING_SIZE}, or a multiple of the patch as HEIGHTxWIDTH"
        raise
    return open_store(path), data.root, failures


def _open_store(
    features: str, protocol: EvalProtocol, data_root: Path | None, work: Work, cache: Cache
) -> tuple[FeatureStore, Path, dict[str, str]]:
    """Return the store at `features`, the root of its media, and what failed when it was made."""
    from cosettle_cache.propagation.run import check_store
    from cosettle_cache.videos.find import media_root

    if (work.workers or work.scheduler) and not is_url(features):
        features = str(Path(features).absolute())
    store = cache.open(features)
    check_store(store, protocol)
    return store, media_root(store.manifest, data_root), dict(store.failures)


def _print(report: PropagationReport, out: Path, talk: Talk, *, as_json: bool) -> None:
    from cosettle_cache.metrics.rows import score_table, summary_json

    if as_json:
        document = {"complete": report.complete, "out": str(out), "failures": dict(report.failures)}
        talk.json({**document, **summary_json(report.scores)})
        return
    if report.scores:
        header, rows = score_table(report.scores)
        talk.table(
            f"{report.scores[0].protocol}, {report.scores[0].provenance.dataset}: percent", header, rows
        )
    else:
        talk.note("nothing was scored: no video is annotated beyond its first frame")
    if report.n_reused:
        talk.note(
            f"neighbours of {report.n_reused} videos (each kind of tokens counts) were read, not searched"
        )
    talk.result(
        f"{report.n_frames} frames in {human_seconds(report.seconds)}, "
        f"peak memory {human_bytes(report.peak_memory_bytes)}"
    )
    talk.result(f"predictions, overlays and scores: {out}")


def _overrides(pairs: list[str]) -> dict[str, object]:
    kinds = {item.name: str(item.type) for item in fields(EvalProtocol)}
    parsers: dict[str, Callable[[str], object]] = {
        "int": int,
        "float": float,
        "bool": lambda text: {"true": True, "false": False}[text.lower()],
    }
    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} sets nothing", wanted="FIELD=VALUE, as top_k=10")
        if key in ("name", "task"):
            raise UsageError(f"{key} is no field to set", hint="--protocol and --task choose the preset")
        kind = kinds.get(key, "str")
        try:
            found[key] = parsers.get(kind, str)(text)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{key} cannot be {text!r}", wanted=f"a value of type {kind}") from error
    return found


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
        talk.json(documents)
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
