"""Views: a decoded frame and its encodings -> normalised images for the encoder.

The two plans prepare images as the released code does: training samples through a square and a random crop
(PROTOCOLS 7.3), evaluation frames through one bilinear resize (PROTOCOLS 1.2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cosettle_cache.core.types import Encoding
from cosettle_cache.store.plan import PairsRecipe, Plan
from cosettle_cache.videos.frames import Image8

Rgb = tuple[float, float, float]
View = Float[Tensor, "3 view_height view_width"]


@dataclass(frozen=True, slots=True)
class PairsViews:
    """Views of a pairs plan: resize to a square ignoring aspect, crop, resize again, flip, normalise.

    The second resize is bicubic and its overshoot is not clamped, as released.
    """

    size: int
    mean: Rgb
    std: Rgb
    rule: ClassVar[str] = "square: pillow bilinear; crop: torch bicubic antialias, not clamped; flip"

    def prepare(self, image: Image8, encodings: Sequence[Encoding]) -> list[View]:
        """Return one normalised view per encoding; encodings with the same crop and flip share memory."""
        square = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float().div_(255)
        views: dict[tuple[object, bool], View] = {}
        for encoding in encodings:
            key = (encoding.crop, encoding.flip)
            if key not in views:
                views[key] = _normalise(self._crop(pixels, encoding), self.mean, self.std)
        return [views[encoding.crop, encoding.flip] for encoding in encodings]

    def _crop(self, pixels: View, encoding: Encoding) -> View:
        crop = encoding.crop
        if crop is not None:
            box = pixels[None, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            size = (self.size, self.size)
            pixels = torch.nn.functional.interpolate(box, size, mode="bicubic", antialias=True)[0]
        return pixels.flip(-1) if encoding.flip else pixels


@dataclass(frozen=True, slots=True)
class FramesViews:
    """Views of a frames plan: one bilinear resize of the float image to the size rule's pixels, normalise."""

    height: int
    width: int
    mean: Rgb
    std: Rgb
    rule: ClassVar[str] = "opencv bilinear of the float image"

    def prepare(self, image: Image8, encodings: Sequence[Encoding]) -> list[View]:
        """Return one normalised view per encoding; all share memory."""
        scaled = image.astype(np.float32) / 255
        resized = cv2.resize(scaled, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        return [_normalise(pixels, self.mean, self.std)] * len(encodings)


Views = PairsViews | FramesViews


def views_rule(plan: Plan, mean: Rgb, std: Rgb) -> str:
    """Return the text that stands for the preprocessing in a fingerprint."""
    rule = PairsViews.rule if isinstance(plan.recipe, PairsRecipe) else FramesViews.rule
    return f"{rule}; mean {_numbers(mean)}; std {_numbers(std)}"


def make_views(plan: Plan, height: int, width: int, mean: Rgb, std: Rgb) -> Views:
    """Return the preparation of frames to `height` x `width` pixels for the plan's kind."""
    if isinstance(plan.recipe, PairsRecipe):
        return PairsViews(height, mean, std)
    return FramesViews(height, width, mean, std)


def _normalise(pixels: View, mean: Rgb, std: Rgb) -> View:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _numbers(values: Rgb) -> str:
    return " ".join(f"{value:g}" for value in values)
