"""Where a command's videos come from: a manifest file, the data root, or the built-in sprites clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Manifest
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.build import entries, is_video_file
from cosettle_cache.videos.manifest import read_manifest
from cosettle_cache.videos.sprites import ensure_sprites

SPRITES, MASKS = "sprites", "masks"

#: Folders looked for under the data root, most specific first: (dataset layout, folder).
TRAINING_FOLDERS = (
    ("kinetics", "kinetics400/train"),
    ("kinetics", "kinetics400"),
    ("kinetics", "k400/train"),
    ("kinetics", "k400"),
    ("folder", "clips"),
)
#: Per benchmark: what tells its folder, and the folders looked for under the data root.
BENCHMARK_FOLDERS = {
    "davis": ("JPEGImages", ("DAVIS", "davis-2017", "davis", ".")),
    "vip": ("Images", ("VIP", "VIP_Fine", "vip", ".")),
    "jhmdb": ("Rename_Images", ("JHMDB", "jhmdb", ".")),
    "tapvid": ("tracks", ("tapvid_davis", "tapvid", ".")),
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


def evaluation_data(task: str, data_root: Path | None, talk: Talk) -> Data:
    """Return videos to propagate on: those under the data root, else the sprites clips."""
    if task == SPRITES:
        return sprites_data("val")
    if task == MASKS:
        return _own_clips(data_root, talk)
    if data_root is None:
        data = sprites_data("val", task)
        talk.note(f"no --data-root given: using the {data.origin}")
        return data
    _check_root(data_root)
    folder = _benchmark_folder(task, data_root)
    if folder is not None:
        return _build(task, folder, data_root, "val", talk)
    data = sprites_data("val", task)
    talk.note(f"no {task} data under {data_root}: using the {data.origin}")
    return data


def benchmark_data(task: str, data_root: Path | None) -> Data:
    """Return the videos of a benchmark under the data root; raise `InputError` when it is not there."""
    if data_root is None:
        raise UsageError(f"where is {task}?", wanted="--data-root FOLDER or --manifest FILE")
    _check_root(data_root)
    folder = _benchmark_folder(task, data_root)
    if folder is None:
        mark, names = BENCHMARK_FOLDERS[task]
        wanted = ", ".join(f"{name}/{mark}" for name in names)
        raise InputError(f"{data_root} holds no {task} data", wanted=f"one of {wanted}")
    built = build_manifest(task, folder, data_root)
    return Data(built.manifest, data_root, f"{folder} ({len(built.manifest)} videos)", built.failures)


def _benchmark_folder(task: str, data_root: Path) -> Path | None:
    mark, names = BENCHMARK_FOLDERS[task]
    return next((data_root / name for name in names if (data_root / name / mark).is_dir()), None)


def sprites_data(split: str, layout: str = SPRITES) -> Data:
    """Return the built-in clips of one split, with their masks or as another benchmark has them."""
    root = ensure_sprites()
    built = build_manifest(layout, root, root, split=split).manifest
    # Whatever the labels, they are these clips, and lie where these lie.
    manifest = replace(built, videos=tuple(replace(video, dataset=SPRITES) for video in built))
    return Data(manifest, root, f"built-in sprites clips ({len(manifest)} videos)")


def _own_clips(data_root: Path | None, talk: Talk) -> Data:
    """Return the clips in a folder, or the folder that is a clip, each with a first mask beside it."""
    if data_root is None:
        raise UsageError(
            "where are the clips?",
            wanted="--data-root FOLDER that holds CLIP.mp4, or a folder CLIP of frames, and CLIP.png",
        )
    _check_root(data_root)
    is_clip = not any(path.is_dir() or is_video_file(path) for path in entries(data_root))
    return _build(MASKS, data_root, data_root.absolute().parent if is_clip else data_root, "", talk)


def _find(
    data_root: Path | None, folders: tuple[tuple[str, str], ...], what: str, split: str, talk: Talk
) -> Data:
    if data_root is None:
        data = sprites_data(split)
        talk.note(f"no --data-root given: using the {data.origin}")
        return data
    _check_root(data_root)
    for layout, name in folders:
        if (data_root / name).is_dir():
            return _build(layout, data_root / name, data_root, split, talk)
    data = sprites_data(split)
    talk.note(f"no {what} under {data_root}: using the {data.origin}")
    return data


def _build(layout: str, folder: Path, data_root: Path, split: str, talk: Talk) -> Data:
    # A folder of training clips is its own split.
    options = {"split": split} if layout in BENCHMARK_FOLDERS else {}
    built = build_manifest(layout, folder, data_root, **options)
    for media, reason in built.failures.items():
        talk.warn(f"left out {media}: {reason}")
    return Data(built.manifest, data_root, f"{folder} ({len(built.manifest)} videos)", built.failures)
