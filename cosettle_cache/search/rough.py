"""Exact ranking, 16 bits first: rough products name candidates, exact ones rank them, a bound certifies.

Frames of unit tokens are kept as they are and rounded; slabs of queries come in, and of what they look at the
nearest tokens go out. The same on a CPU, in bfloat16, and on a GPU, in float16, for which nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import local
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cosettle_cache.core.errors import UsageError
from cosettle_cache.search.faiss_gpu import MOST_ON_GPU, nearest_on_gpu
from cosettle_cache.search.masked import (
    KeyIndex,
    Queries,
    Ranker,
    Similarities,
    Slab,
    exact_products,
    search_threads,
)

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

    What they look at is counted as elements: by frame the positions of `slab`, then those of `first`.
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

    Frames count from the video's first, positions column by column; short rows end in minus infinity.
    """

    similarity: Similarities
    frame: KeyIndex
    position: KeyIndex
    certain: Bool[Tensor, " query"]


#: Twice what a number gains or loses at most when another is added to it in float32, in shares.
_ADDITION = 2.0**-23
#: Half a unit in the last place of a bfloat16 whose mantissa lies between 1/2 and 1 is 2 ** (exponent - 9).
_HALF_UNIT = -9
#: Candidates of a query at least.
_LEAST_CANDIDATES = 16
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
        # Torch before 2.8 rounds float32 sums of float16 products.
        on_gpu = torch.float16 if hasattr(torch.ops.aten.mm, "dtype_out") else torch.float32
        self.dtype: torch.dtype = torch.bfloat16 if self._on_cpu else on_gpu
        #: Candidates per neighbour wanted: with more, few more queries are certified.
        self.overfetch = 5 if self._on_cpu else 2
        self.threads = search_threads if self._on_cpu else None
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
        n_wanted, n_queued = self._n_wanted(k), look.n_frames * look.n_positions
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

    def _n_wanted(self, k: int) -> int:
        return max(_LEAST_CANDIDATES, self.overfetch * k)

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


class FaissRoughRanker(RoughRanker):
    """FAISS names the candidates, on a GPU; without a mask, so what is outside the windows is struck out."""

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type)
        self.overfetch = 6

    def _candidates(self, look: Look, k: int) -> tuple[Similarities, KeyIndex, Float32[Tensor, " query"]]:
        tokens, queries = look.keys.rough, look.queries(look.keys.rough)
        runs = look.keys.runs(look.start, look.frame)
        queued = [tokens[run, look.slab.positions].flatten(0, 1) for run in runs]
        parts = [(tokens[0, look.first.positions], look.first, look.n_frames * look.n_positions)]
        if queued:
            parts.append((torch.cat(queued), look.slab, 0))
        found = [self._among(queries, keys, slab, before, k) for keys, slab, before in parts]
        rough, element, others = zip(*found, strict=True)
        return torch.cat(rough, dim=1), torch.cat(element, dim=1), torch.stack(others).amax(0)

    def _among(
        self, queries: Tensor, keys: Tensor, slab: Slab, before: int, k: int
    ) -> tuple[Similarities, KeyIndex, Float32[Tensor, " query"]]:
        """Return the best of one block of keys, whose elements have `before` others before them."""
        n_wanted = min(self._n_wanted(k), len(keys))
        if n_wanted > MOST_ON_GPU:
            raise UsageError(
                "FAISS on a GPU finds fewer neighbours than that",
                wanted=f"top_k up to {MOST_ON_GPU // self.overfetch}",
                found=k,
                hint="--search torch",
            )
        products, index = nearest_on_gpu(queries, keys, n_wanted)
        others = products[:, -1]
        if n_wanted == len(keys):
            others = torch.full_like(others, -torch.inf)
        if slab.blocked is not None:
            outside = slab.blocked.gather(1, index % slab.blocked.shape[1])
            products = products.masked_fill(outside, -torch.inf)
        return products, before + index, others
