"""Co-Settle's objective: tokens and a projection in, named loss terms out.

A sample is several encodings (views) of one clip, as released plain a, plain b, shifted a. Where released
code and paper (arXiv 2603.26597) differ, both stand here as reductions (docs/training.md). The gradient in
the projected tokens is written by hand, in fewer passes over them than automatic differentiation takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.metrics.cycle import (
    RELEASED_WALK,
    cycle_accuracy,
    cycle_loss,
    cycle_transition,
    identity_cosine,
    pool_tokens,
    return_probability,
)

#: How walks and tokens are summed up: `released` as the code trains, `token-mean` as the paper writes
#: (PROTOCOLS 7.1.2, 7.1.3).
REDUCTIONS = ("released", "token-mean")

#: Shortest length that a token is divided by, as in `torch.nn.functional.normalize`.
_SHORTEST = 1e-12


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


@dataclass(frozen=True)
class Originals:
    """Tokens of the encoder in float32, and what the losses of all heads need of them, computed once."""

    tokens: Float[Tensor, "n view row col dim"]

    @cached_property
    def unit(self) -> Float[Tensor, "n view row col dim"]:
        """The tokens at length 1."""
        return F.normalize(self.tokens, dim=-1)

    @cached_property
    def softmax(self) -> tuple[Float[Tensor, "n view row col dim"], Float[Tensor, "n view row col 1"]]:
        """The softmax of unit tokens over their channels, and the sums of exponents in its denominator."""
        exponents = self.unit.exp()
        sums = exponents.sum(-1, keepdim=True)
        return (exponents / sums if exponents.requires_grad else exponents.div_(sums)), sums


def transfer_loss(
    projection: Callable[[Tensor], Tensor],
    samples: Float[Tensor, "n view row col dim"] | Float[np.ndarray, "n view row col dim"] | Originals,
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
    first one; the separability term takes every view of a sample once, visited or not. Terms can be
    differentiated once. `Originals` are the same samples, whose softmax is computed for the first head only.

    The separability weight acts on a scale of tokens per dimension, 588 / 768 as released (PROTOCOLS 7.1.3).
    Raises `UsageError` when `window` does not divide the grid, when `walk` leaves the sample, or for an
    unknown regulariser or reduction.
    """
    find_regularizer(regularizer, reduction)
    originals = samples if isinstance(samples, Originals) else Originals(torch.as_tensor(samples).float())
    settings = _Settings(temperature, window, regularizer, reduction, tuple(walk))
    # The gradient by hand is that in the projected tokens, and torch.func (vmap, grad) cannot go through it.
    by_torch = originals.tokens.requires_grad or torch._C._are_functorch_transforms_active()
    losses = _losses if by_torch else _Losses.apply
    projected = projection(originals.tokens)
    with exact_float32(projected.device.type):
        cycle, separability, transition = losses(projected, originals, settings)
        total = cycle + separability_weight * separability
        with torch.no_grad():
            monitored = [f(transition) for f in (cycle_accuracy, identity_cosine, return_probability)]
    return LossTerms(total, cycle, separability, *monitored)


#: A separability loss: (unit projected tokens, tokens of the encoder, reduction) -> the loss; or, where that
#: is cheaper than autograd, the loss and a function that computes its gradient in the first as a new tensor.
Loss = tuple[Float[Tensor, ""], Callable[[], Tensor]]
Regularizer = Callable[[Tensor, Originals, str], Tensor | Loss]


def kl(projected: Tensor, originals: Originals, reduction: str) -> Loss:
    """KL divergence between softmax(z) and softmax(p) over the channels, for unit tokens z, p = g(z) (Eq. 3).

    `released`: KL(z || p), summed over tokens, mean over samples. `token-mean`: KL(p || z), mean over tokens
    and samples, as in Eq. 3. On unit vectors either direction is nearly (1 - cosine) / dim per token.
    """
    target, target_sums = originals.softmax
    exponents = projected.exp()
    sums = exponents.sum(-1, keepdim=True)
    log_ratio = (sums / target_sums).log()
    if reduction == "released":
        # KL(z || p) = z' (z - p) + log(sum exp p / sum exp z), with z' = softmax(z).
        loss = _dot(target, originals.unit) - _dot(target, projected) + log_ratio.sum()
        n = len(projected)
        return loss / n, lambda: exponents.div(sums).sub_(target).mul_(1 / n)
    # KL(p || z) = p' (p - z) - log(sum exp p / sum exp z), with p' = softmax(p).
    scale = projected.shape[-1] / projected.numel()
    probabilities, difference = exponents / sums, projected - originals.unit
    mean = (probabilities * difference).sum(-1, keepdim=True)
    loss = (mean - log_ratio).sum() * scale
    return loss, lambda: difference.sub(mean).mul_(probabilities).mul_(scale)


def cosine(projected: Tensor, originals: Originals, reduction: str) -> Loss:
    """(1 - cosine) / dim of unit tokens, nearly the KL divergence; summed up over tokens as that is."""
    dim = projected.shape[-1]
    scale = 1 / (len(projected) * dim) if reduction == "released" else 1 / projected.numel()
    loss = (projected.numel() // dim - _dot(projected, originals.unit)) * scale
    return loss, lambda: originals.unit * -scale


def mse(projected: Tensor, originals: Originals, reduction: str) -> Loss:
    """Squared difference of unit tokens, its mean over samples, tokens and channels in either reduction.

    That is 2 / dim * (1 - mean cosine) (Table 15).
    """
    difference, scale = projected - originals.unit, 1 / projected.numel()
    return _dot(difference, difference) * scale, lambda: difference * (2 * scale)


#: By the name used in settings; a row may be added at run time.
REGULARIZERS: dict[str, Regularizer] = {"kl": kl, "mse": mse, "cosine": cosine}


def find_regularizer(name: str, reduction: str = "released") -> Regularizer:
    """Return the separability loss called `name`; raise `UsageError` for an unknown one or reduction."""
    if reduction not in REDUCTIONS:
        raise UsageError("unknown reduction", wanted=" or ".join(REDUCTIONS), found=reduction)
    if name not in REGULARIZERS:
        raise UsageError("unknown regulariser", wanted=" or ".join(REGULARIZERS), found=name)
    return REGULARIZERS[name]


@dataclass(frozen=True, slots=True)
class _Settings:
    temperature: float
    window: int
    regularizer: str
    reduction: str
    walk: tuple[int, ...]


def _losses(projected: Tensor, originals: Originals, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return cycle loss, separability loss and transition by operations that torch differentiates."""
    unit = F.normalize(projected, dim=-1)
    cycle, transition = _cycle(pool_tokens(unit, settings.window), settings)
    return cycle, _separability(unit, originals, settings)[0], transition


class _Losses(torch.autograd.Function):
    """`_losses` with its gradient in the projected tokens by hand."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, originals: Originals, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the losses, and of the pooled tokens, which are few, the gradient as well."""
        ctx.set_materialize_grads(False)
        ctx.window, needed = settings.window, ctx.needs_input_grad[0]
        ctx.length = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).clamp_min(_SHORTEST)
        ctx.unit = projected / ctx.length
        with torch.set_grad_enabled(needed):
            pooled = pool_tokens(ctx.unit, settings.window).detach().requires_grad_(needed)
            cycle, transition = _cycle(pooled, settings)
            ctx.cycle_gradient = torch.autograd.grad(cycle, pooled)[0] if needed else None
            leaf = ctx.unit.detach().requires_grad_(needed)
            separability, ctx.separability_gradient = _separability(leaf, originals, settings)
        transition = transition.detach()
        ctx.mark_non_differentiable(transition)
        return cycle.detach(), separability.detach(), transition

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_cycle: Tensor | None, d_separability: Tensor | None, _: None
    ) -> tuple[Tensor, None, None]:
        """Add up both gradients in the unit tokens, and carry them through the normalisation."""
        if d_separability is None:
            gradient = torch.zeros_like(ctx.unit)
        else:
            gradient = ctx.separability_gradient().mul_(d_separability)
        if d_cycle is not None:
            _unpool_into(gradient, ctx.cycle_gradient * d_cycle, ctx.window)
        along = (gradient * ctx.unit).sum(-1, keepdim=True)
        return gradient.addcmul_(ctx.unit, along, value=-1).div_(ctx.length), None, None


def _cycle(
    pooled: Float[Tensor, "n view token dim"], settings: _Settings
) -> tuple[Float[Tensor, ""], Float[Tensor, "n token token"]]:
    """Return the cycle loss, a mean over walks as released or their sum in a sample (paper), and P."""
    transition = cycle_transition(pooled, settings.temperature, settings.walk)
    n_walks = 1 if settings.reduction == "released" else transition.shape[-1]
    return cycle_loss(transition) * n_walks, transition


def _separability(unit: Tensor, originals: Originals, settings: _Settings) -> Loss:
    found = REGULARIZERS[settings.regularizer](unit, originals, settings.reduction)
    if isinstance(found, tuple):
        return found
    return found, lambda: torch.autograd.grad(found, unit, retain_graph=True)[0]


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    return torch.dot(a.flatten(), b.flatten())


def _unpool_into(
    tokens: Float[Tensor, "n view row col dim"], pooled: Float[Tensor, "n view token dim"], window: int
) -> None:
    """Add to every token its share of the gradient of the mean that it entered."""
    n, view, row, col, dim = tokens.shape
    tiles = tokens.view(n, view, row // window, window, col // window, window, dim)
    means = pooled.view(n, view, row // window, 1, col // window, 1, dim)
    tiles.add_(means, alpha=1 / window**2)
