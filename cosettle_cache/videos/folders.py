"""Folders of classes: any such tree, UCF101 and HMDB51 with their official train and test lists.

In comes a folder in which every clip lies in the folder of its class, out goes a manifest whose rows carry
the class and, for the two benchmarks, the split. Clips are video files or folders of frames.

A plain folder of clips, at any depth: video files and folders of frames.

In comes the folder, out goes a manifest; nothing is known about the clips but what they hold.

The Kinetics layout: one folder per class, in it one folder of frames or one video file per clip.

In comes the folder of classes, out goes a manifest whose rows carry the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.build import (
    BuildResult,
    Clip,
    Source,
    build,
    choose,
    entries,
    is_video_file,
    name_clips,
    subfolders,
)
from cosettle_cache.videos.frames import VIDEO_SUFFIXES


def build_folder_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()
) -> BuildResult:
    """Return every clip under `root` in natural order, or those of `names` in theirs.

    A clip is a video file, or a folder that holds neither folders nor video files: its images are the frames,
    and without images it counts as a failure. Images beside clips (a contact sheet, say) are no clip.
    """
    clips = choose(list(name_clips(find_media(root), root)), names, root)
    return build(clips, Source("folder", split, root, data_root))


def find_media(folder: Path) -> Iterator[Path]:
    """Yield the video files and the folders of images at any depth, in natural order."""
    nested = [path for path in entries(folder) if path.is_dir() or is_video_file(path)]
    if not nested:
        yield folder
    for path in nested:
        if path.is_dir():
            yield from find_media(path)
        else:
            yield path


#: What the two benchmarks' archives unpack to.
_VIDEO_FOLDERS = ("UCF-101", "UCF101", "hmdb51_org", "hmdb51", "videos")
_LIST_FOLDERS = ("ucfTrainTestlist", "testTrainMulti_7030_splits", "annotations")
#: Official splits of either.
_NUMBERS = ("1", "2", "3")
#: Third word of HMDB51's lines: in no part of this split, to learn from, to be asked about.
_HMDB_SPLITS = {"0": "", "1": "train", "2": "test"}


def build_classes_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()
) -> BuildResult:
    """Return every clip at any depth under `root`; its class is the folder that it lies in.

    A clip that lies in `root` itself has no class and counts as a failure.
    """
    source = Source("classes", split, root, data_root)
    clips = choose(list(_class_clips(find_media(root), root)), names, root)
    return build(clips, source, lambda clip: _of_a_class(clip, source))


def build_ucf101_manifest(
    root: Path, data_root: Path, split: str | None = None, names: Sequence[str] = ()
) -> BuildResult:
    """Return UCF101 with the parts of official split `split` (1, 2 or 3) in the column of that name.

    `root` holds `UCF-101/CLASS/*.avi` and `ucfTrainTestlist/`, or is the folder of classes with the lists
    inside or beside it. Without lists no clip has a part, unless a split was asked for: that raises
    `InputError`. A listed clip that is not there is a failure.
    """
    return _build(_Benchmark("ucf101", _read_ucf_lists), root, data_root, split, names)


def build_hmdb51_manifest(
    root: Path, data_root: Path, split: str | None = None, names: Sequence[str] = ()
) -> BuildResult:
    """Return HMDB51 likewise; its lists are `testTrainMulti_7030_splits/CLASS_test_splitN.txt`.

    Clips that a split leaves out have no part.
    """
    return _build(_Benchmark("hmdb51", _read_hmdb_lists), root, data_root, split, names)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of a list: the clip as it is spelled there, and its part of the split."""

    name: str
    part: str


#: Entries by key of a clip.
_Parts = Mapping[str, _Entry]

#: Reads split number N from a folder of lists; None where the folder holds no such lists.
_Reader = Callable[[Path, str], _Parts | None]


@dataclass(frozen=True, slots=True)
class _Benchmark:
    name: str
    read_lists: _Reader


def _build(
    benchmark: _Benchmark, root: Path, data_root: Path, split: str | None, names: Sequence[str]
) -> BuildResult:
    number = _number(split)
    classes = next((root / name for name in _VIDEO_FOLDERS if (root / name).is_dir()), root)
    parts = _parts(benchmark, root, classes, number)
    if parts is None and split is not None:
        raise InputError(
            f"{root} holds no {benchmark.name} lists", wanted=f"in it {', '.join(_LIST_FOLDERS)}"
        )
    source = Source(benchmark.name, f"split{number}" if parts else "", root, data_root)
    media = [path for path in find_media(classes) if path.name not in _LIST_FOLDERS]
    clips = list(_class_clips(media, classes))
    listed = parts or {}
    missing = [] if names else list(_missing(listed, clips, classes))

    def make_video(clip: Clip) -> Video:
        video, entry = _of_a_class(clip, source), listed.get(_key(clip.video_id))
        return replace(video, split=entry.part if entry else "")

    return build(choose(clips, names, classes) + missing, source, make_video)


def _number(split: str | None) -> str:
    number = (split or "1").removeprefix("split").lstrip("0")
    if number not in _NUMBERS:
        raise UsageError(f"there is no official split {split!r}", wanted="1, 2 or 3", found=split)
    return number


def _class_clips(media: Iterable[Path], root: Path) -> Iterator[Clip]:
    for clip in name_clips(media, root):
        class_name = clip.path.parent.name if clip.path.parent not in (root, root.parent) else None
        yield replace(clip, class_name=class_name)


def _of_a_class(clip: Clip, source: Source) -> Video:
    if clip.class_name is None and clip.path.exists():
        raise MediaError(f"{clip.path.name} lies in no class folder", wanted="CLASS/CLIP")
    return source.video(clip)


def _key(name: str) -> str:
    """Return a clip's name as the lists and the disk agree on it.

    UCF101 spells the class HandstandPushups in both ways, and frames may lie where a list has a file.
    """
    path = PurePosixPath(name)
    return (str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else name).lower()


def _parts(benchmark: _Benchmark, root: Path, classes: Path, number: str) -> _Parts | None:
    for place in dict.fromkeys((root, classes, root.parent)):
        for folder in (place, *(place / name for name in _LIST_FOLDERS)):
            found = benchmark.read_lists(folder, number) if folder.is_dir() else None
            if found is not None:
                return found
    return None


def _missing(parts: _Parts, clips: Sequence[Clip], classes: Path) -> Iterator[Clip]:
    present = {_key(clip.video_id) for clip in clips}
    return (Clip(entry.name, classes / entry.name) for key, entry in parts.items() if key not in present)


def _read_ucf_lists(folder: Path, number: str) -> _Parts | None:
    paths = {part: folder / f"{part}list0{number}.txt" for part in ("train", "test")}
    if not all(path.is_file() for path in paths.values()):
        return None
    lines = ((line, part) for part, path in paths.items() for line in path.read_text().splitlines())
    return _by_key(_Entry(line.split()[0], part) for line, part in lines if line.strip())


def _read_hmdb_lists(folder: Path, number: str) -> _Parts | None:
    suffix = f"_test_split{number}.txt"
    lists = [path for path in entries(folder) if path.name.endswith(suffix)]
    if not lists:
        return None
    return _by_key(
        _Entry(f"{path.name.removesuffix(suffix)}/{name}", part)
        for path in lists
        for name, part in _hmdb_lines(path)
    )


def _by_key(entries: Iterable[_Entry]) -> dict[str, _Entry]:
    return {_key(entry.name): entry for entry in entries}


def _hmdb_lines(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, _, part = line.strip().rpartition(" ")
        if name and part in _HMDB_SPLITS:
            yield name, _HMDB_SPLITS[part]
        elif line.strip():
            raise InputError(f"{path} is not a list of HMDB51", wanted="NAME.avi 0, 1 or 2", found=line)


def build_kinetics_manifest(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()
) -> BuildResult:
    """Return the clips `class/video/*.jpg` and `class/video.mp4` in natural order or as `names`.

    `names` are ids (`class/video`) or videos alone. Without them a class folder without clips counts as a
    failure, so that a half-copied dataset shows.
    """
    clips = [clip for folder in subfolders(root) for clip in _kinetics_clips(folder, root)]
    return build(choose(clips, names, root), Source("kinetics", split, root, data_root))


def _kinetics_clips(folder: Path, root: Path) -> list[Clip]:
    media = [path for path in entries(folder) if path.is_dir() or is_video_file(path)]
    return list(name_clips(media or [folder], root, folder.name))
