"""Folders of clips or images without annotations: any folder, class folders, Kinetics, UCF101 and HMDB51.

In comes the folder, out goes a manifest whose rows carry the class and, for UCF101 and HMDB51, the part of
the official split. Clips are video files or folders of frames; an image is a clip of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.build import (
    Clip,
    Clips,
    Source,
    choose,
    entries,
    images_in,
    is_video_file,
    media_in,
    name_clips,
    subfolders,
)
from cosettle_cache.videos.frames import VIDEO_SUFFIXES
from cosettle_cache.videos.lists import read_lines

#: What the archives of UCF101 and HMDB51 unpack to.
_VIDEO_FOLDERS = ("UCF-101", "UCF101", "hmdb51_org", "hmdb51", "videos")
_LIST_FOLDERS = ("ucfTrainTestlist", "testTrainMulti_7030_splits", "annotations")
#: Third word of HMDB51's lines: in no part of this split, to learn from, to be asked about.
_HMDB_SPLITS = {"0": "", "1": "train", "2": "test"}

#: Clips as the lists of a split spell them, each with its part of the split.
_Lines = list[tuple[str, str]]


def build_folder(root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()) -> Clips:
    """Return every clip at any depth under `root` in natural order, or those of `names` in theirs.

    A clip is a video file, or a folder that holds neither folders nor video files: its images are the frames,
    and without images it counts as a failure. Images beside clips (a contact sheet, say) are no clip.
    """
    clips = choose(name_clips(_find_media(root), root), names, root)
    return Clips(clips, Source("folder", split, root, data_root))


def _find_media(folder: Path) -> Iterator[Path]:
    for path in media_in(folder):
        if path != folder and path.is_dir():
            yield from _find_media(path)
        else:
            yield path


def build_kinetics(root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()) -> Clips:
    """Return the clips `class/video/*.jpg` and `class/video.mp4` in natural order or as `names`.

    `names` are ids (`class/video`) or videos alone. Without them a class folder without clips, and a video
    outside class folders, count as failures, so that a half-copied dataset shows.
    """
    source, loose = Source("kinetics", split, root, data_root), filter(is_video_file, entries(root))
    found = name_clips([*loose, *(path for folder in subfolders(root) for path in media_in(folder))], root)
    clips = [
        clip
        if clip.path.parent == root and is_video_file(clip.path)
        else replace(clip, class_name=clip.path.relative_to(root).parts[0])
        for clip in found
    ]
    return Clips(choose(clips, names, root), source, lambda clip: _class_video(clip, source))


def build_classes(root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()) -> Clips:
    """Return every clip under `root`, its class the folder around it; one in `root` itself is a failure."""
    source = Source("classes", split, root, data_root)
    clips = [_with_class(clip, root) for clip in name_clips(_find_media(root), root)]
    return Clips(choose(clips, names, root), source, lambda clip: _class_video(clip, source))


def build_images(
    root: Path,
    data_root: Path,
    split: str = "",
    names: Sequence[str] = (),
    dataset: str = "images",
    folder: str = "",
) -> Clips:
    """Return every image at any depth under `folder` of `root`; its class is the folder that it lies in."""
    inside = root / folder
    clips = [_with_class(clip, inside) for clip in name_clips(images_in(inside), inside)]
    return Clips(choose(clips, names, inside), Source(dataset, split, root, data_root))


#: SPair-71k: its images; the pairs are read where they are asked for (`videos.image_pairs`).
build_spair = partial(build_images, dataset="spair", folder="JPEGImages")


def _with_class(clip: Clip, root: Path) -> Clip:
    folder = clip.path.parent
    return clip if folder in (root, root.parent) else replace(clip, class_name=folder.name)


def _class_video(clip: Clip, source: Source) -> Video:
    if clip.class_name is None and clip.path.exists():
        raise MediaError(f"{clip.path.name} lies in no class folder", wanted="CLASS/CLIP")
    return source.video(clip)


def _build_benchmark(
    dataset: str,
    read_lists: Callable[[Path, str], _Lines | None],
    root: Path,
    data_root: Path,
    split: str | None = None,
    names: Sequence[str] = (),
) -> Clips:
    """Return the clips with the parts of official split `split` (1, 2 or 3) in the column of that name.

    Without lists no clip has a part, unless a split was asked for: that raises `InputError`. A listed clip
    that is not there is a failure; one that the split leaves out has no part. `read_lists` reads split N from
    a folder, None where the folder holds no such lists.
    """
    number = (split or "1").removeprefix("split").lstrip("0")
    if number not in ("1", "2", "3"):
        raise UsageError(f"there is no official split {split!r}", wanted="1, 2 or 3", found=split)
    classes = next((root / name for name in _VIDEO_FOLDERS if (root / name).is_dir()), root)
    places = [place / name for place in (root, classes, root.parent) for name in ("", *_LIST_FOLDERS)]
    found = (read_lists(folder, number) for folder in places if folder.is_dir())
    lines = next((lines for lines in found if lines is not None), None)
    if lines is None and split is not None:
        raise InputError(f"{root} holds no {dataset} lists", wanted=f"in it {', '.join(_LIST_FOLDERS)}")
    listed = {_key(name): (name, part) for name, part in lines or ()}
    source = Source(dataset, f"split{number}" if listed else "", root, data_root)
    media = [path for path in _find_media(classes) if path.name not in _LIST_FOLDERS]
    clips = [_with_class(clip, classes) for clip in name_clips(media, classes)]
    present = {_key(clip.video_id) for clip in clips}
    missing = [Clip(name, classes / name) for key, (name, _) in listed.items() if key not in present]

    def make_video(clip: Clip) -> Video:
        _, part = listed.get(_key(clip.video_id), ("", ""))
        return replace(_class_video(clip, source), split=part)

    return Clips(choose(clips, names, classes) + ([] if names else missing), source, make_video)


def _key(name: str) -> str:
    """Return a clip's name as the lists and the disk agree on it.

    UCF101 spells the class HandstandPushups in both ways, and frames may lie where a list has a file.
    """
    path = PurePosixPath(name)
    return (str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else name).lower()


def _read_ucf_lists(folder: Path, number: str) -> _Lines | None:
    paths = {part: folder / f"{part}list0{number}.txt" for part in ("train", "test")}
    if not all(path.is_file() for path in paths.values()):
        return None
    return [(line.split()[0], part) for part, path in paths.items() for line in read_lines(path)]


def _read_hmdb_lists(folder: Path, number: str) -> _Lines | None:
    suffix, found = f"_test_split{number}.txt", []
    lists = [path for path in entries(folder) if path.name.endswith(suffix)]
    for path in lists:
        for line in read_lines(path):
            name, _, part = line.rpartition(" ")
            if name and part in _HMDB_SPLITS:
                found.append((f"{path.name.removesuffix(suffix)}/{name}", _HMDB_SPLITS[part]))
            else:
                raise InputError(f"{path} is not a list of HMDB51", wanted="NAME.avi 0, 1 or 2", found=line)
    return found if lists else None


#: `root` holds `UCF-101/CLASS/*.avi` and `ucfTrainTestlist/`, or is the folder of classes with the lists in
#: or beside it.
build_ucf101 = partial(_build_benchmark, "ucf101", _read_ucf_lists)
#: HMDB51 likewise; its lists are `testTrainMulti_7030_splits/CLASS_test_splitN.txt`.
build_hmdb51 = partial(_build_benchmark, "hmdb51", _read_hmdb_lists)
