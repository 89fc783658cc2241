"""`cosettle-cache manifest`: build, check and show lists of videos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cosettle_cache.cli.options import DataRoot, DryRun, Json, Mode, Quiet, check_clean, exits
from cosettle_cache.core.console import Talk, counting
from cosettle_cache.core.errors import ExitCode, UsageError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.datasets import DATASETS, listable

app = typer.Typer(
    no_args_is_help=True, help="Build, check and show manifests (which videos, where, how long)."
)

ManifestPath = Annotated[Path, typer.Argument(metavar="MANIFEST", help="Parquet or CSV file, or vip_val.")]


@app.command()
@exits
def build(
    dataset: Annotated[
        str,
        typer.Argument(help="; ".join(f"{name}: {row.help}" for name, row in DATASETS.items()) + "."),
    ],
    mode: Mode,
    folder: Annotated[
        Path | None, typer.Argument(help="The dataset's folder; relative to the data root.")
    ] = None,
    data_root: DataRoot = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default DATASET.parquet.")] = None,
    split: Annotated[str | None, typer.Option(help="Split; default val (1 of ucf101, hmdb51).")] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="Only the videos of this list or manifest, in its order.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="First mask of a single clip, for masks.")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="Of DAVIS: the folder of frames; default 480p, or the only one.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="So many of the videos, by --seed.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of --sample; default 0.")] = None,
    join: Annotated[Path | None, typer.Option(help="A manifest whose videos come first.")] = None,
    without: Annotated[Path | None, typer.Option(help="A manifest whose videos are left out.")] = None,
) -> int:
    """Build a manifest from a dataset folder.

    Example: cosettle-cache manifest build folder clips --data-root /data --out clips.parquet
    """
    from cosettle_cache.videos import build_manifest
    from cosettle_cache.videos.lists import read_list
    from cosettle_cache.videos.manifest import (
        check_manifest_file,
        leave_out,
        manifests_joined,
        read_manifest,
        write_manifest,
    )

    talk = Talk(quiet=mode.quiet)
    root, base = _roots(dataset, folder, data_root)
    path = out or Path(f"{dataset}.parquet")
    check_manifest_file(path, [listed, mask, join, without])
    before, excluded = (read_manifest(file, listed=True) if file else None for file in (join, without))
    names = tuple(item.name for item in read_list(listed)) if listed else None
    options: dict[str, Any] = {"split": split, "names": names, "mask": mask, "resolution": resolution}
    options |= {"sample": sample, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    result = build_manifest(dataset, base, root, **given)
    manifest = leave_out(result.manifest, excluded) if excluded else result.manifest
    manifest = manifests_joined(before, manifest) if before else manifest
    if not mode.dry_run:
        write_manifest(path, manifest)
    counts = {"videos": len(manifest), "frames": sum(video.n_frames for video in manifest)}
    _say(talk, path, counts, mode.as_json, left_out=dict(result.failures))
    for note in result.notes:
        talk.note(note)
    return _say_left_out(talk, result.failures)


@app.command("from-list")
@exits
def from_list(
    dataset: Annotated[str, typer.Argument(help=f"{', '.join(listable())}.")],
    listed: Annotated[Path, typer.Argument(metavar="LIST", help="Text, CSV or Parquet list of videos.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default LIST.parquet.")] = None,
    folder: Annotated[str | None, typer.Option(help="The dataset's folder below a data root.")] = None,
    split: Annotated[str | None, typer.Option(help="Split; default the one that is evaluated.")] = None,
    source: Annotated[str, typer.Option(help="Where the list comes from, in words.")] = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn a published list into a manifest, without the data: sizes stay open where it has none.

    Example: cosettle-cache manifest from-list vip val_videos.txt --out vip_val.parquet
    """
    from cosettle_cache.videos.lists import list_manifest
    from cosettle_cache.videos.manifest import check_manifest_file, write_manifest

    path = out or Path(listed.stem).with_suffix(".parquet")
    check_manifest_file(path, [listed])
    manifest = list_manifest(dataset, listed, folder=folder, split=split, source=source)
    if not dry_run:
        write_manifest(path, manifest)
    n_known = sum(bool(video.n_frames) for video in manifest)
    _say(Talk(), path, {"videos": len(manifest), "of_known_length": n_known}, as_json)


@app.command()
@exits
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="tapvid_davis.pkl, tapvid_rgb_stacking.pkl.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write, new or empty.")],
    mode: Mode,
) -> int:
    """Turn a pickle of TAP-Vid into frames and tracks for `manifest build tapvid`; nothing is executed.

    Example: cosettle-cache manifest unpack tapvid_davis.pkl /data/tapvid_davis
    """
    from cosettle_cache.videos.tapvid import check_empty, read_tapvid, unpack_tapvid

    talk = Talk(quiet=mode.quiet)
    check_empty(folder)
    failures: dict[str, str] = {}
    clips = read_tapvid(file, failures)
    if not mode.dry_run:
        with counting(talk.progress("unpack"), len(clips), "clips") as advance:
            unpack_tapvid(clips, folder, advance)
    n_points = sum(len(clip["points"]) for clip in clips.values())
    n_frames = sum(len(clip["video"]) for clip in clips.values())
    counts = {"videos": len(clips), "frames": n_frames, "points": n_points}
    _say(talk, folder, counts, mode.as_json, left_out=failures)
    return _say_left_out(talk, failures)


def _say(talk: Talk, out: Path, counts: dict[str, int], as_json: bool, **more: Any) -> None:
    words = ", ".join(f"{number} {unit.replace('_', ' ')}" for unit, number in counts.items())
    talk.result(json.dumps({"out": str(out), **counts, **more}, indent=2) if as_json else f"{out}: {words}")


def _say_left_out(talk: Talk, failures: Mapping[str, str]) -> int:
    """Warn of everything that was left out; return the exit code."""
    for name, reason in failures.items():
        talk.warn(f"left out {name}: {reason}")
    return ExitCode.UNCLEAN if failures else ExitCode.DONE


@app.command()
@exits
def check(
    manifest: ManifestPath,
    data_root: DataRoot = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every frame instead of looking only.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find missing, changed or broken media and annotations before the encoder does.

    Example: cosettle-cache manifest check clips.parquet --data-root /data --decode
    """
    from cosettle_cache.videos.build import check_media
    from cosettle_cache.videos.find import media_root
    from cosettle_cache.videos.manifest import read_manifest

    talk = Talk(quiet=quiet)
    content = read_manifest(manifest, listed=True)
    root = media_root(content, data_root)
    problems = check_media(content, root, decode=decode, progress=talk.progress("check"))
    if as_json:
        talk.json({"videos": len(content), "problems": problems})
    else:
        talk.result(f"{manifest}: {len(content)} videos, {len(problems)} with problems")
    check_clean(problems, f"{len(problems)} videos have problems")


@app.command()
@exits
def show(manifest: ManifestPath, as_json: Json = False) -> None:
    """Print what a manifest holds.

    Example: cosettle-cache manifest show clips.parquet
    """
    from cosettle_cache.videos.manifest import manifest_digest, read_manifest

    talk = Talk()
    content = read_manifest(manifest, listed=True)
    if as_json:
        videos = [asdict(video) for video in content]
        talk.json({"provenance": dict(content.provenance), "videos": videos})
        return
    sizes = Counter(_size(video) for video in content)
    columns = ["video", "frames", "size", "fps", "labels", "objects", "class"]
    rows = [
        [video.video_id, str(video.n_frames or ""), _size(video), f"{video.fps:.4g}" if video.fps else ""]
        + [str(value or "") for value in (video.label_kind, video.n_objects, video.class_name)]
        for video in content
    ]
    talk.table(str(manifest), columns, rows)
    n_frames = sum(video.n_frames for video in content)
    talk.result(f"{len(content)} videos, {n_frames} frames, {len(sizes)} sizes")
    talk.result(f"digest {manifest_digest(content)}")
    for key, value in content.provenance.items():
        talk.result(f"{key}: {value}")


def _roots(dataset: str, folder: Path | None, data_root: Path | None) -> tuple[Path, Path]:
    """Return the data root and the dataset's folder."""
    if dataset == "sprites":
        from cosettle_cache.videos.sprites import ensure_sprites

        root = ensure_sprites()
        return root, root
    if data_root is None and folder is None:
        raise UsageError(
            "which folder?", wanted="a folder or --data-root", hint="cosettle-cache manifest build -h"
        )
    if dataset == "masks" and data_root is None and folder is not None:
        return folder.absolute().parent, folder.absolute()  # its mask may lie beside it
    root = data_root or folder or Path()
    return root, root / folder if data_root and folder else root


def _size(video: Video) -> str:
    return f"{video.height}x{video.width}" if video.height and video.width else ""
