"""Exact nearest neighbours of a frame's tokens among the context's, inside a spatial window.

Tokens of consecutive frames come in; for every query the k most similar context tokens go out, with how often
each stands in the context. No affinity matrix of a whole frame exists at any time, and labels play no part.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from torch import Tensor

from cosettle_cache.affinity import in_window, unit_tokens, window_reach
from cosettle_cache.errors import InputError, UsageError
from cosettle_cache.types import EvalProtocol, Grid

SEARCHES = ("auto", "torch", "faiss")

#: Query columns that are ranked together: few enough that their common window stays narrow, many enough for
#: a fast matrix product (at 30x55 tokens 6 to 9 are equally fast, 3 and 14 slower).
SLAB_COLS = 7

#: Keys per matrix product on a CPU: MKL runs 1,000 to 2,000 at a time a fifth faster than 30,000 at once.
CPU_KEYS = 1024

Queries = Float32[Tensor, "query dim"]
Keys = Float32[Tensor, "position frame dim"]
Blocked = Bool[Tensor, "query position"] | None
Similarities = Float32[Tensor, "query k"]
KeyIndex = Int64[Tensor, "query k"]


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


class TorchRanker:
    """Matrix product, mask, top-k, in one scratch buffer that every call uses again."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

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

    #: Keys fetched per neighbour wanted; enough for all but a few in a thousand queries of real video.
    overfetch = 3

    def __init__(self) -> None:
        import faiss

        # FAISS 1.15 takes its slow path below 128,000 floats of queries, which a slab of a small encoder
        # stays under; 20 is what it was before. Speed is all this decides.
        faiss.cvar.distance_compute_blas_threshold = 20
        self._dense = TorchRanker()

    def rank(self, queries: Queries, keys: Keys, blocked: Blocked, k: int) -> tuple[Similarities, KeyIndex]:
        """See `TorchRanker.rank`."""
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
            again = self._dense.rank(queries[uncertain], keys, blocked[uncertain], k)
            values[uncertain], index[uncertain] = again
        return values, index


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


@dataclass(frozen=True, slots=True)
class Slab:
    """Neighbouring query columns and the key positions, column by column, that their windows reach."""

    query_cols: slice
    positions: slice
    blocked: Blocked


def make_slabs(grid: Grid, protocol: EvalProtocol, device: torch.device) -> list[Slab]:
    """Return slabs that cover every query once, with the protocol's window; a window is never empty."""
    reach = window_reach(protocol.window, protocol.radius)
    slabs = []
    for cols in _slab_cols(grid):
        keys = slice(max(cols.start - reach, 0), min(cols.stop + reach, grid.cols))
        row, col = _displacements(grid, cols, keys, device)
        blocked = ~in_window(row, col, protocol.window, protocol.radius)
        positions = slice(keys.start * grid.rows, keys.stop * grid.rows)
        slabs.append(Slab(cols, positions, blocked if blocked.any() else None))
    return slabs


def make_open_slabs(grid: Grid) -> list[Slab]:
    """Return slabs that cover every query once and reach every position."""
    return [Slab(cols, slice(0, grid.n_tokens), None) for cols in _slab_cols(grid)]


def _slab_cols(grid: Grid) -> list[slice]:
    return [slice(col, min(col + SLAB_COLS, grid.cols)) for col in range(0, grid.cols, SLAB_COLS)]


def _displacements(
    grid: Grid, queries: slice, keys: slice, device: torch.device
) -> tuple[Int[Tensor, "query position"], Int[Tensor, "query position"]]:
    query_col, query_row = _cells(grid, queries, device)
    key_col, key_row = _cells(grid, keys, device)
    return key_row - query_row[:, None], key_col - query_col[:, None]


def _cells(
    grid: Grid, cols: slice, device: torch.device
) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
    col = torch.arange(cols.start, cols.stop, device=device).repeat_interleave(grid.rows)
    row = torch.arange(grid.rows, device=device).repeat(cols.stop - cols.start)
    return col, row


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
        copies = (
            max(0, self._protocol.n_context + 1 - self._n_seen) if self._protocol.first_frame_copies else 0
        )
        count = 1 + copies * self._is_near(position).int()
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
        ranked = [self._rank_slab(queries, keys, slab) for slab in slabs]
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
