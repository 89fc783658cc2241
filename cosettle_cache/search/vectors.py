"""Nearest vectors without a grid: pooled videos or frames against each other, exactly, whoever searches.

Unit vectors come in; the k with the largest dot products go out, in an order that no search decides.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.search.choose import make_ranker
from cosettle_cache.search.masked import FaissRanker, TorchRanker

#: Keys fetched beyond those wanted, so that close ones can be put in order in float64.
_SPARE_KEYS = 8
#: What float32 may err by in a dot product of unit vectors: a hundred times of what is seen at 768 channels.
_FLOAT32_ERROR = 1e-5
#: Similarities that agree to so many decimals are equal, and the earlier key comes first.
_DECIMALS = 12
#: Queries ranked, and put in order, at a time.
_QUERIES_AT_ONCE = 512
#: Products, and floats of candidates to be put in order, that are in memory at a time: fewer queries then.
_PRODUCTS, _CANDIDATE_FLOATS = 2**28, 2**25

Vectors = Float32[np.ndarray, "key dim"]


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The keys nearest to each query, nearest first, and their dot products with it."""

    index: Int64[np.ndarray, "query k"]
    similarity: Float64[np.ndarray, "query k"]


def nearest(
    queries: Float32[np.ndarray, "query dim"],
    keys: Vectors,
    k: int,
    *,
    own: Int64[np.ndarray, " query"] | None = None,
    search: str = "auto",
    device: str = "cpu",
    there: Float32[torch.Tensor, "key dim"] | None = None,
) -> Nearest:
    """Return the k keys with the largest dot products, exactly; all vectors have length one.

    `own` is each query's place among the keys, where it is left out; `there` are the keys on the device, for
    those who ask the same ones again and again. A float32 search finds candidates,
    float64 puts them in order, and a query whose last candidate comes close to its k-th is searched again
    with more: so every search gives the same answer. Among equal similarities the earlier key is nearer.
    Raises `UsageError` for a k beyond the number of keys.
    """
    n_others = len(keys) - (own is not None)
    if not 1 <= k <= n_others:
        raise UsageError(f"there are {n_others} other vectors", wanted=f"1 to {n_others} neighbours", found=k)
    left_out = np.full(len(queries), -1, np.int64) if own is None else own
    if search == "bf16":
        raise UsageError("bf16 ranks tokens, not vectors", wanted="auto, faiss or torch", found=search)
    place = torch.device(device)
    if search == "auto":
        on_gpu = place.type != "cpu"
        search = "torch" if on_gpu or importlib.util.find_spec("faiss") is None else "faiss"
    make_ranker(search, place)  # refuses what cannot run here
    ranker = FaissRanker() if search == "faiss" else TorchRanker()
    among = (torch.from_numpy(keys).to(place) if there is None else there)[:, None]
    found = Nearest(np.empty((len(queries), k), np.int64), np.empty((len(queries), k)))
    todo, n_fetched = np.arange(len(queries)), min(k + 1 + _SPARE_KEYS, len(keys))
    while len(todo):
        certain = np.zeros(len(todo), bool)
        fitting = min(_PRODUCTS // len(keys), _CANDIDATE_FLOATS // (n_fetched * keys.shape[1]))
        at_once = max(1, min(_QUERIES_AT_ONCE, fitting))
        for start in range(0, len(todo), at_once):
            part = slice(start, start + at_once)
            rows = todo[part]
            asked = torch.from_numpy(queries[rows]).to(place)
            with exact_float32(place.type):
                values, index = ranker.rank(asked, among, None, n_fetched)
            candidates = (values.cpu().numpy(), index.cpu().numpy())
            ordered, certain[part] = _in_order(candidates, queries[rows], keys, left_out[rows], k)
            found.index[rows], found.similarity[rows] = ordered.index, ordered.similarity
        todo, n_fetched = todo[~certain], min(4 * n_fetched, len(keys))
    return found


def _in_order(
    candidates: tuple[Float32[np.ndarray, "query fetched"], Int64[np.ndarray, "query fetched"]],
    queries: Float32[np.ndarray, "query dim"],
    keys: Vectors,
    own: Int64[np.ndarray, " query"],
    k: int,
) -> tuple[Nearest, np.ndarray]:
    """Return the k nearest candidates by their float64 similarity, and for which queries they are certain."""
    fetched, index = candidates
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), keys[index].astype(np.float64))
    exact = np.where(index == own[:, None], -np.inf, exact.round(_DECIMALS))
    order = np.lexsort((index, -exact), axis=-1)[:, :k]
    chosen = Nearest(np.take_along_axis(index, order, 1), np.take_along_axis(exact, order, 1))
    # Whatever was not fetched is at most as similar as the last that was.
    whole = index.shape[1] == len(keys)
    certain = chosen.similarity[:, -1] > fetched.min(1) + _FLOAT32_ERROR
    return chosen, certain | whole
