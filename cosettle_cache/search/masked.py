"""Exact ranking: the keys nearest to each query inside a spatial window, by FAISS, torch, or bfloat16 first.

Slabs of queries (neighbouring columns of a frame) and the block of keys that their windows reach come in; the
k largest dot products and where they are come out. No affinity matrix of a whole frame exists at any time.
The only door to FAISS.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from threading import Barrier

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import SEARCHES, package_versions
from cosettle_cache.core.types import EvalProtocol, Grid

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

    A `disc` is open, its rim outside (videowalk and T-CORE); a `square` includes its rim (DINO); `rim` says
    otherwise (DINOv3's disc is closed).
    """
    if shape == "square":
        distance, limit = torch.maximum(row_distance.abs(), col_distance.abs()), radius
    else:
        distance, limit = row_distance.square() + col_distance.square(), radius * radius
    return distance <= limit if is_closed(shape, rim) else distance < limit


def transition(
    similarity: Float[Tensor, "query k"], count: Int[Tensor, "query k"], temperature: float
) -> Float[Tensor, "query k"]:
    """Return weights that sum to one over k: a softmax in which every neighbour stands `count` times.

    Entries of count 0 get weight 0 whatever their similarity.
    """
    logits = (similarity / temperature).masked_fill(count == 0, -torch.inf)
    return torch.softmax(logits + count.clamp(min=1).log(), dim=-1)


#: Query columns that are ranked together: few enough that their common window stays narrow, many enough for
#: a fast matrix product (at 30x55 tokens 4 to 9 are equally fast, 2 and 14 slower).
SLAB_COLS = 5

_FLOAT_BYTES = 4
#: Of similarity and index of a neighbour, over-fetched, sorted and merged.
_NEIGHBOR_BYTES = 200
#: Of candidates that are multiplied exactly at a time.
_GATHERED_BYTES = 2**22

Blocked = Bool[Tensor, "query position"] | None


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring query columns and the key positions, column by column, that their windows reach."""

    query_cols: slice
    positions: slice
    blocked: Blocked


@dataclass(frozen=True, slots=True)
class SearchSize:
    """What decides the memory of a search.

    `n_parallel` slabs are ranked side by side; labels are kept beside, and keys in bfloat16 where `rough`.
    """

    grid: Grid
    dim: int
    protocol: EvalProtocol
    n_parallel: int
    labels_bytes: int = 0
    rough: bool = False

    def needed_bytes(self, slab_cols: int) -> int:
        """Return the most bytes of tensors that a search with slabs of so many columns holds.

        First frame and queue; the frame in hand, three times while it is normalised and turned; of every
        slab that is ranked similarities and mask; the neighbours; the labels.
        """
        frame = _FLOAT_BYTES * self.grid.n_tokens * self.dim
        reach = 2 * _reach(self.protocol)
        reached = self.grid.rows * min(slab_cols + reach, self.grid.cols)
        keys = max(reached * self.protocol.n_context, self.grid.n_tokens)
        queries = self.grid.rows * min(slab_cols, self.grid.cols)
        masks = self.grid.n_tokens * reached
        found = _NEIGHBOR_BYTES * self.grid.n_tokens * self.protocol.top_k
        slabs = self.n_parallel * _FLOAT_BYTES * queries * keys
        kept = (self.protocol.n_context + 4) * frame
        if self.rough:
            kept += (self.protocol.n_context + 2) * frame // 2 + self.n_parallel * _GATHERED_BYTES
        return kept + slabs + masks + found + self.labels_bytes

    def slab_cols(self, memory_limit: int | None) -> int:
        """Return the widest slabs that fit; raise `UsageError` with the least limit when none do."""
        if memory_limit is None:
            return SLAB_COLS
        for cols in range(SLAB_COLS, 0, -1):
            if self.needed_bytes(cols) <= memory_limit:
                return cols
        raise UsageError(
            f"{self.protocol.name} on {self.grid} tokens of {self.dim} channels needs more memory",
            wanted=f"at least {self.needed_bytes(1)} bytes",
            found=memory_limit,
            hint="a larger --memory-limit, or a smaller n_context",
        )


@lru_cache(maxsize=8)
def make_slabs(
    grid: Grid, protocol: EvalProtocol | None, device: torch.device, slab_cols: int = SLAB_COLS
) -> list[Slab]:
    """Return slabs that cover every query once, with the window of a protocol; without, they reach all.

    They are kept, because the host waits for the device to know which windows hide something.
    """
    slabs = []
    reach = grid.cols if protocol is None else _reach(protocol)
    for start in range(0, grid.cols, slab_cols):
        stop = min(start + slab_cols, grid.cols)
        positions = slice(max(start - reach, 0) * grid.rows, min(stop + reach, grid.cols) * grid.rows)
        blocked = None
        if protocol is not None:
            query = torch.arange(start * grid.rows, stop * grid.rows, device=device)[:, None]
            key = torch.arange(positions.start, positions.stop, device=device)
            row, col = key % grid.rows - query % grid.rows, key // grid.rows - query // grid.rows
            blocked = ~in_window(row, col, protocol.window, protocol.radius, protocol.rim)
            blocked = blocked if blocked.any() else None
        slabs.append(Slab(slice(start, stop), positions, blocked))
    return slabs


#: Keys per matrix product on a CPU: MKL runs 2,000 at a time a fifth faster than 30,000 at once.
_CPU_KEYS = 2048
#: What numbers of keys per product are rounded up to.
_KEY_STEP = 256
#: Floats of keys that are gathered at a time.
_PAIR_FLOATS = 2**19

Queries = Float32[Tensor, "query dim"]
Keys = Float32[Tensor, "position frame dim"]
Similarities = Float32[Tensor, "query k"]
KeyIndex = Int64[Tensor, "query k"]


@dataclass(frozen=True, slots=True)
class RoughKeys:
    """Unit keys rounded to bfloat16, for rankers that are `rough`: no key was moved farther than `error`."""

    keys: BFloat16[Tensor, "position frame dim"]
    error: float


Ranked = tuple[Similarities, KeyIndex]


@cache
def _faiss_threads(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that rank slabs, each with FAISS on one core.

    The threads inside FAISS wait for each other, spinning, many times per slab: on a busy machine that costs
    several times the search itself. Whole slabs side by side need not wait.
    """
    import faiss

    return ThreadPoolExecutor(n_threads, "search", initializer=lambda: faiss.omp_set_num_threads(1))


@cache
def _torch_threads(n_threads: int) -> ThreadPoolExecutor:
    """Return the threads that rank slabs, each with torch on one core; see `_faiss_threads`."""
    started = Barrier(n_threads + 1)
    before = torch.get_num_threads()

    def start() -> None:
        # A thread's first question sets its number to the common one, so it comes before.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(n_threads, "search", initializer=start)
    for _ in range(n_threads):
        pool.submit(started.wait)
    started.wait()
    started.wait()
    # The number is a thread's own; but the last one set is what threads to come begin with.
    torch.set_num_threads(before)
    return pool


class Ranker(ABC):
    """Ranks keys for queries: what every search can do."""

    #: Whether keys in bfloat16 are wanted as well.
    rough = False
    #: What makes the threads that rank slabs side by side; without, one slab comes after the other.
    threads: Callable[[int], ThreadPoolExecutor] | None = None

    @property
    def n_parallel(self) -> int:
        """Slabs that are ranked side by side: as many as torch has threads, if there are `threads`."""
        return 1 if self.threads is None else torch.get_num_threads()

    def map(self, job: Callable[[Slab], Ranked], slabs: list[Slab]) -> Iterator[Ranked]:
        """Return `job(slab)` of every slab in order, `n_parallel` at a time."""
        return map(job, slabs) if self.threads is None else self.threads(self.n_parallel).map(job, slabs)

    @abstractmethod
    def rank(
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int, rough: RoughKeys | None = None
    ) -> Ranked:
        """Return the k largest dot products with keys that are not blocked, and each key's flat index.

        Rows with fewer than k such keys end in minus infinity. `k` is at most the number of keys.
        `n_parallel` threads may be inside.
        """


class TorchRanker(Ranker):
    """Matrix product, mask, top-k, in one scratch buffer that every call uses again."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def rank(  # noqa: D102
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int, rough: RoughKeys | None = None
    ) -> Ranked:
        size = len(queries) * keys.shape[0] * keys.shape[1]
        if self._scratch.numel() < size or self._scratch.device != queries.device:
            self._scratch = torch.empty(size, device=queries.device)
        values, index = _products(queries, keys, blocked, self._scratch[:size]).topk(k)
        return values, index


class FaissRanker(Ranker):
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

    def rank(  # noqa: D102
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int, rough: RoughKeys | None = None
    ) -> Ranked:
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


#: Half a unit in the last place of bfloat16: what rounding to it moves a number by at most, in shares.
_ROUGH = 2.0**-8
#: Twice what a number gains or loses at most when another is added to it in float32, in shares.
_ADDITION = 2.0**-23


class RoughRanker(Ranker):
    """Products in bfloat16 name more than k candidates, exact ones rank them, a bound certifies the rest.

    A product of unit tokens in bfloat16 is off by at most both roundings and that of the result (sums are in
    float32). A key that is no candidate has at most the last candidate's product and that bound; where the
    k-th exact product is above, nothing is missed. Other queries look at all keys that may reach it. On CPUs
    only: a GPU may add up parts in bfloat16, which the bound does not cover.
    """

    #: Candidates per neighbour wanted: few more queries are certified with twice as many.
    overfetch = 5
    rough = True
    threads = staticmethod(_torch_threads)

    def rank(  # noqa: D102
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int, rough: RoughKeys | None = None
    ) -> Ranked:
        flat, n_candidates = keys.flatten(0, 1), self.overfetch * k
        if rough is None or 4 * n_candidates > len(flat):
            return TorchRanker().rank(queries, keys, blocked, k)
        rounded = queries.bfloat16()
        products = _products(rounded, rough.keys, blocked, rounded.new_empty(len(queries) * len(flat)))
        candidates, index = products.topk(n_candidates)
        values = exact_products(queries, flat, index).masked_fill(candidates.isneginf(), -torch.inf)
        values, order = values.topk(k)
        index = index.gather(1, order)
        # Of a key that is no candidate the rough product is at most the last candidate's.
        last = candidates[:, -1].float()
        error = _rough_error(queries, rough.error)
        uncertain = (values[:, -1] < last + error + _ROUGH * last.abs()).nonzero()[:, 0]
        if len(uncertain) > len(queries) // 4:
            hidden = None if blocked is None else blocked[uncertain]
            values[uncertain], index[uncertain] = TorchRanker().rank(queries[uncertain], keys, hidden, k)
        else:
            least = values[:, -1] - error - _ROUGH
            for row in uncertain.tolist():
                near = (products[row] >= least[row]).nonzero()[:, 0]
                best = (flat[near] @ queries[row]).topk(k)
                values[row], index[row] = best.values, near[best.indices]
        return values, index


def _products(queries: Tensor, keys: Tensor, blocked: Blocked, out: Tensor) -> Tensor:
    """Write the dot products into flat `out` and return it as `[query key]`, blocked ones minus infinity."""
    flat = keys.flatten(0, 1)
    out = out.view(len(queries), len(flat))
    # On a CPU a few keys at a time, which it packs anew.
    at_once = _CPU_KEYS if queries.device.type == "cpu" else len(flat)
    for start in range(0, len(flat), at_once):
        stop = min(start + at_once, len(flat))
        # Shapes that recur: code for a product in bfloat16 is made, and kept, once per shape.
        first = max(0, stop - -(-(stop - start) // _KEY_STEP) * _KEY_STEP)
        torch.mm(queries, flat[first:stop].T, out=out[:, first:stop])
    if blocked is not None:
        out.view(len(queries), *keys.shape[:2]).masked_fill_(blocked[:, :, None], -torch.inf)
    return out


def rounding_error(tokens: Float32[Tensor, "*shape dim"]) -> Float32[Tensor, "*shape"]:
    """Return how far tokens lie from their roundings to bfloat16."""
    distance: Tensor = torch.linalg.vector_norm(tokens - tokens.bfloat16().float(), dim=-1)
    return distance


def _rough_error(queries: Queries, of_keys: float) -> Float32[Tensor, " query"]:
    """Return how far the sum of rounded products may lie from the exact one, before it is rounded itself."""
    of_queries = rounding_error(queries)
    return of_queries + of_keys * (1 + of_queries) + queries.shape[1] * _ADDITION


def exact_products(
    queries: Queries, keys: Float32[Tensor, "key dim"], index: KeyIndex, *, alike: bool = False
) -> Similarities:
    """Return the dot products with the keys at `index`; with `alike`, equal to the last bit for equal keys.

    A matrix product adds up in an order that depends on where a key lies; `alike` adds up every pair alike.
    """
    at_once = max(1, _PAIR_FLOATS // (index.shape[1] * keys.shape[1]))
    parts = []
    for start in range(0, len(queries), at_once):
        query, gathered = queries[start : start + at_once], keys[index[start : start + at_once]]
        if alike:
            parts.append((query[:, None] * gathered).sum(dim=-1))
        else:
            parts.append(torch.bmm(gathered, query[:, :, None])[..., 0])
    return torch.cat(parts)


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


def make_ranker(search: str, device: torch.device) -> Ranker:
    """Return the ranker named `auto`, `bf16`, `faiss` or `torch`; all give the same neighbours.

    `auto` is bfloat16 first on a CPU that has it, else FAISS on a CPU where it is installed, because it fuses
    the product with the ranking (ratios in docs/benchmarks), and torch otherwise. Raises `UsageError` for a
    search that cannot run here.
    """
    if search not in SEARCHES:
        raise UsageError(f"there is no search {search!r}", wanted=", ".join(SEARCHES), found=search)
    has_faiss, on_cpu = importlib.util.find_spec("faiss") is not None, device.type == "cpu"
    if search == "faiss" and not has_faiss:
        raise UsageError(
            "faiss is not installed", hint="pip install 'cosettle-cache[cpu]', or --search torch"
        )
    if search in ("bf16", "faiss") and not on_cpu:
        raise UsageError(f"{search} searches on the CPU only", found=str(device), hint="--search torch")
    # Without hardware for bfloat16 its products are slower than exact ones.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if search == "bf16" or (search == "auto" and on_cpu and native):
        return RoughRanker()
    if search == "faiss" or (search == "auto" and has_faiss and on_cpu):
        faiss_packages()
        return FaissRanker()
    return TorchRanker()
