"""Label maps: masks, parts or key points of an annotated frame become soft maps on the grid, and back.

Pure functions; a benchmark's first labels go in and `[row col class]` comes out, or the reverse. Part masks
are masks: their classes are those that the first frame shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from cosettle_cache.core.types import Grid
from cosettle_cache.videos.masks import sample_mask

Mask = UInt8[np.ndarray, "height width"]
Size = tuple[int, int]
LabelMap = Float32[Tensor, "row col class"]
#: Key points: x, then y.
Points = Float[np.ndarray, "2 joint"]

#: Width of a key point's Gaussian, in cells.
SIGMA = 0.5
#: Cells that a key point is decoded from; videowalk takes 3.
DECODED_CELLS = 5
#: Both coordinates of a key point whose map is empty.
LOST = -1.0


@dataclass(frozen=True, slots=True)
class FirstLabels:
    """The first frame's label map; class c of the map is object `object_ids[c]` of the mask, ascending."""

    object_ids: tuple[int, ...]
    label_map: LabelMap


def encode_mask(mask: Mask, size: Size, grid: Grid) -> FirstLabels:
    """Return the label map of a first frame whose network input has `size` (height, width) in pixels.

    `mask` holds object indices and no void. It is resized to the input by nearest neighbour, its classes are
    those left there, and each is shrunk to the grid bilinearly: of a patch of 16 pixels only the central 2x2
    count (PROTOCOLS 1.2.8).
    """
    at_input = resize_mask(mask, size)
    object_ids = tuple(np.unique(at_input).tolist())
    # One class at a time: OpenCV drops the axis of a single class, and all at once take a frame each.
    shrink = partial(cv2.resize, dsize=(grid.cols, grid.rows), interpolation=cv2.INTER_LINEAR)
    maps = [shrink((at_input == object_id).astype(np.float32)) for object_id in object_ids]
    return FirstLabels(object_ids, torch.from_numpy(np.stack(maps, axis=-1)))


def encode_mask_nearest(mask: Mask, grid: Grid) -> FirstLabels:
    """Return DINO's label map: each cell belongs to the object at its centre (PROTOCOLS 1.1).

    The mask is sampled at its own size, without a stop at the network input, by Pillow's nearest neighbour.
    The background is a class even where no cell shows it, as in DINO; an object that no cell shows is none.
    """
    cells = sample_mask(mask, (grid.rows, grid.cols))
    object_ids = np.union1d(0, cells)
    return FirstLabels(
        tuple(object_ids.tolist()),
        torch.from_numpy((cells[..., None] == object_ids).astype(np.float32)),
    )


def decode_classes(
    label_map: LabelMap, size: Size, *, stretched: bool = False, upsampling: str = "bilinear"
) -> UInt8[Tensor, "_ _"]:
    """Return the strongest class at each pixel of the input `size`, on the label map's device.

    By `upsampling` to `size`, bilinear or nearest; of equally strong classes the first wins, which is the
    background where there is any (PROTOCOLS 1.2.9). `stretched` is DINO's way: first each class's minimum and
    maximum over the image go to 0 and 1, a class that is the same everywhere to 0 (PROTOCOLS 1.1).
    """
    # Class-major in memory first: interpolating the strided view is fifteen times slower on a CPU.
    maps = label_map.permute(2, 0, 1)[None].contiguous()
    maps = torch.nn.functional.interpolate(maps, size, mode=upsampling)[0]
    if stretched:
        maps = maps - maps.amin(dim=(1, 2), keepdim=True)
        highest = maps.amax(dim=(1, 2), keepdim=True)
        maps = maps / highest.where(highest > 0, 1.0)
    return maps.max(dim=0).indices.to(torch.uint8)


def name_classes(
    classes: Mask, object_ids: Sequence[int], mask_size: Size, *, stretched: bool = False
) -> UInt8[np.ndarray, "_ _"]:
    """Return the index mask, at `mask_size`, of an image of class numbers.

    OpenCV's nearest neighbour resizes (PROTOCOLS 1.2.9), Pillow's where DINO's way is taken (`stretched`).
    """
    mask = np.array(object_ids, np.uint8)[classes]
    return sample_mask(mask, mask_size) if stretched else resize_mask(mask, mask_size)


def encode_keypoints(points: Points, grid: Grid) -> LabelMap:
    """Return the label map of key points given in cells; class 0 is the background, class j + 1 is joint j.

    Each joint is a Gaussian of `SIGMA` cells around its nearest cell, 1 there. As released, it is cut to
    the four cells from two before to one after, and coordinates below 1.5 are rounded another way
    (PROTOCOLS 2.2; see `_bump`). A joint outside the grid has an empty map. The background is 1 where no
    joint is.
    """
    joints = [
        np.outer(_bump(float(y), grid.rows), _bump(float(x), grid.cols)) for x, y in zip(*points, strict=True)
    ]
    maps = np.stack(joints, axis=-1)
    background = maps.sum(axis=-1, keepdims=True) == 0
    return torch.from_numpy(np.concatenate([background, maps], axis=-1).astype(np.float32))


def decode_keypoints(label_map: LabelMap, *, n_cells: int = DECODED_CELLS) -> Float32[Tensor, "2 joint"]:
    """Return the joints of a label map in cells: the mean of each joint's `n_cells` strongest cells.

    Cells are weighted by their share of the map's sum over them. A joint whose map is empty is `LOST` in both
    coordinates (PROTOCOLS 2.4).
    """
    n_rows, n_cols, _ = label_map.shape
    strongest = label_map[..., 1:].flatten(0, 1).topk(min(n_cells, n_rows * n_cols), dim=0)
    total = strongest.values.sum(dim=0)
    weights = strongest.values / total
    x, y = strongest.indices % n_cols, strongest.indices // n_cols
    points = torch.stack([(weights * x).sum(dim=0), (weights * y).sum(dim=0)])
    return points.where(total != 0, LOST)


def resize_mask(mask: Mask, size: Size) -> UInt8[np.ndarray, "_ _"]:
    """Return `mask` at `size` by OpenCV's nearest neighbour, which rounds source coordinates down."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


def _bump(centre: float, n_cells: int) -> Float64[np.ndarray, " cell"]:
    """Return a key point's profile along one axis.

    The released code truncates both ends of the profile towards zero, not down: from 1.5 cells on that rounds
    the centre half up, before it moves the peak one cell inwards and shortens the profile.
    """
    start, stop = int(centre - 3 * SIGMA), int(centre + 3 * SIGMA + 1)
    cells = np.arange(n_cells)
    profile = np.exp(-((cells - (start + 2)) ** 2) / (2 * SIGMA**2))
    return np.where((cells >= start) & (cells < stop), profile, 0.0)
