"""Candidates by one Triton kernel: products, window and the largest of them; nothing else is written.

Opt-in (`--search triton`) until it has been measured on a GPU; importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from cosettle_cache.search.masked import KeyIndex, Similarities, Slab, Window
from cosettle_cache.search.rough import Look, RoughRanker

#: Queries and keys of one tile, and channels at a time.
_TILE = {"tile_q": 64, "tile_k": 128, "tile_d": 64}
_WINDOWS = {"none": 0, "disc": 1, "square": 2}


@triton.jit  # type: ignore[untyped-decorator]
def _best_in_frame(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, place_ptr, value_ptr, position_ptr,
    first_query, n_queries, first_key, n_keys, n_tokens, n_rows, radius, reach,
    dim: tl.constexpr, n_best: tl.constexpr, shape: tl.constexpr,
    tile_q: tl.constexpr, tile_k: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """Write the n_best largest products of a block of queries with the keys of one frame, unsorted.

    Tokens lie column by column, so what the windows of a block reach is one stretch of positions. The least
    of n_best running values is replaced as long as a tile has a larger one, which after a few tiles is rare.
    """
    row = tl.program_id(0) * tile_q + tl.arange(0, tile_q)
    asked = row < n_queries
    query = first_query + row
    start, stop = first_key, first_key + n_keys
    if shape:
        block = first_query + tl.program_id(0) * tile_q
        start = tl.maximum(start, (block // n_rows - reach) * n_rows)
        stop = tl.minimum(stop, ((block + tile_q - 1) // n_rows + reach + 1) * n_rows)
    frame_ptr = key_ptr + tl.load(place_ptr + tl.program_id(1)).to(tl.int64) * n_tokens * dim
    values = tl.full((tile_q, n_best), float("-inf"), tl.float32)
    positions = tl.zeros((tile_q, n_best), tl.int32)
    column = tl.arange(0, n_best)[None, :]
    for at in range(start, stop, tile_k):
        key = at + tl.arange(0, tile_k)
        there = key < stop
        products = tl.zeros((tile_q, tile_k), tl.float32)
        for d in range(0, dim, tile_d):
            channel = d + tl.arange(0, tile_d)
            inside = channel < dim
            a = tl.load(
                query_ptr + row[:, None] * dim + channel[None, :],
                mask=asked[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                frame_ptr + key[None, :] * dim + channel[:, None],
                mask=there[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            products = tl.dot(a, b, products)
        seen = asked[:, None] & there[None, :]
        right = tl.abs(key[None, :] // n_rows - query[:, None] // n_rows).to(tl.float32)
        down = tl.abs(key[None, :] % n_rows - query[:, None] % n_rows).to(tl.float32)
        if shape == 1:
            seen = seen & (right * right + down * down < radius * radius)
        if shape == 2:
            seen = seen & (tl.maximum(right, down) <= radius)
        products = tl.where(seen, products, float("-inf"))
        largest, least = tl.max(products, axis=1), tl.min(values, axis=1)
        while tl.max((largest > least).to(tl.int32), axis=0) > 0:
            best = tl.argmax(products, axis=1)
            replaced = (column == tl.argmin(values, axis=1)[:, None]) & (largest > least)[:, None]
            values = tl.where(replaced, largest[:, None], values)
            positions = tl.where(replaced, (at + best)[:, None], positions)
            products = tl.where(tl.arange(0, tile_k)[None, :] == best[:, None], float("-inf"), products)
            largest, least = tl.max(products, axis=1), tl.min(values, axis=1)
    out = (tl.program_id(1).to(tl.int64) * n_queries + row[:, None]) * n_best + column
    tl.store(value_ptr + out, values, mask=asked[:, None])
    tl.store(position_ptr + out, positions, mask=asked[:, None])


class TritonRanker(RoughRanker):
    """The kernel names the candidates: the best of every frame, and the best of those."""

    def __init__(self) -> None:
        super().__init__("cuda")

    def _candidates(self, look: Look, k: int) -> tuple[Similarities, KeyIndex, Float32[Tensor, " query"]]:
        n_wanted = triton.next_power_of_2(self._n_wanted(k))
        device, n_queued = look.keys.rough.device, look.n_frames * look.n_positions
        frames = look.keys.place(torch.arange(look.start, look.frame, device=device))
        parts = [(torch.zeros(1, dtype=torch.int64, device=device), look.first, n_queued)]
        if look.n_frames:
            parts.append((frames, look.slab, 0))
        products, elements = list[Tensor](), list[Tensor]()
        for places, slab, before in parts:
            values, position = self._best(look, places.int(), slab, n_wanted)
            number = torch.arange(len(places), device=device)[:, None, None] * look.n_positions
            elements.append((before + number + position - slab.positions.start).transpose(0, 1).flatten(1))
            products.append(values.transpose(0, 1).flatten(1))
        rough, index = torch.cat(products, dim=1).topk(n_wanted)
        return rough, torch.cat(elements, dim=1).gather(1, index), rough[:, -1]

    def _best(
        self, look: Look, places: Int32[Tensor, " frame"], slab: Slab, n_wanted: int
    ) -> tuple[Float32[Tensor, "frame query k"], Int64[Tensor, "frame query k"]]:
        """Return the largest products of the queries with each frame's tokens, and their positions."""
        queries, keys = look.queries(look.keys.rough), look.keys.rough
        shape = (len(places), len(queries), n_wanted)
        values = torch.empty(shape, device=keys.device)
        position = torch.empty(shape, dtype=torch.int32, device=keys.device)
        window = slab.window or Window("none", 0.0, 1)
        _best_in_frame[(triton.cdiv(len(queries), _TILE["tile_q"]), len(places))](
            *(queries, keys, places, values, position, look.slab.queries.start, len(queries)),
            *(slab.positions.start, slab.positions.stop - slab.positions.start, keys.shape[1]),
            *(window.n_rows, window.radius, int(window.radius)),
            dim=keys.shape[2], n_best=n_wanted, shape=_WINDOWS[window.shape],
            **_TILE, num_warps=8, num_stages=3,
        )  # fmt: skip
        return values, position.long()
