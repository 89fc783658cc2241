"""The context of a video: first frame and queue, and the neighbours that each next frame has in it.

Tokens of consecutive frames come in; for every query its most similar context tokens go out, with how often
each stands in the context. Labels play no part, and what is kept does not grow with the number of frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor
from torch.nn.functional import pad

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.search.choose import make_ranker
from cosettle_cache.search.masked import (
    KeyRanker,
    Keys,
    Queries,
    SearchSize,
    Similarities,
    Slab,
    exact_products,
    in_window,
    limit_on,
    make_slabs,
    unit_tokens,
)
from cosettle_cache.search.rough import Found, FrameKeys, Look, RoughRanker

#: Far above the rounding of a cosine in float32, far below what separates different tokens.
_ROUNDING = 1e-5
#: Frames that a GPU works on before the host waits for what they came to, and writes it: a clip, mostly.
FRAMES_AT_ONCE = 128
#: Positions whose frames are moved at a time while the queue fills.
_GROW_POSITIONS = 64

#: Unit tokens of a frame, column by column.
Columns = Float32[Tensor, "position dim"]


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


def _best(found: Neighbors, top_k: int, *, keep_ties: bool) -> Neighbors:
    """Return the most similar neighbours first: `top_k` places, the last one's copies beyond them cut.

    With `keep_ties` nothing is cut, and whatever is as similar as the neighbour on the last place stays too;
    then the lists are as wide as the longest, or on a GPU, which the host does not wait for, as they were.
    """
    similarity, order = found.similarity.sort(dim=1, descending=True, stable=True)
    frame, position, count = (part.gather(1, order) for part in (found.frame, found.position, found.count))
    places_left = (top_k - (count.cumsum(dim=1) - count)).clamp(min=0)
    if keep_ties:
        last = similarity.masked_fill(places_left == 0, torch.inf).amin(dim=1, keepdim=True)
        count = count.masked_fill(similarity < last, 0)
        on_cpu = count.device.type == "cpu"
        width = max(top_k, int((count > 0).sum(dim=1).max())) if on_cpu else count.shape[1]
    else:
        count, width = torch.minimum(count, places_left).int(), top_k
    similarity = similarity.masked_fill(count == 0, -torch.inf)
    return Neighbors(*(item[:, :width].contiguous() for item in (frame, position, similarity, count)))


class Queue:
    """The last `capacity` frames after the first: `keys[position, slot]` is a token of frame `frames[slot]`.

    While it fills, each frame's arrival lays the keys out anew in the same storage, so that a position's
    frames stay side by side without empty places between them; later frames replace the oldest.
    """

    def __init__(self, capacity: int, grid: Grid, dim: int, device: torch.device) -> None:
        self._capacity = capacity
        self._storage = torch.empty(capacity * grid.n_tokens * dim, device=device)
        self.keys: Float32[Tensor, "position slot dim"] = self._storage[:0].view(grid.n_tokens, 0, dim)
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
    with the least limit that works.

    `n_at_once` is the most frames that `steps` may be given. On a GPU, for which the host waits once per
    call, it is lowered to what fits, on the card too; on a CPU it is one.
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
        n_at_once: int = 1,
    ) -> None:
        check_candidates(grid, protocol)
        self._grid, self._protocol, self._device = grid, protocol, device
        self._shape = (grid.rows, grid.cols, dim)
        ranker = make_ranker(search, device)
        size = SearchSize(grid, dim, protocol, ranker.n_parallel, labels_bytes, ranker.dtype)
        limit = limit_on(device, memory_limit)
        self.n_at_once = 1 if device.type == "cpu" else size.n_at_once(limit, n_at_once)
        slab_cols = size.slab_cols(limit)
        slabs = make_slabs(grid, protocol, device, slab_cols)
        first_slabs = slabs if protocol.mask_first else make_slabs(grid, None, device, slab_cols)
        windows = list(zip(slabs, first_slabs, strict=True))
        self._context: _RoughContext | _KeyContext
        if isinstance(ranker, RoughRanker):
            n_kept = protocol.n_context + self.n_at_once
            keys = FrameKeys(n_kept, grid.n_tokens, dim, device, ranker.dtype)
            self._context = _RoughContext(protocol, windows, ranker, keys)
        else:
            assert isinstance(ranker, KeyRanker)
            self._context = _KeyContext(
                protocol, windows, ranker, Queue(protocol.n_context, grid, dim, device)
            )
        self._n_seen = 0

    def step(self, tokens: Float[Tensor, "row col dim"]) -> Neighbors | None:
        """Return the neighbours of the next frame and take it into the context; None for the first frame.

        Raises `InputError` for tokens of another shape and for tokens that are not finite.
        """
        return next(self.steps([tokens]))

    def steps(self, frames: Iterable[Float[Tensor, "row col dim"]]) -> Iterator[Neighbors | None]:
        """Yield for each of the next frames, at most `n_at_once`, what `step` returns."""
        first, are_finite, found = self._n_seen, list[Tensor](), list[list[Found]]()
        with exact_float32(self._device.type):
            for tokens in frames:
                there = upload(tokens, self._device)
                are_finite.append(self._is_finite(there))
                columns = unit_tokens(there).transpose(0, 1).flatten(0, 1)
                found.append(self._context.take(columns, self._n_seen))
                self._n_seen += 1
            certain = [slab.certain for of_frame in found for slab in of_frame]
            if self._device.type == "cuda":
                # What the host waits for.
                told = torch.cat([torch.stack(are_finite), *certain]).cpu()
                finite, *certain = torch.split(told, [len(are_finite), *map(len, certain)])
                if not finite.all():
                    raise _not_finite(first + int((~finite).nonzero()[0]))
        is_certain = iter(certain)
        for frame, of_frame in enumerate(found, start=first):
            sure = list(islice(is_certain, len(of_frame)))
            with exact_float32(self._device.type):
                right = self._context.correct(of_frame, sure, frame)
                neighbors = self._neighbors(right, frame) if frame else None
            yield neighbors

    def _is_finite(self, tokens: Float[Tensor, "row col dim"]) -> Bool[Tensor, ""]:
        """Say whether tokens are finite; raise `InputError` for another shape and, on a CPU, if not."""
        if tuple(tokens.shape) != self._shape:
            wanted, found = (" x ".join(map(str, shape)) for shape in (self._shape, tokens.shape))
            raise InputError(
                f"the tokens of frame {self._n_seen} have another shape", wanted=wanted, found=found
            )
        finite = torch.isfinite(tokens).all()
        if self._device.type == "cpu" and not finite:
            raise _not_finite(self._n_seen)
        return finite

    def _neighbors(self, found: Sequence[Found], frame: int) -> Neighbors:
        """Return what the slabs of a frame found, queries and positions row by row."""
        width = max(self._protocol.top_k, *(slab.similarity.shape[1] for slab in found))
        rows, cols = self._grid.rows, self._grid.cols
        similarity, of_frame, place = (
            torch.cat([pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
            .view(cols, rows, -1)
            .transpose(0, 1)
            .flatten(0, 1)
            for parts, fill in zip(
                ([slab[i] for slab in found] for i in range(3)), (-torch.inf, 0, 0), strict=True
            )
        )
        position = (place % rows * cols + place // rows).int()
        # The first frame also stands in the queue while that is not full of later frames.
        n_copies = max(0, self._protocol.n_context + 1 - frame) if self._protocol.first_frame_copies else 0
        query = torch.arange(self._grid.n_tokens, device=self._device)[:, None]
        row, col = position // cols - query // cols, position % cols - query % cols
        protocol = self._protocol
        near = in_window(row, col, protocol.window, protocol.radius, protocol.rim) & (of_frame == 0)
        count = (1 + n_copies * near.int()).masked_fill(similarity.isneginf(), 0).int()
        neighbors = Neighbors(of_frame.int(), position, similarity, count)
        return _best(neighbors, self._protocol.top_k, keep_ties=self._protocol.keep_ties)


class _RoughContext:
    """First frame and queue in exact and in rough tokens, and what `RoughRanker` finds in them."""

    def __init__(
        self,
        protocol: EvalProtocol,
        windows: Sequence[tuple[Slab, Slab]],
        ranker: RoughRanker,
        keys: FrameKeys,
    ) -> None:
        self._protocol, self._windows, self._ranker, self._keys = protocol, windows, ranker, keys
        # A still scene repeats every token in every frame.
        self._k = protocol.top_k + (2 + protocol.n_context if protocol.keep_ties else 0)

    def take(self, columns: Columns, frame: int) -> list[Found]:
        """Take the next frame into the context and return what its slabs find; nothing for the first.

        On a GPU some queries may be uncertain, and `correct` is to be called before frames are overwritten.
        """
        self._keys.put(columns, frame)
        return list(self._ranker.map(partial(self._find, frame), self._windows)) if frame else []

    def correct(self, found: list[Found], certain: Sequence[Tensor], frame: int) -> list[Found]:
        """Return what the slabs of a frame found, all of it certain; `certain` is that on the host."""
        if all(flags.all() for flags in certain):
            return found
        rows = [upload((~flags).nonzero()[:, 0], self._keys.exact.device) for flags in certain]
        looks = [self._look(frame, window) for window in self._windows]
        return [
            self._correct(*parts) if len(parts[2]) else parts[1]
            for parts in zip(looks, found, rows, strict=True)
        ]

    def _look(self, frame: int, window: tuple[Slab, Slab]) -> Look:
        return Look(self._keys, frame, max(1, frame - self._protocol.n_context), *window)

    def _find(self, frame: int, window: tuple[Slab, Slab]) -> Found:
        look = self._look(frame, window)
        if look.keys.exact.device.type == "cpu":
            found = self._ranker.find(look, self._k)
            open_rows = (~self._are_ties_in(look, found)).nonzero()[:, 0]
            return self._correct(look, found, open_rows) if len(open_rows) else self._alike(look, found)
        found = self._ranker.name(look, self._k)
        certain = found.certain & self._are_ties_in(look, found)
        return self._alike(look, found._replace(certain=certain))

    def _correct(self, look: Look, found: Found, rows: Int64[Tensor, " query"]) -> Found:
        """Look queries `rows` up by exact products; with `keep_ties` more and more until all ties are in."""
        while True:
            k = found.similarity.shape[1]
            self._ranker.correct(look, k, found, rows)
            if not self._protocol.keep_ties:
                return found
            rows = rows[~self._are_ties_in(look, found)[rows]]
            if not len(rows):
                return self._alike(look, found)
            more = (0, min(k, look.n_elements - k))
            found = Found(
                pad(found.similarity, more, value=-torch.inf),
                pad(found.frame, more),
                pad(found.position, more),
                found.certain,
            )

    def _are_ties_in(self, look: Look, found: Found) -> Bool[Tensor, " query"]:
        """Say for which queries whatever may be as similar as the last neighbour was found."""
        values = found.similarity
        if not self._protocol.keep_ties or values.shape[1] == look.n_elements:
            return torch.ones_like(found.certain)
        return _are_ties_in(values, self._protocol.top_k)

    def _alike(self, look: Look, found: Found) -> Found:
        """Where ties are kept, give equal tokens equal similarities, to the last bit."""
        if not self._protocol.keep_ties:
            return found
        exact = look.keys.products(look.queries(look.keys.exact), found.frame, found.position, alike=True)
        return found._replace(similarity=exact.masked_fill(found.similarity.isneginf(), -torch.inf))


class _KeyContext:
    """First frame and queue for `KeyRanker`, and what it finds in them; on a CPU."""

    def __init__(
        self, protocol: EvalProtocol, windows: Sequence[tuple[Slab, Slab]], ranker: KeyRanker, queue: Queue
    ) -> None:
        self._protocol, self._windows, self._ranker, self._queue = protocol, windows, ranker, queue
        self._first: Keys | None = None

    def take(self, columns: Columns, frame: int) -> list[Found]:
        """Take the next frame into the context and return what its slabs find; nothing for the first."""
        if self._first is None:
            self._first = columns[:, None]
            return []
        found = list(self._ranker.map(partial(self._find, columns, self._first), self._windows))
        self._queue.append(columns, frame)
        return found

    def correct(self, found: list[Found], certain: Sequence[Tensor], frame: int) -> list[Found]:
        """Return what was found: it is certain."""
        return found

    def _find(self, columns: Columns, first: Keys, window: tuple[Slab, Slab]) -> Found:
        queries, numbers = columns[window[0].queries], self._queue.frames
        contexts = [(first, numbers.new_zeros(1), window[1])]
        if len(numbers):
            contexts.append((self._queue.keys, numbers, window[0]))
        parts = [self._rank(queries, *context) for context in contexts]
        similarity, frame, position = (torch.cat(items, dim=1) for items in zip(*parts, strict=True))
        return Found(similarity, frame, position, torch.ones(len(queries), dtype=torch.bool))

    def _rank(
        self, queries: Queries, keys: Keys, numbers: Int32[Tensor, " slot"], slab: Slab
    ) -> tuple[Similarities, Int64[Tensor, "query k"], Int64[Tensor, "query k"]]:
        """Return the top k keys of a slab's queries; with `keep_ties` also all that equal the last of them.

        For those more and more keys are fetched until the last one is clearly below the k-th of every query.
        """
        window = keys[slab.positions]
        n_slots, n_keys = window.shape[1], window.shape[0] * window.shape[1]
        top_k, keep_ties = self._protocol.top_k, self._protocol.keep_ties
        # A still scene repeats every token in every frame of the queue.
        k = min(top_k + 1 + n_slots if keep_ties else top_k, n_keys)
        values, index = self._ranker.rank(queries, window, slab.blocked, k)
        if keep_ties:
            while k < n_keys and not _are_ties_in(values, top_k).all():
                k = min(2 * k, n_keys)
                values, index = self._ranker.rank(queries, window, slab.blocked, k)
            exact = exact_products(queries, window.flatten(0, 1), index, alike=True)
            values = exact.masked_fill(values.isneginf(), -torch.inf)
        return values, numbers[index % n_slots].long(), slab.positions.start + index // n_slots


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


def _are_ties_in(values: Similarities, top_k: int) -> Bool[Tensor, " query"]:
    last = values[:, -1]
    return last.isneginf() | (last < values[:, top_k - 1] - _ROUNDING)
