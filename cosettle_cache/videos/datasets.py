"""The table of data sets: a row says how a folder is laid out, what it annotates, where it is looked for.

Light to import: builders are named as text and imported when a manifest is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cosettle_cache.core.types import LabelKind


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set; `help` says in a few words what it holds.

    `folders` are looked for under the data root, most specific first; one counts when it holds the folder
    `mark`. Rows with folders and without `label_kind` are clips to train on. `media` and `labels` are the
    places of the clip `{name}` under the data set's folder: a published list becomes a manifest by them, and
    so does a folder whose row has no `build`. `list_folder` and `list_split` are those of a published list
    where they differ from the first of `folders` and from `split`. `build` is `module:function` of this room,
    or a function, called with (root, data_root) and the options `split`, `names`.

    `sparse`: some frames are annotated, objects may appear later; `binary`: values above 0 are one object.
    """

    help: str
    build: str | Callable[..., Any] = ""
    label_kind: LabelKind | None = None
    split: str | None = ""
    folders: tuple[str, ...] = ()
    mark: str = ""
    media: str = ""
    labels: str = ""
    list_folder: str = ""
    list_split: str = ""
    sparse: bool = False
    binary: bool = False

    def builder(self) -> Callable[..., Any] | None:
        """Return the function that builds a manifest; None where the row's own places do."""
        if isinstance(self.build, str) and self.build:
            builder: Callable[..., Any] = resolve_name(f"cosettle_cache.videos.{self.build}")
            return builder
        return self.build or None

    def find(self, data_root: Path) -> Path | None:
        """Return the data set's folder under the data root, None where there is none."""
        found = (data_root / name for name in self.folders if (data_root / name / self.mark).is_dir())
        return next(found, None)


def _masks(title: str, build: str, *folders: str, place: str = "", **more: Any) -> DataSet:
    """Return the row of a data set in the layout of DAVIS (`place` is the resolution) or YouTube-VOS."""
    return DataSet(
        f"object masks of {title}",
        f"layouts:{build}",
        LabelKind.MASKS,
        folders=folders,
        media=f"JPEGImages{place}/{{name}}",
        labels=f"Annotations{place}/{{name}}",
        **more,
    )


_DAVIS: dict[str, Any] = {"place": "/480p", "split": "val", "mark": "JPEGImages"}
_VOS = ("YouTube-VOS", "YouTubeVOS", "youtube-vos", "ytvos")

DATASETS: dict[str, DataSet] = {
    "davis": _masks("DAVIS", "build_davis", "DAVIS", "davis-2017", "davis", ".", **_DAVIS),
    "davis2016": _masks(
        "DAVIS-2016", "build_davis2016", "DAVIS-2016", "DAVIS2016", "davis2016", **_DAVIS, binary=True
    ),
    "youtube-vos": _masks("YouTube-VOS", "build_vos", *_VOS, split="valid", sparse=True),
    "mose": _masks("MOSE", "build_mose", "MOSE", "mose", split="train", sparse=True),
    "lvos": _masks("LVOS", "build_lvos", "LVOS", "lvos", split="valid", sparse=True),
    "vip": DataSet(
        "body parts of VIP",
        "layouts:build_vip",
        LabelKind.PARTS,
        split="val",
        folders=("VIP", "VIP_Fine", "vip", "."),
        mark="Images",
        media="Images/{name}",
        labels="Annotations/Category_ids/{name}",
    ),
    "jhmdb": DataSet(
        "joints of JHMDB",
        "layouts:build_jhmdb",
        LabelKind.KEYPOINTS,
        split="val",
        folders=("JHMDB", "jhmdb", "."),
        mark="Rename_Images",
        media="Rename_Images/{name}",
        labels="joint_positions/{name}/joint_positions.mat",
        list_split="split1_test",
    ),
    "masks": DataSet("your clips, a first mask beside each", "layouts:build_masks", LabelKind.MASKS),
    "kinetics": DataSet(
        "class folders of clips",
        "folders:build_kinetics",
        folders=("kinetics400/train", "kinetics400", "k400/train", "k400"),
        media="{name}",
        list_folder="kinetics400/val",
        list_split="val",
    ),
    "classes": DataSet("class folders at any depth", "folders:build_classes"),
    "ucf101": DataSet("UCF101 with its lists", "folders:build_ucf101", split=None),
    "hmdb51": DataSet("HMDB51 with its lists", "folders:build_hmdb51", split=None),
    "folder": DataSet("any folder of clips", "folders:build_folder", folders=("clips",)),
    "images": DataSet("any folder of images", "folders:build_images"),
    "voc": DataSet("classes of VOC's pixels", "layouts:build_voc", LabelKind.CLASSES, split="train,val"),
    "spair": DataSet("images of SPair-71k", "folders:build_spair"),
    "sprites": DataSet("the built-in clips", "layouts:build_sprites", LabelKind.MASKS, split="val"),
    "tapvid": DataSet(
        "unpacked TAP-Vid tracks",
        "layouts:build_tapvid",
        LabelKind.TRACKS,
        folders=("tapvid_davis", "tapvid", "."),
        mark="tracks",
    ),
}


def listable() -> list[str]:
    """Return the data sets of which a published list makes a manifest."""
    return [name for name, row in DATASETS.items() if row.media]
