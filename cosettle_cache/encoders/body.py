"""A timm ViT taken apart at its positions, so that one forward gives each image its own shift.

Images and shifts come in; all tokens after the blocks and the family's final norm go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders.families import FinalNorm, PositionResize
from cosettle_cache.encoders.positions import Positions

Shifts = Sequence[PositionShift | None]


class VitBody:
    """A frozen timm VisionTransformer or Eva; prefix tokens (CLS, registers) and positions are held apart."""

    def __init__(self, vit: Any, resize: PositionResize, final_norm: FinalNorm = FinalNorm.ALWAYS) -> None:
        self.vit = vit
        self.final_norm = final_norm
        self.prefix, embedding = split_positions(vit)
        self.positions = None if embedding is None else Positions(embedding, resize)
        self.rotary = _rotary(vit)

    def tokens(self, images: Tensor, image_of: Sequence[int] | None, grid: Grid, shifts: Shifts) -> Tensor:
        """Return all tokens [n, prefix + patch, dim] of the views (image number, shift)."""
        patches = self.vit.patch_embed(images).flatten(1, 2)
        if image_of is not None:
            patches = patches[list(image_of)]
        if self.positions is not None:
            patches = patches + _embeddings(self.positions, grid, shifts)
        elif self.rotary is None and any(shifts):
            raise UsageError("this encoder has no positions to shift", wanted="absolute or rotary positions")
        tokens = torch.cat([self.prefix.expand(len(patches), -1, -1), patches], 1)
        return self._normed(self._blocks(self.vit.norm_pre(tokens), grid, shifts), shifts)

    def compile_blocks(self) -> None:
        """Compile the blocks in place; they are alike, so the compiler works once."""
        for block in self.vit.blocks:
            block.compile()

    def _blocks(self, tokens: Tensor, grid: Grid, shifts: Shifts) -> Tensor:
        if self.rotary is None:
            for block in self.vit.blocks:
                tokens = block(tokens)
            return tokens
        for block, table in zip(self.vit.blocks, self.rotary.tables(grid, shifts), strict=True):
            tokens = block(tokens, rope=table)
        return tokens

    def _normed(self, tokens: Tensor, shifts: Shifts) -> Tensor:
        normed: Tensor = self.vit.norm(tokens)
        if self.final_norm is FinalNorm.ALWAYS:
            return normed
        shifted = torch.tensor([shift is not None for shift in shifts], device=tokens.device)
        return torch.where(shifted[:, None, None], normed, tokens)


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


def _rotary(vit: Any) -> Any:
    if getattr(vit, "rope", None) is None:
        return None
    from cosettle_cache.encoders.rotary import Rotary

    return Rotary(vit.rope, len(vit.blocks))


def _embeddings(positions: Positions, grid: Grid, shifts: Shifts) -> Tensor:
    """Return the positions of each view, or one for all when all are plain."""
    moved = [index for index, shift in enumerate(shifts) if shift is not None]
    plain = positions.plain(grid)
    if not moved:
        return plain
    shifted = positions.shifted(grid, [shift for shift in shifts if shift is not None])
    if len(moved) == len(shifts):
        return shifted
    every = plain.repeat(len(shifts), 1, 1)
    every[moved] = shifted
    return every
