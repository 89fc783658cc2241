"""Co-Settle's objective as pure tensor functions: tokens and a projection in, named loss terms out.

A sample is three encodings of one clip in the order plain a, plain b, shifted a. The reductions are those of
the released code, which differ from the paper's formulas (PROTOCOLS 7.1); all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.errors import UsageError

#: Added to a cycle's probabilities before the logarithm (released code).
PROBABILITY_FLOOR = 1e-6

TokenMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The objective and its parts as 0-d tensors; only `total`, `cycle` and `separability` carry gradients.

    `cycle_accuracy` is the share of walks whose most probable end is their start (chance: one over the pooled
    tokens); `identity_cosine` the cosine of the batch's transitions, flattened, with the identity.
    """

    total: Float[Tensor, ""]
    cycle: Float[Tensor, ""]
    separability: Float[Tensor, ""]
    cycle_accuracy: Float[Tensor, ""]
    identity_cosine: Float[Tensor, ""]


def transfer_loss(
    projection: TokenMap,
    samples: Float[Tensor, "n 3 row col dim"],
    *,
    temperature: float = 0.03,
    separability_weight: float = 3.0,
    window: int = 2,
    regularizer: str = "kl",
) -> LossTerms:
    """Return `cycle + separability_weight * separability` of a batch of samples, with its monitoring figures.

    Original and projected tokens are both L2-normalised first; pooled tokens are not normalised again. The
    separability weight acts on a scale of tokens per dimension, 588 / 768 as released (PROTOCOLS 7.1.3).
    Raises `UsageError` when `window` does not divide the grid or the regulariser is unknown.
    """
    separability_loss = find_regularizer(regularizer)
    original = samples.float()
    projected = F.normalize(projection(original), dim=-1)
    transition = cycle_transition(pool_tokens(projected, window), temperature)
    cycle = cycle_loss(transition)
    separability = separability_loss(projected, F.normalize(original, dim=-1))
    with torch.no_grad():
        accuracy, identity = cycle_accuracy(transition), identity_cosine(transition)
    return LossTerms(cycle + separability_weight * separability, cycle, separability, accuracy, identity)


def check_window(rows: int, cols: int, window: int) -> None:
    """Raise `UsageError` unless `window` by `window` tokens tile the grid."""
    if window < 1 or rows % window or cols % window:
        raise UsageError(
            "the pooling window does not divide the grid of tokens",
            wanted="a window that divides both rows and columns",
            found=f"window {window} on a grid of {rows}x{cols}",
        )


def pool_tokens(
    tokens: Float[Tensor, "n view row col dim"], window: int
) -> Float[Tensor, "n view pooled dim"]:
    """Return the means of `window` by `window` tokens, in row-major order, without normalising them again."""
    n, view, row, col, dim = tokens.shape
    check_window(row, col, window)
    tiles = tokens.reshape(n, view, row // window, window, col // window, window, dim)
    return tiles.mean(dim=(3, 5)).flatten(2, 3)


def cycle_transition(
    tokens: Float[Tensor, "n 3 token dim"], temperature: float
) -> Float[Tensor, "n token token"]:
    """Return the row-stochastic walk plain a -> plain b -> shifted a: softmax(A12 / t) softmax(A23 / t)."""
    start, middle, end = tokens.unbind(1)
    there = (start @ middle.mT / temperature).softmax(-1)
    back = (middle @ end.mT / temperature).softmax(-1)
    return there @ back


def cycle_loss(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cross entropy of log(P + 1e-6) with the start of each walk, its mean over n * token walks.

    The paper sums over tokens; the released code averages. Chance is ln(token).
    """
    return F.cross_entropy((transition + PROBABILITY_FLOOR).log().flatten(0, 1), _starts(transition))


def kl_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return KL(softmax(original) || softmax(projected)) over dim, summed over tokens, mean over n.

    The paper writes the other direction and a mean over tokens, 588 times weaker at the released sizes. On
    unit vectors both directions are close to tokens / dim * (1 - mean cosine).
    """
    divergence = F.kl_div(projected.log_softmax(-1), original.softmax(-1), reduction="sum")
    return divergence / len(projected)


def mse_separability(
    projected: Float[Tensor, "n *token dim"], original: Float[Tensor, "n *token dim"]
) -> Float[Tensor, ""]:
    """Return the squared difference of unit tokens, its mean over samples, tokens and dim (as released)."""
    return F.mse_loss(projected, original)


SeparabilityLoss = Callable[[Tensor, Tensor], Tensor]

#: What keeps projected tokens near the original ones, by the name used in settings.
REGULARIZERS: Mapping[str, SeparabilityLoss] = {"kl": kl_separability, "mse": mse_separability}


def find_regularizer(name: str) -> SeparabilityLoss:
    """Return the separability loss called `name`; raise `UsageError` when there is none."""
    if name not in REGULARIZERS:
        raise UsageError("unknown regulariser", wanted=" or ".join(REGULARIZERS), found=name)
    return REGULARIZERS[name]


def cycle_accuracy(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the share of walks that most probably end where they started."""
    return (transition.argmax(-1).flatten() == _starts(transition)).float().mean()


def identity_cosine(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cosine of the flattened batch of transitions with as many identity matrices."""
    n, token, _ = transition.shape
    trace = transition.diagonal(dim1=1, dim2=2).sum()
    squares = transition.square().sum()
    return trace / (squares * n * token).sqrt()


def _starts(transition: Tensor) -> Tensor:
    n, token, _ = transition.shape
    return torch.arange(token, device=transition.device).repeat(n)
