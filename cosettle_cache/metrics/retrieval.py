"""Retrieval among labelled vectors: each one queries all the others, those of its own class are relevant.

Unit vectors and class numbers come in, the average precision of every query goes out. Average precision needs
the whole ranking, which is made block by block from similarities and sorted as integers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

#: Rows of the similarity matrix in memory at a time.
_BLOCK = 256
#: Similarities are compared in steps of 2**-30. Mean tokens of any two videos are much alike (cosines of 0.9
#: and more), so that the error of float32 would decide who comes first; hence float64.
_STEPS = 2**30
#: Bits of a sort key that hold the place of the vector.
_PLACE_BITS = 32

Vectors = Float32[np.ndarray, "video dim"]
Classes = Int64[np.ndarray, " video"]


def average_precisions(vectors: Vectors, classes: Classes) -> Float64[np.ndarray, " video"]:
    """Return the average precision of every video as a query among all others; NaN where its class is alone.

    It is the mean, over the other videos of the class, of the share of that class among those ranked at least
    as high. Unit vectors are ranked by cosine; of two equally near, to 2**-30, the earlier one comes first.
    """
    starts = range(0, len(vectors), _BLOCK)
    keys = torch.from_numpy(vectors).double()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        blocks = pool.map(lambda start: _block(keys, classes, start), starts)
        return np.concatenate([np.empty(0), *blocks])


def _block(
    keys: Float64[torch.Tensor, "video dim"], classes: Classes, start: int
) -> Float64[np.ndarray, " query"]:
    queries = keys[start : start + _BLOCK]
    ranked = _ranking((queries @ keys.T).numpy(), start)
    relevant = classes[ranked] == classes[start : start + len(queries), None]
    row, rank = np.nonzero(relevant)
    counts = np.bincount(row, minlength=len(queries))
    # Relevant videos are found row by row, so their number within the row says how many came before.
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    sums = np.bincount(row, (number + 1) / (rank + 1), minlength=len(queries))
    shares: Float64[np.ndarray, " query"] = np.full(len(queries), np.nan)
    np.divide(sums, counts, out=shares, where=counts > 0)
    return shares


def _ranking(similarity: Float64[np.ndarray, "query video"], start: int) -> Int64[np.ndarray, "query other"]:
    """Return the videos by falling similarity, the query itself (`start` and on) left out.

    A key holds the similarity in its upper bits and the place in its lower ones: sorting plain integers is
    ten times faster than a stable sort of numbers with their places, and knows no ties.
    """
    similarity *= -_STEPS
    steps = np.rint(similarity, out=similarity).astype(np.int64)
    steps[np.arange(len(steps)), start + np.arange(len(steps))] = -2 * _STEPS + 1
    steps <<= _PLACE_BITS
    steps |= np.arange(steps.shape[1])
    steps.sort(axis=1)
    steps &= 2**_PLACE_BITS - 1
    others: Int64[np.ndarray, "query other"] = steps[:, 1:]
    return others
