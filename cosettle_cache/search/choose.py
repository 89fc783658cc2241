"""Which search runs where, by name."""

from __future__ import annotations

import importlib.util

import torch

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import SEARCHES
from cosettle_cache.search.faiss_gpu import check_gpu_faiss
from cosettle_cache.search.masked import FaissRanker, Ranker, TorchRanker, faiss_packages
from cosettle_cache.search.rough import FaissRoughRanker, RoughRanker


def make_ranker(search: str, device: torch.device) -> Ranker:
    """Return the ranker named `auto`, `bf16`, `faiss`, `torch` or `triton`; all give the same neighbours.

    On a CPU `auto` is bfloat16 first where it is multiplied in hardware, else FAISS where it is installed,
    because it fuses the product with the ranking (ratios in docs/benchmarks), and torch otherwise. On a GPU
    it is float16 first, as `torch` and `triton` (one kernel) are. Raises `UsageError` where one cannot run.
    """
    if search not in SEARCHES:
        raise UsageError(f"there is no search {search!r}", wanted=", ".join(SEARCHES), found=search)
    has_faiss = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not has_faiss:
        raise UsageError(
            "faiss is not installed", hint="pip install 'cosettle-cache[cpu]', or --search torch"
        )
    if device.type != "cpu":
        return _on_gpu(search, device)
    if search == "triton":
        raise UsageError("triton searches on a GPU only", found=str(device), hint="--search auto")
    # Without hardware for bfloat16 its products are slower than exact ones.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if search == "bf16" or (search == "auto" and native):
        return RoughRanker()
    if search == "faiss" or (search == "auto" and has_faiss):
        faiss_packages()
        return FaissRanker()
    return TorchRanker()


def _on_gpu(search: str, device: torch.device) -> Ranker:
    if search == "bf16":
        raise UsageError("bf16 searches on the CPU only", found=str(device), hint="--search torch")
    if search == "faiss":
        faiss_packages()
        check_gpu_faiss()
        return FaissRoughRanker(device.type)
    if search == "triton":
        if importlib.util.find_spec("triton") is None:
            raise UsageError("Triton is not installed", hint="--search torch")
        from cosettle_cache.search.triton_names import TritonRanker

        return TritonRanker()
    return RoughRanker(device.type)
