"""Pure tensor functions between tokens and weights: unit tokens, spatial windows, transitions.

Tokens and neighbour lists come in, tensors of the same device go out; nothing is kept.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor


def unit_tokens(tokens: Float[Tensor, "*shape dim"]) -> Float32[Tensor, "*shape dim"]:
    """Return tokens of length one in float32, so that dot products are cosines; zeros stay zeros."""
    return torch.nn.functional.normalize(tokens.float(), dim=-1)


def window_reach(shape: str, radius: float) -> int:
    """Return how many rows or columns away from a query its window still reaches."""
    return math.floor(radius) if shape == "square" else math.ceil(radius) - 1


def in_window(
    row_distance: Int[Tensor, "*shape"], col_distance: Int[Tensor, "*shape"], shape: str, radius: float
) -> Bool[Tensor, "*shape"]:
    """Say which displacements lie inside the window.

    A `disc` is open, its rim outside (videowalk and T-CORE); a `square` includes its rim (DINO).
    """
    if shape == "square":
        return torch.maximum(row_distance.abs(), col_distance.abs()) <= radius
    return row_distance.square() + col_distance.square() < radius * radius


def transition(
    similarity: Float[Tensor, "query k"], count: Int[Tensor, "query k"], temperature: float
) -> Float[Tensor, "query k"]:
    """Return weights that sum to one over k: a softmax in which every neighbour stands `count` times.

    Entries of count 0 get weight 0 whatever their similarity.
    """
    logits = (similarity / temperature).masked_fill(count == 0, -torch.inf)
    return torch.softmax(logits + count.clamp(min=1).log(), dim=-1)
