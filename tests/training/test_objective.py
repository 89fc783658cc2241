"""The objective with its gradient by hand against the plain one under automatic differentiation."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.errors import UsageError
from cosettle_cache.heads.projection import Projection
from cosettle_cache.training.losses import REDUCTIONS, LossTerms, transfer_loss
from cosettle_cache.training.objective import SEPARABILITIES, Originals, fast_transfer_loss
from cosettle_cache.training.samples import walk_of


def gradients(loss: Tensor, projection: Projection, weight: float = 1.0) -> Tensor:
    found = torch.autograd.grad(loss * weight, list(projection.parameters()), retain_graph=True)
    return torch.cat([item.flatten() for item in found])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("views", "window", "dim"), [(3, 2, 48), (4, 1, 8), (5, 4, 8)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("regularizer", ["kl", "mse", "cosine"])
def test_values_and_gradients_are_those_of_the_definition(
    regularizer: str, reduction: str, views: int, window: int, dim: int
) -> None:
    samples = torch.randn(3, views, 4, 8, dim, generator=torch.Generator().manual_seed(views))
    head = Projection(dim, init="pytorch")
    options = {"regularizer": regularizer, "reduction": reduction, "window": window, "temperature": 0.1}
    wanted = transfer_loss(head, samples, walk=walk_of(views), **options)
    found = fast_transfer_loss(head(samples), Originals(samples), walk=walk_of(views), **options)
    for field in fields(LossTerms):
        a, b = getattr(wanted, field.name), getattr(found, field.name)
        assert b.item() == pytest.approx(a.item(), rel=2e-5), field.name
    for name in ("total", "cycle", "separability"):  # each on its own, as the automatic weight needs them
        a, b = getattr(wanted, name), getattr(found, name)
        assert relative(gradients(b, head), gradients(a, head)) <= 2e-6, name
    assert relative(gradients(found.total, head, 0.5), gradients(wanted.total, head) * 0.5) <= 2e-6


def test_originals_serve_every_head_alike() -> None:
    samples = torch.randn(2, 3, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    shared, heads = Originals(samples), [Projection(8, init="pytorch", seed=seed) for seed in range(3)]
    for regularizer in ("kl", "mse", "kl", "cosine", "kl"):
        for head in heads:
            alone, together = (
                fast_transfer_loss(head(samples), item, regularizer=regularizer)
                for item in (Originals(samples), shared)
            )
            assert torch.equal(gradients(alone.total, head), gradients(together.total, head))


def test_tokens_of_length_zero_have_finite_gradients() -> None:
    samples = torch.zeros(1, 3, 2, 2, 4)
    projected = torch.zeros(1, 3, 2, 2, 4, requires_grad=True)
    fast_transfer_loss(projected, Originals(samples)).total.backward()
    assert projected.grad is not None and projected.grad.isfinite().all()


def test_every_loss_has_its_counterpart() -> None:
    names = {reduction: set(item.separability) for reduction, item in REDUCTIONS.items()}
    assert {reduction: set(item) for reduction, item in SEPARABILITIES.items()} == names
    with pytest.raises(UsageError, match="unknown regulariser"):
        fast_transfer_loss(torch.ones(1, 3, 2, 2, 4), Originals(torch.ones(1, 3, 2, 2, 4)), regularizer="l1")
    with pytest.raises(UsageError, match="does not divide"):
        fast_transfer_loss(torch.ones(1, 3, 2, 3, 4), Originals(torch.ones(1, 3, 2, 3, 4)))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5, 5), (0, 5)])
def test_a_linear_map_as_a_convolution(shape: tuple[int, ...]) -> None:
    head = Projection(5, "affine", init="pytorch")
    tokens = torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    linear = F.linear(tokens, head.linears[0].weight, head.linears[0].bias)
    wanted = F.layer_norm(linear, (5,))
    assert torch.allclose(head(tokens), wanted, atol=1e-6)
    wanted_inputs = torch.autograd.grad(wanted.square().sum(), tokens)[0]
    assert torch.allclose(
        torch.autograd.grad(head(tokens).square().sum(), tokens)[0], wanted_inputs, atol=1e-5
    )
