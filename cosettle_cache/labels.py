"""Label maps: index masks of an annotated frame become soft maps on the token grid, and back.

Pure functions; a benchmark's first mask goes in and `[row col class]` comes out, or the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from cosettle_cache.types import Grid

Mask = UInt8[np.ndarray, "height width"]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FirstLabels:
    """The first frame's label map; class c of the map is object `object_ids[c]` of the mask, ascending."""

    object_ids: tuple[int, ...]
    label_map: Float32[Tensor, "row col class"]


def encode_mask(mask: Mask, size: Size, grid: Grid) -> FirstLabels:
    """Return the label map of a first frame whose network input has `size` (height, width) in pixels.

    `mask` holds object indices and no void. It is resized to the input by nearest neighbour, its classes are
    those left there, and each is shrunk to the grid bilinearly: of a patch of 16 pixels only the central 2x2
    count (PROTOCOLS 1.2.8).
    """
    at_input = resize_mask(mask, size)
    object_ids = tuple(np.unique(at_input).tolist())
    # One class at a time: OpenCV drops the axis of a single class, and all at once take a frame each.
    maps = [_shrink(at_input == object_id, grid) for object_id in object_ids]
    return FirstLabels(object_ids, torch.from_numpy(np.stack(maps, axis=-1)))


def decode_mask(
    label_map: Float32[Tensor, "row col class"], object_ids: Sequence[int], size: Size, mask_size: Size
) -> Mask:
    """Return the index mask of a label map at `mask_size`.

    Bilinear to the input `size`, the strongest class, then nearest neighbour to `mask_size`. Of equally
    strong classes the first wins, which is the background where there is any (PROTOCOLS 1.2.9).
    """
    classes = _enlarge(label_map, size).max(dim=0).indices
    lookup = torch.tensor(object_ids, dtype=torch.uint8, device=label_map.device)
    return resize_mask(lookup[classes].cpu().numpy(), mask_size)


def resize_mask(mask: Mask, size: Size) -> UInt8[np.ndarray, "_ _"]:
    """Return `mask` at `size` by OpenCV's nearest neighbour, which rounds source coordinates down."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


def _shrink(chosen: np.ndarray, grid: Grid) -> Float32[np.ndarray, "row col"]:
    size = (grid.cols, grid.rows)
    return cv2.resize(chosen.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def _enlarge(
    label_map: Float32[Tensor, "row col class"], size: Size
) -> Float32[Tensor, "class height width"]:
    # Class-major in memory first: interpolating the strided view is fifteen times slower on a CPU.
    maps = label_map.permute(2, 0, 1)[None].contiguous()
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
