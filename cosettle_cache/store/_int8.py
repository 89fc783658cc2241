"""Grouped int8: every token as signed bytes, with one float16 scale for each 64 of its channels.

Float16 tokens come in and int8 arrays go out, and back again; nothing is read or written. `docs/store.md`
gives the stored form and what it costs.

NumPy casts between float16 and float32 one number at a time. Where values allow it, float16 is taken apart
and put together as integers instead, a block at a time: the numbers are the same, in half the time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float16, Float32, Int8, Int16

from cosettle_cache.core.types import SCALE_CHANNELS

#: Channels that share a scale; the last group of a token may have fewer.
GROUP_CHANNELS = SCALE_CHANNELS

#: Numbers worked on at a time: what lies between two steps stays in the cache, and steps outlast their calls.
BLOCK_VALUES = 1 << 18

_LEVELS = 127
#: 127 times the next float16 is infinite in float16.
_LARGEST_SCALE = 515.5
#: From here up, a float16 below the smallest normal one is at most half a scale, and counts as zero.
_SMALLEST_EASY_SCALE = 2.0**-13

#: Exponent and mantissa of a float16, shifted into a float32's places, make the number times 2^-112.
_MANTISSA_SHIFT = 13
_DOWN = np.float32(2.0**-112)
_SIGN = 0x8000

Halves = Float16[np.ndarray, "token group channel"]
Singles = Float32[np.ndarray, "token group channel"]
Levels = Int8[np.ndarray, "token group channel"]
Scales = Float16[np.ndarray, "token group"]


class _Scratch(threading.local):
    """Memory of one thread for one block: fresh pages would cost more than the arithmetic in them."""

    def __init__(self) -> None:
        self._kept = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def take(self, number: int, shape: tuple[int, ...], dtype: type[np.number]) -> np.ndarray:
        """Return memory `number`, 0 or 1, in this shape; the one who takes it next gets the same."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self._kept[number].size < n_bytes:
            self._kept[number] = np.empty(n_bytes, np.uint8)
        return self._kept[number][:n_bytes].view(dtype).reshape(shape)


_scratch = _Scratch()


def stored_width(n_channels: int) -> int:
    """Return the bytes of one token: its levels, then its scales."""
    return n_channels + 2 * _n_groups(n_channels)


def quantize(tokens: Float16[np.ndarray, "*token dim"]) -> Int8[np.ndarray, "*token stored"]:
    """Return finite tokens, each as `dim` levels and then the bytes of its little-endian float16 scales.

    A group's scale is its largest magnitude over 127. A level counts the scales, as stored, in the multiple
    nearest to the value, the even one of two. So errors are at most half a scale, and zeros stay zeros.
    """
    dim = tokens.shape[-1]
    stored = np.empty((*tokens.shape[:-1], stored_width(dim)), np.int8)
    every, every_stored = tokens.reshape(-1, dim), stored.reshape(-1, stored.shape[-1])
    for block in _blocks(len(every), dim):
        scales = np.empty((len(every[block]), _n_groups(dim)), "<f2")
        for channels, groups in _parts(dim):
            values, levels = (_grouped(side[block, channels]) for side in (every, every_stored))
            scales[:, groups] = _fill_levels(values, levels)
        every_stored[block, dim:] = scales.view(np.int8)
    return stored


def dequantize(stored: Int8[np.ndarray, "*token stored"], out: Float16[np.ndarray, "*token dim"]) -> None:
    """Fill `out`, C-contiguous, with level times scale, rounded to float16 as NumPy rounds."""
    if not out.flags.c_contiguous:
        raise ValueError("tokens are made in contiguous memory only")
    dim = out.shape[-1]
    every, every_stored = out.reshape(-1, dim), stored.reshape(-1, stored.shape[-1])
    for block in _blocks(len(every), dim):
        scales = np.ascontiguousarray(every_stored[block, dim:]).view("<f2")
        for channels, groups in _parts(dim):
            values, levels = (_grouped(side[block, channels]) for side in (every, every_stored))
            _fill_values(levels, scales[:, groups], values)


def _n_groups(n_channels: int) -> int:
    return -(-n_channels // GROUP_CHANNELS)


def _blocks(n_tokens: int, dim: int) -> Iterator[slice]:
    at_once = max(BLOCK_VALUES // dim, 1)
    return (slice(start, start + at_once) for start in range(0, n_tokens, at_once))


def _parts(dim: int) -> Iterator[tuple[slice, slice]]:
    """Yield channels and their groups: all whole groups, then the narrower last one if there is one."""
    n_whole = dim // GROUP_CHANNELS
    whole = n_whole * GROUP_CHANNELS
    if n_whole:
        yield slice(0, whole), slice(0, n_whole)
    if whole < dim:
        yield slice(whole, dim), slice(n_whole, n_whole + 1)


def _grouped(rows: np.ndarray) -> np.ndarray:
    """Return a view with an axis of groups; narrower rows are one group."""
    n_tokens, n_channels = rows.shape
    return rows.reshape(n_tokens, -1, min(GROUP_CHANNELS, n_channels))


def _fill_levels(values: Halves, levels: Levels) -> Scales:
    """Fill `levels` and return the scales they count."""
    scales = _make_scales(_magnitudes(values).max(axis=-1).view(np.float16))
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)[..., None]
    singles = _scratch.take(0, values.shape, np.float32)
    if _is_easy(scales):
        _scale_down(values, singles)
        divisors *= _DOWN
    else:
        np.copyto(singles, values)
    singles /= divisors
    np.rint(singles, out=singles)
    np.copyto(levels, singles, casting="unsafe")
    return scales


def _fill_values(levels: Levels, scales: Scales, values: Halves) -> None:
    factors = scales.astype(np.float32)[..., None]
    products = _scratch.take(0, values.shape, np.float32)
    np.copyto(products, levels)
    if _is_easy(scales):
        products *= factors * _DOWN
        _round_scaled_down(products, levels, values)
    else:
        products *= factors
        np.copyto(values, products, casting="same_kind")


def _make_scales(largest: Scales) -> Scales:
    """Return the float16 nearest to a 127th, or the next where that would leave a value above level 127."""
    exact = largest.astype(np.float32) / np.float32(_LEVELS)
    scales: Scales = np.minimum(exact, np.float32(_LARGEST_SCALE)).astype(np.float16)
    # Nearest is too small only among subnormal numbers, where steps are as large as the scales.
    too_small = exact > 1.002 * scales.astype(np.float32)
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    return scales


def _is_easy(scales: Scales) -> bool:
    """Say whether no number that matters, before or after, is subnormal or infinite in float16."""
    inside = (scales >= _SMALLEST_EASY_SCALE) & (scales <= _LARGEST_SCALE)
    return bool((inside | (scales == 0)).all())


def _magnitudes(values: Halves) -> Int16[np.ndarray, "token group channel"]:
    """Return float16 without signs, as integers: they order as the numbers do."""
    magnitudes = _scratch.take(1, values.shape, np.int16)
    np.bitwise_and(values.view(np.int16), _SIGN - 1, out=magnitudes)
    return magnitudes


def _scale_down(values: Halves, singles: Singles) -> None:
    """Fill `singles` with values times 2^-112, exactly."""
    bits = singles.view(np.int32)
    np.copyto(bits, values.view(np.int16))
    bits <<= _MANTISSA_SHIFT
    # The sign was extended over the exponent's upper bits.
    bits &= ~0x70000000


def _round_scaled_down(products: Singles, levels: Levels, values: Halves) -> None:
    """Fill `values` with products times 2^112, to the nearest float16, to even where two are as near."""
    bits, halves = products.view(np.uint32), values.view(np.uint16)
    odd = np.right_shift(bits, _MANTISSA_SHIFT, out=_scratch.take(1, bits.shape, np.uint32))
    odd &= 1
    bits += odd
    bits += (1 << (_MANTISSA_SHIFT - 1)) - 1
    bits >>= _MANTISSA_SHIFT
    # A negative level's upper byte is its sign bit eight times; the product's own is shifted out of reach.
    np.copyto(halves.view(np.int16), levels)
    halves &= _SIGN
    np.bitwise_or(halves, bits, out=halves, casting="unsafe")
