"""Views: a decoded frame and its encodings -> normalised images for the encoder.

The two plans prepare images as the released code does: training samples through a square and a random crop
(PROTOCOLS 7.3), evaluation frames through one bilinear resize (PROTOCOLS 1.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cosettle_cache.core.settings import LINEAR
from cosettle_cache.core.types import Crop, PlanKind
from cosettle_cache.store.plan import Plan
from cosettle_cache.videos.frames import Image8

Rgb = tuple[float, float, float]
View = Float[Tensor, "3 view_height view_width"]
#: Crop and flip: what encodings of a frame may have in common.
Look = tuple[Crop | None, bool]


@dataclass(frozen=True, slots=True)
class Views:
    """How a plan's kind prepares frames; sizes are pixels.

    Pairs: resize to a square ignoring aspect, crop, resize again, flip, normalise; the second resize is
    bicubic and its overshoot is not clamped, as released. Frames: one resize, normalise; `resampling` is
    `linear` (of the float image) or `bicubic` (Pillow's of the 8-bit image, antialiased, as DINOv3 does).
    """

    kind: PlanKind
    height: int
    width: int
    mean: Rgb
    std: Rgb
    resampling: str = LINEAR

    def resize(self, image: Image8) -> View:
        """Return a frame at the encoder's size, in 0 to 1, which all its views are made of."""
        if self.kind is PlanKind.PAIRS or self.resampling != LINEAR:
            rule = "BILINEAR" if self.kind is PlanKind.PAIRS else "BICUBIC"
            square = Image.fromarray(image).resize((self.width, self.height), Image.Resampling[rule])
            return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float().div_(255)
        scaled = image.astype(np.float32) / 255
        resized = cv2.resize(scaled, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(resized).permute(2, 0, 1).contiguous()

    def write(self, pixels: View, outs: Mapping[Look, View]) -> None:
        """Fill the normalised view of every crop and flip of a resized frame."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        for look, out in outs.items():
            torch.sub(self._crop(pixels, *look), mean, out=out).div_(std)

    def _crop(self, pixels: View, crop: Crop | None, flip: bool) -> View:
        if crop is not None:
            box = pixels[None, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            size = (self.height, self.width)
            pixels = torch.nn.functional.interpolate(box, size, mode="bicubic", antialias=True)[0]
        return pixels.flip(-1) if flip else pixels


def resampling_of(plan: Plan) -> str:
    """Return how frames of a plan are resized; samples of a pairs plan have one way only."""
    return getattr(plan.recipe.settings, "resampling", LINEAR)


def views_rule(plan: Plan, mean: Rgb, std: Rgb) -> str:
    """Return the text that stands for the preprocessing in a fingerprint."""
    pairs = "square: pillow bilinear; crop: torch bicubic antialias, not clamped; flip"
    frames = "opencv bilinear of the float image" if resampling_of(plan) == LINEAR else "pillow bicubic"
    rule = pairs if plan.kind is PlanKind.PAIRS else frames
    numbers = [" ".join(f"{value:g}" for value in values) for values in (mean, std)]
    return f"{rule}; mean {numbers[0]}; std {numbers[1]}"
