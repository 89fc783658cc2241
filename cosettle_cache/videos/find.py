"""Where a command's videos come from: a manifest file, the data root, or the built-in sprites clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Manifest
from cosettle_cache.videos.build import build_manifest, media_in
from cosettle_cache.videos.datasets import DATASETS
from cosettle_cache.videos.manifest import read_manifest
from cosettle_cache.videos.sprites import ensure_sprites

SPRITES, MASKS = "sprites", "masks"


@dataclass(frozen=True, slots=True)
class Data:
    """Videos, the folder of their paths, where they are from in one line, and why some cannot be used."""

    manifest: Manifest
    root: Path
    origin: str
    failures: Mapping[str, str] = field(default_factory=dict)


def manifest_data(path: Path, data_root: Path | None) -> Data:
    """Return the videos of a manifest file; raise `UsageError` when nobody says where its media are."""
    manifest = read_manifest(path)
    return Data(manifest, media_root(manifest, data_root), f"{path} ({len(manifest)} videos)")


def media_root(manifest: Manifest, data_root: Path | None) -> Path:
    """Return the folder that a manifest's media paths are relative to: the data root where they lie there."""
    is_there = data_root is not None and any((data_root / video.media).exists() for video in manifest)
    if not is_there and {video.dataset for video in manifest} == {SPRITES}:
        return ensure_sprites()
    if data_root is None:
        raise UsageError("the media of this manifest are not known to be anywhere", hint="--data-root FOLDER")
    _check_root(data_root)
    return data_root


def _check_root(data_root: Path) -> None:
    if not data_root.is_dir():
        raise InputError(f"{data_root} is not a folder", wanted="the data root", hint="--data-root FOLDER")


def training_data(data_root: Path | None, talk: Talk) -> Data:
    """Return clips to train on: those of the first such data set under the data root, else the sprites."""
    names = [name for name, row in DATASETS.items() if row.label_kind is None]
    return _first_of(names, "clips to train on", "train", SPRITES, data_root, talk)


def without_stills(data: Data, talk: Talk) -> Data:
    """Leave out, with a warning, the videos of one frame, which have no pair of frames."""
    stills = {video.video_id: "one frame is no pair" for video in data.manifest if video.n_frames < 2}
    moving = tuple(video for video in data.manifest if video.n_frames > 1)
    if not moving:
        raise InputError("no video has two frames", wanted="pairs of frames", found="videos of one frame")
    for video_id, reason in stills.items():
        talk.warn(f"left out {video_id}: {reason}")
    return replace(data, manifest=replace(data.manifest, videos=moving), failures={**data.failures, **stills})


def evaluation_data(task: str, data_root: Path | None, talk: Talk) -> Data:
    """Return videos to propagate on: those under the data root, else the sprites clips."""
    if task == SPRITES:
        return sprites_data("val")
    if task == MASKS:
        return _own_clips(data_root, talk)
    return _first_of([task], f"{task} data", "val", task, data_root, talk)


def benchmark_data(task: str, data_root: Path | None) -> Data:
    """Return the videos of a benchmark under the data root; raise `InputError` when it is not there."""
    if data_root is None:
        raise UsageError(f"where is {task}?", wanted="--data-root FOLDER or --manifest FILE")
    _check_root(data_root)
    row = DATASETS[task]
    folder = row.find(data_root)
    if folder is None:
        wanted = ", ".join(f"{name}/{row.mark}" for name in row.folders)
        raise InputError(f"{data_root} holds no {task} data", wanted=f"one of {wanted}")
    return _built(task, folder, data_root)


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
    is_clip = media_in(data_root) == [data_root]
    return _built(MASKS, data_root, data_root.absolute().parent if is_clip else data_root, talk)


def _first_of(
    names: Sequence[str], what: str, split: str, layout: str, data_root: Path | None, talk: Talk
) -> Data:
    """Return the first data set of `names` under the data root, else the sprites in a layout."""
    if data_root is None:
        why = "no --data-root given"
    else:
        _check_root(data_root)
        for name in names:
            folder = DATASETS[name].find(data_root)
            if folder is not None:
                return _built(name, folder, data_root, talk)
        why = f"no {what} under {data_root}"
    data = sprites_data(split, layout)
    talk.note(f"{why}: using the {data.origin}")
    return data


def _built(name: str, folder: Path, data_root: Path, talk: Talk | None = None) -> Data:
    """Return a folder's videos; `talk` says what was left out."""
    built = build_manifest(name, folder, data_root)
    if talk is not None:
        for note in built.notes:
            talk.note(note)
        for media, reason in built.failures.items():
            talk.warn(f"left out {media}: {reason}")
    return Data(built.manifest, data_root, f"{folder} ({len(built.manifest)} videos)", built.failures)
