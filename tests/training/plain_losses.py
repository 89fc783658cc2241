"""Oracle of the objective: what `training.losses` computes, in plain operations that torch differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.metrics.cycle import (
    RELEASED_WALK,
    cycle_accuracy,
    cycle_loss,
    cycle_transition,
    identity_cosine,
    pool_tokens,
    return_probability,
)
from cosettle_cache.training.losses import LossTerms


def kl_separability(projected: Tensor, original: Tensor) -> Tensor:
    """KL(softmax(original) || softmax(projected)) over dim, summed over tokens, mean over n (released)."""
    return F.kl_div(projected.log_softmax(-1), original.softmax(-1), reduction="sum") / len(projected)


def token_mean_kl_separability(projected: Tensor, original: Tensor) -> Tensor:
    """KL(softmax(projected) || softmax(original)) over dim, mean over tokens and n (paper, Eq. 3)."""
    divergence = F.kl_div(original.log_softmax(-1), projected.softmax(-1), reduction="sum")
    return divergence * projected.shape[-1] / projected.numel()


def cosine_separability(projected: Tensor, original: Tensor) -> Tensor:
    """tokens / dim * (1 - mean cosine) of unit tokens."""
    n_tokens = projected.numel() / projected.shape[-1]
    return token_mean_cosine_separability(projected, original) * n_tokens / len(projected)


def token_mean_cosine_separability(projected: Tensor, original: Tensor) -> Tensor:
    """(1 - mean cosine) / dim of unit tokens."""
    return (1 - (projected * original).sum(-1).mean()) / projected.shape[-1]


SEPARABILITIES: Mapping[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "released": {"kl": kl_separability, "mse": F.mse_loss, "cosine": cosine_separability},
    "token-mean": {
        "kl": token_mean_kl_separability,
        "mse": F.mse_loss,
        "cosine": token_mean_cosine_separability,
    },
}


def plain_transfer_loss(
    projection: Callable[[Tensor], Tensor],
    samples: Tensor,
    *,
    temperature: float = 0.03,
    separability_weight: float = 3.0,
    window: int = 2,
    regularizer: str = "kl",
    reduction: str = "released",
    walk: Sequence[int] = RELEASED_WALK,
) -> LossTerms:
    """Return what `transfer_loss` returns."""
    original = samples.float()
    projected = F.normalize(projection(original), dim=-1)
    transition = cycle_transition(pool_tokens(projected, window), temperature, walk)
    cycle = cycle_loss(transition) * (1 if reduction == "released" else transition.shape[-1])
    separability = SEPARABILITIES[reduction][regularizer](projected, F.normalize(original, dim=-1))
    total = cycle + separability_weight * separability
    with torch.no_grad():
        monitored = (f(transition) for f in (cycle_accuracy, identity_cosine, return_probability))
        return LossTerms(total, cycle, separability, *monitored)
