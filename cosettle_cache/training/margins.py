"""Distances within and between videos as they are after a projection, for many thresholds at once.

Unit tokens and an eigenbasis with its gains come in, distances per gain go out. The length of a projected
token and its product with another are sums over directions weighted with gains: one rotation serves all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

Basis = Float64[Tensor, "dim direction"]
Gains = Float64[Tensor, "gain direction"]

#: Below this length a projected token counts as gone.
_SHORTEST = 1e-12


def intra_distances(
    first: Float64[Tensor, "pair token dim"],
    second: Float64[Tensor, "pair token dim"],
    basis: Basis,
    gains: Gains,
) -> Float64[Tensor, "pair gain"]:
    """Return the mean distance of corresponding projected unit tokens, in diameters of the unit sphere."""
    first, second = first @ basis, second @ basis
    lengths = _lengths(first, gains) * _lengths(second, gains)
    return _half_chord(((first * second) @ gains.T) / lengths).mean(1)


def inter_distances(
    tokens: Float64[Tensor, "video place dim"], basis: Basis, gains: Gains
) -> Float64[Tensor, " gain"]:
    """Return the mean distance of projected unit tokens at one place over all pairs of videos and places."""
    rotated = (tokens @ basis).transpose(0, 1)
    first, second = torch.triu_indices(len(tokens), len(tokens), 1).unbind()
    means = []
    for gain in gains:
        scaled = rotated * gain.sqrt()
        scaled = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
        means.append(_half_chord((scaled @ scaled.mT)[:, first, second]).mean())
    return torch.stack(means)


def _lengths(rotated: Tensor, gains: Gains) -> Tensor:
    return (rotated.square() @ gains.T).sqrt().clamp_min(_SHORTEST)


def _half_chord(cosine: Tensor) -> Tensor:
    """Return half the distance of two unit vectors with this cosine."""
    return ((1 - cosine) / 2).clamp_min(0).sqrt()
