"""The objective with its gradient written by hand: what `losses` defines, in fewer passes over the tokens.

Projected tokens and the encoder's go in, loss terms come out. What all heads need of the encoder's tokens is
computed once. `losses.transfer_loss` is the definition, to which the tests hold values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.metrics.cycle import RELEASED_WALK, cycle_transition, pool_tokens
from cosettle_cache.training.losses import LossTerms, find_reduction, find_regularizer, make_terms

#: Shortest length that a token is divided by, as in `torch.nn.functional.normalize`.
_SHORTEST = 1e-12


@dataclass(frozen=True)
class Originals:
    """Tokens of the encoder in float32, and what the losses of all heads need of them, computed once."""

    tokens: Float[Tensor, "n view row col dim"]

    @cached_property
    def unit(self) -> Float[Tensor, "n view row col dim"]:
        """The tokens at length 1."""
        return F.normalize(self.tokens, dim=-1)

    @cached_property
    def softmax(self) -> Float[Tensor, "n view row col dim"]:
        """The softmax of unit tokens over their channels."""
        return self._exponents.div_(self.sums)

    @cached_property
    def sums(self) -> Float[Tensor, "n view row col 1"]:
        """The sums of the exponents of unit tokens."""
        return self._exponents.sum(-1, keepdim=True)

    @cached_property
    def _exponents(self) -> Tensor:
        return self.unit.exp()


@dataclass(frozen=True, slots=True)
class Separability:
    """A separability loss, and its gradient in the unit projected tokens as a new tensor."""

    value: Float[Tensor, ""]
    gradient: Callable[[], Tensor]


def _kl(unit: Tensor, originals: Originals) -> Separability:
    """KL(softmax(z) || softmax(p)) = z' (z - p) + log(sum exp p / sum exp z), with z' = softmax(z)."""
    target = originals.softmax
    exponents = unit.exp()
    sums = exponents.sum(-1, keepdim=True)
    value = _dot(target, originals.unit) - _dot(target, unit) + (sums / originals.sums).log().sum()
    return Separability(value / len(unit), lambda: exponents.div(sums).sub_(target).mul_(1 / len(unit)))


def _token_mean_kl(unit: Tensor, originals: Originals) -> Separability:
    """KL(softmax(p) || softmax(z)) = p' (p - z) - log(sum exp p / sum exp z), with p' = softmax(p)."""
    scale = unit.shape[-1] / unit.numel()
    probabilities, difference = unit.exp(), unit - originals.unit
    sums = probabilities.sum(-1, keepdim=True)
    probabilities.div_(sums)
    mean = (probabilities * difference).sum(-1, keepdim=True)
    value = (mean - (sums / originals.sums).log()).sum()
    return Separability(value * scale, lambda: difference.sub(mean).mul_(probabilities).mul_(scale))


def _mse(unit: Tensor, originals: Originals) -> Separability:
    difference = unit - originals.unit
    scale = 1 / unit.numel()
    return Separability(_dot(difference, difference) * scale, lambda: difference * (2 * scale))


def _cosine(unit: Tensor, originals: Originals) -> Separability:
    return _scaled_cosine(unit, originals, 1 / (len(unit) * unit.shape[-1]))


def _token_mean_cosine(unit: Tensor, originals: Originals) -> Separability:
    return _scaled_cosine(unit, originals, 1 / unit.numel())


def _scaled_cosine(unit: Tensor, originals: Originals, scale: float) -> Separability:
    n_tokens = unit.numel() // unit.shape[-1]
    value = (n_tokens - _dot(unit, originals.unit)) * scale
    return Separability(value, lambda: originals.unit * -scale)


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    return torch.dot(a.flatten(), b.flatten())


#: By reduction and regulariser, as in `losses.REDUCTIONS`.
SEPARABILITIES: Mapping[str, Mapping[str, Callable[[Tensor, Originals], Separability]]] = {
    "released": {"kl": _kl, "mse": _mse, "cosine": _cosine},
    "token-mean": {"kl": _token_mean_kl, "mse": _mse, "cosine": _token_mean_cosine},
}


def fast_transfer_loss(
    projected: Float[Tensor, "n view row col dim"],
    originals: Originals,
    *,
    temperature: float = 0.03,
    separability_weight: float = 3.0,
    window: int = 2,
    regularizer: str = "kl",
    reduction: str = "released",
    walk: Sequence[int] = RELEASED_WALK,
) -> LossTerms:
    """Return what `transfer_loss` returns for a projection whose output is `projected`, in float32.

    Can be differentiated once. Raises what `transfer_loss` raises.
    """
    find_regularizer(regularizer, reduction)
    objective = _Settings(temperature, window, regularizer, reduction, tuple(walk))
    cycle, separability, transition = _Objective.apply(projected, originals, objective)
    return make_terms(cycle, separability, separability_weight, transition)


@dataclass(frozen=True, slots=True)
class _Settings:
    temperature: float
    window: int
    regularizer: str
    reduction: str
    walk: tuple[int, ...]


class _Objective(torch.autograd.Function):
    """Cycle loss, separability loss and transition of projected tokens."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, originals: Originals, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the losses, and of the pooled tokens, which are few, the gradient as well."""
        ctx.set_materialize_grads(False)
        ctx.window = settings.window
        ctx.length = torch.linalg.vector_norm(projected, dim=-1, keepdim=True).clamp_min(_SHORTEST)
        ctx.unit = projected / ctx.length
        cycle, transition, ctx.cycle_gradient = _cycle(ctx.unit, settings, ctx.needs_input_grad[0])
        separability = SEPARABILITIES[settings.reduction][settings.regularizer](ctx.unit, originals)
        ctx.separability_gradient = separability.gradient
        ctx.mark_non_differentiable(transition)
        return cycle, separability.value, transition

    @staticmethod
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
    unit: Float[Tensor, "n view row col dim"], settings: _Settings, needs_gradient: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "n token token"], Float[Tensor, "n view token dim"] | None]:
    """Return the cycle loss, the transition, and the gradient of the loss in the pooled tokens."""
    with torch.set_grad_enabled(needs_gradient):
        pooled = pool_tokens(unit, settings.window).detach().requires_grad_(needs_gradient)
        transition = cycle_transition(pooled, settings.temperature, settings.walk)
        cycle = find_reduction(settings.reduction).cycle(transition)
        gradient = torch.autograd.grad(cycle, pooled)[0] if needs_gradient else None
    return cycle.detach(), transition.detach(), gradient


def _unpool_into(
    tokens: Float[Tensor, "n view row col dim"], pooled: Float[Tensor, "n view token dim"], window: int
) -> None:
    """Add to every token its share of the gradient of the mean that it entered."""
    n, view, row, col, dim = tokens.shape
    tiles = tokens.view(n, view, row // window, window, col // window, window, dim)
    means = pooled.view(n, view, row // window, 1, col // window, 1, dim)
    tiles.add_(means, alpha=1 / window**2)
