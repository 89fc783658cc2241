"""`pytest -m gpu`: what a pretended GPU cannot tell. And that benchmarks/gpu.py runs, at toy size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from propagation_cases import single_thread
from safetensors.torch import load_file

from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders import load_backbone
from cosettle_cache.propagation.context import ContextSearch
from cosettle_cache.propagation.propagator import propagate
from cosettle_cache.propagation.protocols import make_protocol

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = "timm/test_vit"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@contextmanager
def refused_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-5), ("bf16", 2e-2), ("fp16", 3e-3)])
def test_tokens_are_the_cpus_and_the_same_twice(precision: str, limit: float) -> None:
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    shifts = [None, PositionShift(10.0, 3, 4), None, PositionShift(10.0, 0, 9)]
    wanted = load_backbone(TINY, weights="random").encode(images, shifts)
    backbone = load_backbone(TINY, weights="random", device="cuda", precision=precision)
    found = backbone.encode(images, shifts)
    assert found.is_cuda and (found.cpu() - wanted).norm() < limit * wanted.norm()
    assert torch.equal(found, backbone.encode(images, shifts))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("preset", ["cosettle", "dino", "crw"])
def test_labels_are_the_cpus(preset: str, golden) -> None:
    known = load_file(golden("propagation/queue_wide.safetensors"))
    arguments = (known["features"], known["first_labels"], make_protocol(preset))
    here, there = propagate(*arguments), propagate(*arguments, device="cuda")
    assert (here.argmax(-1) == there.argmax(-1)).double().mean() > 0.9995
    assert (here - there).abs().median() < 1e-6


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("preset", ["cosettle", "dino"])
def test_frames_are_named_without_a_wait(preset: str) -> None:
    tokens = torch.randn(8, 6, 9, 32, device="cuda").half()
    cuda = torch.device("cuda")
    search = ContextSearch(Grid(6, 9), 32, make_protocol(preset, n_context=3), device=cuda, n_at_once=8)
    list(search.steps(tokens))  # the first time kernels are loaded
    columns = torch.nn.functional.normalize(tokens.float(), dim=-1).flatten(1, 2)
    with refused_waits():
        for frame in range(8, 12):
            search._context.take(columns[frame - 8], frame)


@pytest.mark.parametrize("section", ["parity", "sanity", "search", "metrics"])
def test_the_benchmark_runs_at_toy_size(section: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    with single_thread():
        figures = gpu.run_section(section, gpu.Sizes.tiny("cpu"), tmp_path)
    assert all(figures["checks"].values()), figures
    assert len(figures) > 2 and all(callable(getattr(gpu, name)) for name in gpu.SECTIONS)
    assert sum(gpu.SECTIONS.values()) <= 480
    del sys.modules["gpu"]
