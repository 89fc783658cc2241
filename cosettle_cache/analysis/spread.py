"""Radii, diameters and the effective rank: how far tokens spread, and in how many directions.

Mean tokens and a definition come in; distances of tokens to their centres, and figures of them, go out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from cosettle_cache.analysis.definitions import SMALLEST_DIAMETER, Definition

#: Of frames or clips to a centre: of every token, or one of all tokens together.
Distances = Float32[np.ndarray, "_ _"]

#: Added to a share before its logarithm (released code).
_SMALLEST_SHARE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Distances to a centre as one definition has them: of every token, or of an item as a whole."""

    centre: Float32[Tensor, "#place dim"]
    drawn: Int[Tensor, " place"] | None
    averaged: bool

    @classmethod
    def about(cls, places: Float64[Tensor, "place dim"], definition: Definition) -> Spread:
        """Return the spread about the mean tokens of all places."""
        drawn = definition.drawn(len(places))
        chosen = places if drawn is None else places[drawn]
        averaged = definition.centre == "place"
        return cls((chosen if averaged else chosen.mean(0, keepdim=True)).float(), drawn, averaged)

    def distances(self, tokens: Float32[Tensor, "item place dim"]) -> Distances:
        """Return how far the tokens of frames or of clips are away from the centre: tokens, or their mean."""
        chosen = tokens if self.drawn is None else tokens[:, self.drawn]
        found = torch.linalg.vector_norm(chosen - self.centre, dim=-1)
        if self.averaged:
            found = found.mean(-1, keepdim=True)
        distances: Distances = found.numpy()
        return distances


def diameters(distances: Distances, definition: Definition) -> dict[int, float]:
    """Return twice the radius that covers each percentage of the distances, interpolated between two of them.

    A definition that draws tokens takes the largest of so many per cent of the distances, rounded down.
    """
    values, shares = distances.astype(np.float64).ravel(), [item / 100 for item in definition.percents]
    if definition.n_drawn:
        ranks = [max(int(share * len(values)), 1) - 1 for share in shares]
        radii = np.sort(values)[ranks]
    else:
        radii = np.quantile(values, shares)
    return {percent: 2 * float(radius) for percent, radius in zip(definition.percents, radii, strict=True)}


def scaled(distance: float, diameter: float) -> float:
    """Return a distance in diameters."""
    return distance / (diameter + SMALLEST_DIAMETER)


def effective_rank(products: Float64[np.ndarray, "dim dim"]) -> float:
    """Return exp(entropy of the normalised singular values) of the tokens whose outer products sum to this.

    As a share of the dimensions, in (0, 1]; tokens are not centred. The singular values are the roots of the
    eigenvalues of `products`, so those below 1e-8 of the largest are lost; they move the figure by less.
    """
    # By torch, whose linear algebra is in use already: numpy's has threads with buffers of their own.
    values = torch.linalg.eigvalsh(torch.from_numpy(products)).clamp(min=0).sqrt().numpy()
    shares = values / max(float(values.sum()), _SMALLEST_SHARE)
    entropy = -(shares * np.log(shares + _SMALLEST_SHARE)).sum()
    return float(np.exp(entropy) / len(products))
