"""Exact ranking: the keys nearest to each query inside a spatial window, by FAISS, torch, or 16 bits first.

Slabs of queries (neighbouring columns of a frame) and the block of keys that their windows reach come in; the
k largest dot products and where they are come out. No affinity matrix of a whole frame exists on a CPU at any
time. The only door to FAISS.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import start_one_core_threads, upload
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.search.faiss_gpu import MOST_ON_GPU, nearest_on_gpu

#: Packages that bring the module `faiss`. It is always imported after torch (above): the other way round the
#: two may load different copies of CUDA's and OpenMP's libraries.
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


def unit_tokens(tokens: Float[Tensor, "*shape dim"]) -> Float32[Tensor, "*shape dim"]:
    """Return tokens of length one in float32, so that dot products are cosines; zeros stay zeros."""
    return torch.nn.functional.normalize(tokens.float(), dim=-1)


def _reach(protocol: EvalProtocol) -> int:
    """Return how many rows or columns away from a query its window still reaches."""
    closed = is_closed(protocol.window, protocol.rim)
    return math.floor(protocol.radius) if closed else math.ceil(protocol.radius) - 1


def is_closed(shape: str, rim: str) -> bool:
    """Say whether a distance of the radius itself is inside; by its shape a disc is open, a square closed."""
    return shape == "square" if rim == "shape" else rim == "closed"


def in_window(
    row_distance: Int[Tensor, "*shape"],
    col_distance: Int[Tensor, "*shape"],
    shape: str,
    radius: float,
    rim: str = "shape",
) -> Bool[Tensor, "*shape"]:
    """Say which displacements lie inside the window.

    A `disc` is open (videowalk, T-CORE), a `square` closed (DINO), or as `rim` says (DINOv3's closed disc).
    """
    if shape == "square":
        distance, limit = torch.maximum(row_distance.abs(), col_distance.abs()), radius
    else:
        distance, limit = row_distance.square() + col_distance.square(), radius * radius
    return distance <= limit if is_closed(shape, rim) else distance < limit


def transition(
    similarity: Float[Tensor, "*query k"], count: Int[Tensor, "*query k"], temperature: float
) -> Float[Tensor, "*query k"]:
    """Return weights that sum to one over k: a softmax with each neighbour `count` times (0: weight 0)."""
    logits = (similarity / temperature).masked_fill(count == 0, -torch.inf)
    return torch.softmax(logits + count.clamp(min=1).log(), dim=-1)


#: Query columns that are ranked together: few enough that their common window stays narrow, many enough for
#: a fast matrix product (at 30x55 tokens 4 to 9 are equally fast, 2 and 14 slower).
SLAB_COLS = 4

_FLOAT_BYTES = 4
#: Of a GPU's free memory that a search takes at most: labels, masks and the encoder's leftovers need some.
_FREE_SHARE = 0.8
#: Floats of keys that are gathered at a time on a GPU.
_PAIR_FLOATS = 2**26
#: Of similarity and index of a neighbour, over-fetched, sorted and merged.
_NEIGHBOR_BYTES = 200
#: Per query and position: the largest product in float32, its turned copy, the products of candidates.
_NAMED_BYTES = 32

Blocked = Bool[Tensor, "query position"] | None


class Window(NamedTuple):
    """Shape and radius of a window, and the rows of the grid that it lies on."""

    shape: str
    radius: float
    n_rows: int


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring query columns and the key positions, column by column, that their windows reach.

    `blocked` is what a `window` hides of these positions; both are None where it hides nothing.
    """

    query_cols: slice
    queries: slice
    positions: slice
    blocked: Blocked
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class SearchSize:
    """What decides the memory of a search.

    `n_parallel` slabs are ranked side by side; labels are kept beside; `rough` is the data type of
    `RoughRanker`, on a CPU or a GPU, and None for others.
    """

    grid: Grid
    dim: int
    protocol: EvalProtocol
    n_parallel: int
    labels_bytes: int = 0
    rough: torch.dtype | None = None

    @property
    def _on_gpu(self) -> bool:
        return self.rough not in (None, torch.bfloat16)

    def needed_bytes(self, slab_cols: int, n_at_once: int = 1) -> int:
        """Return the most bytes of tensors that a search holds, by columns of a slab and frames at once.

        First frame and queue; the frames in hand, one of them three times while it is normalised and turned;
        of every slab that is ranked similarities and mask; the neighbours; the labels.
        """
        frame = _FLOAT_BYTES * self.grid.n_tokens * self.dim
        reach = 2 * _reach(self.protocol)
        reached = self.grid.rows * min(slab_cols + reach, self.grid.cols)
        queries = self.grid.rows * min(slab_cols, self.grid.cols)
        masks = self.grid.n_tokens * reached
        found = n_at_once * _NEIGHBOR_BYTES * self.grid.n_tokens * self.protocol.top_k
        kept = (self.protocol.n_context + 3 + n_at_once) * frame
        keys = max(reached * self.protocol.n_context, self.grid.n_tokens)
        if self.rough is not None:
            # Roundings; products once more in float32 where they are looked at again; what is named.
            kept += (self.protocol.n_context + 1 + n_at_once) * frame // 2
            keys = reached * self.protocol.n_context + self.grid.n_tokens
            kept += self.n_parallel * _NAMED_BYTES * queries * (reached + self.grid.n_tokens)
        if self._on_gpu:
            kept += n_at_once * frame + _FLOAT_BYTES * min(_PAIR_FLOATS, 8 * queries * keys)
        slabs = self.n_parallel * (2 if self._on_gpu else 1) * _FLOAT_BYTES * queries * keys
        return kept + slabs + masks + found + self.labels_bytes

    def slab_cols(self, memory_limit: int | None) -> int:
        """Return the widest slabs that fit; raise `UsageError` with the least limit when none do."""
        most = self.grid.cols if self._on_gpu else SLAB_COLS
        if memory_limit is None:
            return most
        for cols in range(most, 0, -1):
            if self.needed_bytes(cols) <= memory_limit:
                return cols
        raise UsageError(
            f"{self.protocol.name} on {self.grid} tokens of {self.dim} channels needs more memory",
            wanted=f"at least {self.needed_bytes(1)} bytes",
            found=memory_limit,
            hint="a larger --memory-limit, or a smaller n_context",
        )

    def n_at_once(self, memory_limit: int | None, most: int) -> int:
        """Return how many frames at once fit beside the widest slabs that fit, at most `most`."""
        if memory_limit is None:
            return most
        cols = self.slab_cols(memory_limit)
        one = self.needed_bytes(cols)
        return max(1, min(most, 1 + (memory_limit - one) // (self.needed_bytes(cols, 2) - one)))


def limit_on(device: torch.device, memory_limit: int | None) -> int | None:
    """Return how many bytes a search may take: those given and, on a GPU, no more than most of the free."""
    if device.type != "cuda":
        return memory_limit
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(_FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    return free if memory_limit is None else min(free, memory_limit)


@lru_cache(maxsize=8)
def make_slabs(
    grid: Grid, protocol: EvalProtocol | None, device: torch.device, slab_cols: int = SLAB_COLS
) -> list[Slab]:
    """Return slabs that cover every query once, with the window of a protocol; without, they reach all.

    Masks are made on the host, which is to know which windows hide something, and kept.
    """
    slabs = []
    reach = grid.cols if protocol is None else _reach(protocol)
    for start in range(0, grid.cols, slab_cols):
        stop = min(start + slab_cols, grid.cols)
        queries = slice(start * grid.rows, stop * grid.rows)
        positions = slice(max(start - reach, 0) * grid.rows, min(stop + reach, grid.cols) * grid.rows)
        blocked = window = None
        if protocol is not None:
            query = torch.arange(queries.start, queries.stop)[:, None]
            key = torch.arange(positions.start, positions.stop)
            row, col = key % grid.rows - query % grid.rows, key // grid.rows - query // grid.rows
            blocked = ~in_window(row, col, protocol.window, protocol.radius, protocol.rim)
            blocked = upload(blocked, device) if blocked.any() else None
            window = Window(protocol.window, protocol.radius, grid.rows) if blocked is not None else None
        slabs.append(Slab(slice(start, stop), queries, positions, blocked, window))
    return slabs


#: Keys per matrix product on a CPU: MKL runs 2,000 at a time a fifth faster than 30,000 at once.
_CPU_KEYS = 2048

Queries = Float32[Tensor, "query dim"]
Keys = Float32[Tensor, "position frame dim"]
Similarities = Float32[Tensor, "query k"]
KeyIndex = Int64[Tensor, "query k"]


Ranked = tuple[Similarities, KeyIndex]
_Slab = TypeVar("_Slab")
_Result = TypeVar("_Result")


@cache
def _faiss_threads(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that rank slabs, each with FAISS on one core.

    The threads inside FAISS wait for each other, spinning, many times per slab: on a busy machine that costs
    several times the search itself. Whole slabs side by side need not wait.
    """
    import faiss

    return ThreadPoolExecutor(n_threads, "search", initializer=lambda: faiss.omp_set_num_threads(1))


@cache
def search_threads(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that rank slabs, each with torch on one core; see `_faiss_threads`."""
    return start_one_core_threads(n_threads, "search")


class Ranker:
    """Ranks what slabs of queries look at: what every search can do."""

    #: What candidates are named in, where they are.
    dtype: torch.dtype | None = None
    #: What makes the threads that rank slabs side by side; without, one slab comes after the other.
    threads: Callable[[int], ThreadPoolExecutor] | None = None

    @property
    def n_parallel(self) -> int:
        """Slabs that are ranked side by side: as many as torch has threads, if there are `threads`."""
        return 1 if self.threads is None else torch.get_num_threads()

    def map(self, job: Callable[[_Slab], _Result], slabs: Sequence[_Slab]) -> Iterator[_Result]:
        """Return `job(slab)` of every slab in order, `n_parallel` at a time."""
        return map(job, slabs) if self.threads is None else self.threads(self.n_parallel).map(job, slabs)


class KeyRanker(Ranker, ABC):
    """Ranks one block of keys for a slab of queries, on a CPU."""

    @abstractmethod
    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> Ranked:
        """Return the k largest dot products with keys that are not blocked, and each key's flat index.

        Rows with fewer than k such keys end in minus infinity. `n_parallel` threads may be inside.
        """


class TorchRanker(KeyRanker):
    """Matrix product, mask, top-k, in one scratch buffer that every call uses again."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> Ranked:
        """Return what `KeyRanker` says."""
        size = len(queries) * keys.shape[0] * keys.shape[1]
        if self._scratch.numel() < size or self._scratch.device != queries.device:
            self._scratch = torch.empty(size, device=queries.device)
        values, index = _products(queries, keys, blocked, self._scratch[:size]).topk(k)
        return values, index


class FaissRanker(KeyRanker):
    """FAISS without a mask over more than k keys, then certified: k survivors of the mask are the exact k.

    FAISS knows no cheap selector per query. Queries with fewer than k survivors are ranked by `TorchRanker`.
    """

    #: Keys fetched per neighbour wanted: on ViT-Tiny tokens of DAVIS one query in 20,000 is left uncertain.
    overfetch = 3
    threads = staticmethod(_faiss_threads)

    def __init__(self) -> None:
        import faiss

        # FAISS 1.15 takes its slow path below 128,000 floats of queries, which a slab of a small encoder
        # stays under; 20 is what it was before. Speed is all this decides.
        faiss.cvar.distance_compute_blas_threshold = 20

    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> Ranked:
        """Return what `KeyRanker` says."""
        if queries.device.type == "cuda":
            if k > MOST_ON_GPU:
                return TorchRanker().rank(queries, keys, None, k)
            return nearest_on_gpu(queries, keys.flatten(0, 1), k)
        import faiss

        n_keys = keys.shape[0] * keys.shape[1]
        n_fetched = k if blocked is None else min(self.overfetch * k, n_keys)
        flat = keys.flatten(0, 1).numpy()
        found = faiss.knn(queries.numpy(), flat, n_fetched, metric=faiss.METRIC_INNER_PRODUCT)
        values, index = map(torch.from_numpy, found)
        if blocked is None:
            return values, index
        values = values.masked_fill(blocked.gather(1, index // keys.shape[1]), -torch.inf)
        values, order = values.topk(k)
        index = index.gather(1, order)
        uncertain = values[:, -1].isneginf()
        if n_fetched < n_keys and uncertain.any():
            again = TorchRanker().rank(queries[uncertain], keys, blocked[uncertain], k)
            values[uncertain], index[uncertain] = again
        return values, index


def _products(queries: Tensor, keys: Tensor, blocked: Blocked, out: Tensor) -> Tensor:
    """Write the dot products into flat `out` and return it as `[query key]`, blocked ones minus infinity."""
    flat = keys.flatten(0, 1)
    out = out.view(len(queries), len(flat))
    # On a CPU a few keys at a time, which it packs anew.
    at_once = _CPU_KEYS if queries.device.type == "cpu" else len(flat)
    for start in range(0, len(flat), at_once):
        stop = min(start + at_once, len(flat))
        torch.mm(queries, flat[start:stop].T, out=out[:, start:stop])
    if blocked is not None:
        out.view(len(queries), *keys.shape[:2]).masked_fill_(blocked[:, :, None], -torch.inf)
    return out


def exact_products(
    queries: Queries, keys: Float32[Tensor, "key dim"], index: KeyIndex, *, alike: bool = False
) -> Similarities:
    """Return the dot products with the keys at `index`; with `alike`, equal to the last bit for equal keys.

    A matrix product adds up in an order that depends on where a key lies; `alike` does not, nor does a CPU.
    """
    if queries.device.type == "cpu":
        return _sampled_products(queries, keys, index)
    at_once = max(1, _PAIR_FLOATS // (index.shape[1] * keys.shape[1]))
    parts = []
    for start in range(0, len(queries), at_once):
        query, places = queries[start : start + at_once], index[start : start + at_once]
        gathered = keys.index_select(0, places.flatten()).view(*places.shape, keys.shape[1])
        if alike:
            parts.append((query[:, None] * gathered).sum(dim=-1))
        else:
            parts.append(torch.bmm(gathered, query[:, :, None])[..., 0])
    return torch.cat(parts)


def _sampled_products(queries: Queries, keys: Float32[Tensor, "key dim"], index: KeyIndex) -> Similarities:
    """Return the products at some places of a matrix: no key is copied, each pair is added up alike."""
    _expect_sparse()
    n_queries, k = index.shape
    rows = torch.arange(0, n_queries * k + 1, k)
    size = (n_queries, len(keys))
    places = torch.sparse_csr_tensor(
        rows, index.flatten(), keys.new_zeros(n_queries * k), size, check_invariants=False
    )
    products: Tensor = torch.sparse.sampled_addmm(places, queries, keys.T, beta=0.0).values()
    return products.view(n_queries, k)


@cache
def _expect_sparse() -> None:
    """Let torch say once, to nobody, that such matrices are new to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def faiss_packages() -> list[str]:
    """Return the packages of FAISS that are installed, one or none; raise `InputError` for several."""
    versions = package_versions(*FAISS_PACKAGES)
    found = [name for name in FAISS_PACKAGES if versions[name] != "absent"]
    if len(found) > 1:
        raise InputError(
            "several packages of FAISS are installed, and each overwrites the files of the others",
            found=", ".join(found),
            hint=f"pip uninstall {' '.join(found)}, then install one of them again",
        )
    return found


def describe_faiss() -> dict[str, str]:
    """Return which FAISS is installed, what it was built for, its number of GPUs and the CUDA it needs."""
    packages = faiss_packages()
    if importlib.util.find_spec("faiss") is None:
        return {"faiss": "absent"}
    import faiss

    said = {"faiss": " ".join([faiss.__version__, *packages])}
    said["faiss built for"] = faiss.get_compile_options().strip()
    said["GPUs of faiss"] = str(faiss.get_num_gpus())
    needed = [need for name in packages for need in metadata.requires(name) or ()]
    cuda = [need for need in needed if need.startswith(("nvidia-", "cuda-", "libcuvs"))]
    return said | {"CUDA of faiss": ", ".join(cuda) or "none"}
