"""The context of a video: first frame and queue, and the neighbours that each next frame has in it.

Tokens of consecutive frames come in; for every query its most similar context tokens go out, with how often
each stands in the context. What is kept between frames does not grow with their number.

Neighbour lists: the context tokens that every query of a frame looks at, and how often each counts.

Lists of several parts of the context come in and are merged under a protocol's rules. Labels play no part, so
lists can be kept and used for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.search.masked import (
    Blocked,
    KeyIndex,
    Keys,
    RoughKeys,
    SearchSize,
    Similarities,
    Slab,
    in_window,
    make_open_slabs,
    make_ranker,
    make_slabs,
    rounding_error,
    unit_tokens,
)


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


def merge_neighbors(lists: list[Neighbors], top_k: int, *, keep_ties: bool) -> Neighbors:
    """Return the best of several lists: `top_k` places, the last neighbour's copies beyond them cut.

    With `keep_ties` nothing is cut, and whatever is as similar as the neighbour on the last place stays too.
    """
    similarity = torch.cat([item.similarity for item in lists], dim=1)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    frame, position, count = (
        torch.cat([getattr(item, name) for item in lists], dim=1).gather(1, order)
        for name in ("frame", "position", "count")
    )
    places_left = (top_k - (count.cumsum(dim=1) - count)).clamp(min=0)
    if keep_ties:
        count = count.masked_fill(~_as_similar_as_last(similarity, places_left > 0), 0)
        width = max(top_k, int((count > 0).sum(dim=1).max()))
    else:
        count, width = torch.minimum(count, places_left).int(), top_k
    similarity = similarity.masked_fill(count == 0, -torch.inf)
    return Neighbors(*(item[:, :width].contiguous() for item in (frame, position, similarity, count)))


def _as_similar_as_last(
    similarity: Float32[Tensor, "query k"], placed: Bool[Tensor, "query k"]
) -> Bool[Tensor, "query k"]:
    last = similarity.masked_fill(~placed, torch.inf).amin(dim=1, keepdim=True)
    return similarity >= last


#: Far above the rounding of a cosine in float32, far below what separates different tokens.
ROUNDING = 1e-5

#: Floats of keys that are gathered at a time.
_PAIR_FLOATS = 2**21

#: Positions whose frames are moved at a time while the queue fills.
_GROW_POSITIONS = 64


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
        if len(self.frames) < self._capacity:
            self._grow(tokens, frame)
        elif self._capacity:
            slot = int(self.frames.argmin())
            self.keys[:, slot] = tokens
            self.frames[slot] = frame

    def _grow(self, tokens: Float32[Tensor, "position dim"], frame: int) -> None:
        n_positions, n_frames, dim = self.keys.shape
        wider = self._storage[: n_positions * (n_frames + 1) * dim].view(n_positions, n_frames + 1, dim)
        # Positions move towards the end, so the last ones go first; a copy lets a block overlap itself.
        for start in reversed(range(0, n_positions, _GROW_POSITIONS)):
            block = slice(start, start + _GROW_POSITIONS)
            wider[block, :n_frames] = self.keys[block].clone()
        wider[:, n_frames] = tokens
        self.keys = wider
        self.frames = torch.cat([self.frames, self.frames.new_tensor([frame])])


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the context, the first frame or the queue, in both precisions where the ranker wants that."""

    keys: Keys
    rough: RoughKeys | None

    @property
    def n_keys(self) -> int:
        return self.keys.shape[0] * self.keys.shape[1]

    def cut(self, positions: slice) -> _Part:
        rough = self.rough and RoughKeys(self.rough.keys[positions], self.rough.error)
        return _Part(self.keys[positions], rough)


class ContextSearch:
    """The context of one video, first frame and queue, and each next frame's neighbours in it.

    Tokens are normalised once, when they enter, and lie column by column, so that the window of a slab of
    query columns is one contiguous block. Memory does not depend on the number of frames: it is the context
    and the similarities of the slabs in work, which `memory_limit` (bytes, `labels_bytes` of labels included)
    makes narrower; only ties beyond all measure, where a protocol keeps them, take more. Raises `UsageError`
    with the least limit that works.
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
    ) -> None:
        check_candidates(grid, protocol)
        self._grid, self._protocol, self._device = grid, protocol, device
        self._shape = (grid.rows, grid.cols, dim)
        self._ranker = make_ranker(search, device)
        size = SearchSize(grid, dim, protocol, self._ranker.n_parallel, labels_bytes, self._ranker.rough)
        slab_cols = size.slab_cols(memory_limit)
        self._slabs = make_slabs(grid, protocol, device, slab_cols)
        self._first_slabs = self._slabs if protocol.mask_first else make_open_slabs(grid, slab_cols)
        self._first: _Part | None = None
        self._queue = Queue(protocol.n_context, grid, dim, device)
        n_rough = protocol.n_context if self._ranker.rough else 0
        self._rough_queue = Queue(n_rough, grid, dim, device, torch.bfloat16)
        self._rounding_error = 0.0
        self._n_seen = 0

    def step(self, tokens: Float[Tensor, "row col dim"]) -> Neighbors | None:
        """Return the neighbours of the next frame and take it into the context; None for the first frame.

        Raises `InputError` for tokens of another shape and for tokens that are not finite.
        """
        self._check(tokens)
        columns = unit_tokens(tokens.to(self._device)).transpose(0, 1).contiguous()
        if self._ranker.rough:
            error = float(rounding_error(columns, columns.bfloat16()).max())
            self._rounding_error = max(self._rounding_error, error)
        if self._first is None:
            keys = columns.flatten(0, 1)[:, None]
            self._first = self._part(keys, keys.bfloat16() if self._ranker.rough else keys)
            found = None
        else:
            found = self._neighbors(columns, self._first)
            self._queue.append(columns.flatten(0, 1), self._n_seen)
            self._rough_queue.append(columns.flatten(0, 1), self._n_seen)
        self._n_seen += 1
        return found

    def _part(self, keys: Keys, rough: Tensor) -> _Part:
        return _Part(keys, RoughKeys(rough, self._rounding_error) if self._ranker.rough else None)

    def _neighbors(self, queries: Float32[Tensor, "col row dim"], first: _Part) -> Neighbors:
        lists = [self._in_first(queries, first)]
        if len(self._queue.frames):
            lists.append(self._in_queue(queries))
        return merge_neighbors(lists, self._protocol.top_k, keep_ties=self._protocol.keep_ties)

    def _in_first(self, queries: Float32[Tensor, "col row dim"], first: _Part) -> Neighbors:
        similarity, position, slot = self._rank(queries, first, self._first_slabs)
        count = 1 + self._n_copies() * self._is_near(position).int()
        return Neighbors(slot, position, similarity, count.masked_fill(similarity.isneginf(), 0))

    def _n_copies(self) -> int:
        """Return how often the first frame stands in the queue while that is not full of later frames."""
        if not self._protocol.first_frame_copies:
            return 0
        return max(0, self._protocol.n_context + 1 - self._n_seen)

    def _in_queue(self, queries: Float32[Tensor, "col row dim"]) -> Neighbors:
        part = self._part(self._queue.keys, self._rough_queue.keys)
        similarity, position, slot = self._rank(queries, part, self._slabs)
        return Neighbors(self._queue.frames[slot], position, similarity, similarity.isfinite().int())

    def _rank(
        self, queries: Float32[Tensor, "col row dim"], part: _Part, slabs: list[Slab]
    ) -> tuple[Similarities, Int32[Tensor, "query k"], Int32[Tensor, "query k"]]:
        """Return similarity, position and slot of the nearest keys, queries and positions row by row."""
        ranked = list(self._ranker.map(partial(self._rank_slab, queries, part), slabs))
        width = max(self._protocol.top_k, *(values.shape[1] for values, _ in ranked))
        similarity = torch.cat([_widen(values, width, -torch.inf) for values, _ in ranked])
        index = torch.cat([_widen(index, width, 0) for _, index in ranked])
        n_slots = part.keys.shape[1]
        place = (self._by_rows(index) // n_slots).int()
        position = place % self._grid.rows * self._grid.cols + place // self._grid.rows
        return self._by_rows(similarity), position, (self._by_rows(index) % n_slots).int()

    def _rank_slab(
        self, queries: Float32[Tensor, "col row dim"], part: _Part, slab: Slab
    ) -> tuple[Similarities, KeyIndex]:
        window = part.cut(slab.positions)
        chosen = queries[slab.query_cols].flatten(0, 1)
        rank = self._rank_ties if self._protocol.keep_ties else self._rank_top
        values, index = rank(chosen, window, slab.blocked)
        return values, index + slab.positions.start * part.keys.shape[1]

    def _rank_top(
        self, queries: Float32[Tensor, "query dim"], window: _Part, blocked: Blocked
    ) -> tuple[Similarities, KeyIndex]:
        k = min(self._protocol.top_k, window.n_keys)
        return self._ranker.rank(queries, window.keys, blocked, k, window.rough)

    def _rank_ties(
        self, queries: Float32[Tensor, "query dim"], window: _Part, blocked: Blocked
    ) -> tuple[Similarities, KeyIndex]:
        """Return at least the top k and all that equal the last of them, with `exact_similarity`.

        More and more keys are fetched until the last one is clearly below the k-th of every query.
        """
        top_k, n_keys = self._protocol.top_k, window.n_keys
        # A still scene repeats every token in every frame of the queue.
        k = min(top_k + 1 + window.keys.shape[1], n_keys)
        values, index = self._ranker.rank(queries, window.keys, blocked, k, window.rough)
        while k < n_keys and not _are_ties_in(values, top_k):
            k = min(2 * k, n_keys)
            values, index = self._ranker.rank(queries, window.keys, blocked, k, window.rough)
        exact = exact_similarity(queries, window.keys.flatten(0, 1), index)
        return exact.masked_fill(values.isneginf(), -torch.inf), index

    def _by_rows(self, columns: Tensor) -> Tensor:
        by_cell = columns.view(self._grid.cols, self._grid.rows, -1)
        return by_cell.transpose(0, 1).flatten(0, 1)

    def _is_near(self, position: Int32[Tensor, "query k"]) -> Bool[Tensor, "query k"]:
        query = torch.arange(self._grid.n_tokens, device=self._device)[:, None]
        row = position // self._grid.cols - query // self._grid.cols
        col = position % self._grid.cols - query % self._grid.cols
        return in_window(row, col, self._protocol.window, self._protocol.radius)

    def _check(self, tokens: Tensor) -> None:
        what = f"the tokens of frame {self._n_seen}"
        if tuple(tokens.shape) != self._shape:
            wanted, found = (" x ".join(map(str, shape)) for shape in (self._shape, tokens.shape))
            raise InputError(f"{what} have another shape", wanted=wanted, found=found)
        if not torch.isfinite(tokens).all():
            raise InputError(f"{what} are not finite", wanted="numbers", found="nan or inf")


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


def exact_similarity(
    queries: Float32[Tensor, "query dim"], keys: Float32[Tensor, "key dim"], index: KeyIndex
) -> Similarities:
    """Return the dot products with the keys at `index`, equal for equal keys to the last bit.

    A matrix product adds up in an order that depends on where a key lies; here every pair is added up alike.
    """
    at_once = max(1, _PAIR_FLOATS // (index.shape[1] * keys.shape[1]))
    starts = (slice(start, start + at_once) for start in range(0, len(queries), at_once))
    return torch.cat([(queries[part, None] * keys[index[part]]).sum(dim=-1) for part in starts])


def _are_ties_in(values: Similarities, top_k: int) -> bool:
    last = values[:, -1]
    return bool((last.isneginf() | (last < values[:, top_k - 1] - ROUNDING)).all())


def _widen(part: Tensor, width: int, value: float | int) -> Tensor:
    return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)
