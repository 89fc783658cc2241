"""The cycle of tokens along a walk over views (paper, section 3): transition, and how often it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.errors import UsageError

#: Added to a cycle's probabilities before the logarithm (released code).
PROBABILITY_FLOOR = 1e-6

#: Views of a sample in the order in which the released walk visits them.
RELEASED_WALK = (0, 1, 2)


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
    images = tokens.flatten(0, 1).permute(0, 3, 1, 2)  # tokens in their order are images with channels last
    means: Tensor = F.avg_pool2d(images, window)
    return means.permute(0, 2, 3, 1).reshape(n, view, -1, dim)


def cycle_transition(
    tokens: Float[Tensor, "n view token dim"], temperature: float, walk: Sequence[int] = RELEASED_WALK
) -> Float[Tensor, "n token token"]:
    """Return the row-stochastic walk (released: a, b, shifted a), a product of softmax(A / t) over steps."""
    n_views = tokens.shape[1]
    if len(walk) < 2 or not all(0 <= view < n_views for view in walk):
        raise UsageError(
            "the walk does not fit the samples",
            wanted=f"two or more views out of 0 to {n_views - 1}",
            found=" ".join(map(str, walk)) or "no views",
        )
    stops = pairwise(tokens[:, view] for view in walk)
    return reduce(torch.matmul, [(start @ end.mT / temperature).softmax(-1) for start, end in stops])


def cycle_loss(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cross entropy of log(P + 1e-6) with the start of each walk, its mean over n * token walks.

    As released (PROTOCOLS 7.1.2). Chance is ln(token).
    """
    return F.cross_entropy((transition + PROBABILITY_FLOOR).log().flatten(0, 1), _starts(transition))


def cycle_accuracy(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the share of walks that most probably end where they started."""
    return (transition.argmax(-1).flatten() == _starts(transition)).float().mean()


def identity_cosine(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the cosine of the flattened batch of transitions with as many identity matrices."""
    n, token, _ = transition.shape
    trace = transition.diagonal(dim1=1, dim2=2).sum()
    return trace / (transition.square().sum() * n * token).sqrt()


def return_probability(transition: Float[Tensor, "n token token"]) -> Float[Tensor, ""]:
    """Return the mean probability that a walk ends where it started (chance: one over the tokens)."""
    return transition.diagonal(dim1=1, dim2=2).mean()


def _starts(transition: Tensor) -> Tensor:
    n, token, _ = transition.shape
    return torch.arange(token, device=transition.device).repeat(n)
