"""`cosettle-cache report`: what runs did, as one HTML file to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache.cli.options import Cache, DataRoot, Mode
from cosettle_cache.core.console import Talk, human_bytes
from cosettle_cache.core.errors import UncleanError, UsageError
from cosettle_cache.core.files import name_folders


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of propagate, track, train, analyze.")
    ],
    mode: Mode,
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
) -> None:
    """Show in one HTML file what runs did: scores, masks, curves, and affinities to explore.

    Example: cosettle-cache report runs/davis runs/linear --features davis.zarr
    """
    from cosettle_cache.report import open_contents, write_report

    talk = Talk(quiet=mode.quiet)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", wanted="a file, as report.html")
    if projection and features is None:
        raise UsageError("--projection shows projected tokens", wanted="--features with the raw ones")
    # Every folder once, as it was first written.
    folders = list({folder.resolve(): folder for folder in reversed(runs)}.values())[::-1]
    store = None if features is None else Cache().open(features)
    contents = open_contents(name_folders(folders), store, projection or [], data_root)
    document = {"out": str(out), **contents.to_json()}
    if mode.dry_run:
        talk.json(document)
        return
    written = write_report(out, contents, videos, max_frames)
    if mode.as_json:
        document |= {"bytes": written.n_bytes, "failures": written.failures}
        talk.json(document)
    else:
        talk.result(f"{out}: {human_bytes(written.n_bytes)}")
    if written.failures:
        raise UncleanError("some pictures are missing from the report", details=written.failures)
