"""The context of a video: first frame and queue, and the neighbours that each next frame has in it.

Tokens of consecutive frames come in; for every query the k most similar context tokens go out, with how often
each stands in the context. Labels play no part, so neighbours can be kept and used for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from cosettle_cache.affinity import in_window, unit_tokens
from cosettle_cache.errors import InputError
from cosettle_cache.search import KeyIndex, Keys, Similarities, Slab, make_open_slabs, make_ranker, make_slabs
from cosettle_cache.types import EvalProtocol, Grid


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The context tokens that each query of one frame looks at, most similar first.

    Queries and positions count row by row over the grid; `frame` counts from the video's first frame.
    `count` says how often the neighbour stands in the context (PROTOCOLS 1.2.4): counts add up to top_k where
    there are that many candidates, and entries beyond that have count 0.
    """

    frame: Int32[Tensor, "query k"]
    position: Int32[Tensor, "query k"]
    similarity: Similarities
    count: Int32[Tensor, "query k"]


class Queue:
    """The last `capacity` frames after the first: `keys[position, slot]` is a token of frame `frames[slot]`.

    While it fills, each frame's arrival lays the keys out anew, so that a position's frames stay side by side
    without empty places between them; later frames replace the oldest.
    """

    def __init__(self, capacity: int, grid: Grid, dim: int, device: torch.device) -> None:
        self._capacity = capacity
        self._storage = torch.empty(capacity * grid.n_tokens * dim, device=device)
        self._spare = torch.empty_like(self._storage)
        self.keys: Keys = self._storage[:0].view(grid.n_tokens, 0, dim)
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
        grown = self._spare[: n_positions * (n_frames + 1) * dim].view(n_positions, n_frames + 1, dim)
        grown[:, :n_frames] = self.keys
        grown[:, n_frames] = tokens
        self.keys = grown
        self.frames = torch.cat([self.frames, self.frames.new_tensor([frame])])
        self._storage, self._spare = self._spare, self._storage
        if n_frames + 1 == self._capacity:
            self._spare = torch.empty(0)


class ContextSearch:
    """The context of one video, first frame and queue, and each next frame's neighbours in it.

    Tokens are normalised once, when they enter, and lie column by column, so that the window of a slab of
    query columns is one contiguous block. Memory does not depend on the number of frames: it is the context,
    a spare queue while that fills, and one slab of similarities.
    """

    def __init__(
        self, grid: Grid, dim: int, protocol: EvalProtocol, *, device: torch.device, search: str = "auto"
    ) -> None:
        self._grid, self._protocol, self._device = grid, protocol, device
        self._shape = (grid.rows, grid.cols, dim)
        self._ranker = make_ranker(search, device)
        self._slabs = make_slabs(grid, protocol, device)
        self._first_slabs = self._slabs if protocol.mask_first else make_open_slabs(grid)
        self._first: Keys | None = None
        self._queue = Queue(protocol.n_context, grid, dim, device)
        self._n_seen = 0

    def step(self, tokens: Float[Tensor, "row col dim"]) -> Neighbors | None:
        """Return the neighbours of the next frame and take it into the context; None for the first frame.

        Raises `InputError` for tokens of another shape and for tokens that are not finite.
        """
        self._check(tokens)
        columns = unit_tokens(tokens.to(self._device)).transpose(0, 1).contiguous()
        if self._first is None:
            self._first = columns.flatten(0, 1)[:, None]
            found = None
        else:
            found = self._neighbors(columns, self._first)
            self._queue.append(columns.flatten(0, 1), self._n_seen)
        self._n_seen += 1
        return found

    def _neighbors(self, queries: Float32[Tensor, "col row dim"], first: Keys) -> Neighbors:
        lists = [self._in_first(queries, first)]
        if len(self._queue.frames):
            lists.append(self._in_queue(queries))
        return _merge(lists, self._protocol.top_k)

    def _in_first(self, queries: Float32[Tensor, "col row dim"], first: Keys) -> Neighbors:
        similarity, position, slot = self._rank(queries, first, self._first_slabs)
        count = 1 + self._n_copies() * self._is_near(position).int()
        return Neighbors(slot, position, similarity, count.masked_fill(similarity.isneginf(), 0))

    def _n_copies(self) -> int:
        """Return how often the first frame stands in the queue while that is not full of later frames."""
        if not self._protocol.first_frame_copies:
            return 0
        return max(0, self._protocol.n_context + 1 - self._n_seen)

    def _in_queue(self, queries: Float32[Tensor, "col row dim"]) -> Neighbors:
        similarity, position, slot = self._rank(queries, self._queue.keys, self._slabs)
        return Neighbors(self._queue.frames[slot], position, similarity, similarity.isfinite().int())

    def _rank(
        self, queries: Float32[Tensor, "col row dim"], keys: Keys, slabs: list[Slab]
    ) -> tuple[Similarities, Int32[Tensor, "query k"], Int32[Tensor, "query k"]]:
        """Return similarity, position and slot of the nearest keys, queries and positions row by row."""
        ranked = list(self._ranker.map(partial(self._rank_slab, queries, keys), slabs))
        similarity = self._by_rows(torch.cat([values for values, _ in ranked]))
        index = self._by_rows(torch.cat([index for _, index in ranked]))
        place = (index // keys.shape[1]).int()
        position = place % self._grid.rows * self._grid.cols + place // self._grid.rows
        return similarity, position, (index % keys.shape[1]).int()

    def _rank_slab(
        self, queries: Float32[Tensor, "col row dim"], keys: Keys, slab: Slab
    ) -> tuple[Similarities, KeyIndex]:
        window = keys[slab.positions]
        k, n_keys = self._protocol.top_k, window.shape[0] * window.shape[1]
        chosen = queries[slab.query_cols].flatten(0, 1)
        values, index = self._ranker.rank(chosen, window, slab.blocked, min(k, n_keys))
        missing = (0, k - values.shape[1])
        values = torch.nn.functional.pad(values, missing, value=-torch.inf)
        return values, torch.nn.functional.pad(index + slab.positions.start * keys.shape[1], missing)

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


def _merge(lists: list[Neighbors], k: int) -> Neighbors:
    """Return the k most similar of several lists; counts beyond k places are cut."""
    similarity = torch.cat([item.similarity for item in lists], dim=1)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    order = order[:, :k]
    frame, position, count = (
        torch.cat([getattr(item, name) for item in lists], dim=1).gather(1, order)
        for name in ("frame", "position", "count")
    )
    places_left = (k - (count.cumsum(dim=1) - count)).clamp(min=0)
    return Neighbors(frame, position, similarity[:, :k], torch.minimum(count, places_left).int())
