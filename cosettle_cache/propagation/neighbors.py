"""Neighbour lists: the context tokens that every query of a frame looks at, and how often each counts.

Lists of several parts of the context come in and are merged under a protocol's rules. Labels play no part, so
lists can be kept and used for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int32
from torch import Tensor


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
