"""The context of a video: first frame and queue, and the neighbours that each next frame has in it.

Tokens of consecutive frames come in; for every query its most similar context tokens go out, with how often
each stands in the context. Labels play no part, and what is kept does not grow with the number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn.functional import pad

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.search.masked import (
    Keys,
    Ranked,
    RoughKeys,
    SearchSize,
    Similarities,
    Slab,
    exact_products,
    in_window,
    make_ranker,
    make_slabs,
    rounding_error,
    unit_tokens,
)

#: Far above the rounding of a cosine in float32, far below what separates different tokens.
_ROUNDING = 1e-5
#: Frames that a GPU works on before the host waits for what they came to, and writes it.
FRAMES_AT_ONCE = 64
#: Positions whose frames are moved at a time while the queue fills.
_GROW_POSITIONS = 64

Columns = Float32[Tensor, "col row dim"]


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The context tokens that each query of one frame looks at, most similar first.

    Queries and positions count row by row over the grid; `frame` counts from the video's first frame.
    `count` says how often the neighbour stands in the context (PROTOCOLS 1.2.4); entries of count 0, with a
    similarity of minus infinity, fill rows that are shorter than others or than top_k. Counts
    of a row add up to top_k where there are that many candidates, to more where a protocol keeps ties.
    """

    frame: Int32[Tensor, "query k"]
    position: Int32[Tensor, "query k"]
    similarity: Float32[Tensor, "query k"]
    count: Int32[Tensor, "query k"]


class TiesError(Exception):
    """More tokens were as similar as the last neighbour than a search without waits looks at."""


def _merge(lists: list[Neighbors], top_k: int, *, keep_ties: bool, cut: bool = True) -> Neighbors:
    """Return the best of several lists: `top_k` places, the last neighbour's copies beyond them cut.

    With `keep_ties` nothing is cut, and whatever is as similar as the neighbour on the last place stays too;
    then the lists are as wide as the longest, which the host waits to know, or without `cut` as they can be.
    """
    similarity = torch.cat([item.similarity for item in lists], dim=1)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    frame, position, count = (
        torch.cat([getattr(item, name) for item in lists], dim=1).gather(1, order)
        for name in ("frame", "position", "count")
    )
    places_left = (top_k - (count.cumsum(dim=1) - count)).clamp(min=0)
    if keep_ties:
        last = similarity.masked_fill(places_left == 0, torch.inf).amin(dim=1, keepdim=True)
        count = count.masked_fill(similarity < last, 0)
        width = max(top_k, int((count > 0).sum(dim=1).max())) if cut else count.shape[1]
    else:
        count, width = torch.minimum(count, places_left).int(), top_k
    similarity = similarity.masked_fill(count == 0, -torch.inf)
    return Neighbors(*(item[:, :width].contiguous() for item in (frame, position, similarity, count)))


class Queue:
    """The last `capacity` frames after the first: `keys[position, slot]` is a token of frame `frames[slot]`.

    While it fills, each frame's arrival lays the keys out anew in the same storage, so that a position's
    frames stay side by side without empty places between them; later frames replace the oldest.
    """

    def __init__(
        self, capacity: int, grid: Grid, dim: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self._capacity = capacity
        self._storage = torch.empty(capacity * grid.n_tokens * dim, device=device, dtype=dtype)
        self.keys: Float[Tensor, "position slot dim"] = self._storage[:0].view(grid.n_tokens, 0, dim)
        self.frames: Int32[Tensor, " slot"] = torch.empty(0, dtype=torch.int32, device=device)

    def append(self, tokens: Float32[Tensor, "position dim"], frame: int) -> None:
        """Keep `tokens` as frame number `frame`; numbers ascend by one."""
        n_positions, n_frames, dim = self.keys.shape
        if n_frames < self._capacity:
            wider = self._storage[: n_positions * (n_frames + 1) * dim].view(n_positions, n_frames + 1, dim)
            # Positions move towards the end, so the last ones go first; a copy lets a block overlap itself.
            for start in reversed(range(0, n_positions, _GROW_POSITIONS)):
                block = slice(start, start + _GROW_POSITIONS)
                wider[block, :n_frames] = self.keys[block].clone()
            wider[:, n_frames] = tokens
            self.keys = wider
            self.frames = torch.cat([self.frames, self.frames.new_full((1,), frame)])
        elif self._capacity:
            # The oldest: frames came one by one, the first of them was number 1.
            slot = (frame - 1) % self._capacity
            self.keys[:, slot] = tokens
            self.frames[slot].fill_(frame)


class ContextSearch:
    """The context of one video, first frame and queue, and each next frame's neighbours in it.

    Tokens are normalised once, when they enter, and lie column by column, so that the window of a slab of
    query columns is one contiguous block. Memory does not depend on the number of frames: it is the context
    and the similarities of the slabs in work, which `memory_limit` (bytes, `labels_bytes` of labels included)
    makes narrower; only ties beyond all measure, where a protocol keeps them, take more. Raises `UsageError`
    with the least limit that works. With `deferred` the host does not wait for a GPU: what is wrong with the
    frames so far is told by `check`.
    """

    def __init__(
        self,
        grid: Grid,
        dim: int,
        protocol: EvalProtocol,
        *,
        device: torch.device,
        search: str = "auto",
        memory_limit: int | None = None,
        labels_bytes: int = 0,
        deferred: bool = False,
    ) -> None:
        check_candidates(grid, protocol)
        self._grid, self._protocol, self._device = grid, protocol, device
        self._shape = (grid.rows, grid.cols, dim)
        self._ranker = make_ranker(search, device)
        size = SearchSize(grid, dim, protocol, self._ranker.n_parallel, labels_bytes, self._ranker.rough)
        slab_cols = size.slab_cols(memory_limit)
        self._slabs = make_slabs(grid, protocol, device, slab_cols)
        self._first_slabs = self._slabs if protocol.mask_first else make_slabs(grid, None, device, slab_cols)
        self._first: tuple[Keys, RoughKeys | None] | None = None
        self._queue = Queue(protocol.n_context, grid, dim, device)
        n_rough = protocol.n_context if self._ranker.rough else 0
        self._rough_queue = Queue(n_rough, grid, dim, device, torch.bfloat16)
        self._rounding_error = 0.0
        self._n_seen = 0
        self._deferred = deferred and device.type != "cpu"
        self._are_finite, self._are_ties_in = list[Tensor](), list[Tensor]()

    def check(self) -> None:
        """Raise what was `deferred`: `InputError` for tokens that are not finite, `TiesError`."""
        for frame, finite in enumerate(torch.stack(self._are_finite).tolist() if self._are_finite else ()):
            if not finite:
                raise _not_finite(frame)
        if self._are_ties_in and not torch.stack(self._are_ties_in).all():
            raise TiesError

    def step(self, tokens: Float[Tensor, "row col dim"]) -> Neighbors | None:
        """Return the neighbours of the next frame and take it into the context; None for the first frame.

        Raises `InputError` for tokens of another shape and for tokens that are not finite.
        """
        with exact_float32(self._device.type):
            return self._step(tokens)

    def _step(self, tokens: Float[Tensor, "row col dim"]) -> Neighbors | None:
        if tuple(tokens.shape) != self._shape:
            wanted, found = (" x ".join(map(str, shape)) for shape in (self._shape, tokens.shape))
            raise InputError(
                f"the tokens of frame {self._n_seen} have another shape", wanted=wanted, found=found
            )
        finite = torch.isfinite(tokens).all()
        if self._deferred:
            self._are_finite.append(finite)
        elif not finite:
            raise _not_finite(self._n_seen)
        columns = unit_tokens(tokens.to(self._device)).transpose(0, 1).contiguous()
        flat = columns.flatten(0, 1)
        if self._ranker.rough:
            self._rounding_error = max(self._rounding_error, float(rounding_error(flat).max()))
        if self._first is None:
            rough = RoughKeys(flat[:, None].bfloat16(), self._rounding_error) if self._ranker.rough else None
            self._first, neighbors = (flat[:, None], rough), None
        else:
            neighbors = self._neighbors(columns, *self._first)
            self._queue.append(flat, self._n_seen)
            self._rough_queue.append(flat, self._n_seen)
        self._n_seen += 1
        return neighbors

    def _neighbors(self, queries: Columns, first: Keys, rough: RoughKeys | None) -> Neighbors:
        protocol, cols = self._protocol, self._grid.cols
        similarity, position, slot = self._rank(queries, first, rough, self._first_slabs)
        # The first frame also stands in the queue while that is not full of later frames.
        n_copies = max(0, protocol.n_context + 1 - self._n_seen) if protocol.first_frame_copies else 0
        query = torch.arange(self._grid.n_tokens, device=self._device)[:, None]
        row, col = position // cols - query // cols, position % cols - query % cols
        count = 1 + n_copies * in_window(row, col, protocol.window, protocol.radius, protocol.rim).int()
        lists = [Neighbors(slot, position, similarity, count.masked_fill(similarity.isneginf(), 0))]
        if len(self._queue.frames):
            rough = RoughKeys(self._rough_queue.keys, self._rounding_error) if self._ranker.rough else None
            similarity, position, slot = self._rank(queries, self._queue.keys, rough, self._slabs)
            count = similarity.isfinite().int()
            lists.append(Neighbors(self._queue.frames[slot], position, similarity, count))
        return _merge(lists, protocol.top_k, keep_ties=protocol.keep_ties, cut=not self._deferred)

    def _rank(
        self, queries: Columns, keys: Keys, rough: RoughKeys | None, slabs: list[Slab]
    ) -> tuple[Similarities, Int32[Tensor, "query k"], Int32[Tensor, "query k"]]:
        """Return similarity, position and slot of the nearest keys, queries and positions row by row."""
        ranked = list(self._ranker.map(partial(self._rank_slab, queries, keys, rough), slabs))
        width = max(self._protocol.top_k, *(values.shape[1] for values, _ in ranked))
        rows, cols = self._grid.rows, self._grid.cols
        similarity, index = (
            torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
            .view(cols, rows, -1)
            .transpose(0, 1)
            .flatten(0, 1)
            for parts, fill in zip(zip(*ranked, strict=True), (-torch.inf, 0), strict=True)
        )
        n_slots = keys.shape[1]
        place = (index // n_slots).int()
        return similarity, place % rows * cols + place // rows, (index % n_slots).int()

    def _rank_slab(self, queries: Columns, keys: Keys, rough: RoughKeys | None, slab: Slab) -> Ranked:
        """Return the top k keys of a slab's queries; with `keep_ties` also all that equal the last of them.

        For those more and more keys are fetched until the last one is clearly below the k-th of every query.
        """
        chosen, window = queries[slab.query_cols].flatten(0, 1), keys[slab.positions]
        rough = rough and RoughKeys(rough.keys[slab.positions], rough.error)
        n_slots, n_keys = window.shape[1], window.shape[0] * window.shape[1]
        top_k, keep_ties = self._protocol.top_k, self._protocol.keep_ties
        # A still scene repeats every token in every frame of the queue.
        k = min(top_k + 1 + n_slots if keep_ties else top_k, n_keys)
        values, index = self._ranker.rank(chosen, window, slab.blocked, k, rough)
        if keep_ties:
            if self._deferred and k < n_keys:
                self._are_ties_in.append(_are_ties_in(values, top_k))
            while not self._deferred and k < n_keys and not _are_ties_in(values, top_k):
                k = min(2 * k, n_keys)
                values, index = self._ranker.rank(chosen, window, slab.blocked, k, rough)
            exact = exact_products(chosen, window.flatten(0, 1), index, alike=True)
            values = exact.masked_fill(values.isneginf(), -torch.inf)
        return values, index + slab.positions.start * n_slots


def check_candidates(grid: Grid, protocol: EvalProtocol) -> None:
    """Raise `UsageError` when frame 1 has fewer candidates, copies counted, than `top_k` asks for."""
    n_frames = 1 + (protocol.n_context if protocol.first_frame_copies else 0)
    if protocol.top_k > n_frames * grid.n_tokens:
        raise UsageError(
            f"top_k asks for more neighbours than a {grid} grid has at the second frame",
            wanted=f"at most {n_frames * grid.n_tokens}",
            found=protocol.top_k,
            hint="a smaller top_k, or a larger size",
        )


def _not_finite(frame: int) -> InputError:
    return InputError(f"the tokens of frame {frame} are not finite", wanted="numbers", found="nan or inf")


def _are_ties_in(values: Similarities, top_k: int) -> Bool[Tensor, ""]:
    last = values[:, -1]
    return (last.isneginf() | (last < values[:, top_k - 1] - _ROUNDING)).all()
