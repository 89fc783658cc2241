"""The one encoder class: normalised images in, patch tokens out, by the released forward of its family.

`Backbone` checks sizes and shifts and knows its provenance; `VitBody` is timm's model taken apart at its
positions; `Positions` (absolute) and `Rotary` (DINOv3, EVA-02, RoPE-ViT) give the positions of a grid, plain
or shifted as Co-Settle does.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    get_mixed_freqs,
    get_mixed_grid,
)
from torch import Tensor, nn

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders.registry import NORMS, PositionResize, join_name, split_name

if TYPE_CHECKING:
    from cosettle_cache.encoders.registry import BackboneInfo

#: Names of the precisions and the type that autocast computes in; None is float32, exact, without TF32.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: What a shift does, for fingerprints.
SHIFT_RULE = "shift: bicubic to int((1 + ratio) grid), no antialias, cropped"
#: Added to rows and columns by the released scale-factor resize, against rounding (PROTOCOLS 7.4).
_SCALE_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Weights:
    """`source`: file name, hub file or `random:seed`; `sha256`: of the file, or of the random tensors.

    `passed_over` has the keys of other state dicts of the model in the file, such as an average (EMA).
    """

    source: str
    sha256: str
    passed_over: tuple[str, ...] = ()


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
        self.weights_passed_over = weights.passed_over
        self.token_rule, self.position_rule = token_rule, position_rule
        self.precision, self.device = precision, torch.device(device)
        self.layers, self.norm = tuple[int, ...](), NORMS[0]
        self._body = body
        self._autocast = PRECISIONS[precision]
        if self._autocast is not None:
            body.keep_weights_in(self._autocast)

    def take_layers(self, layers: Sequence[int], norm: str) -> None:
        """Give the tokens behind these blocks (from 0), side by side in the channels, instead of the last's.

        The encoder's final norm is applied to those of the `last` block only, to `each`, or to `none`, as
        timm's `forward_intermediates` does. Raises `UsageError` for a layer that does not exist.
        """
        depth = len(self._body.vit.blocks)
        if not all(0 <= layer < depth for layer in layers):
            found = ", ".join(map(str, layers))
            raise UsageError(f"{self.name} has no such layer", wanted=f"layers 0 to {depth - 1}", found=found)
        self.layers, self.norm = tuple(layers), norm
        self._body.layers, self._body.norm = self.layers, norm
        self.dim = self.info.dim * len(layers)
        rule = ", ".join(map(str, layers))
        self.token_rule += f"; behind block {rule} of 0 to {depth - 1}, final norm on {norm}"
        self.name = join_name(self.name, layers, norm)

    def one_layer(self, layer: int) -> Backbone:
        """Return the same encoder, giving the tokens of one of its layers."""
        one = copy(self)
        one._body = copy(self._body)
        one.name, _, _ = split_name(self.name)
        one.token_rule = self.token_rule.partition("; behind block")[0]
        one.take_layers([layer], self.norm)
        return one

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid of patch tokens of an image of this size in pixels."""
        from cosettle_cache.videos.frames import check_grid  # brings the decoders

        hint = "the nearest sizes are {below} and {above}"
        return check_grid(height, width, self.patch, f"an image for {self.name}", hint)

    def encode(
        self,
        images: Float[Tensor, "n 3 height width"] | Float[np.ndarray, "n 3 height width"],
        shift: PositionShift | Sequence[PositionShift | None] | None = None,
    ) -> Float[Tensor, "n row col dim"]:
        """Return the patch tokens of normalised images; no CLS, no registers.

        `shift` is one position shift for all images or one (or None) per image. Tokens are float32 in
        precision fp32, and on the encoder's device.
        """
        images = torch.as_tensor(images)
        shifts = (shift,) * len(images) if isinstance(shift, PositionShift | None) else tuple(shift)
        if len(shifts) != len(images):
            raise UsageError("one shift per image", wanted=len(images), found=len(shifts))
        return self.encode_views(images, list(enumerate(shifts)))

    def encode_views(
        self,
        images: Float[Tensor, "image 3 height width"],
        views: Sequence[tuple[int, PositionShift | None]],
    ) -> Float[Tensor, "n row col dim"]:
        """Return the tokens of views (image number, shift) as `encode` does, each image embedded once."""
        grid = self.grid(*images.shape[-2:])
        for shift in {shift for _, shift in views if shift is not None}:
            check_shift(grid, shift)
        with torch.inference_mode():
            tokens = self._body.tokens(images.to(self.device), views, grid, self._autocast)
        # Copied outside inference mode: without prefix tokens, contiguous, and usable in training.
        patches = tokens[:, -grid.n_tokens :].clone()
        return patches.view(len(patches), grid.rows, grid.cols, self.dim)

    def compile_blocks(self) -> None:
        """Put the blocks through torch.compile; `precision` says so, as tokens move in the last bits.

        The first batch of every size takes longer, by the compiler's time.
        """
        for block in self._body.vit.blocks:  # they are alike, so the compiler works once
            block.compile()
        self.precision = f"{self.precision} compiled"


class VitBody:
    """A frozen timm VisionTransformer or Eva, positions held apart, so that each view has its own shift."""

    def __init__(self, vit: Any, resize: PositionResize, norm_plain: bool = True) -> None:
        self.vit = vit
        self.norm_plain = norm_plain
        self.prefix, embedding = split_positions(vit)
        self.positions = None if embedding is None else Positions(embedding, resize)
        self.layers: tuple[int, ...] = (len(vit.blocks) - 1,)
        self.norm = NORMS[0]
        rope = getattr(vit, "rope", None)
        self.rotary = None if rope is None else Rotary(rope, len(vit.blocks))

    def keep_weights_in(self, dtype: torch.dtype) -> None:
        """Round once the weights that autocast would round in every forward; norms, scales stay float32."""
        for module in self.vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def tokens(
        self,
        images: Tensor,
        views: Sequence[tuple[int, PositionShift | None]],
        grid: Grid,
        autocast: torch.dtype | None = None,
    ) -> Tensor:
        """Return all tokens [n, prefix + patch, layer * dim] of the views (image number, shift).

        Positions are float32 in every precision, so no token depends on which other views are shifted.
        """
        images_of, shifts = [image for image, _ in views], [shift for _, shift in views]
        if self.positions is None and self.rotary is None and any(shifts):
            raise UsageError("this encoder has no positions to shift", wanted="absolute or rotary positions")
        device = images.device.type
        with exact_float32(device):
            positions = None if self.positions is None else self.positions.of_views(grid, shifts)
            tables = None if self.rotary is None else self.rotary.tables(grid, shifts)
            with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
                found = self._forward(images, images_of, positions, tables)
                normed = [self._normed(tokens, layer, shifts) for layer, tokens in found]
        return normed[0] if len(normed) == 1 else torch.cat(normed, -1)

    def _normed(self, tokens: Tensor, layer: int, shifts: Sequence[PositionShift | None]) -> Tensor:
        """Return the tokens of a layer with the final norm, where that is asked for."""
        if self.norm == "none" or (self.norm == "last" and layer < len(self.vit.blocks) - 1):
            return tokens
        normed: Tensor = self.vit.norm(tokens)
        if self.norm_plain or self.norm == "each":
            return normed
        shifted = upload(torch.tensor([shift is not None for shift in shifts]), tokens.device)
        return torch.where(shifted[:, None, None], normed, tokens)

    def _forward(
        self,
        images: Tensor,
        images_of: Sequence[int],
        positions: Tensor | None,
        tables: Sequence[Tensor] | None,
    ) -> list[tuple[int, Tensor]]:
        """Return the tokens of the views of these images behind each block that is asked for."""
        patches = self.vit.patch_embed(images).flatten(1, 2)
        if images_of != list(range(len(patches))):
            patches = patches[upload(torch.tensor(images_of), patches.device)]
        if positions is not None:
            patches = patches + positions
        tokens: Tensor = self.vit.norm_pre(torch.cat([self.prefix.expand(len(patches), -1, -1), patches], 1))
        found = []
        for index, block in enumerate(self.vit.blocks[: self.layers[-1] + 1]):
            tokens = block(tokens) if tables is None else block(tokens, rope=tables[index])
            if index in self.layers:
                found.append((index, tokens))
        return found


def split_positions(vit: Any) -> tuple[Tensor, Tensor | None]:
    """Return the prefix tokens with their positions added, and the patch positions [row col dim] if any."""
    found = (getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    parts = [part for part in found if part is not None]
    empty = vit.patch_embed.proj.weight.new_empty(1, 0, vit.embed_dim)
    prefix = torch.cat([empty, *parts], 1)
    if vit.pos_embed is None:
        return prefix.detach(), None
    positions = vit.pos_embed
    if not vit.no_embed_class:
        prefix = prefix + positions[:, : prefix.shape[1]]
        positions = positions[:, prefix.shape[1] :]
    return prefix.detach(), positions.detach()[0].unflatten(0, vit.patch_embed.grid_size)


class Positions:
    """The absolute position embedding of an encoder's patch tokens."""

    def __init__(self, embedding: Float[Tensor, "row col dim"], resize: PositionResize) -> None:
        self._embedding = embedding
        #: The embedding at a grid [1 token dim], and interpolation weights by axis and enlarged length.
        self.plain = lru_cache(maxsize=8)(
            lambda grid: resize_positions(embedding, grid, resize).flatten(0, 1).unsqueeze(0)
        )
        self._weights = lru_cache(maxsize=16)(
            lambda axis, length: bicubic_weights(embedding.shape[axis], length).to(embedding)
        )

    def shifted(self, grid: Grid, shifts: Sequence[PositionShift]) -> Float[Tensor, "n token dim"]:
        """Return one shifted embedding per shift: the crop at its offsets of the enlarged embedding.

        The enlargement (bicubic, no antialias; PROTOCOLS 7.2) is linear and separable, so the crop is row
        weights x embedding x column weights; the whole, 600 MB for a ViT-B at 480x880, is never made.
        """
        rows = torch.stack([self._crop(grid, shift, 0) for shift in shifts])
        cols = torch.stack([self._crop(grid, shift, 1) for shift in shifts])
        by_row = torch.einsum("nri,ijd->nrjd", rows, self._embedding)
        return torch.einsum("ncj,nrjd->nrcd", cols, by_row).flatten(1, 2)

    def of_views(self, grid: Grid, shifts: Sequence[PositionShift | None]) -> Float[Tensor, "n token dim"]:
        """Return the positions of each view, or one for all when all are plain."""
        moved = [index for index, shift in enumerate(shifts) if shift is not None]
        plain = self.plain(grid)
        if not moved:
            return plain
        shifted = self.shifted(grid, [shift for shift in shifts if shift is not None])
        if len(moved) == len(shifts):
            return shifted
        every = plain.repeat(len(shifts), 1, 1)
        every[upload(torch.tensor(moved), every.device)] = shifted
        return every

    def _crop(self, grid: Grid, shift: PositionShift, axis: int) -> Tensor:
        length, start = ((grid.rows, shift.row), (grid.cols, shift.col))[axis]
        return self._weights(axis, enlarged_length(length, shift.ratio))[start : start + length]


def resize_positions(
    embedding: Float[Tensor, "row col dim"], grid: Grid, rule: PositionResize
) -> Float[Tensor, "new_row new_col dim"]:
    """Return the embedding at another grid by the family's rule; at its own grid it is returned as it is."""
    rows, cols, _ = embedding.shape
    if (rows, cols) == (grid.rows, grid.cols):
        return embedding
    planes = embedding.permute(2, 0, 1).unsqueeze(0)
    if rule is PositionResize.SCALE_FACTOR:
        factors = ((grid.rows + _SCALE_MARGIN) / rows, (grid.cols + _SCALE_MARGIN) / cols)
        resized = F.interpolate(planes, scale_factor=factors, mode="bicubic")
    else:
        antialias = rule is PositionResize.ANTIALIAS
        resized = F.interpolate(planes, size=(grid.rows, grid.cols), mode="bicubic", antialias=antialias)
    return resized[0].permute(1, 2, 0).contiguous()


def enlarged_length(length: int, ratio: float) -> int:
    """Return the length of an axis of the enlarged position grid (PROTOCOLS 7.2)."""
    return int((1 + ratio) * length)


def enlarged(grid: Grid, ratio: float) -> Grid:
    """Return the enlarged position grid."""
    return Grid(enlarged_length(grid.rows, ratio), enlarged_length(grid.cols, ratio))


def check_shift(grid: Grid, shift: PositionShift) -> None:
    """Raise `InputError` when the shift's crop does not lie within the enlarged grid."""
    if not shift.ratio >= 0:
        raise InputError("a position shift enlarges", wanted="a ratio of at least 0", found=shift.ratio)
    large = enlarged(grid, shift.ratio)
    rows, cols = large.rows - grid.rows, large.cols - grid.cols
    if not (0 <= shift.row <= rows and 0 <= shift.col <= cols):
        raise InputError(
            "the position shift lies outside the enlarged grid",
            wanted=f"row 0 to {rows}, column 0 to {cols} (grid {grid}, ratio {shift.ratio:g})",
            found=f"row {shift.row}, column {shift.col}",
        )


def bicubic_weights(length: int, enlarged: int) -> Float[Tensor, "enlarged length"]:
    """Return the matrix that torch's bicubic interpolation (`align_corners=False`) applies along one axis."""
    unit = torch.eye(length)[None, None]
    return F.interpolate(unit, size=(enlarged, length), mode="bicubic")[0, 0]


class Rotary:
    """The rotary embedding of a timm Eva model; `tables` gives one sine-cosine table per block.

    A shift has no released counterpart here. It is the same idea on coordinates: those of the grid are
    refined to `int((1 + ratio) * grid)` steps over the same extent, and the crop at the shift's offsets is
    used. Attention between patches sees distances shrunk by `1 + ratio`; as rotations are relative, the
    offsets matter to prefix tokens only.
    """

    def __init__(self, rope: Any, depth: int) -> None:
        self._rope = rope
        self._depth = depth
        #: Learned frequencies differ by block and head; fixed ones are shared.
        self._by_block = isinstance(rope, RotaryEmbeddingMixed)
        self._plain = lru_cache(maxsize=4)(lambda grid: rope.get_embed(shape=(grid.rows, grid.cols)))
        self._enlarged = lru_cache(maxsize=2)(self._make_enlarged)

    def tables(self, grid: Grid, shifts: Sequence[PositionShift | None]) -> Sequence[Tensor]:
        """Return the table of each block, with an axis of views when a view is shifted."""
        if all(shift is None for shift in shifts):
            tables = self._plain(grid)
            return list(tables) if self._by_block else [tables] * self._depth
        views = [self._plain(grid) if shift is None else self._shifted(grid, shift) for shift in shifts]
        if self._by_block:
            return list(torch.stack(views, 1))
        return [torch.stack(views)[:, None]] * self._depth

    def _shifted(self, grid: Grid, shift: PositionShift) -> Tensor:
        if self._by_block:
            return self._shifted_mixed(grid, shift)
        return _crop(self._enlarged(grid, shift.ratio), grid, shift).flatten(0, 1)

    def _make_enlarged(self, grid: Grid, ratio: float) -> Tensor:
        large, rope = enlarged(grid, ratio), self._rope
        if isinstance(rope, RotaryEmbeddingCat) and not rope.in_pixels:
            # Counts patches: the reference shape makes it count in steps of the grid's own extent.
            rope = copy(rope)
            rope.ref_feat_shape = self._rope.ref_feat_shape or [grid.rows, grid.cols]
        elif not isinstance(rope, RotaryEmbeddingCat | RotaryEmbeddingDinoV3):
            raise UsageError(
                "position shifts are not defined for this rotary embedding",
                wanted="absolute positions, or rotary ones of DINOv3, EVA-02 or RoPE-ViT",
                found=type(rope).__name__,
            )
        table: Tensor = rope.get_embed(shape=(large.rows, large.cols))
        return table.view(large.rows, large.cols, -1)

    def _shifted_mixed(self, grid: Grid, shift: PositionShift) -> Tensor:
        large, rope = enlarged(grid, shift.ratio), self._rope
        steps = {"row": grid.rows / large.rows, "col": grid.cols / large.cols}
        order = ("row", "col") if rope.grid_indexing == "ij" else ("col", "row")
        coordinates = get_mixed_grid([large.rows, large.cols], rope.grid_indexing, rope.freqs.device)
        first, second = (
            _crop(along.view(large.rows, large.cols), grid, shift).flatten() * steps[axis]
            for along, axis in zip(coordinates, order, strict=True)
        )
        return get_mixed_freqs(rope.freqs, first, second)


def _crop(table: Tensor, grid: Grid, shift: PositionShift) -> Tensor:
    return table[shift.row : shift.row + grid.rows, shift.col : shift.col + grid.cols]
