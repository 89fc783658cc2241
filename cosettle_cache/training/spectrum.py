"""The spectrum of what changes within videos, and the soft threshold that makes a projection of it.

Sums over pairs of frames come in, from anywhere and in any grouping; eigenvectors, the matrix of a threshold,
and distances within and between videos, predicted and measured, go out. All in float64; nothing touches disk.
The length of a projected token and its product with another are sums over directions weighted with gains: one
rotation into the eigenbasis serves many thresholds at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError

Matrix = Float64[np.ndarray, "dim dim"]
Directions = Float64[np.ndarray, " direction"]

#: Eigenvalues below this share of the largest are rounding errors of a covariance without full rank.
RANK_TOLERANCE = 1e-10

#: The smallest threshold that is tried keeps this share of the directions, the largest is this many times the
#: largest eigenvalue, where the projection is the identity to 3 %.
SMALLEST_KEPT, LARGEST_THRESHOLD = 1 / 16, 32.0


@dataclass(frozen=True, slots=True, eq=False)
class SpectralStatistics:
    """Sums over unit tokens; those of two parts of a store add up to those of both.

    `differences` sums the outer product of the difference of `n_differences` pairs of corresponding tokens.
    `n_videos` videos are represented by one frame each: `products` sums the outer products of its tokens at
    `n_places` places of the grid, `places` the tokens of all videos place by place.
    """

    n_differences: int
    differences: Matrix
    n_videos: int
    products: Matrix
    places: Float64[np.ndarray, "place dim"]

    def __add__(self, other: SpectralStatistics) -> SpectralStatistics:
        return SpectralStatistics(*(getattr(self, a) + getattr(other, a) for a in self.__slots__))

    @classmethod
    def zero(cls, dim: int, n_places: int) -> SpectralStatistics:
        """Return the sums over nothing."""
        return cls(0, np.zeros((dim, dim)), 0, np.zeros((dim, dim)), np.zeros((n_places, dim)))


@dataclass(frozen=True, slots=True)
class Margin:
    """Mean distances of unit tokens, in diameters of the unit sphere, and D = d_inter - gamma * d_intra.

    `d_intra` is between corresponding tokens of a video, `d_inter` between tokens of two videos at the same
    place (PROTOCOLS 5.3, 7.7).
    """

    d_inter: float
    d_intra: float
    margin: float

    @classmethod
    def of(cls, d_inter: float, d_intra: float, gamma: float) -> Margin:
        """Return the margin of two distances."""
        return cls(float(d_inter), float(d_intra), float(d_inter - gamma * d_intra))


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The directions (columns of `basis`) in which corresponding tokens differ, calmest first.

    Per direction: `intra`, the mean square of that difference (the eigenvalue); `inter`, the mean square
    difference of tokens of two videos; `energy`, the mean square of a token, which sums to one.
    """

    basis: Float64[np.ndarray, "dim direction"]
    intra: Directions
    inter: Directions
    energy: Directions

    @property
    def rank(self) -> int:
        """Number of directions in which corresponding tokens differ at all."""
        return int((self.intra > RANK_TOLERANCE * self.intra[-1]).sum())

    def gains(self, spectral_lambda: float) -> Directions:
        """Return by what factor the square of each direction is kept: 1 - sigma / (2 lambda), at least 0."""
        return (1 - self.intra / (2 * spectral_lambda)).clip(0)

    def matrix(self, spectral_lambda: float) -> Matrix:
        """Return W = U diag(sqrt(gains)) U^T, of all with this W^T W the one nearest to the identity."""
        matrix: Matrix = (self.basis * np.sqrt(self.gains(spectral_lambda))) @ self.basis.T
        return matrix

    def predict(self, spectral_lambda: float, gamma: float) -> Margin:
        """Return root mean square distances of projected tokens over the root mean square length of one."""
        gains = self.gains(spectral_lambda)
        length = np.sqrt(gains @ self.energy)
        inter, intra = np.sqrt(gains @ self.inter), np.sqrt(gains @ self.intra)
        return Margin.of(inter / length / 2, intra / length / 2, gamma)

    def check_lambda(self, spectral_lambda: float) -> None:
        """Raise `UsageError` when the threshold removes every direction in which the tokens move."""
        smallest = float(self.intra[-self.rank])
        if not spectral_lambda > smallest / 2:
            raise UsageError(
                f"a spectral lambda of {spectral_lambda:.4g} removes all directions",
                wanted=f"more than {smallest / 2:.4g}, half the smallest eigenvalue of these tokens",
                found=f"{spectral_lambda:.4g}",
                hint="leave --spectral-lambda out: it is then chosen on clips that are held out",
            )

    def candidates(self, n_lambdas: int) -> Float64[np.ndarray, " lambda"]:
        """Return lambdas in a geometric series from a sharp threshold to hardly any, ascending."""
        moving = self.intra[-self.rank :]
        n_kept = min(max(1, int(np.ceil(SMALLEST_KEPT * len(moving)))), len(moving) - 1)
        lowest = moving[n_kept] if n_kept else 2 * moving[-1]
        return np.geomspace(lowest, LARGEST_THRESHOLD * moving[-1], n_lambdas) / 2


def make_spectrum(statistics: SpectralStatistics) -> Spectrum:
    """Return the spectrum of the sums over two videos or more.

    Raises `InputError` when corresponding tokens never differ.
    """
    intra, basis = np.linalg.eigh(statistics.differences / statistics.n_differences)
    if intra[-1] <= 0:
        raise InputError(
            "corresponding tokens never differ: these clips stand still", wanted="clips with some movement"
        )
    n_tokens = statistics.n_videos * len(statistics.places)
    n_pairs = statistics.n_videos * (statistics.n_videos - 1) / 2 * len(statistics.places)
    # The sum over all pairs of videos of the outer product of their difference.
    inter = statistics.n_videos * statistics.products - statistics.places.T @ statistics.places
    return Spectrum(
        basis,
        np.clip(intra, 0, None),
        _diagonal(inter / n_pairs, basis),
        _diagonal(statistics.products / n_tokens, basis),
    )


def _diagonal(matrix: Matrix, basis: Matrix) -> Directions:
    """Return the quadratic form of each column of `basis`."""
    diagonal: Directions = np.clip(np.einsum("ij,ij->j", basis, matrix @ basis), 0, None)
    return diagonal


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
    a, b = ((rotated.square() @ gains.T).sqrt().clamp_min(_SHORTEST) for rotated in (first, second))
    return _half_chord(((first * second) @ gains.T) / (a * b)).mean(1)


def inter_distances(
    tokens: Float64[Tensor, "video place dim"], basis: Basis, gains: Gains
) -> Float64[Tensor, " gain"]:
    """Return the mean distance of projected unit tokens at one place over all pairs of videos and places."""
    rotated = (tokens @ basis).transpose(0, 1)
    first, second = torch.triu_indices(len(tokens), len(tokens), 1, device=tokens.device).unbind()
    means = []
    for gain in gains:
        scaled = rotated * gain.sqrt()
        scaled = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
        means.append(_half_chord((scaled @ scaled.mT)[:, first, second]).mean())
    return torch.stack(means)


def _half_chord(cosine: Tensor) -> Tensor:
    """Return half the distance of two unit vectors with this cosine."""
    return ((1 - cosine) / 2).clamp_min(0).sqrt()
