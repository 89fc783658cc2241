"""`cosettle-cache store`: what is in a store, whether its bytes are right, mending it, copying it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import DryRun, Json, Mode, Quiet, exits
from cosettle_cache.core.console import Talk, human_bytes, interruptible
from cosettle_cache.core.errors import ExitCode

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into, check, mend and copy stores.")

Store = Annotated[str, typer.Argument(metavar="STORE", help="A folder or a URL.")]

_AGAIN = "; interrupted, run it again to go on"


@app.command()
@exits
def info(store: Store, as_json: Json = False) -> None:
    """Print a store's plan, fingerprint, slots, bytes and failed videos.

    Example: cosettle-cache store info store.zarr
    """
    from cosettle_cache.store import open_store, store_summary

    summary = store_summary(open_store(store))
    lines = [
        "{path}: {plan_kind} plan, {n_videos} videos, ".format(**summary) + human_bytes(summary["n_bytes"]),
        "slots: {n_slots} = {n_done} done, {n_failed} failed, {n_todo} to do".format(**summary),
        "encodings: {n_present} of {n_encodings} present, {n_failed_encodings} failed".format(**summary),
    ]
    for array in summary["arrays"]:
        text = "array {grid}: {n_present} of {n_encodings} encodings, {n_channels} channels, {dtype}, "
        text += "codec {codec}, {n_slots} slots of "
        lines.append(text.format(**array) + human_bytes(array["slot_bytes"]))
    for title in ("fingerprint", "encoder"):
        lines.append(f"{title}:")
        for key, value in summary[title].items():
            lines.append(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")
    lines += [f"failed: {video_id}: {reason}" for video_id, reason in summary["failures"].items()]
    _show(summary, as_json, lines)


@app.command()
@exits
def verify(store: Store, as_json: Json = False, quiet: Quiet = False) -> int:
    """Check every byte of a store and name every damaged encoding; exit code 5 when there are any.

    Example: cosettle-cache store verify store.zarr
    """
    from cosettle_cache.store import verify_store

    talk = Talk(quiet=quiet)
    with interruptible(talk, "slots") as stop:
        report = verify_store(store, progress=talk.progress("verify"), stop=stop)
    slots = f"{report.n_verified} of {report.n_slots} slots checked, {human_bytes(report.n_bytes)} of shards"
    state = f"{len(report.damages)} damages" if report.damages else "no damage"
    todo = f", {report.n_todo} slots to do" if report.n_todo else ""
    lines = [f"note: {note}" for note in report.notes]
    lines.append(f"{report.path}: {state}; {slots}{todo}{_AGAIN * report.interrupted}")
    if report.damages:
        lines.append(f"hint: cosettle-cache store repair {report.path}, then the same extract command again")
    return _show(report, as_json, lines)


@app.command()
@exits
def repair(store: Store, dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False) -> int:
    """Restore damaged metadata and make damaged slots `todo`; the same extract command then encodes them.

    Example: cosettle-cache store repair store.zarr
    """
    from cosettle_cache.store import repair_store
    from cosettle_cache.store.format import MANIFEST

    talk = Talk(quiet=quiet)
    with interruptible(talk, "slots") as stop:
        report = repair_store(store, dry_run=dry_run, progress=talk.progress("verify"), stop=stop)
    mood = "would be " if dry_run else ""
    slots = f"{len(report.slots)} slots {mood or 'are '}to do again"
    lines = [f"{mood}restored: {name}" for name in report.restored]
    aside = "" if dry_run else ", set aside as a hidden .tmp file, which the next extraction deletes"
    lines += [f"{mood}removed: {name}{aside}" for name in report.removed]
    lines.append(f"{report.path}: {len(report.damages)} damages, {slots}{_AGAIN * report.interrupted}")
    if report.removed or any(damage.file == MANIFEST for damage in report.damages):
        lines.append("hint: the same extract command again brings back what is missing")
    _show(report, as_json, lines)
    return ExitCode.INTERRUPTED if report.interrupted else ExitCode.DONE


@app.command()
@exits
def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store: a folder or a URL.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Where to: a folder or a URL.")],
    mode: Mode,
) -> int:
    """Copy a store slot by slot, checking every byte. Run it again to go on; damaged slots are left out.

    Example: cosettle-cache store copy store.zarr s3://bucket/store.zarr
    """
    from cosettle_cache.store import copy_store, plan_copy

    if mode.dry_run:
        plan = plan_copy(source, target)
        n_slots, n_copied = plan["n_slots"], plan["n_slots"] - plan["n_there"]
        line = f"{n_copied} of {n_slots} slots to copy, {human_bytes(plan['n_bytes'])}"
        return _show(plan, mode.as_json, [line])
    talk = Talk(quiet=mode.quiet)
    with interruptible(talk, "slots") as stop:
        report = copy_store(source, target, progress=talk.progress("copy"), stop=stop)
    held = f", {report.n_held} being written by another process" if report.n_held else ""
    left_out = len({damage.slot for damage in report.damages})
    damaged = f", {left_out} damaged and left out" if left_out else ""
    copied = f"{report.n_copied} slots copied, {human_bytes(report.n_bytes)}"
    there = f"{report.n_there} of {report.n_slots} were there already"
    lines = [f"{report.target}: {copied}; {there}{held}{damaged}{_AGAIN * report.interrupted}"]
    if report.damages:
        lines.append(f"hint: cosettle-cache store repair {report.source}, then extract and copy once more")
    return _show(report, mode.as_json, lines)


def _show(report: Any, as_json: bool, lines: Iterable[str]) -> int:
    """Print a report with its damages, or as JSON; return the exit code."""
    damages, interrupted = getattr(report, "damages", ()), getattr(report, "interrupted", False)
    text = ["damaged: " + "\n".join(damage.lines()) for damage in damages] + list(lines)
    document = report if isinstance(report, dict) else asdict(report)
    Talk().result(json.dumps(document, indent=2) if as_json else "\n".join(text))
    if damages:
        return ExitCode.DAMAGED
    return ExitCode.INTERRUPTED if interrupted else ExitCode.DONE
