"""Clips on disk and manifest rows: what the builders of all layouts share, and a check of rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from cosettle_cache.core.console import Progress, counting
from cosettle_cache.core.errors import CosettleError, InputError, MediaError, UsageError
from cosettle_cache.core.files import printable
from cosettle_cache.core.parallel import map_ahead, share_of_cores
from cosettle_cache.core.settings import draw_mark
from cosettle_cache.core.types import LabelKind, Manifest, Video
from cosettle_cache.videos.content import is_other, media_content, media_stamp, present_row
from cosettle_cache.videos.datasets import DATASETS
from cosettle_cache.videos.frames import (
    LEFT_BEHIND,
    VIDEO_SUFFIXES,
    MediaInfo,
    check_size,
    is_hidden,
    is_image_name,
    iter_frames,
    natural_key,
    probe,
)
from cosettle_cache.videos.jhmdb import open_joints
from cosettle_cache.videos.lists import Listed, locate, made_today
from cosettle_cache.videos.manifest import path_fault
from cosettle_cache.videos.masks import VOID, open_parts, open_sequence, read_classes
from cosettle_cache.videos.queries import open_tracks

#: Objects of a first mask up to which nobody wonders; DAVIS has up to 10.
_MOST_OBJECTS = 20


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file, a folder of frames or an image that a layout found, its annotations, and its row's id."""

    video_id: str
    path: Path
    class_name: str | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The manifest of the good videos, the reason of each bad one by its media path, notes on oddities."""

    manifest: Manifest
    failures: Mapping[str, str]
    notes: tuple[str, ...] = ()


def build_manifest(name: str, root: str | Path, data_root: str | Path, **options: Any) -> BuildResult:
    """Return the manifest of the folder `root` in the layout `name`, and the reasons of what was left out.

    Media paths are relative to `data_root`. `options` are the layout's own; all have `split`, and `names` to
    restrict and order them. Of a `sample` those videos are made whose SHA-256 with the `seed` is smallest,
    whatever else is there. Raises `UsageError` for an unknown layout, `InputError` without a usable clip.
    """
    if name not in DATASETS:
        raise UsageError(f"there is no dataset layout {name}", wanted=" ".join(DATASETS), found=name)
    options = {"split": DATASETS[name].split} | options
    builder = DATASETS[name].builder() or partial(_build_row, name)
    drawn = {key: options.pop(key) for key in ("sample", "seed") if key in options}
    useless = [key for key in options if key not in signature(builder).parameters]
    if useless:
        raise UsageError(f"the layout {name} has no {useless[0]}", wanted=f"no --{useless[0]}", found=useless)
    return _build(builder(Path(root), Path(data_root), **options), **drawn)


def _build_row(name: str, root: Path, data_root: Path, split: str, names: Sequence[str] = ()) -> Clips:
    row, listed = DATASETS[name], [Listed(clip) for clip in names]
    return build_places(Source(name, split, root, data_root), listed, row.media, row.labels)


def build_places(source: Source, listed: Sequence[Listed], media: str, labels: str) -> Clips:
    """Return the clips `listed`, or every folder there is, at the places `media` and `labels` with `{name}`.

    A line with two paths says itself where clip and labels are. A clip without labels becomes a row without.
    """
    root, clips = source.root, []
    for item in listed or [Listed(path.name) for path in subfolders(root / media.partition("{name}")[0])]:
        path = root / media.format(name=item.name)
        label = root / labels.format(name=item.name) if labels else None
        if item.media is not None and item.labels is not None:
            path, label = locate(root, item.media), locate(root, item.labels)
        class_name = item.name.rpartition("/")[0] if source.dataset == "jhmdb" else ""
        clips.append(Clip(item.name, path, class_name or None, label))
    return Clips(clips, source)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a manifest's videos come from: layout and folder, and what its media paths are relative to."""

    dataset: str
    split: str
    root: Path
    data_root: Path

    def relative(self, path: Path) -> str:
        """Return `path`, which lies under the data root, as a manifest writes it."""
        if not path.is_relative_to(self.root):
            return _path_in(path, self.data_root).as_posix()
        return (_path_in(self.root, self.data_root) / path.relative_to(self.root)).as_posix()

    def video(self, clip: Clip) -> Video:
        """Return the row of one clip, with its labels if any; raise `MediaError` for what cannot be read."""
        media = self.relative(clip.path)
        fault = path_fault(clip.video_id) or (path_fault(media) if media != "." else None)
        if fault:
            raise MediaError(f"{media!r} cannot stand in a manifest: {fault}")
        info = probe(clip.path)
        video = Video(
            video_id=clip.video_id,
            media=media,
            media_kind=info.kind,
            n_frames=info.n_frames,
            height=info.height,
            width=info.width,
            dataset=self.dataset,
            split=self.split,
            fps=info.fps,
            class_name=clip.class_name,
            stamp=media_stamp(clip.path),  # before the bytes are read, so that a change meanwhile shows
            content=media_content(clip.path),
        )
        kind, labels = DATASETS[self.dataset].label_kind, clip.labels
        # A clip without tracks was not unpacked whole: reading them says so.
        if kind is None or labels is None or not (labels.exists() or kind is LabelKind.TRACKS):
            return video
        video = replace(video, labels=self.relative(labels), label_kind=kind)
        n_objects, n_labelled = count_labels(video, self.data_root)
        return replace(video, n_objects=n_objects, labelled_frames=n_labelled)


class Clips(NamedTuple):
    """What a layout found; `make_video` (default `source.video`) makes the row of a clip or raises."""

    clips: Sequence[Clip]
    source: Source
    make_video: Callable[[Clip], Video] | None = None


def _build(found: Clips, sample: int | None = None, seed: int = 0) -> BuildResult:
    """Return the rows of clips, in order, and a reason for every one that cannot be a row.

    With `sample` clips are looked at as they are drawn, until there are so many rows. Raises `InputError`
    when no row is left.
    """
    clips, source, make_video = found
    provenance = made_today(source.dataset, source.relative(source.root), source.split)
    if not clips:
        raise InputError(f"{source.root} holds no clips", wanted=f"the {source.dataset} layout")

    def attempt(clip: Clip) -> Video | str:
        try:
            return (make_video or source.video)(clip)
        except CosettleError as error:
            return _reason(error, clip.path)

    order, looked_at, n_rows = list(range(len(clips))), dict[int, Video | str](), 0
    if sample is not None:
        order.sort(key=lambda index: draw_mark(seed, clips[index].video_id))
    with closing(map_ahead(attempt, (clips[index] for index in order), share_of_cores(1))) as made:
        for index, row in zip(order, made, strict=False):
            looked_at[index] = row
            n_rows += isinstance(row, Video)
            if n_rows == sample:
                break
    pairs = [(clips[index], row) for index, row in sorted(looked_at.items())]
    videos = tuple(row for _, row in pairs if isinstance(row, Video))
    failures = {printable(source.relative(clip.path)): row for clip, row in pairs if isinstance(row, str)}
    if not videos:
        details = [f"{media}: {reason}" for media, reason in failures.items()]
        raise InputError(f"{source.root} holds no usable clip", details=details)
    good = [clip.path for clip, row in pairs if isinstance(row, Video)]
    videos_of = [path for path in good if path != source.root and not is_image_name(path.name)]
    places = {path.parent for path in videos_of if source.dataset != "masks"}
    notes = (*_passed_over(Path(os.path.commonpath(good))), *_beside(places), *_doubts(videos))
    return BuildResult(Manifest(videos, provenance), failures, notes)


def _reason(error: CosettleError, media: Path) -> str:
    """Return an error in one line; what to do about it as well, unless there is no such media."""
    return error.reason if media.exists() else error.summary


def _doubts(videos: Sequence[Video]) -> Iterator[str]:
    """Yield notes of labels that are missing, or of more objects than anybody annotates: soft edges, say."""
    bare = [video.video_id for video in videos if video.label_kind is None]
    if 0 < len(bare) < len(videos):
        yield f"{len(bare)} of {len(videos)} videos have no labels: {', '.join(bare[:8])}"
    soft = [v for v in videos if v.label_kind is LabelKind.MASKS and v.n_objects > _MOST_OBJECTS]
    if soft:
        names = ", ".join(f"{video.video_id} ({video.n_objects})" for video in soft[:8])
        yield (
            f"{len(soft)} first masks have more than {_MOST_OBJECTS} objects: {names}. Every value is an "
            "object, those of soft edges too; save masks of whole numbers"
        )


def _beside(folders: Iterable[Path]) -> Iterator[str]:
    """Yield a note of the images beside clips, in the `folders` that hold these: they are no frames."""
    found = {folder: len(_image_names(folder)) for folder in sorted(folders)}
    places = [f"{printable(folder.name)} ({n})" for folder, n in found.items() if n]
    if places:
        more = f" and {len(places) - 8} other folders" if len(places) > 8 else ""
        yield f"images beside clips are no frames: those in {', '.join(places[:8])}{more} were passed over"


def _passed_over(root: Path) -> tuple[str, ...]:
    """Return a note of what systems and viewers have left under `root` and is no clip or frame."""
    kinds = Counter[str]()
    for folder, folders, files in os.walk(root):
        kinds.update("._*" for name in files if name.startswith("._"))
        left = [name for name in (*folders, *files) if name in LEFT_BEHIND]
        copies = [path.name for path in _copies(Path(folder))] if folders else []
        kinds.update((*left, *copies))
        folders[:] = [name for name in folders if not is_hidden(name) and name not in copies]
    found = ", ".join(f"{name} ({n})" for name, n in sorted(kinds.items()))
    return (f"passed over {printable(found)}",) if found else ()


def count_labels(video: Video, data_root: Path, *, decode: bool = False) -> tuple[int, int]:
    """Return how many objects a row's labels hold and how many frames are annotated.

    Of classes of pixels it is the largest number. With `decode` every mask is read. Raises `MediaError`.
    """
    if video.label_kind is LabelKind.KEYPOINTS:
        joints = open_joints(video, data_root).joints
        return joints.shape[1], joints.shape[2]
    if video.label_kind is LabelKind.TRACKS:
        tracks = open_tracks(video, data_root)
        return len(tracks.points), tracks.n_frames
    if video.label_kind is LabelKind.CLASSES:
        mask = read_classes(video, data_root)
        return int(mask[mask != VOID].max(initial=0)), 1
    opener = open_sequence if video.label_kind is LabelKind.MASKS else open_parts
    sequence = opener(video, data_root)
    for index in range(video.n_frames if decode else 0):
        sequence.mask(index)
    return sequence.n_objects, len(sequence.labelled)


def check_media(manifest: Manifest, data_root: Path, *, decode: bool, progress: Progress) -> dict[str, str]:
    """Return a reason for every video that does not hold what its row says.

    Sizes, counts and contents are compared as far as the row knows them; with `decode` every byte is read,
    every frame decoded and every mask read too.
    """

    def find_problem(video: Video) -> str | None:
        try:
            _check_video(video, data_root, decode)
        except MediaError as error:
            return _reason(error, data_root / video.media)
        return None

    problems: dict[str, str] = {}
    with counting(progress, len(manifest), "videos") as advance:
        found = map_ahead(find_problem, manifest, share_of_cores(1))
        for video, problem in zip(manifest, found, strict=True):
            if problem is not None:
                problems[video.video_id] = problem
            advance()
    return problems


def _check_video(video: Video, data_root: Path, decode: bool) -> None:
    video = _measured(video, probe(data_root / video.media, exact=False))
    if is_other(video, present_row(video, data_root, read=decode or None)):
        raise MediaError(
            f"{video.media} has changed", wanted="what the manifest was made from", found="other bytes"
        )
    if decode:
        for _ in iter_frames(video, data_root):
            pass
    if video.label_kind is not None:
        _, n_labelled = count_labels(video, data_root, decode=decode)
        if n_labelled < video.labelled_frames:
            raise MediaError(
                f"{video.labels} lacks annotations",
                wanted=f"{video.labelled_frames} annotated frames",
                found=f"{n_labelled} annotated frames",
            )


def _measured(video: Video, info: MediaInfo) -> Video:
    """Return the row with what it did not know filled in; raise `MediaError` where it knew otherwise."""
    n_frames = video.n_frames or info.n_frames - video.first_frame
    if not 0 < video.first_frame + n_frames <= info.n_frames:
        raise MediaError(
            f"{video.media} ends early",
            wanted=f"{video.first_frame + n_frames} frames",
            found=f"{info.n_frames} frames",
        )
    size = (video.height or info.height, video.width or info.width)
    check_size(f"{video.media} has another size", (info.height, info.width), size)
    return replace(video, n_frames=n_frames, height=info.height, width=info.width)


def _path_in(root: Path, data_root: Path) -> Path:
    # As written first, so that a link under the data root keeps its place there.
    for inner, outer in ((root.absolute(), data_root.absolute()), (root.resolve(), data_root.resolve())):
        if inner.is_relative_to(outer) and ".." not in inner.relative_to(outer).parts:
            return inner.relative_to(outer)
    raise InputError(f"{root} lies outside the data root", wanted=f"a folder under {data_root}")


def entries(folder: Path) -> list[Path]:
    """Return what `folder` holds in natural order, hidden names and links to folders around it aside."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="a dataset folder")
    visible = (entry for entry in folder.iterdir() if not is_hidden(entry.name) and not _leads_back(entry))
    return sorted(visible, key=lambda entry: natural_key(entry.name))


def _leads_back(path: Path) -> bool:
    if not path.is_symlink() or not path.is_dir():
        return False
    return path.resolve() in [folder.resolve() for folder in path.absolute().parents]


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder` in natural order, hidden ones aside."""
    return [entry for entry in entries(folder) if entry.is_dir()]


def is_video_file(path: Path) -> bool:
    """Say whether the name is a video file's."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def media_in(folder: Path) -> list[Path]:
    """Return the folders and video files in `folder`; where there are none it is a clip itself.

    A folder of smaller copies of the images beside it is none.
    """
    copies = _copies(folder)
    media = [path for path in entries(folder) if path.is_dir() or is_video_file(path)]
    return [path for path in media if path not in copies] or [folder]


def images_in(folder: Path) -> list[Path]:
    """Return the images at any depth under `folder` in natural order; of smaller copies see `media_in`."""
    found, copies = [], _copies(folder)
    for path in entries(folder):
        if is_image_file(path):
            found.append(path)
        elif path.is_dir() and path not in copies:
            found += images_in(path)
    return found


def is_image_file(path: Path) -> bool:
    """Say whether the name is an image's, and no folder's."""
    return is_image_name(path.name) and not path.is_dir()


def _copies(folder: Path) -> list[Path]:
    """Return the folders in `folder` all of whose images have the names of images beside them."""
    inside = entries(folder)
    own = {path.stem for path in inside if is_image_name(path.name)}
    if not own:
        return []
    found = {path: {Path(name).stem for name in _image_names(path)} for path in inside if path.is_dir()}
    return [path for path, stems in found.items() if stems and stems <= own]


def _image_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if is_image_name(entry.name)]


def choose(clips: Sequence[Clip], names: Sequence[str], root: Path) -> list[Clip]:
    """Return the clips `names` in that order, all without any; one that is not there shows when it is probed.

    A name is a clip's id or, where a layout has class folders and the list does not, its last part.
    """
    by_name = {clip.video_id.rpartition("/")[2]: clip for clip in clips}
    by_name |= {clip.video_id: clip for clip in clips}
    return [by_name.get(name, Clip(name, root / name)) for name in names] or list(clips)


def name_clips(paths: Iterable[Path], root: Path) -> list[Clip]:
    """Return clips named by their path under `root`, without suffix wherever that stays unique."""
    full = {path: path.relative_to(root).as_posix() if path != root else root.name for path in paths}
    short = {
        path: name.removesuffix(path.suffix) if is_video_file(path) or is_image_file(path) else name
        for path, name in full.items()
    }
    uses = Counter(short.values())
    return [Clip(short[path] if uses[short[path]] == 1 else full[path], path) for path in full]
