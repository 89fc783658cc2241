"""Clips on disk and manifest rows: what the builders of all layouts share, and a check of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cosettle_cache.core.console import Progress
from cosettle_cache.core.errors import CosettleError, InputError, MediaError, UsageError
from cosettle_cache.core.types import LabelKind, Manifest, Video
from cosettle_cache.videos.datasets import DATASETS
from cosettle_cache.videos.frames import VIDEO_SUFFIXES, MediaInfo, iter_frames, natural_key, probe
from cosettle_cache.videos.jhmdb import open_joints
from cosettle_cache.videos.lists import Listed, locate
from cosettle_cache.videos.manifest import is_safe_path
from cosettle_cache.videos.masks import open_parts, open_sequence
from cosettle_cache.videos.queries import open_tracks


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file or a folder of frames that a layout found, its annotations, and its row's id."""

    video_id: str
    path: Path
    class_name: str | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The manifest of the good videos, and for each bad one (by its media path) the reason."""

    manifest: Manifest
    failures: Mapping[str, str]


def build_manifest(name: str, root: str | Path, data_root: str | Path, **options: Any) -> BuildResult:
    """Return the manifest of the folder `root` in the layout `name`, and the reasons of what was left out.

    Media paths are relative to `data_root`. `options` are the layout's own; all have `split`, and `names` to
    restrict and order the clips. Raises `UsageError` for an unknown layout and `InputError` for a folder
    without a usable clip.
    """
    if name not in DATASETS:
        raise UsageError(f"there is no dataset layout {name}", wanted=" ".join(DATASETS), found=name)
    options = {"split": DATASETS[name].split} | options
    builder = DATASETS[name].builder() or partial(_build_row, name)
    result: BuildResult = builder(Path(root), Path(data_root), **options)
    return result


def _build_row(name: str, root: Path, data_root: Path, split: str, names: Sequence[str] = ()) -> BuildResult:
    row, listed = DATASETS[name], [Listed(clip) for clip in names]
    return build_places(Source(name, split, root, data_root), listed, row.media, row.labels)


def build_places(source: Source, listed: Sequence[Listed], media: str, labels: str) -> BuildResult:
    """Return the clips `listed`, or every folder there is, at the places `media` and `labels` with `{name}`.

    A line of a list with two paths says itself where its clip and labels are. A clip without labels becomes a
    row without.
    """
    root, clips = source.root, []
    for item in listed or [Listed(path.name) for path in subfolders(root / media.partition("{name}")[0])]:
        path = root / media.format(name=item.name)
        label = root / labels.format(name=item.name) if labels else None
        if item.media is not None and item.labels is not None:
            path, label = locate(root, item.media), locate(root, item.labels)
        class_name = item.name.rpartition("/")[0] if source.dataset == "jhmdb" else ""
        clips.append(Clip(item.name, path, class_name or None, label))
    return build(clips, source)


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
        """Return the row of one clip, with its labels where they exist.

        Raises `MediaError` when the clip cannot be decoded or named, or its labels cannot be read.
        """
        media = self.relative(clip.path)
        if not is_safe_path(media):
            raise MediaError(f"{media!r} cannot stand in a manifest", wanted="a name without : and \\")
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
        )
        kind, labels = DATASETS[self.dataset].label_kind, clip.labels
        # A clip without tracks was not unpacked whole: reading them says so.
        if kind is None or labels is None or not (labels.exists() or kind is LabelKind.TRACKS):
            return video
        video = replace(video, labels=self.relative(labels), label_kind=kind)
        n_objects, n_labelled = count_labels(video, self.data_root)
        return replace(video, n_objects=n_objects, labelled_frames=n_labelled)


def build(
    clips: Sequence[Clip], source: Source, make_video: Callable[[Clip], Video] | None = None
) -> BuildResult:
    """Return the rows of `clips`, in order, and a reason for every one that cannot be a row.

    `make_video` (default `source.video`) makes one row or raises. Raises `InputError` when no row is left.
    """
    provenance = {
        "builder": source.dataset,
        "root": source.relative(source.root),
        "split": source.split,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if not clips:
        raise InputError(f"{source.root} holds no clips", wanted=f"the {source.dataset} layout")

    def attempt(clip: Clip) -> Video | str:
        try:
            return (make_video or source.video)(clip)
        except CosettleError as error:
            return error.summary

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(attempt, clips))
    videos = tuple(row for row in rows if isinstance(row, Video))
    pairs = zip(clips, rows, strict=True)
    failures = {source.relative(clip.path): row for clip, row in pairs if not isinstance(row, Video)}
    if not videos:
        details = [f"{media}: {reason}" for media, reason in failures.items()]
        raise InputError(f"{source.root} holds no usable clip", details=details)
    return BuildResult(Manifest(videos, provenance), failures)


def count_labels(video: Video, data_root: Path, *, decode: bool = False) -> tuple[int, int]:
    """Return how many objects a row's labels hold and how many frames are annotated.

    With `decode` every mask is read. Raises `MediaError` for what cannot be read.
    """
    if video.label_kind is LabelKind.KEYPOINTS:
        joints = open_joints(video, data_root).joints
        return joints.shape[1], joints.shape[2]
    if video.label_kind is LabelKind.TRACKS:
        tracks = open_tracks(video, data_root)
        return len(tracks.points), tracks.n_frames
    opener = open_sequence if video.label_kind is LabelKind.MASKS else open_parts
    sequence = opener(video, data_root)
    for index in range(video.n_frames if decode else 0):
        sequence.mask(index)
    return sequence.n_objects, len(sequence.labelled)


def check_media(manifest: Manifest, data_root: Path, *, decode: bool, progress: Progress) -> dict[str, str]:
    """Return a reason for every video that does not hold what its row says.

    Sizes and counts are compared as far as the row knows them; with `decode` every frame is decoded and every
    mask is read too.
    """
    problems: dict[str, str] = {}
    progress.start(len(manifest), "videos")
    try:
        for video in manifest:
            try:
                _check_video(video, data_root, decode)
            except MediaError as error:
                problems[video.video_id] = error.summary
            progress.advance()
    finally:
        progress.finish()
    return problems


def _check_video(video: Video, data_root: Path, decode: bool) -> None:
    video = _measured(video, probe(data_root / video.media))
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
    if size != (info.height, info.width):
        raise MediaError(
            f"{video.media} has another size",
            wanted=f"{size[0]}x{size[1]}",
            found=f"{info.height}x{info.width}",
        )
    return replace(video, n_frames=n_frames, height=info.height, width=info.width)


def _path_in(root: Path, data_root: Path) -> Path:
    # As written first, so that a link under the data root keeps its place there.
    for inner, outer in ((root.absolute(), data_root.absolute()), (root.resolve(), data_root.resolve())):
        if inner.is_relative_to(outer) and ".." not in inner.relative_to(outer).parts:
            return inner.relative_to(outer)
    raise InputError(f"{root} lies outside the data root", wanted=f"a folder under {data_root}")


def entries(folder: Path) -> list[Path]:
    """Return what `folder` holds in natural order, hidden names aside."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="a dataset folder")
    visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(visible, key=lambda entry: natural_key(entry.name))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder` in natural order, hidden ones aside."""
    return [entry for entry in entries(folder) if entry.is_dir()]


def is_video_file(path: Path) -> bool:
    """Say whether the name is a video file's."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def media_in(folder: Path) -> list[Path]:
    """Return the folders and video files in `folder`; where there are none it is a clip itself."""
    return [path for path in entries(folder) if path.is_dir() or is_video_file(path)] or [folder]


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
        path: name.removesuffix(path.suffix) if is_video_file(path) else name for path, name in full.items()
    }
    uses = Counter(short.values())
    return [Clip(short[path] if uses[short[path]] == 1 else full[path], path) for path in full]
