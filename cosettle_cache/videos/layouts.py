"""Folders of annotated videos: DAVIS, VIP, JHMDB, TAP-Vid, the sprites, and own clips with a first mask.

In comes a folder, out goes its manifest; a clip without labels becomes a row without, if not said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.types import Video
from cosettle_cache.videos.build import (
    BuildResult,
    Clip,
    Source,
    build,
    build_places,
    choose,
    entries,
    is_video_file,
    media_in,
    name_clips,
    subfolders,
)
from cosettle_cache.videos.datasets import DATASETS
from cosettle_cache.videos.lists import Listed, read_lines, read_list
from cosettle_cache.videos.masks import mask_file

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
) -> BuildResult:
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
        hint="videos without one, as in YouTube-VOS: move them into JPEGImages/480p and Annotations/480p"
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
    """Return the list of a split, None for val where there are no lists: then val is all that is there.

    Raises `UsageError` that names the splits there are.
    """
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


def build_vip(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> BuildResult:
    """Return the clips `names`, or those of `lists/SPLIT_videos.txt`, or all where there are no lists."""
    listed = _listed(names, root, split, (root / "lists", root), "*_videos.txt", "vip_*list.txt")
    labels = next((name for name in _VIP_LABELS if (root / name).is_dir()), _VIP_LABELS[0])
    source = Source("vip", split if listed else "", root, data_root)
    return build_places(source, listed, DATASETS["vip"].media, f"{labels}/{{name}}")


def build_jhmdb(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> BuildResult:
    """Return the clips `names` (`CLASS/CLIP`), or those of `jhmdb_SPLITlist.txt`, or all without lists."""
    listed = _listed(names, root, split, (root, root / "lists"), "jhmdb_*list.txt")
    source = Source("jhmdb", split if listed else "", root, data_root)
    if not listed:
        classes = subfolders(root / "Rename_Images")
        listed = [Listed(f"{folder.name}/{clip.name}") for folder in classes for clip in entries(folder)]
    return build_places(source, listed, DATASETS["jhmdb"].media, DATASETS["jhmdb"].labels)


def build_tapvid(root: Path, data_root: Path, split: str = "", names: Sequence[str] = ()) -> BuildResult:
    """Return the clips of a folder that `manifest unpack` wrote, or `names`; one without tracks fails."""
    if root.is_file():
        raise InputError(
            f"{root} is a file",
            wanted="a folder with frames/ and tracks/",
            hint=f"cosettle-cache manifest unpack {root} FOLDER",
        )
    source = Source("tapvid", split, root, data_root)
    return build_places(source, [Listed(name) for name in names], "frames/{name}", "tracks/{name}.npz")


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
) -> BuildResult:
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

    return build(choose(name_clips(found, parent), names, parent), source, masked)
