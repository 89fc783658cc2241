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
from threading import Barrier, local
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import upload
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
    square = protocol.window == "square"
    return math.floor(protocol.radius) if square else math.ceil(protocol.radius) - 1


def in_window(
    row_distance: Int[Tensor, "*shape"], col_distance: Int[Tensor, "*shape"], shape: str, radius: float
) -> Bool[Tensor, "*shape"]:
    """Say which displacements lie inside the window.

    A `disc` is open, its rim outside (videowalk and T-CORE); a `square` includes its rim (DINO).
    """
    if shape == "square":
        return torch.maximum(row_distance.abs(), col_distance.abs()) <= radius
    return row_distance.square() + col_distance.square() < radius * radius


def transition(
    similarity: Float[Tensor, "*query k"], count: Int[Tensor, "*query k"], temperature: float
) -> Float[Tensor, "*query k"]:
    """Return weights that sum to one over k: a softmax in which every neighbour stands `count` times.

    Entries of count 0 get weight 0 whatever their similarity.
    """
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


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring query columns and the key positions, column by column, that their windows reach."""

    query_cols: slice
    queries: slice
    positions: slice
    blocked: Blocked


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
    free = int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
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
        blocked = None
        if protocol is not None:
            query = torch.arange(queries.start, queries.stop)[:, None]
            key = torch.arange(positions.start, positions.stop)
            row, col = key % grid.rows - query % grid.rows, key // grid.rows - query // grid.rows
            blocked = ~in_window(row, col, protocol.window, protocol.radius)
            blocked = upload(blocked, device) if blocked.any() else None
        slabs.append(Slab(slice(start, stop), queries, positions, blocked))
    return slabs


#: Keys per matrix product on a CPU: MKL runs 2,000 at a time a fifth faster than 30,000 at once.
_CPU_KEYS = 2048
#: What numbers of keys per product are rounded up to.
_KEY_STEP = 256

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

        Rows with fewer than k such keys end in minus infinity. `k` is at most the number of keys.
        `n_parallel` threads may be inside.
        """


class TorchRanker(KeyRanker):
    """Matrix product, mask, top-k, in one scratch buffer that every call uses again."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def rank(  # noqa: D102
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int
    ) -> Ranked:
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

    def rank(  # noqa: D102
        self, queries: Queries, keys: Keys, blocked: Blocked, k: int
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


_Frame = TypeVar("_Frame", int, Tensor)


class FrameKeys:
    """Frame 0 and the latest frames after it, each at a place of its own: unit tokens, exact and in 16 bits.

    `exact` and `rough` are `[place position dim]`, float32 and `dtype`; `moved[place position]` says how far
    a token lies from its rounding. Frame 0 keeps place 0, frame t > 0 goes to place 1 + (t - 1) % n_kept.
    """

    def __init__(
        self, n_kept: int, n_tokens: int, dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._n_kept, shape = n_kept, (1 + n_kept, n_tokens, dim)
        self.exact = torch.empty(shape, device=device)
        self.rough = torch.empty(shape, device=device, dtype=dtype)
        self.moved = torch.zeros(shape[:2], device=device)

    def put(self, tokens: Float32[Tensor, "position dim"], frame: int) -> None:
        """Keep the unit tokens of a frame."""
        place = self.place(frame)
        self.exact[place] = tokens
        self.rough[place] = tokens
        self.moved[place] = torch.linalg.vector_norm(tokens - self.rough[place].float(), dim=-1)

    def place(self, frame: _Frame) -> _Frame:
        """Return where a frame, or each of several, is kept."""
        return (1 + (frame - 1) % self._n_kept) * (frame > 0)

    def products(
        self, queries: Queries, frame: KeyIndex, position: KeyIndex, *, alike: bool = False
    ) -> Similarities:
        """Return the exact products of queries with tokens; see `exact_products`."""
        index = self.place(frame) * self.exact.shape[1] + position
        return exact_products(queries, self.exact.flatten(0, 1), index, alike=alike)

    def runs(self, start: int, stop: int) -> list[slice]:
        """Return the places of the frames from `start` (1 or later) to `stop`, in order: at most two runs."""
        if start >= stop:
            return []
        first, last = self.place(start), self.place(stop - 1)
        if first <= last:
            return [slice(first, last + 1)]
        return [slice(first, 1 + self._n_kept), slice(1, last + 1)]


@dataclass(frozen=True, slots=True)
class Look:
    """A slab of a frame's queries and what they look at: frame 0, and the frames from `start` to `frame`.

    What they look at is counted as elements: frame by frame the positions of `slab`, then of frame 0 those
    of `first`.
    """

    keys: FrameKeys
    frame: int
    start: int
    slab: Slab
    first: Slab

    @property
    def n_frames(self) -> int:
        """Frames beside the first."""
        return self.frame - self.start

    @property
    def n_positions(self) -> int:
        """Positions in each of them."""
        return _length(self.slab.positions)

    @property
    def n_elements(self) -> int:
        """Tokens in all."""
        return self.n_frames * self.n_positions + _length(self.first.positions)

    def queries(self, of: Tensor) -> Tensor:
        """Return what the queries have of something that is kept by place and position."""
        queries: Tensor = of[self.keys.place(self.frame), self.slab.queries]
        return queries

    def split(self, element: KeyIndex) -> tuple[KeyIndex, KeyIndex]:
        """Return the frames and the positions of elements."""
        n_queued = self.n_frames * self.n_positions
        is_first = element >= n_queued
        frame = (self.start + element // self.n_positions).masked_fill(is_first, 0)
        of_first = self.first.positions.start + element - n_queued
        return frame, torch.where(is_first, of_first, self.slab.positions.start + element % self.n_positions)

    def hide(self, products: Float[Tensor, "element query"], rows: Int64[Tensor, " query"]) -> None:
        """Set the products of queries `rows` with what is outside their windows to minus infinity."""
        n_queued = self.n_frames * self.n_positions
        queued = products[:n_queued].view(self.n_frames, self.n_positions, products.shape[1])
        for part, blocked in ((queued, self.slab.blocked), (products[n_queued:], self.first.blocked)):
            if blocked is not None:
                part.masked_fill_(blocked[rows].T, -torch.inf)


class Found(NamedTuple):
    """The k context tokens nearest to each query of a slab, and for which queries that is certain.

    Frames count from the video's first one, positions column by column. Rows with fewer tokens end in minus
    infinity.
    """

    similarity: Similarities
    frame: KeyIndex
    position: KeyIndex
    certain: Bool[Tensor, " query"]


#: Twice what a number gains or loses at most when another is added to it in float32, in shares.
_ADDITION = 2.0**-23
#: Half a unit in the last place of a bfloat16 whose mantissa lies between 1/2 and 1 is 2 ** (exponent - 9).
_HALF_UNIT = -9
#: One query in so many may be uncertain; with more, and so many at a time, all tokens are multiplied exactly.
_UNCERTAIN = 4


class RoughRanker(Ranker):
    """Products in 16 bits name more than k candidates, exact ones rank them, a bound certifies the rest.

    First come the positions whose largest product over the frames is highest, then the elements among those:
    the n best elements lie in the n best positions. A product of rounded unit tokens, summed in float32, is
    off by at most both roundings, and on a CPU by that of the result to bfloat16. A token that is no
    candidate has at most the last candidate's product and that bound; where the k-th exact product is above,
    nothing is missed. Other queries are looked at again. On a GPU the 16 bits are float16, eight times as
    fine, and results float32.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._on_cpu = device_type == "cpu"
        self.dtype: torch.dtype = torch.bfloat16 if self._on_cpu else _gpu_dtype()
        #: Candidates per neighbour wanted: with more, few more queries are certified.
        self.overfetch = 5 if self._on_cpu else 2
        self.threads = _torch_threads if self._on_cpu else None
        self._local = local()

    def name(self, look: Look, k: int) -> Found:
        """Return the nearest tokens as far as the candidates tell. The host waits for nothing."""
        queries = look.queries(look.keys.exact)
        rough, element, others = self._candidates(look, k)
        values, element = _rank_exactly(look, queries, rough, element, k)
        certain = (values[:, -1] >= others + self._error(look, others)) | others.isneginf()
        return Found(values, *look.split(element), certain)

    def find(self, look: Look, k: int) -> Found:
        """Return the nearest tokens, all queries certain, by the products just made where they are few."""
        found = self.name(look, k)
        rows = (~found.certain).nonzero()[:, 0]
        if len(rows) * _UNCERTAIN > len(found.certain):
            return self.correct(look, k, found, rows)
        if len(rows):
            products = self._space(look).view(look.n_elements, -1)[:, rows].float()
            look.hide(products, rows)
            error = self._error(look, torch.ones_like(found.similarity[:, -1]))
            least = (found.similarity[:, -1] - error)[rows]
            n_near = int((products >= least).sum(0).max())
            rough, element = products.T.topk(max(n_near, found.similarity.shape[1]))
            queries = look.queries(look.keys.exact)[rows]
            _replace(found, rows, look, *_rank_exactly(look, queries, rough, element, k))
        return found

    def correct(self, look: Look, k: int, found: Found, rows: Int64[Tensor, " query"]) -> Found:
        """Return what was found with queries `rows` looked up among all tokens by exact products."""
        for part in torch.split(rows, max(1, len(found.certain) // _UNCERTAIN)):
            queries = look.queries(look.keys.exact)[part]
            products = queries.new_empty(look.n_elements, len(part))
            self._multiply(look, look.keys.exact, queries, products)
            look.hide(products, part)
            _replace(found, part, look, *products.T.topk(min(k, look.n_elements)))
        return found

    def _candidates(self, look: Look, k: int) -> tuple[Similarities, KeyIndex, Float32[Tensor, " query"]]:
        """Return the best elements by rough products, and the most that any other one has."""
        queries = look.queries(look.keys.rough)
        queued, first = self._multiply(look, look.keys.rough, queries, self._space(look))
        n_wanted, n_queued = self.overfetch * k, look.n_frames * look.n_positions
        products = first.T.float()
        if look.first.blocked is not None:
            products.masked_fill_(look.first.blocked, -torch.inf)
        position = None
        if look.n_frames:
            best = queued.amax(0).T.float()
            if look.slab.blocked is not None:
                best.masked_fill_(look.slab.blocked, -torch.inf)
            highest, position = best.topk(min(n_wanted, look.n_positions))
            among = queued.gather(1, position.T[None].expand(look.n_frames, -1, -1)).permute(2, 0, 1).float()
            among.masked_fill_(highest.isneginf()[:, None], -torch.inf)
            products = torch.cat([among.flatten(1), products], dim=1)
        rough, index = products.topk(min(n_wanted, products.shape[1]))
        others = rough[:, -1]
        if rough.shape[1] == look.n_elements:
            others = torch.full_like(others, -torch.inf)
        if position is None:
            return rough, index, others
        n_kept = position.shape[1]
        of_queue = index // n_kept * look.n_positions + position.gather(1, index % n_kept)
        of_first = index - look.n_frames * n_kept + n_queued
        return rough, torch.where(index < look.n_frames * n_kept, of_queue, of_first), others

    def _multiply(
        self, look: Look, tokens: Float[Tensor, "place position dim"], queries: Tensor, out: Tensor
    ) -> tuple[Float[Tensor, "frame reached query"], Float[Tensor, "first query"]]:
        """Write products of all elements with some queries to flat `out`; return the queue's, the first's."""
        out = out.view(look.n_elements, len(queries))
        n_queued, at = look.n_frames * look.n_positions, 0
        for run in look.keys.runs(look.start, look.frame):
            window = tokens[run, look.slab.positions]
            # On a CPU frame by frame: code for a product in bfloat16 is made, and kept, once per shape.
            whole = window.flatten(0, 1)[None] if window.is_contiguous() and not self._on_cpu else window
            for keys in whole:
                _multiply_into(keys, queries.T, out[at : at + len(keys)])
                at += len(keys)
        _multiply_into(tokens[0, look.first.positions], queries.T, out[n_queued:])
        return out[:n_queued].view(look.n_frames, look.n_positions, len(queries)), out[n_queued:]

    def _space(self, look: Look) -> Tensor:
        """Return the memory of a slab's rough products, which every call of a thread uses again."""
        space = getattr(self._local, "space", None)
        n_queries = _length(look.slab.queries)
        if space is None or space.numel() < look.n_elements * n_queries:
            dtype = torch.bfloat16 if self._on_cpu else torch.float32
            space = torch.empty(look.n_elements * n_queries, dtype=dtype, device=look.keys.exact.device)
            self._local.space = space
        found: Tensor = space[: look.n_elements * n_queries]
        return found

    def _error(self, look: Look, products: Float32[Tensor, " query"]) -> Float32[Tensor, " query"]:
        """Return how far the rough products of each query that come to `products` may be off."""
        of_queries, of_keys = look.queries(look.keys.moved), look.keys.moved.amax()
        error = of_queries + of_keys * (1 + of_queries) + look.keys.exact.shape[2] * _ADDITION
        if self._on_cpu:
            error += torch.ldexp(torch.ones_like(products), torch.frexp(products).exponent + _HALF_UNIT)
        return error


def _length(span: slice) -> int:
    n: int = span.stop - span.start
    return n


def _gpu_dtype() -> torch.dtype:
    """Return what a GPU names candidates in; torch before 2.8 rounds float32 sums of float16 products."""
    return torch.float16 if hasattr(torch.ops.aten.mm, "dtype_out") else torch.float32


def _multiply_into(a: Float[Tensor, "n d"], b: Float[Tensor, "d m"], out: Float[Tensor, "n m"]) -> None:
    if a.dtype is torch.float16:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out=out)


def _rank_exactly(
    look: Look,
    queries: Queries,
    rough: Float32[Tensor, "query named"],
    element: Int64[Tensor, "query named"],
    k: int,
) -> tuple[Similarities, KeyIndex]:
    """Return the exact products of the k best of some elements; those of minus infinity are none."""
    values = look.keys.products(queries, *look.split(element)).masked_fill(rough.isneginf(), -torch.inf)
    values, order = values.topk(min(k, values.shape[1]))
    return values, element.gather(1, order)


def _replace(
    found: Found, rows: Int64[Tensor, " query"], look: Look, values: Similarities, element: KeyIndex
) -> None:
    for part, new in zip(found, (values, *look.split(element)), strict=False):
        part[rows] = new
    found.certain[rows] = True


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


def exact_products(
    queries: Queries, keys: Float32[Tensor, "key dim"], index: KeyIndex, *, alike: bool = False
) -> Similarities:
    """Return the dot products with the keys at `index`; with `alike`, equal to the last bit for equal keys.

    A matrix product adds up in an order that depends on where a key lies; `alike` adds up every pair alike,
    which on a CPU is done anyway.
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


def make_ranker(search: str, device: torch.device) -> Ranker:
    """Return the ranker named `auto`, `bf16`, `faiss` or `torch`; all give the same neighbours.

    On a CPU `auto` is bfloat16 first where it is multiplied in hardware, else FAISS where it is installed,
    because it fuses the product with the ranking (ratios in docs/benchmarks), and torch otherwise; on a GPU
    it is float16 first, as is `torch`. Raises `UsageError` for a search that cannot run here.
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
    if not on_cpu:
        return RoughRanker(device.type)
    # Without hardware for bfloat16 its products are slower than exact ones.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if search == "bf16" or (search == "auto" and native):
        return RoughRanker()
    if search == "faiss" or (search == "auto" and has_faiss):
        faiss_packages()
        return FaissRanker()
    return TorchRanker()
