"""The objective against a plain loop, its plain definition and the released code's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import SEPARABILITIES, plain_transfer_loss
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.functional import normalize, smooth_l1_loss

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import PositionShift
from cosettle_cache.encoders import load_backbone
from cosettle_cache.heads.projection import Projection, load_projection
from cosettle_cache.metrics.cycle import cycle_transition, pool_tokens
from cosettle_cache.training.losses import (
    REDUCTIONS,
    REGULARIZERS,
    LossTerms,
    Originals,
    transfer_loss,
)
from cosettle_cache.training.samples import walk_of


def separability(name: str, projected: Tensor, original: Tensor, reduction: str = "released") -> float:
    """Return the separability loss of unit tokens."""
    value, _ = REGULARIZERS[name](projected, Originals(original), reduction)
    return value.item()


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def softmax(array: np.ndarray) -> np.ndarray:
    exponent = np.exp(array - array.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def pool(view: np.ndarray, window: int) -> np.ndarray:
    """Oracle: the mean token of every window, row by row."""
    rows, cols, dim = view.shape
    corners = [(r, c) for r in range(0, rows, window) for c in range(0, cols, window)]
    return np.stack([view[r : r + window, c : c + window].reshape(-1, dim).mean(axis=0) for r, c in corners])


def sample_terms(
    original: np.ndarray, projected: np.ndarray, temperature: float, window: int
) -> tuple[list[float], list[bool], float]:
    """Oracle for one sample: cross entropy and hit of every walk, and the summed KL divergence."""
    a, b, shifted = (pool(view, window) for view in unit(projected))
    walk = softmax(a @ b.T / temperature) @ softmax(b @ shifted.T / temperature) + 1e-6
    entropies = [float(-np.log(row[i] / row.sum())) for i, row in enumerate(walk)]
    hits = [int(row.argmax()) == i for i, row in enumerate(walk)]
    wanted, found = softmax(unit(original)), softmax(unit(projected))
    return entropies, hits, float((wanted * np.log(wanted / found)).sum())


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 3),
    rows=st.integers(1, 3),
    cols=st.integers(1, 3),
    window=st.integers(1, 3),
    temperature=st.floats(0.02, 1.0),
    weight=st.floats(0.0, 10.0),
    seed=st.integers(0, 2**16),
)
def test_transfer_loss_equals_a_plain_loop(
    n: int, rows: int, cols: int, window: int, temperature: float, weight: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, 3, rows * window, cols * window, 5, generator=generator, dtype=torch.float64)
    projection = Projection(5, init="pytorch", seed=seed)
    terms = transfer_loss(
        projection, samples, temperature=temperature, separability_weight=weight, window=window
    )
    projected = projection(samples.float()).detach().double().numpy()
    parts = [sample_terms(z, g, temperature, window) for z, g in zip(samples.numpy(), projected, strict=True)]
    cycle = np.mean([entropy for part in parts for entropy in part[0]])
    separability = np.mean([part[2] for part in parts])
    assert terms.cycle.item() == pytest.approx(cycle, rel=1e-3, abs=1e-4)
    assert terms.separability.item() == pytest.approx(separability, rel=1e-3, abs=1e-4)
    assert terms.total.item() == pytest.approx(cycle + weight * separability, rel=1e-3, abs=1e-3)
    assert 0.0 <= terms.cycle_accuracy.item() <= 1.0
    assert 0.0 <= terms.identity_cosine.item() <= 1.0 + 1e-6


def test_cycle_accuracy_counts_walks_that_return() -> None:
    tokens = torch.eye(4).reshape(1, 1, 2, 2, 4).repeat(1, 3, 1, 1, 1)
    assert transfer_loss(lambda x: x, tokens, window=1).cycle_accuracy.item() == 1.0
    tokens[:, 2] = tokens[:, 2].roll(1, dims=2)
    assert transfer_loss(lambda x: x, tokens, window=1).cycle_accuracy.item() == 0.0


def two_sides(dim: int = 768, side: int = 14) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 2, 3, side, side, dim, generator=generator, dtype=torch.float64)
    first, second = normalize(tokens, dim=-1)
    return first, second


def test_kl_sums_over_tokens_and_is_nearly_a_cosine_distance() -> None:
    first, second = two_sides()
    cosine = (first * second).sum(-1).mean().item()
    forward, backward = separability("kl", second, first), separability("kl", first, second)
    assert forward == pytest.approx(588 / 768 * (1 - cosine), rel=2e-3)
    assert backward == pytest.approx(forward, rel=1e-3)


def test_the_cosine_regulariser_acts_as_strongly_as_the_kl_divergence() -> None:
    original, projected = two_sides()
    for reduction in REDUCTIONS:
        kl, cosine = (separability(name, projected, original, reduction) for name in ("kl", "cosine"))
        assert cosine == pytest.approx(kl, rel=2e-3)
    distance = 1 - (projected * original).sum(-1).mean().item()
    assert separability("cosine", projected, original) == pytest.approx(588 / 768 * distance, rel=1e-9)
    assert separability("mse", projected, original) == pytest.approx(2 / 768 * distance, rel=1e-9)


def test_the_papers_reduction_is_588_times_weaker_and_its_cycle_is_a_sum() -> None:
    original, projected = two_sides()
    literal = separability("kl", projected, original, "token-mean")
    assert separability("kl", original, projected) == pytest.approx(588 * literal, rel=1e-9)
    p, z = (softmax(side.numpy()) for side in (projected, original))
    assert literal == pytest.approx((p * np.log(p / z)).sum(-1).mean(), rel=1e-9)
    samples = torch.randn(2, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    released, paper = (transfer_loss(lambda x: x, samples, reduction=name) for name in REDUCTIONS)
    assert paper.cycle.item() == pytest.approx(4 * released.cycle.item(), rel=1e-6)


@pytest.mark.parametrize("walk", [(0, 2), (0, 1, 2), (0, 1, 2, 1, 3)])
def test_a_walk_visits_its_views_in_order(walk: tuple[int, ...]) -> None:
    tokens = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    found = cycle_transition(tokens, 0.3, walk).numpy()
    for sample, transition in zip(tokens.numpy(), found, strict=True):
        wanted = np.eye(5)
        for start, end in pairwise(walk):
            wanted = wanted @ softmax(sample[start] @ sample[end].T / 0.3)
        assert np.allclose(transition, wanted, atol=1e-6)
    assert np.allclose(found.sum(-1), 1, atol=1e-5)


def test_a_longer_walk_over_the_same_frames_starts_from_the_released_one() -> None:
    samples = torch.randn(3, 3, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    longer = torch.cat([samples[:, :2], samples], dim=1)
    head = Projection(8, init="pytorch")
    short, same = transfer_loss(head, samples), transfer_loss(head, longer, walk=(2, 3, 4))
    assert torch.equal(short.cycle, same.cycle)
    palindrome = transfer_loss(head, longer, walk=(0, 1, 3, 1, 4))
    assert palindrome.cycle.item() != short.cycle.item()
    assert palindrome.cycle.requires_grad
    assert palindrome.separability.requires_grad


@pytest.mark.parametrize("walk", [(), (0,), (0, 3), (-1, 0)])
def test_a_walk_stays_in_the_sample(walk: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="walk does not fit") as raised:
        transfer_loss(lambda x: x, torch.ones(1, 3, 2, 2, 2), walk=walk)
    assert raised.value.wanted == "two or more views out of 0 to 2"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("regularizer", ["kl", "mse", "cosine"])
def test_many_heads_are_mapped_over_at_once(regularizer: str, reduction: str) -> None:
    heads = [Projection(8, init="pytorch", seed=seed) for seed in range(2)]
    samples = torch.randn(3, 3, 4, 4, 8, generator=torch.Generator().manual_seed(4))
    weights = torch.tensor([1.0, 3.0])

    def total(parameters: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        def head(tokens: Tensor) -> Tensor:
            return functional_call(heads[0], parameters, (tokens,))

        terms = transfer_loss(head, samples, regularizer=regularizer, reduction=reduction)
        return terms.cycle + weight * terms.separability

    stacked, _ = stack_module_state(heads)
    gradients, values = vmap(grad_and_value(total))(stacked, weights)
    for number, head in enumerate(heads):
        alone = total(dict(head.named_parameters()), weights[number].item())
        alone.backward()
        assert values[number].item() == pytest.approx(alone.item(), rel=1e-5)
        wanted = head.linears[0].weight.grad
        error = (gradients["linears.0.weight"][number] - wanted).norm() / wanted.norm()
        assert error <= 1e-4


def test_pooling_keeps_row_major_order_and_does_not_normalise() -> None:
    tokens = torch.arange(24.0).reshape(1, 1, 4, 6, 1)
    assert pool_tokens(tokens, 2).flatten().tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


@pytest.mark.parametrize("window", [3, 4, 0])
def test_window_must_divide_the_grid(window: int) -> None:
    with pytest.raises(UsageError) as raised:
        transfer_loss(lambda x: x, torch.ones(1, 3, 6, 4, 2), window=window)
    assert raised.value.found == f"window {window} on a grid of 6x4"


def test_unknown_regularizer_is_named() -> None:
    with pytest.raises(UsageError, match="unknown regulariser") as raised:
        transfer_loss(lambda x: x, torch.ones(1, 3, 2, 2, 2), regularizer="l1")
    assert raised.value.wanted == " or ".join(REGULARIZERS)
    with pytest.raises(UsageError, match="unknown reduction"):
        transfer_loss(lambda x: x, torch.ones(1, 3, 2, 2, 2), reduction="mean")


def gradients(loss: Tensor, projection: Projection, weight: float = 1.0) -> Tensor:
    found = torch.autograd.grad(loss * weight, list(projection.parameters()), retain_graph=True)
    return torch.cat([item.flatten() for item in found])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def smooth_l1() -> Iterator[str]:
    """A regulariser of one's own: one function, whose gradient autograd finds, and one row."""

    def loss(projected: Tensor, originals: Originals, reduction: str) -> Tensor:
        return smooth_l1_loss(projected, originals.unit, beta=0.1)

    REGULARIZERS["smooth-l1"] = loss
    SEPARABILITIES["released"]["smooth-l1"] = lambda p, z: smooth_l1_loss(p, z, beta=0.1)
    yield "smooth-l1"
    for table in (REGULARIZERS, SEPARABILITIES["released"]):
        del table["smooth-l1"]


@pytest.mark.parametrize(("views", "window", "dim"), [(3, 2, 48), (4, 1, 8), (5, 4, 8)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_values_and_gradients_are_those_of_the_definition(
    regularizer: str, reduction: str, views: int, window: int, dim: int
) -> None:
    samples = torch.randn(3, views, 4, 8, dim, generator=torch.Generator().manual_seed(views))
    check_definition(samples, regularizer=regularizer, reduction=reduction, window=window)


def test_a_regulariser_is_one_function_and_one_row(smooth_l1: str) -> None:
    samples = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check_definition(samples, regularizer=smooth_l1)
    samples.requires_grad_()
    transfer_loss(Projection(8), samples, regularizer=smooth_l1).separability.backward()
    assert samples.grad is not None and samples.grad.isfinite().all()


def check_definition(samples: Tensor, **options: Any) -> None:
    """Compare values, and gradients of each term on its own (as the automatic weight needs them)."""
    head = Projection(samples.shape[-1], init="pytorch")
    options |= {"walk": walk_of(samples.shape[1]), "temperature": 0.1}
    wanted = plain_transfer_loss(head, samples, **options)
    found = transfer_loss(head, samples, **options)
    for field in fields(LossTerms):
        a, b = getattr(wanted, field.name), getattr(found, field.name)
        assert b.item() == pytest.approx(a.item(), rel=2e-5), field.name
    for name in ("total", "cycle", "separability"):
        a, b = getattr(wanted, name), getattr(found, name)
        assert relative(gradients(b, head), gradients(a, head)) <= 2e-6, name
    assert relative(gradients(found.total, head, 0.5), gradients(wanted.total, head) * 0.5) <= 2e-6


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_samples_may_have_gradients_too(regularizer: str, reduction: str) -> None:
    samples = torch.randn(2, 3, 4, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head = Projection(8, init="pytorch")
    wanted, found = (
        torch.autograd.grad(
            loss(head, samples, regularizer=regularizer, reduction=reduction, temperature=0.1).total, samples
        )[0]
        for loss in (plain_transfer_loss, transfer_loss)
    )
    assert relative(found, wanted) <= 1e-5


def test_originals_serve_every_head_alike() -> None:
    samples = torch.randn(2, 3, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    shared, heads = Originals(samples), [Projection(8, init="pytorch", seed=seed) for seed in range(3)]
    for regularizer in ("kl", "mse", "kl", "cosine", "kl"):
        for head in heads:
            alone, together = (
                transfer_loss(head, item, regularizer=regularizer) for item in (samples, shared)
            )
            assert torch.equal(gradients(alone.total, head), gradients(together.total, head))


def test_tokens_of_length_zero_have_finite_gradients() -> None:
    projected = torch.zeros(1, 3, 2, 2, 4, requires_grad=True)
    transfer_loss(lambda _: projected, torch.zeros(1, 3, 2, 2, 4)).total.backward()
    assert projected.grad is not None and projected.grad.isfinite().all()


def test_half_precision_samples_are_computed_in_float32() -> None:
    samples = torch.randn(2, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    terms = transfer_loss(Projection(8), samples)
    assert terms.total.dtype == torch.float32
    assert torch.equal(terms.total, transfer_loss(Projection(8), samples.float()).total)


def golden_head(golden: Callable[[str], Path], variant: str, moment: str) -> tuple[Projection, Tensor]:
    """Return the head of a golden training file (`init` or `final`) and its tokens `[n 3 14 14 dim]`."""
    tensors = load_file(golden(f"train/train_{variant}.safetensors"))
    head = variant.split("_", maxsplit=1)[0]
    projection = Projection(64, head)
    names = {"adapter_layer_norm1": "norm", "adapter_linear": "linears.0"}
    names |= {f"adapter_linear{k}": f"linears.{k - 1}" for k in (1, 2, 3)}
    prefix = f"{moment}.adapter."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    projection.load_state_dict(
        {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": tensor for k, tensor in state.items()}
    )
    return projection, tensors["features"].unflatten(2, (14, 14))


@pytest.mark.parametrize("variant", ["linear_kl", "linear_mse", "mlp2_kl", "mlp3_kl"])
def test_released_loss_of_the_first_batch(
    golden: Callable[[str], Path], golden_json: Callable[[str], Any], variant: str
) -> None:
    projection, samples = golden_head(golden, variant, "init")
    expected = golden_json(f"train/train_{variant}.json")
    terms = transfer_loss(projection, samples[:4], regularizer=expected["regularizer"])
    first = expected["log"][0]
    assert terms.total.item() == pytest.approx(first["loss"], rel=1e-5)
    assert terms.cycle_accuracy.item() == pytest.approx(first["cycle_accuracy"], rel=1e-6)
    assert terms.identity_cosine.item() == pytest.approx(first["identity_cosine"], rel=1e-5)


@pytest.mark.parametrize("family", ["mae"])
def test_released_loss_and_gradient_behind_an_encoder(
    golden: Callable[[str], Path], golden_json: Callable[[str], Any], family: str
) -> None:
    path = golden(f"backbones/{family}/ours.pth")
    backbone, projection = load_backbone(family, weights=path), load_projection(path)
    expected = load_file(golden(f"backbones/{family}/expected.safetensors"))
    shift = PositionShift(10.0, *golden_json(f"backbones/{family}/expected.json")["loss_pea_offset_hw"])
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    images = (expected["image_224"] / 255 - mean) / std
    plain, shifted = backbone.encode(images), backbone.encode(images, shift)
    terms = transfer_loss(projection, torch.stack([plain, plain.flip(0), shifted], dim=1))
    assert terms.total.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    assert terms.cycle_accuracy.item() == pytest.approx(expected["cycle_accuracy"].item(), rel=1e-4)
    assert terms.identity_cosine.item() == pytest.approx(expected["identity_cosine"].item(), rel=1e-4)
    terms.total.backward()
    linear, norm = projection.linears[0], projection.norm
    for name, found in (("adapter_linear", linear), ("adapter_layer_norm1", norm)):
        for leaf in ("weight", "bias"):
            wanted = expected[f"grad.adapter.{name}.{leaf}"]
            error = (getattr(found, leaf).grad - wanted).norm() / wanted.norm()
            assert error <= 1e-3, (name, leaf)
