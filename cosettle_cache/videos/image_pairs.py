"""Pairs of images with key points in common, as SPair-71k keeps them: a JSON file per pair.

In comes a folder with `PairAnnotation/SPLIT/NAME.json`, out go the pairs and the reasons of those that are
none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import printable, read_json
from cosettle_cache.videos.lists import read_lines

Points = Float64[np.ndarray, "point 2"]


@dataclass(frozen=True, slots=True, eq=False)
class ImagePair:
    """Key points of a source image and the same ones of a target, (x, y) in pixels of each image.

    Images are `CATEGORY/NAME.jpg`; `side` is the longer side of the target's box in pixels.
    """

    name: str
    category: str
    source: str
    target: str
    source_points: Points
    target_points: Points
    side: float


def read_pairs(root: Path, split: str) -> tuple[list[ImagePair], dict[str, str]]:
    """Return the pairs of a split, in the order of `Layout/large/SPLIT.txt` where it is there, and bad ones.

    Raises `InputError` for a folder without such a split.
    """
    folder, listing = root / "PairAnnotation" / split, root / "Layout" / "large" / f"{split}.txt"
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*"))
        raise InputError(f"{folder} does not exist", found=", ".join(known) or "no image pairs")
    names = read_lines(listing) if listing.is_file() else sorted(path.stem for path in folder.glob("*.json"))
    pairs, failures = list[ImagePair](), dict[str, str]()
    for name in names:
        try:
            pairs.append(_read_pair(folder / f"{name}.json", name))
        except InputError as error:
            failures[printable(name)] = error.summary
    return pairs, failures


def _read_pair(path: Path, name: str) -> ImagePair:
    document = read_json(path)
    try:
        category = str(document["category"])
        source, target = (printable(f"{category}/{document[key]}") for key in ("src_imname", "trg_imname"))
        points = [np.array(document[key], np.float64).reshape(-1, 2) for key in ("src_kps", "trg_kps")]
        left, top, right, bottom = map(float, document["trg_bndbox"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        wanted = "category, src_imname, trg_imname, src_kps, trg_kps and trg_bndbox"
        raise InputError(f"{path} is no image pair", wanted=wanted, found=repr(error)) from error
    if not len(points[0]) or points[0].shape != points[1].shape:
        found = f"{len(points[0])} and {len(points[1])}"
        raise InputError(f"the image pair {name} has no key points in common", found=found)
    side = max(right - left, bottom - top)
    if not (np.isfinite(points).all() and 0 < side < np.inf):
        raise InputError(f"the image pair {name} has points or a box that are none", found=f"a box of {side}")
    return ImagePair(printable(name), category, source, target, points[0], points[1], side)
