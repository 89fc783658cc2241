"""The one encoder class: normalised images in, patch tokens out, by the released forward of its family.

What the families do differently lies in their rows and in the body; here are sizes, shifts, precision and
provenance.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders.positions import check_shift

if TYPE_CHECKING:
    from cosettle_cache.encoders.body import VitBody
    from cosettle_cache.encoders.registry import BackboneInfo
    from cosettle_cache.encoders.weights import Weights

#: Names of the precisions and the type that autocast computes in; float32 is exact, without TF32.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: What a shift does, for fingerprints.
SHIFT_RULE = "shift: bicubic to int((1 + ratio) grid), no antialias, cropped"


class Backbone:
    """A frozen encoder.

    `mean` and `std` normalise RGB in 0 to 1. `token_rule` and `position_rule` say in words what decides the
    tokens; with `name`, `weights_sha256` and `precision` they belong in every fingerprint.
    """

    def __init__(
        self,
        info: BackboneInfo,
        body: VitBody,
        weights: Weights,
        *,
        token_rule: str,
        position_rule: str,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.info = info
        self.name, self.family, self.dim, self.patch = info.name, info.family, info.dim, info.patch
        self.mean, self.std = info.mean, info.std
        self.weights_source, self.weights_sha256 = weights.source, weights.sha256
        self.token_rule, self.position_rule = token_rule, position_rule
        self.precision, self.device = precision, torch.device(device)
        self._body = body
        self._autocast = PRECISIONS[precision]

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid of patch tokens of an image of this size in pixels."""
        if height % self.patch or width % self.patch or not (height and width):
            sizes = sorted({self._near(height, width, up) for up in (False, True)})
            raise InputError(
                f"the image size is not a multiple of the patch of {self.name}",
                wanted=f"height and width multiples of {self.patch}",
                found=f"{height}x{width}",
                hint="the nearest sizes are " + " and ".join(f"{h}x{w}" for h, w in sizes),
            )
        return Grid(height // self.patch, width // self.patch)

    def encode(
        self,
        images: Float[Tensor, "n 3 height width"],
        shift: PositionShift | Sequence[PositionShift | None] | None = None,
    ) -> Float[Tensor, "n row col dim"]:
        """Return the patch tokens of normalised images; no CLS, no registers.

        `shift` is one position shift for all images or one (or None) per image. Tokens are float32 in
        precision fp32, and on the encoder's device.
        """
        shifts = (shift,) * len(images) if isinstance(shift, PositionShift | None) else tuple(shift)
        if len(shifts) != len(images):
            raise UsageError("one shift per image", wanted=len(images), found=len(shifts))
        return self._encode(images, None, shifts)

    def encode_views(
        self,
        images: Float[Tensor, "image 3 height width"],
        views: Sequence[tuple[int, PositionShift | None]],
    ) -> Float[Tensor, "n row col dim"]:
        """Return the patch tokens of views (image number, shift); views of one image share its patches.

        Equal to `encode` on repeated images, without transferring and embedding an image twice.
        """
        return self._encode(images, [image for image, _ in views], [shift for _, shift in views])

    def compile_blocks(self) -> None:
        """Put the blocks through torch.compile; `precision` says so, as tokens move in the last bits.

        The first batch of every size takes longer, by the compiler's time.
        """
        self._body.compile_blocks()
        self.precision = f"{self.precision} compiled"

    def _encode(
        self, images: Tensor, image_of: Sequence[int] | None, shifts: Sequence[PositionShift | None]
    ) -> Tensor:
        grid = self.grid(*images.shape[-2:])
        for shift in {shift for shift in shifts if shift is not None}:
            check_shift(grid, shift)
        with torch.inference_mode(), self._numerics():
            tokens = self._body.tokens(images.to(self.device, non_blocking=True), image_of, grid, shifts)
        # Copied outside inference mode: without prefix tokens, contiguous, and usable in training.
        patches = tokens[:, -grid.n_tokens :].clone()
        return patches.view(len(patches), grid.rows, grid.cols, self.dim)

    def _numerics(self) -> AbstractContextManager[Any]:
        if self._autocast is not None:
            return torch.autocast(self.device.type, dtype=self._autocast)
        if self.device.type == "cuda":
            # Convolutions default to TF32, which moves tokens by 1e-3.
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return nullcontext()

    def _near(self, height: int, width: int, up: bool) -> tuple[int, int]:
        def near(length: int) -> int:
            return max(1, length // self.patch + int(up and length % self.patch > 0)) * self.patch

        return near(height), near(width)
