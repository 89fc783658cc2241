"""Grouped int8: every token as signed bytes, with one float16 scale for each 64 of its channels.

`docs/store.md` gives the stored form and what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float16, Int8, Shaped

from cosettle_cache.core.types import SCALE_CHANNELS

#: Numbers worked on at a time: they stay in the cache, and torch works on fewer than 2^15 in one
#: thread, so that a forked process, which has none of torch's other threads, never waits for them.
BLOCK_VALUES = 2**15 - 1

_LEVELS = 127
#: 127 times the next float16 is infinite in float16.
_LARGEST_SCALE = 515.5
#: Of the scales that are not zero; where it is zero, all values are.
_SMALLEST_SCALE = 2.0**-24


def stored_width(n_channels: int) -> int:
    """Return the bytes of one token: its levels, then its scales."""
    return n_channels + 2 * -(-n_channels // SCALE_CHANNELS)


def quantize(tokens: Float16[np.ndarray, "*token dim"]) -> Int8[np.ndarray, "*token stored"]:
    """Return finite tokens, each as `dim` levels and then the bytes of its little-endian float16 scales.

    A group's scale is its largest magnitude over 127. A level counts the scales, as stored, in the multiple
    nearest to the value, the even one of two. So errors are at most half a scale, and zeros stay zeros.
    """
    dim = tokens.shape[-1]
    stored = np.empty((*tokens.shape[:-1], stored_width(dim)), np.int8)
    every_stored = stored.reshape(-1, stored.shape[-1])
    halves = torch.from_numpy(_grouped(tokens.reshape(-1, dim)))
    blocks = list(_blocks(len(halves), dim))
    largest = torch.empty(halves.shape[:2], dtype=torch.int16)
    for block in blocks:
        # Without signs, the bits of float16 order as the numbers do.
        torch.amax(halves[block].abs().view(torch.int16), -1, out=largest[block])
    # All scales at once: for so few numbers as those of a block, calls would take longer than arithmetic.
    exact = largest.numpy().view(np.float16).astype(np.float32) / _LEVELS
    scales = np.minimum(exact, _LARGEST_SCALE).astype("<f2")
    # Nearest is too small only among subnormal numbers, where steps are as large as the scales.
    scales.view("<i2")[:] += exact > 1.002 * scales.astype(np.float32)
    divisors = torch.from_numpy(np.maximum(scales.astype(np.float32), _SMALLEST_SCALE))[..., None]
    for block in blocks:
        multiples = halves[block].float().div_(divisors[block]).flatten(1).numpy()
        np.rint(multiples, out=multiples)
        np.copyto(every_stored[block, :dim], multiples[:, :dim], casting="unsafe")
    every_stored[:, dim:] = scales.view(np.int8)
    return stored


def dequantize(stored: Int8[np.ndarray, "*token stored"], out: Float16[np.ndarray, "*token dim"]) -> None:
    """Fill `out`, C-contiguous, with level times scale, rounded to the nearest float16."""
    if not out.flags.c_contiguous:
        raise ValueError("tokens are made in contiguous memory only")
    dim = out.shape[-1]
    every, every_stored = out.reshape(-1, dim), stored.reshape(-1, stored.shape[-1])
    scales = torch.from_numpy(every_stored[:, dim:].copy().view("<f2").astype(np.float32))[..., None]
    for block in _blocks(len(every), dim):
        values = torch.from_numpy(_grouped(every_stored[block, :dim])) * scales[block]
        torch.from_numpy(every[block]).copy_(values.view(len(values), -1)[:, :dim])


def _grouped(rows: Shaped[np.ndarray, "token dim"]) -> Shaped[np.ndarray, "token group channel"]:
    """Return contiguous rows with an axis of groups, the last one filled up with zeros."""
    missing = -rows.shape[-1] % SCALE_CHANNELS
    rows = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return rows.reshape(len(rows), rows.shape[-1] // SCALE_CHANNELS, SCALE_CHANNELS)


def _blocks(n_tokens: int, dim: int) -> Iterator[slice]:
    at_once = max(BLOCK_VALUES // (dim + -dim % SCALE_CHANNELS), 1)
    return (slice(start, start + at_once) for start in range(0, n_tokens, at_once))
