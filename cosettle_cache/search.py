"""Exact ranking: the keys nearest to each query inside a spatial window, by FAISS or by torch.

A slab of queries and the block of keys that their windows reach come in; the k largest dot products and where
they are come out. No affinity matrix of a whole frame exists at any time. The only door to FAISS.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from cosettle_cache.errors import UsageError
from cosettle_cache.slabs import Blocked, Slab

SEARCHES = ("auto", "torch", "faiss")

#: Keys per matrix product on a CPU: MKL runs 2,000 at a time a fifth faster than 30,000 at once.
CPU_KEYS = 2048

Queries = Float32[Tensor, "query dim"]
Keys = Float32[Tensor, "position frame dim"]
Similarities = Float32[Tensor, "query k"]
KeyIndex = Int64[Tensor, "query k"]


Job = Callable[[Slab], tuple[Similarities, KeyIndex]]


class TorchRanker:
    """Matrix product, mask, top-k, in one scratch buffer that every call uses again."""

    #: Slabs that are ranked side by side.
    n_parallel = 1

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def map(self, job: Job, slabs: list[Slab]) -> Iterator[tuple[Similarities, KeyIndex]]:
        """Return `job(slab)` of every slab in order, one after the other: torch has its own threads."""
        return map(job, slabs)

    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> tuple[Similarities, KeyIndex]:
        """Return the k largest dot products with keys that are not blocked, and each key's flat index.

        Rows with fewer than k such keys end in minus infinity. `k` is at most the number of keys.
        """
        flat = keys.flatten(0, 1)
        scores = self._matrix(len(queries), len(flat), queries.device)
        at_once = CPU_KEYS if queries.device.type == "cpu" else len(flat)
        for start in range(0, len(flat), at_once):
            part = slice(start, start + at_once)
            torch.mm(queries, flat[part].T, out=scores[:, part])
        if blocked is not None:
            scores.view(len(queries), *keys.shape[:2]).masked_fill_(blocked[:, :, None], -torch.inf)
        values, index = scores.topk(k)
        return values, index

    def _matrix(self, n_rows: int, n_cols: int, device: torch.device) -> Float32[Tensor, "query key"]:
        if self._scratch.numel() < n_rows * n_cols or self._scratch.device != device:
            self._scratch = torch.empty(n_rows * n_cols, device=device)
        return self._scratch[: n_rows * n_cols].view(n_rows, n_cols)


class FaissRanker:
    """FAISS without a mask over more than k keys, then certified: k survivors of the mask are the exact k.

    FAISS knows no cheap selector per query. Queries with fewer than k survivors are ranked by `TorchRanker`.
    """

    #: Keys fetched per neighbour wanted: on ViT-Tiny tokens of DAVIS one query in 20,000 is left uncertain.
    overfetch = 3

    def __init__(self) -> None:
        import faiss

        # FAISS 1.15 takes its slow path below 128,000 floats of queries, which a slab of a small encoder
        # stays under; 20 is what it was before. Speed is all this decides.
        faiss.cvar.distance_compute_blas_threshold = 20

    @property
    def n_parallel(self) -> int:
        """Slabs that are ranked side by side: as many as torch has threads."""
        return torch.get_num_threads()

    def map(self, job: Job, slabs: list[Slab]) -> Iterator[tuple[Similarities, KeyIndex]]:
        """Return `job(slab)` of every slab in order, `n_parallel` at a time."""
        return _faiss_threads(self.n_parallel).map(job, slabs)

    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> tuple[Similarities, KeyIndex]:
        """See `TorchRanker.rank`; any number of threads may be inside."""
        if blocked is None:
            return _faiss_knn(queries, keys, k)
        n_keys = keys.shape[0] * keys.shape[1]
        n_fetched = min(self.overfetch * k, n_keys)
        fetched, fetched_index = _faiss_knn(queries, keys, n_fetched)
        hidden = blocked.gather(1, fetched_index // keys.shape[1])
        values, order = fetched.masked_fill(hidden, -torch.inf).topk(k)
        index = fetched_index.gather(1, order)
        uncertain = values[:, -1].isneginf()
        if n_fetched < n_keys and uncertain.any():
            again = TorchRanker().rank(queries[uncertain], keys, blocked[uncertain], k)
            values[uncertain], index[uncertain] = again
        return values, index


@cache
def _faiss_threads(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that rank slabs, each with FAISS on one core.

    The threads inside FAISS wait for each other, spinning, many times per slab: on a busy machine that costs
    several times the search itself. Whole slabs side by side need not wait.
    """
    import faiss

    return ThreadPoolExecutor(n_threads, "search", initializer=lambda: faiss.omp_set_num_threads(1))


def _faiss_knn(queries: Queries, keys: Keys, k: int) -> tuple[Similarities, KeyIndex]:
    import faiss

    flat = keys.flatten(0, 1).numpy()
    values, index = faiss.knn(queries.numpy(), flat, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values), torch.from_numpy(index)


#: Ranks keys for queries: the two searches have one interface.
Ranker = TorchRanker | FaissRanker


def make_ranker(search: str, device: torch.device) -> Ranker:
    """Return the ranker named `auto`, `torch` or `faiss`; all give the same neighbours.

    `auto` is FAISS on a CPU where it is installed, because it fuses the product with the ranking (ratio in
    docs/benchmarks), and torch otherwise. Raises `UsageError` for a search that cannot run here.
    """
    if search not in SEARCHES:
        raise UsageError(f"there is no search {search!r}", wanted=", ".join(SEARCHES), found=search)
    has_faiss = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not has_faiss:
        raise UsageError(
            "faiss is not installed", hint="pip install 'cosettle-cache[cpu]', or --search torch"
        )
    if search == "faiss" and device.type != "cpu":
        raise UsageError("faiss searches on the CPU only", found=str(device), hint="--search torch")
    use_faiss = search == "faiss" or (search == "auto" and has_faiss and device.type == "cpu")
    return FaissRanker() if use_faiss else TorchRanker()
