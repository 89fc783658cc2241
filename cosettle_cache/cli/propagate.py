"""`cosettle-cache propagate`: labels of the first frame through stored tokens, and the scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DataRoot,
    Device,
    DryRun,
    FramesStoreOrNone,
    Json,
    Projections,
    Quiet,
    Scheduler,
    Weights,
    Workers,
    finish,
    open_features,
)
from cosettle_cache.core.console import Talk, human_bytes, human_seconds, interruptible
from cosettle_cache.core.errors import ExitCode, InputError, UsageError
from cosettle_cache.core.files import store_title
from cosettle_cache.core.settings import FITTING_SIZE, PropagateSettings
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.protocols import make_protocol
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
    workers: Workers = 0,
    scheduler: Scheduler = None,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="Of an encoder run on the way.")] = "fp32",
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Propagate first-frame labels, raw and projected, and score them. Finished videos are kept.

    Example: cosettle-cache propagate --task davis --features davis.zarr
    """
    given = dict(locals())
    talk = Talk(quiet=quiet)
    chosen = make_protocol(protocol, task=find_task(task).name, **_overrides(override or []))
    heads = list(projection or ())
    if dry_run:
        _print_plan(given, chosen, talk)
        return int(ExitCode.DONE)

    from cosettle_cache.core.cluster import pick_device, work_on
    from cosettle_cache.extraction.jobs import StoreWish
    from cosettle_cache.heads.kinds import default_projection, load_heads
    from cosettle_cache.metrics.rows import CHART_FILE, CHART_SVG, remove_scores, write_scores
    from cosettle_cache.propagation.run import propagate_store, write_score_chart

    wish = StoreWish(
        task, chosen.size, backbone, weights, data_root, device, precision, workers, scheduler, chosen.red_std
    )
    if features is None:
        store, root, failures = _make_store(wish, manifest, talk)
        heads = heads or default_projection(store, talk)
    else:
        store, root, failures = _open_store(wish, chosen, features, cache_dir, cache_size)
    # The protocol stands in the name where it is not the default.
    mark = "" if chosen == make_protocol(task=task) else "-" + re.sub("[ /:]+", "-", chosen.name)
    out = out or Path("runs") / f"{task}-{store_title(store.path)}{mark}"
    projections = load_heads(heads, store)
    talk.note(f"protocol: {json.dumps(chosen.to_json())}")

    def start(n_finished: int) -> None:
        # Figures of an earlier run must not pass for those of a run that fails.
        remove_scores(out)
        if n_finished:
            talk.note(f"{out}: {n_finished} of {len(store.manifest)} videos are finished already")

    with (
        interruptible(talk, "videos") as stop,
        # A video keeps all cores of its worker busy: one at a time.
        work_on(workers, scheduler, device, threads=1, stop=stop, note=talk.note) as runner,
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
        )
    write_scores(out, report.scores, complete=not (report.interrupted or report.error))
    failures |= report.failures
    _print(report, out, failures, talk, as_json=as_json)
    if settings.overlays != "none":
        write_score_chart(report.scores, out / CHART_FILE, out / CHART_SVG)
    return finish(report, failures)


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
    wish: StoreWish, protocol: EvalProtocol, features: str, cache_dir: Path | None, cache_size: str
) -> tuple[FeatureStore, Path, dict[str, str]]:
    """Return the store at `features`, the root of its media, and what failed when it was made."""
    from cosettle_cache.core.files import is_url
    from cosettle_cache.propagation.run import check_store
    from cosettle_cache.videos.find import media_root

    if (wish.workers or wish.scheduler) and not is_url(features):
        features = str(Path(features).absolute())
    store = open_features(features, cache_dir, cache_size)
    check_store(store, protocol)
    return store, media_root(store.manifest, wish.data_root), dict(store.failures)


def _print_plan(given: dict[str, Any], protocol: EvalProtocol, talk: Talk) -> None:
    """Print what was asked for, after a look at the files that it names."""
    if given["features"] is not None:
        open_features(given["features"], None, given["cache_size"])
    for path in [*(given["projection"] or ()), given["manifest"]]:
        if path is not None and not path.exists():
            raise InputError(f"{path} does not exist", wanted="a file")
    left_out = ("protocol", "override", "settings", "dry_run", "as_json", "quiet")
    options = {name: value for name, value in given.items() if name not in left_out}
    document = {"protocol": protocol.to_json(), **options, **asdict(given["settings"])}
    talk.result(json.dumps(document, indent=2, default=str))


def _print(
    report: PropagationReport, out: Path, failures: Mapping[str, str], talk: Talk, *, as_json: bool
) -> None:
    from cosettle_cache.metrics.rows import score_table, summary_json

    if as_json:
        complete = not (report.interrupted or report.error)
        document = {"complete": complete, "out": str(out), "failures": failures}
        talk.result(json.dumps({**document, **summary_json(report.scores)}, indent=2))
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
        kind = kinds.get(key, "str")
        try:
            found[key] = parsers.get(kind, str)(text)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{key} cannot be {text!r}", wanted=f"a value of type {kind}") from error
    return found
