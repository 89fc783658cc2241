"""Co-Settle's objective as pure tensor functions: tokens and a projection in, named loss terms out.

A sample is several encodings (views) of one clip, as released plain a, plain b, shifted a. The released
reductions and those that the paper writes stand side by side (PROTOCOLS 7.1, docs/objective.md). All is
computed in float32, without a branch on a value, so that many heads can be mapped over at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.errors import UsageError
from cosettle_cache.metrics.cycle import (
    PROBABILITY_FLOOR,
    RELEASED_WALK,
    _starts,
    cycle_accuracy,
    cycle_transition,
    pool_tokens,
)

TokenMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The objective and its parts as 0-d tensors; only `total`, `cycle` and `separability` carry gradients.

    `cycle_accuracy` is the share of walks whose most probable end is their start (chance: one over the pooled
    tokens); `identity_cosine` the cosine of the batch's transitions, flattened, with the identity;
    `return_probability` the mean probability that a walk ends where it started.
    """

    total: Float[Tensor, ""]
    cycle: Float[Tensor, ""]
    separability: Float[Tensor, ""]
    cycle_accuracy: Float[Tensor, ""]
    identity_cosine: Float[Tensor, ""]
    return_probability: Float[Tensor, ""]


def transfer_loss(
    projection: TokenMap,
    samples: Float[Tensor, "n view row col dim"],
    *,
    temperature: float = 0.03,
    separability_weight: float = 3.0,
    window: int = 2,
    regularizer: str = "kl",
    reduction: str = "released",
    walk: Sequence[int] = RELEASED_WALK,
) -> LossTerms:
    """Return `cycle + separability_weight * separability` of a batch of samples, with its monitoring figures.

    Original and projected tokens are both L2-normalised first; pooled tokens are not normalised again. `walk`
    lists the views that the cycle visits, (0, 1, 2, 1, 3) for a palindrome over three frames and the shifted
    first one; the separability term takes every view of a sample once, visited or not.

    The separability weight acts on a scale of tokens per dimension, 588 / 768 as released (PROTOCOLS 7.1.3).
    Raises `UsageError` when `window` does not divide the grid, when `walk` leaves the sample, or for an
    unknown regulariser or reduction.
    """
    parts = find_reduction(reduction)
    separability_loss = find_regularizer(regularizer, reduction)
    original = samples.float()
    projected = F.normalize(projection(original), dim=-1)
    transition = cycle_transition(pool_tokens(projected, window), temperature, walk)
    cycle = parts.cycle(transition)
    separability = separability_loss(projected, F.normalize(original, dim=-1))
    return make_terms(cycle, separability, separability_weight, transition)


@torch.no_grad()
def _monitor(transition: Tensor) -> list[Tensor]:
    return [measure(transition) for measure in (cycle_accuracy, identity_cosine, return_probability)]


def make_terms(
    cycle: Float[Tensor, ""],
    separability: Float[Tensor, ""],
    separability_weight: float,
    transition: Float[Tensor, "n token token"],
) -> LossTerms:
    """Return the objective of both losses, and the figures of the transition beside it."""
    total = cycle + separability_weight * separability
    return LossTerms(total, cycle, separability, *_monitor(transition))


def cycle_loss(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cross entropy of log(P + 1e-6) with the start of each walk, its mean over n * token walks.

    As released. Chance is ln(token).
    """
    return F.cross_entropy((transition + PROBABILITY_FLOOR).log().flatten(0, 1), _starts(transition))


def summed_cycle_loss(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cross entropy of `cycle_loss` summed over the walks of a sample, mean over n (paper)."""
    return cycle_loss(transition) * transition.shape[-1]


def kl_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return KL(softmax(original) || softmax(projected)) over dim, summed over tokens, mean over n.

    As released. On unit vectors it is close to tokens / dim * (1 - mean cosine), in either direction.
    """
    divergence = F.kl_div(projected.log_softmax(-1), original.softmax(-1), reduction="sum")
    return divergence / len(projected)


def token_mean_kl_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return KL(softmax(projected) || softmax(original)) over dim, mean over tokens and n (paper, Eq. 3)."""
    divergence = F.kl_div(original.log_softmax(-1), projected.softmax(-1), reduction="sum")
    return divergence / _n_vectors(projected)


def cosine_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return tokens / dim * (1 - mean cosine) of unit tokens: nearly the released KL divergence."""
    return token_mean_cosine_separability(projected, original) * (_n_vectors(projected) / len(projected))


def token_mean_cosine_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return (1 - mean cosine) / dim of unit tokens: nearly the paper's KL divergence."""
    cosine = (projected * original).sum(-1).mean()
    return (1 - cosine) / projected.shape[-1]


def mse_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return the squared difference of unit tokens, its mean over samples, tokens and dim (as released).

    That is 2 / dim * (1 - mean cosine).
    """
    return F.mse_loss(projected, original)


def _n_vectors(tokens: Tensor) -> int:
    return tokens.numel() // tokens.shape[-1]


CycleLoss = Callable[[Tensor], Tensor]
SeparabilityLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Reduction:
    """How walks and tokens are summed up: the cycle term, and the separability term by regulariser."""

    cycle: CycleLoss
    separability: Mapping[str, SeparabilityLoss]


#: `released` as the code trains; `token-mean` as the paper writes (PROTOCOLS 7.1.2, 7.1.3).
REDUCTIONS: Mapping[str, Reduction] = {
    "released": Reduction(
        cycle_loss, {"kl": kl_separability, "mse": mse_separability, "cosine": cosine_separability}
    ),
    "token-mean": Reduction(
        summed_cycle_loss,
        {
            "kl": token_mean_kl_separability,
            "mse": mse_separability,
            "cosine": token_mean_cosine_separability,
        },
    ),
}


def find_reduction(name: str) -> Reduction:
    """Return the reduction called `name`; raise `UsageError` when there is none."""
    if name not in REDUCTIONS:
        raise UsageError("unknown reduction", wanted=" or ".join(REDUCTIONS), found=name)
    return REDUCTIONS[name]


def find_regularizer(name: str, reduction: str = "released") -> SeparabilityLoss:
    """Return the separability loss called `name`; raise `UsageError` when there is none."""
    losses = find_reduction(reduction).separability
    if name not in losses:
        raise UsageError("unknown regulariser", wanted=" or ".join(losses), found=name)
    return losses[name]


def identity_cosine(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cosine of the flattened batch of transitions with as many identity matrices."""
    n, token, _ = transition.shape
    trace = transition.diagonal(dim1=1, dim2=2).sum()
    squares = transition.square().sum()
    return trace / (squares * n * token).sqrt()


def return_probability(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the mean probability that a walk ends where it started (chance: one over the tokens)."""
    return transition.diagonal(dim1=1, dim2=2).mean()
