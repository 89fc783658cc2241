"""Folders of annotated videos: DAVIS, VIP, JHMDB, TAP-Vid, the sprites, and own clips with a first mask.

In comes a folder, out goes its manifest; a clip without labels becomes a row without, if not said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from cosettle_cache.videos.lists import Listed, read_list

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
    if _USUAL_RESOLUTION in found or len(found) == 1:
        return _USUAL_RESOLUTION if _USUAL_RESOLUTION in found else found[0]
    raise InputError(
        f"{root} has no single resolution folder",
        wanted=f"JPEGImages/{_USUAL_RESOLUTION}, or one other",
        found=", ".join(found) or "none",
    )


def _davis_list(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "2017"
    lists = {path.stem: path for path in entries(folder) if path.suffix == ".txt"} if folder.is_dir() else {}
    if not lists:
        return []
    if split not in lists:
        raise UsageError(f"{root} has no split {split}", wanted=", ".join(lists), found=split)
    names = list(dict.fromkeys(lists[split].read_text().split()))
    if not names:
        raise InputError(f"{lists[split]} lists no sequences", wanted="one name per line")
    return names


def build_vip(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> BuildResult:
    """Return the clips `names`, or those of `lists/SPLIT_videos.txt`, or all where there is no list."""
    files = (f"{split}_videos.txt", f"vip_{split}list.txt")
    listed = _listed(names, *(folder / file for file in files for folder in (root / "lists", root)))
    labels = next((name for name in _VIP_LABELS if (root / name).is_dir()), _VIP_LABELS[0])
    source = Source("vip", split if listed else "", root, data_root)
    return build_places(source, listed, DATASETS["vip"].media, f"{labels}/{{name}}")


def build_jhmdb(root: Path, data_root: Path, split: str = "val", names: Sequence[str] = ()) -> BuildResult:
    """Return the clips `names` (`CLASS/CLIP`), or those of `jhmdb_SPLITlist.txt`, or all without a list."""
    listed = _listed(names, *(folder / f"jhmdb_{split}list.txt" for folder in (root, root / "lists")))
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
    return build_places(source, _listed(names), "frames/{name}", "tracks/{name}.npz")


def _listed(names: Sequence[str], *lists: Path) -> list[Listed]:
    """Return `names`, or the lines of the first list that is there, or nothing."""
    present = (list(read_list(path)) for path in lists if path.is_file())
    return [Listed(name) for name in names] or next(present, [])


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
        first = mask or clip.path.parent / f"{name}.png"
        if first.is_file():
            return source.video(replace(clip, labels=first))
        source.video(clip)  # what is wrong with the clip itself comes first
        raise MediaError(
            f"{clip.video_id} has no first mask",
            wanted=f"{first.name} beside it, of the frames' size",
            hint="save object numbers (0 for the background) as a palette or grey PNG",
        )

    return build(choose(name_clips(found, parent), names, parent), source, masked)
