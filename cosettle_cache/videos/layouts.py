"""Folders of annotated videos and images: DAVIS, VIP, JHMDB, TAP-Vid, VOC, sprites, clips with a first mask.

In comes a folder, out goes its manifest; a clip without labels becomes a row without, if not said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.files import read_json
from cosettle_cache.core.types import LabelKind, Video
from cosettle_cache.videos.build import (
    Clip,
    Clips,
    Source,
    build_places,
    choose,
    count_labels,
    entries,
    is_video_file,
    media_in,
    name_clips,
    subfolders,
)
from cosettle_cache.videos.datasets import DATASETS
from cosettle_cache.videos.lists import Listed, read_lines, read_list
from cosettle_cache.videos.masks import frame_stems, mask_file

#: Of YouTube-VOS and MOSE: the categories and the annotated frames of every object.
META = "meta.json"
#: The resolution folder that is meant when several lie side by side.
_USUAL_RESOLUTION = "480p"
#: Where the two published archives of VIP keep the classes.
_VIP_LABELS = ("Annotations/Category_ids", "Category_ids")


def build_davis(
    root: Path,
    data_root: Path,
    split: str = "val",
    names: Sequence[str] = (),
    resolution: str | None = None,
    dataset: str = "davis",
) -> Clips:
    """Return the sequences `names`, or those of `ImageSets/2017/SPLIT.txt`, or all where there are no lists.

    Frames are `JPEGImages/480p/NAME/00000.jpg`, masks `Annotations/480p/NAME/00000.png`.
    """
    resolution = resolution or _only_resolution(root)
    listed = [Listed(name) for name in names or _davis_list(root, split)]
    source = Source(dataset, split if listed else "", root, data_root)
    media, labels = (f"{folder}/{resolution}/{{name}}" for folder in ("JPEGImages", "Annotations"))
    return build_places(source, listed, media, labels)


#: The built-in clips in a folder made by `ensure_sprites`; splits train, val.
build_sprites = partial(build_davis, dataset="sprites")


def _only_resolution(root: Path) -> str:
    found = [path.name for path in subfolders(root / "JPEGImages")]
    if _USUAL_RESOLUTION in found or (len(found) == 1 and subfolders(root / "JPEGImages" / found[0])):
        return _USUAL_RESOLUTION if _USUAL_RESOLUTION in found else found[0]
    is_flat = bool(found) and not subfolders(root / "JPEGImages" / found[0])
    raise InputError(
        f"{root} has no single resolution folder",
        wanted=f"JPEGImages/{_USUAL_RESOLUTION}, or one other",
        found=", ".join(found[:8]) or "none",
        hint=f"videos without one, as in YouTube-VOS: cosettle-cache manifest build youtube-vos {root}"
        if is_flat
        else None,
    )


def _davis_list(root: Path, split: str) -> list[str]:
    sets = root / "ImageSets"
    found = {path.relative_to(sets): path for path in sorted(sets.rglob("*.txt"))}
    lists = {path.stem: full for path, full in found.items() if path.parent.name == "2017"}
    if sets.is_dir() and not lists:
        others = ", ".join(map(str, found)) or "no lists"
        raise UsageError(f"{root} has no split {split}", wanted="ImageSets/2017/SPLIT.txt", found=others)
    path = _list_of(root, split, lists, "ImageSets/2017/SPLIT.txt")
    if path is None:
        return []
    names = list(dict.fromkeys(read_lines(path)))
    if not names:
        raise InputError(f"{path} lists no sequences", wanted="one name per line")
    return names


def _list_of(root: Path, split: str, lists: Mapping[str, Path], place: str) -> Path | None:
    """Return a split's list, None for val (all there is) without lists; a `UsageError` names the splits."""
    if split in lists:
        return lists[split]
    if lists or split != "val":
        raise UsageError(f"{root} has no split {split}", wanted=", ".join(lists) or place, found=split)
    return None


def _lists_in(folders: Sequence[Path], *patterns: str) -> dict[str, Path]:
    """Return the lists in `folders` by split, which stands at the star of a pattern; earlier ones count."""
    found = dict[str, Path]()
    for pattern in patterns:
        before, after = pattern.split("*")
        for path in (path for folder in folders for path in sorted(folder.glob(pattern))):
            found.setdefault(path.name.removeprefix(before).removesuffix(after), path)
    return found


def build_davis2016(
    root: Path, data_root: Path, split: str = "val", names: Sequence[str] = (), resolution: str | None = None
) -> Clips:
    """Return the sequences `names`, or those of `ImageSets/480p/SPLIT.txt` or `ImageSets/2016/SPLIT.txt`.

    The first list has pairs of frames and masks. Without lists all sequences are taken.
    """
    files = [root / "ImageSets" / folder / f"{split}.txt" for folder in ("480p", "2016")]
    lines = next((read_lines(path) for path in files if path.is_file()), [])
    if not lines and (root / "ImageSets").is_dir():
        raise UsageError(f"{root} has no split {split}", wanted=" or ".join(map(str, files)), found=split)
    listed = [PurePosixPath(line.split()[0]).parent.name if "/" in line else line for line in lines]
    chosen = tuple(names or dict.fromkeys(listed))
    if not chosen:
        chosen = tuple(path.name for path in subfolders(root / "JPEGImages" / _only_resolution(root)))
    return build_davis(root, data_root, split, chosen, resolution, "davis2016")


def build_vos(
    root: Path,
    data_root: Path,
    split: str = "valid",
    names: Sequence[str] = (),
    dataset: str = "youtube-vos",
) -> Clips:
    """Return the videos `names`, or those of `meta.json`, or all folders, of a data set like YouTube-VOS.

    Frames are `JPEGImages/NAME`, masks `Annotations/NAME`, of some frames or of all, in the folder `SPLIT` or
    in `root` itself. A video begins at its first mask; one that lacks a frame of `meta.json` is a failure.
    """
    folder = root / split if (root / split / "JPEGImages").is_dir() else root
    if not (folder / "JPEGImages").is_dir():
        raise InputError(f"{root} has no split {split}", wanted=f"{split}/JPEGImages or JPEGImages")
    meta = read_meta(folder)
    source = Source(dataset, split, folder, data_root)
    found = names or list(meta) or [path.name for path in subfolders(folder / "JPEGImages")]

    def row(clip: Clip) -> Video:
        video = replace(source.video(replace(clip, labels=None)), label_kind=LabelKind.MASKS)
        assert clip.labels is not None
        stems = frame_stems(video, data_root)
        wanted = {frame for item in meta.get(clip.video_id, {}).values() for frame in item["frames"]}
        if missing := sorted(wanted.difference(stems)):
            more = ", ".join(missing[:8])
            raise MediaError(
                f"{META} names {len(missing)} frames of {clip.video_id} that are not there: {more}"
            )
        first = next((n for n, stem in enumerate(stems) if mask_file(clip.labels, stem).is_file()), None)
        if first is None:
            raise MediaError(f"{clip.video_id} has no mask", wanted=f"masks in Annotations/{clip.video_id}")
        video = replace(video, first_frame=first, n_frames=video.n_frames - first)
        video = replace(video, labels=source.relative(clip.labels))
        n_objects, n_labelled = count_labels(video, data_root)
        return replace(video, n_objects=n_objects, labelled_frames=n_labelled)

    places = [(name, folder / "JPEGImages" / name, folder / "Annotations" / name) for name in found]
    return Clips([Clip(name, media, None, labels) for name, media, labels in places], source, row)


build_mose = partial(build_vos, dataset="mose")
build_lvos = partial(build_vos, dataset="lvos")


def object_kinds(video: Video, data_root: Path) -> dict[int, dict[str, Any]]:
    """Return by object its `category`, and with the training videos beside whether it is `seen` there."""
    folder = (data_root / (video.labels or "")).parent.parent
    trained = read_meta(folder.parent / "train") if folder.name != "train" else {}
    seen = {item["category"] for objects in trained.values() for item in objects.values()}
    found = {}
    for number, item in read_meta(folder).get(video.video_id, {}).items():
        category = item["category"]
        found[int(number)] = {"category": category, **({"seen": category in seen} if seen else {})}
    return found


def read_meta(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what `meta.json`, if any, says by video and object; raise `InputError` for a file of others."""
    path = folder / META
    return _parse_meta(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=4)  # every video asks for it
def _parse_meta(path: Path, _changed: int) -> dict[str, dict[str, dict[str, Any]]]:
    document = read_json(path)
    try:
        return {
            name: {
                str(int(number)): {
                    "category": str(item["category"]),
                    "frames": [str(frame) for frame in item["frames"]],
                }
                for number, item in video["objects"].items()
            }
            for name, video in document["videos"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = "videos: objects: category and frames"
        raise InputError(f"{path} is no list of objects", wanted=wanted, found=repr(error)) from error


def build_vip(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> Clips:
    """Return the clips `names`, or those of `lists/SPLIT_videos.txt`, or all where there are no lists."""
    listed = _listed(names, root, split, (root / "lists", root), "*_videos.txt", "vip_*list.txt")
    labels = next((name for name in _VIP_LABELS if (root / name).is_dir()), _VIP_LABELS[0])
    source = Source("vip", split if listed else "", root, data_root)
    return build_places(source, listed, DATASETS["vip"].media, f"{labels}/{{name}}")


def build_jhmdb(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> Clips:
    """Return the clips `names` (`CLASS/CLIP`), or those of `jhmdb_SPLITlist.txt`, or all without lists."""
    listed = _listed(names, root, split, (root, root / "lists"), "jhmdb_*list.txt")
    source = Source("jhmdb", split if listed else "", root, data_root)
    if not listed:
        classes = subfolders(root / "Rename_Images")
        listed = [Listed(f"{folder.name}/{clip.name}") for folder in classes for clip in entries(folder)]
    return build_places(source, listed, DATASETS["jhmdb"].media, DATASETS["jhmdb"].labels)


def build_tapvid(root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()) -> Clips:
    """Return the clips of a folder that `manifest unpack` wrote, or `names`; one without tracks fails."""
    if root.is_file():
        raise InputError(
            f"{root} is a file",
            wanted="a folder with frames/ and tracks/",
            hint=f"cosettle-cache manifest unpack {root} FOLDER",
        )
    source = Source("tapvid", split, root, data_root)
    return build_places(source, [Listed(name) for name in names], "frames/{name}", "tracks/{name}.npz")


def build_voc(root: Path, data_root: Path, split: str = "train,val", names: Sequence[str] = ()) -> Clips:
    """Return the images of the lists `ImageSets/Segmentation/LIST.txt` that `split` names.

    Images are `JPEGImages/NAME.jpg`, masks `SegmentationClass/NAME.png`, or those of `SegmentationClassAug`
    for the list `trainaug`. Rows of the list val are of the split val, those of others of the split train.
    """
    lists = dict[str, str]()
    for listed in split.split(","):
        for name in read_lines(root / "ImageSets" / "Segmentation" / f"{listed}.txt"):
            lists.setdefault(name, listed)
    source, clips = Source("voc", split, root, data_root), []
    for name in names or lists:
        masks = "SegmentationClassAug" if lists.get(name) == "trainaug" else "SegmentationClass"
        clips.append(Clip(name, root / "JPEGImages" / f"{name}.jpg", None, root / masks / f"{name}.png"))

    def row(clip: Clip) -> Video:
        part = lists.get(clip.video_id, "")
        return replace(source.video(clip), split="train" if part not in ("", "val") else part)

    return Clips(clips, source, row)


def _listed(
    names: Sequence[str], root: Path, split: str, folders: Sequence[Path], *patterns: str
) -> list[Listed]:
    """Return `names`, or the lines of the split's list in one of `folders`, or nothing without lists."""
    if names:
        return [Listed(name) for name in names]
    path = _list_of(root, split, _lists_in(folders, *patterns), patterns[0].replace("*", "SPLIT"))
    return [] if path is None else list(read_list(path))


def build_masks(
    root: Path, data_root: Path, split: str = "", names: Sequence[str] = (), mask: Path | None = None
) -> Clips:
    """Return the clips directly in `root`, each with its mask; a clip without one is a named failure.

    Where `root` is itself a clip (a folder of images), it is the only one, and its mask is `mask` or the
    PNG file beside it. `mask` lies under the data root.
    """
    found = media_in(root)
    parent = root.parent if found == [root] else root
    source = Source("masks", split, parent, data_root)

    def masked(clip: Clip) -> Video:
        name = clip.path.stem if is_video_file(clip.path) else clip.path.name
        first = mask or mask_file(clip.path.parent, name)
        if first.is_file():
            return source.video(replace(clip, labels=first))
        source.video(clip)  # what is wrong with the clip itself comes first
        raise MediaError(
            f"{clip.video_id} has no first mask",
            wanted=f"{first.name} beside it, of the frames' size",
            hint="save object numbers (0 for the background) as a palette or grey PNG",
        )

    return Clips(choose(name_clips(found, parent), names, parent), source, masked)
