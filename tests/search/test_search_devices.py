"""The search on a pretended GPU: what the CPU finds, in as many frames at once as fit; FAISS stands in."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_cuda import CudaTensor, Device, pretend_cuda
from propagation_cases import clips, dense_oracle, single_thread

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid
from cosettle_cache.propagation.context import FRAMES_AT_ONCE, ContextSearch
from cosettle_cache.propagation.propagator import propagate
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.search import choose, faiss_gpu
from cosettle_cache.search.choose import make_ranker
from cosettle_cache.search.masked import SearchSize
from cosettle_cache.search.vectors import nearest

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def _array(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype).reshape(shape)


def _brute_force(resources: object, asked: SimpleNamespace) -> None:
    """Write the k largest dot products, as `faiss.bfKnn` does, to the addresses that it is given."""
    assert asked.metric == "product" and asked.vectorsRowMajor and asked.queriesRowMajor
    assert asked.vectorType == asked.queryType and 1 <= asked.k <= min(2048, asked.numVectors)
    keys, queries = (
        _array(address, (n, asked.dims), asked.vectorType).astype(np.float32)
        for address, n in ((asked.vectors, asked.numVectors), (asked.queries, asked.numQueries))
    )
    products = queries @ keys.T
    order = np.argsort(-products, axis=1, kind="stable")[:, : asked.k]
    shape = (asked.numQueries, asked.k)
    _array(asked.outDistances, shape, np.float32)[:] = np.take_along_axis(products, order, 1)
    _array(asked.outIndices, shape, np.int64)[:] = order


def stand_in(n_gpus: int = 1) -> SimpleNamespace:
    """Return a FAISS with the names that a GPU needs."""
    resources = SimpleNamespace(setTempMemory=lambda n: None, setDefaultStream=lambda device, stream: None)
    kinds = {f"DistanceDataType_{name}": kind for name, kind in (("F16", np.float16), ("F32", np.float32))}
    casts = dict.fromkeys(("void_ptr", "float_ptr", "cudastream_t"), lambda address: address)
    return SimpleNamespace(
        __version__="1.15.1",
        __spec__=object(),
        cvar=SimpleNamespace(),
        METRIC_INNER_PRODUCT="product",
        IndicesDataType_I64="int64",
        StandardGpuResources=lambda: resources,
        GpuDistanceParams=SimpleNamespace,
        get_num_gpus=lambda: n_gpus,
        bfKnn=_brute_force,
        **kinds,
        **{f"cast_integer_to_{name}": cast for name, cast in casts.items()},
    )


@contextmanager
def faiss_on_gpu(module: object) -> Iterator[Device]:
    """Let `faiss` be a module that finds pretended tensors at their numbers' addresses."""
    address = patch.object(CudaTensor, "data_ptr", lambda tensor: tensor.held.data_ptr())
    packages = patch.object(choose, "faiss_packages", lambda: ["faiss-gpu"])
    # One entry alone: what torch imports meanwhile stays.
    with pytest.MonkeyPatch.context() as modules, pretend_cuda() as device, address, packages:
        modules.setitem(sys.modules, "faiss", module)
        yield device
    faiss_gpu._resources.cache_clear()


@pytest.mark.parametrize("search", ["auto", "faiss"])
@settings(max_examples=6, deadline=None)
@given(clip=clips(min_frames=3), n_at_once=st.sampled_from([1, 2, 8]))
def test_a_gpu_finds_what_a_cpu_finds(search, clip, n_at_once):
    options = {"grid": clip.grid, "dim": clip.tokens.shape[-1], "protocol": clip.protocol}
    here = ContextSearch(**options, device=torch.device("cpu"), search="torch")
    expected = [here.step(frame) for frame in clip.tokens][1:]
    with faiss_on_gpu(stand_in()):
        there = ContextSearch(**options, device=CUDA, search=search, n_at_once=n_at_once)
        found = []
        for frames in torch.split(clip.tokens.to(CUDA), n_at_once):
            found += there.steps(frames)
        found = [(item.similarity.cpu(), item.count.cpu()) for item in found[1:]]
    for (similarity, count), wanted in zip(found, expected, strict=True):
        width = min(similarity.shape[1], wanted.similarity.shape[1])
        torch.testing.assert_close(similarity[:, :width], wanted.similarity[:, :width], atol=1e-5, rtol=0)
        assert torch.equal(count.sum(1), wanted.count.sum(1)) and not count[:, width:].any()


@settings(max_examples=6, deadline=None)
@given(clips())
def test_labels_of_a_gpu_equal_the_dense_oracle(clip):
    expected, open_tie = dense_oracle(clip.tokens, clip.first_labels, clip.protocol)
    with pretend_cuda():
        found = propagate(clip.tokens, clip.first_labels, clip.protocol, device="cuda:0")
    if not open_tie:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_host_waits_once_for_many_frames(cuda):
    tokens = torch.randn(9, 5, 6, 16, generator=torch.Generator().manual_seed(0)).pin_memory()
    search = ContextSearch(Grid(5, 6), 16, make_protocol(n_context=3), device=CUDA, n_at_once=8)
    frames = tokens.to(CUDA, non_blocking=True)
    list(search.steps(frames[:1]))
    cuda.clear()
    list(search.steps(frames[1:]))
    assert cuda.waits == 1, cuda.report()


def test_tokens_that_are_not_finite_are_named_by_their_frame(cuda):
    tokens = torch.randn(4, 3, 4, 8)
    tokens[2, 0, 0, 0] = torch.nan
    search = ContextSearch(Grid(3, 4), 8, make_protocol(), device=CUDA, n_at_once=4)
    with pytest.raises(InputError, match="frame 2 are not finite"):
        list(search.steps(tokens.to(CUDA)))


@pytest.mark.parametrize("limit", ["given", "free"])
def test_frames_at_once_are_what_fits(limit, cuda):
    grid, dim, protocol = Grid(30, 55), 768, make_protocol()
    size = SearchSize(grid, dim, protocol, 1, rough=torch.float16)
    needed, least = size.needed_bytes(grid.cols, 10), size.needed_bytes(1)
    options = {"device": CUDA, "n_at_once": FRAMES_AT_ONCE}

    def at_once(n_bytes: int) -> int:
        if limit == "given":
            return ContextSearch(grid, dim, protocol, **options, memory_limit=n_bytes).n_at_once
        with patch("torch.cuda.mem_get_info", lambda _: (n_bytes / 0.8 + 1, 80e9)):
            return ContextSearch(grid, dim, protocol, **options).n_at_once

    assert [at_once(n) for n in (least, needed, 10**11)] == [1, 10, FRAMES_AT_ONCE]
    with pytest.raises(UsageError, match="needs more memory"):
        at_once(least - 2)
    assert needed < 1.6e9


def test_a_kernel_names_what_torch_names():
    pytest.importorskip("triton", reason="Triton is not installed")
    # Its interpreter is chosen before Triton is imported, which torch may have done here.
    script = Path(__file__).parents[1] / "support/interpreted_kernel.py"
    done = subprocess.run(
        [sys.executable, script],
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cosettle", "dino", "crw"]


def test_vectors_are_searched_on_a_gpu_too():
    vectors = np.random.default_rng(1).standard_normal((300, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = nearest(vectors[:50], vectors, 7, search="torch")
    with faiss_on_gpu(stand_in()):
        for search in ("auto", "faiss"):
            found = nearest(vectors[:50], vectors, 7, search=search, device="cuda")
            assert np.array_equal(found.index, wanted.index)
            assert np.array_equal(found.similarity, wanted.similarity)


def test_a_faiss_that_has_no_gpu_is_refused():
    without = stand_in()
    del without.StandardGpuResources
    for module, said in ((without, "knows no GPU"), (stand_in(0), "built for another CUDA")):
        with faiss_on_gpu(module), pytest.raises(UsageError, match=said) as caught:
            make_ranker("faiss", CUDA)
        assert "--search torch" in caught.value.hint
    missing = patch.object(faiss_gpu, "import_module", side_effect=ImportError("libcublas.so.12 is missing"))
    with faiss_on_gpu(stand_in()), missing, pytest.raises(UsageError, match="cannot be loaded") as caught:
        make_ranker("faiss", CUDA)
    assert caught.value.found == "libcublas.so.12 is missing"
    with pytest.raises(UsageError, match="bf16 searches on the CPU only"):
        make_ranker("bf16", CUDA)
    assert make_ranker("auto", CUDA).dtype == make_ranker("torch", CUDA).dtype == torch.float16
