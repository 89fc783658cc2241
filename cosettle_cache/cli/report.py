"""`cosettle-cache report`: what runs did, as one HTML file to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    DataRoot,
    DryRun,
    Json,
    Quiet,
    open_features,
)
from cosettle_cache.core.console import Talk, human_bytes
from cosettle_cache.core.errors import ExitCode, UncleanError, UsageError
from cosettle_cache.core.files import name_folders

if TYPE_CHECKING:
    from cosettle_cache.report import Media, Runs, Tokens


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of propagate, track, train, analyze.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    features: Annotated[
        str | None, typer.Option(help="Frames store, local or at a URL: adds the affinity explorer.")
    ] = None,
    projection: Annotated[
        list[Path] | None, typer.Option(help="Projection in the explorer; repeatable.")
    ] = None,
    data_root: DataRoot = None,
    videos: Annotated[int, typer.Option(min=0, help="Videos with pictures, of every run.")] = 3,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames with pictures, of every video.")] = 24,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show in one HTML file what runs did: scores, masks, curves, and affinities to explore.

    Example: cosettle-cache report runs/davis runs/linear --features davis.zarr
    """
    from cosettle_cache.report import Limits, make_report, read_runs, write_report

    talk = Talk(quiet=quiet)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", wanted="a file, as report.html")
    found = read_runs(name_folders(_different(runs)))
    media, tokens = _explored(features, projection or [], data_root)
    described = _described(found)
    document = {"out": str(out), "runs": described, "explorer": _described_tokens(tokens)}
    if dry_run:
        talk.result(json.dumps(document, indent=2))
        return int(ExitCode.DONE)
    title = f"Report: {_some(list(described))}"
    made = make_report(found, media, tokens, Limits(videos, max_frames), title)
    n_bytes = write_report(out, made)
    if as_json:
        talk.result(json.dumps({**document, "bytes": n_bytes, "failures": made.failures}, indent=2))
    else:
        talk.result(f"{out}: {human_bytes(n_bytes)}")
    if made.failures:
        raise UncleanError("some pictures are missing from the report", details=made.failures)
    return int(ExitCode.DONE)


def _different(folders: Sequence[Path]) -> list[Path]:
    """Return every folder once, as it was first written."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _explored(
    features: str | None, projections: Sequence[Path], data_root: Path | None
) -> tuple[Media, Tokens | None]:
    """Return the videos of the store, where their frames are, and its tokens; nothing without a store."""
    from cosettle_cache.report import Media, make_tokens
    from cosettle_cache.videos.find import media_root

    if features is None:
        if projections:
            raise UsageError("--projection shows projected tokens", wanted="--features with the raw ones")
        return Media({}, Path()), None
    store = open_features(features, None, DEFAULT_CACHE_SIZE)
    from cosettle_cache.heads.kinds import load_heads

    tokens = make_tokens(store, load_heads(projections, store))
    media = Media({video.video_id: video for video in store.manifest}, media_root(store.manifest, data_root))
    return media, tokens


def _some(names: Sequence[str], at_most: int = 4) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _described(runs: Runs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for scored in runs.scored:
        n_videos = len({score.video_id for score in scored.scores})
        found.setdefault(scored.name, {})["scores"] = {"videos": n_videos, "tokens": list(scored.tokens)}
    for trained in runs.trained:
        figures = {member.name: len(member.steps) for member in trained.members}
        found.setdefault(trained.name, {})["steps"] = figures
    return found


def _described_tokens(tokens: Tokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {"features": str(tokens.store.path), "tokens": [kind.name for kind in tokens.kinds]}
