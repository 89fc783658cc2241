"""Where a command's videos come from: a manifest file, the data root, or the built-in sprites clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cosettle_cache.console import Talk
from cosettle_cache.datasets import build_manifest
from cosettle_cache.datasets.sprites import ensure_sprites
from cosettle_cache.errors import InputError, UsageError
from cosettle_cache.manifest import read_manifest
from cosettle_cache.types import Manifest

SPRITES = "sprites"

#: Folders looked for under the data root, most specific first: (dataset layout, folder).
TRAINING_FOLDERS = (
    ("kinetics", "kinetics400/train"),
    ("kinetics", "kinetics400"),
    ("kinetics", "k400/train"),
    ("kinetics", "k400"),
    ("folder", "clips"),
)
DAVIS_FOLDERS = (("davis", "DAVIS"), ("davis", "davis-2017"), ("davis", "davis"), ("davis", "."))
#: Per benchmark: what tells its folder, and the folders looked for under the data root.
BENCHMARK_FOLDERS = {
    "davis": ("JPEGImages", ("DAVIS", "davis-2017", "davis", ".")),
    "vip": ("Images", ("VIP", "VIP_Fine", "vip", ".")),
    "jhmdb": ("Rename_Images", ("JHMDB", "jhmdb", ".")),
}


@dataclass(frozen=True, slots=True)
class Data:
    """Videos, the folder their paths are relative to, and one line that says where they come from.

    `failures` maps media that were found but cannot be used to reasons.
    """

    manifest: Manifest
    root: Path
    origin: str
    failures: Mapping[str, str] = field(default_factory=dict)


def manifest_data(path: Path, data_root: Path | None) -> Data:
    """Return the videos of a manifest file; raise `UsageError` when nobody says where its media are."""
    manifest = read_manifest(path)
    return Data(manifest, media_root(manifest, data_root), f"{path} ({len(manifest)} videos)")


def media_root(manifest: Manifest, data_root: Path | None) -> Path:
    """Return the folder that a manifest's media paths are relative to."""
    if {video.dataset for video in manifest} == {SPRITES}:
        return ensure_sprites()
    if data_root is None:
        raise UsageError("the media of this manifest are not known to be anywhere", hint="--data-root FOLDER")
    _check_root(data_root)
    return data_root


def _check_root(data_root: Path) -> None:
    if not data_root.is_dir():
        raise InputError(f"{data_root} is not a folder", wanted="the data root", hint="--data-root FOLDER")


def training_data(data_root: Path | None, talk: Talk) -> Data:
    """Return clips to train on: the first training folder under the data root, else the sprites."""
    return _find(data_root, TRAINING_FOLDERS, "clips to train on", "train", talk)


def davis_data(data_root: Path | None, talk: Talk) -> Data:
    """Return sequences to propagate on: the DAVIS folder under the data root, else the sprites."""
    return _find(data_root, DAVIS_FOLDERS, "a DAVIS folder", "val", talk)


def benchmark_data(task: str, data_root: Path | None) -> Data:
    """Return the videos of a benchmark under the data root; raise `InputError` when it is not there."""
    if data_root is None:
        raise UsageError(f"where is {task}?", wanted="--data-root FOLDER or --manifest FILE")
    _check_root(data_root)
    mark, names = BENCHMARK_FOLDERS[task]
    for name in names:
        if (data_root / name / mark).is_dir():
            built = build_manifest(task, data_root / name, data_root)
            origin = f"{data_root / name} ({len(built.manifest)} videos)"
            return Data(built.manifest, data_root, origin, built.failures)
    wanted = ", ".join(f"{name}/{mark}" for name in names)
    raise InputError(f"{data_root} holds no {task} data", wanted=f"one of {wanted}")


def sprites_data(split: str) -> Data:
    """Return the built-in clips of one split."""
    root = ensure_sprites()
    manifest = build_manifest(SPRITES, root, root, split=split).manifest
    return Data(manifest, root, f"built-in sprites clips ({len(manifest)} videos)")


def _find(
    data_root: Path | None, folders: tuple[tuple[str, str], ...], what: str, split: str, talk: Talk
) -> Data:
    if data_root is None:
        data = sprites_data(split)
        talk.note(f"no --data-root given: using the {data.origin}")
        return data
    _check_root(data_root)
    for layout, name in folders:
        if _has_layout(layout, data_root / name):
            return _build(layout, data_root / name, data_root, split, talk)
    data = sprites_data(split)
    talk.note(f"no {what} under {data_root}: using the {data.origin}")
    return data


def _has_layout(layout: str, folder: Path) -> bool:
    return (folder / "JPEGImages").is_dir() if layout == "davis" else folder.is_dir()


def _build(layout: str, folder: Path, data_root: Path, split: str, talk: Talk) -> Data:
    options = {"split": split} if layout == "davis" else {}
    built = build_manifest(layout, folder, data_root, **options)
    for media, reason in built.failures.items():
        talk.warn(f"left out {media}: {reason}")
    return Data(built.manifest, data_root, f"{folder} ({len(built.manifest)} videos)", built.failures)
