"""`cosettle-cache pca`: stored tokens as colours, raw and projected, beside their frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.options import (
    DEFAULT_CACHE_SIZE,
    CacheDir,
    CacheSize,
    DataRoot,
    Device,
    DryRun,
    FramesStore,
    Json,
    Projections,
    Quiet,
    interruptible,
    open_features,
    pick_device,
    store_title,
)
from cosettle_cache.core.console import Talk, human_seconds
from cosettle_cache.core.errors import ExitCode, UncleanError
from cosettle_cache.core.files import make_folder

if TYPE_CHECKING:
    from cosettle_cache.analysis.pca import PcaReport


class Per(StrEnum):
    """Whose tokens share their components."""

    VIDEO = "video"
    STORE = "store"


class Foreground(StrEnum):
    """Which side of the first component is drawn."""

    NONE = "none"
    AUTO = "auto"
    HIGH = "high"
    LOW = "low"


class FilmFormat(StrEnum):
    """What the film is."""

    MP4 = "mp4"
    WEBP = "webp"
    NONE = "none"


def pca(
    features: FramesStore,
    video: Annotated[list[str] | None, typer.Option(help="Video; repeatable; default: all.")] = None,
    projection: Projections = None,
    per: Annotated[Per, typer.Option(help="Components of each video, or one set for the store.")] = Per.VIDEO,
    foreground: Annotated[
        Foreground, typer.Option(help="One side of the first component alone; auto: that of the middle.")
    ] = Foreground.NONE,
    film: Annotated[FilmFormat, typer.Option(help="Frame and colours beside each other.")] = FilmFormat.MP4,
    stills: Annotated[bool, typer.Option(help="A PNG per frame and kind of tokens.")] = True,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/pca-STORE.")] = None,
    device: Device = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw the first three principal components of tokens as red, green and blue.

    Example: cosettle-cache pca --features davis.zarr --video dog --data-root /data
    """
    from cosettle_cache.analysis.pca import PcaSettings, check_request, chosen_videos, draw_store
    from cosettle_cache.heads.heads import load_heads
    from cosettle_cache.videos.find import media_root

    talk = Talk(quiet=quiet)
    store = open_features(features, cache_dir, cache_size)
    settings = PcaSettings(per.value, foreground.value, film.value, stills)
    names = list(video or ())
    check_request(store, names, settings)
    heads = load_heads(projection or (), store)
    root = media_root(store.manifest, data_root)
    out = out or Path("runs") / f"pca-{store_title(store.path)}"
    if dry_run:
        document = {
            "videos": [row.video_id for row in chosen_videos(store, names)],
            "tokens": ["raw", *(name for name, _ in heads)],
            "settings": asdict(settings),
            "out": str(out),
        }
        talk.result(json.dumps(document, indent=2))
        return int(ExitCode.DONE)
    make_folder(out)
    with interruptible(talk, "video") as stop:
        report = draw_store(
            store,
            root,
            out,
            videos=names,
            projections=heads,
            settings=settings,
            device=pick_device(device),
            progress=talk.progress("draw"),
            stop=stop,
        )
    _print_pca(report, out, talk, as_json)
    return _end(report, {} if names else store.failures)


def _print_pca(report: PcaReport, out: Path, talk: Talk, as_json: bool) -> None:
    if as_json:
        document = {
            "out": str(out),
            "videos": report.n_videos,
            "frames": report.n_frames,
            "seconds": report.seconds,
            "components": [asdict(item) for item in report.shares],
        }
        talk.result(json.dumps(document, indent=2))
        return
    rows = [
        [item.video_id, item.tokens, *(f"{100 * share:.1f}" for share in item.shares)]
        for item in report.shares
    ]
    talk.table("share of the variance, percent", ["video", "tokens", "red", "green", "blue"], rows)
    talk.result(f"{report.n_frames} frames in {human_seconds(report.seconds)}: {out}")


def _end(report: PcaReport, store_failures: Mapping[str, str]) -> int:
    if report.error:
        raise report.error
    if report.interrupted:
        return int(ExitCode.INTERRUPTED)
    failures = {**store_failures, **report.failures}
    if failures:
        details = [f"{video_id}: {reason}" for video_id, reason in failures.items()]
        raise UncleanError(f"{len(failures)} videos had failures", details=details)
    return int(ExitCode.DONE)
