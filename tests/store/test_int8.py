"""Grouped int8: errors stay below half a scale, and the fast way gives what plain arithmetic gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cosettle_cache.core.types import SCALE_CHANNELS, ArrayLayout, Grid
from cosettle_cache.store._int8 import (
    BLOCK_VALUES,
    dequantize,
    quantize,
    stored_width,
)

LARGEST = float(np.finfo(np.float16).max)
TINIEST = float(np.finfo(np.float16).smallest_subnormal)


@st.composite
def tokens(draw: st.DrawFn) -> np.ndarray:
    """Tokens of any width whose groups differ in size by any factor that float16 knows."""
    n_tokens, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3 * SCALE_CHANNELS))
    values = draw(arrays(np.float16, (n_tokens, dim), elements=st.floats(-1, 1, width=16)))
    sizes = st.sampled_from([0.0, TINIEST, 1e-6, 2.0**-14, 2.0**-13, 127 * 2.0**-13, 1.0, 300.0, LARGEST])
    factors = draw(arrays(np.float64, (n_tokens, n_groups(dim)), elements=sizes))
    return (values * spread(factors, dim)).astype(np.float16)


def n_groups(dim: int) -> int:
    return -(-dim // SCALE_CHANNELS)


def spread(per_group: np.ndarray, dim: int) -> np.ndarray:
    return per_group.repeat(SCALE_CHANNELS, axis=-1)[..., :dim]


def scales_of(stored: np.ndarray, dim: int) -> np.ndarray:
    return np.ascontiguousarray(stored[..., dim:]).view("<f2")


def restored(stored: np.ndarray, dim: int) -> np.ndarray:
    out = np.full((*stored.shape[:-1], dim), np.nan, np.float16)
    dequantize(stored, out)
    return out


def plain_levels(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the nearest multiples in float64, in which every quotient is as good as exact."""
    divisors = spread(np.where(scales == 0, 1, scales), values.shape[-1]).astype(np.float64)
    return np.rint(values / divisors)


def plain_values(stored: np.ndarray, dim: int) -> np.ndarray:
    return (stored[..., :dim] * spread(scales_of(stored, dim).astype(np.float64), dim)).astype(np.float16)


@given(tokens())
@example(np.full((1, 1), LARGEST, np.float16))
@example(np.full((1, 1), -TINIEST, np.float16))
@example(np.array([[178, -3, 127, 64]], np.float16) * np.float16(TINIEST))
def test_every_value_is_the_nearest_multiple_of_its_scale(values: np.ndarray) -> None:
    dim = values.shape[-1]
    stored = quantize(values)
    scales = scales_of(stored, dim)
    assert stored.shape == (len(values), stored_width(dim))
    assert np.array_equal(stored[:, :dim], plain_levels(values, scales))
    assert stored[:, :dim].min() >= -127
    assert np.array_equal(restored(stored, dim), plain_values(stored, dim))


@given(tokens())
def test_errors_are_at_most_half_a_scale(values: np.ndarray) -> None:
    dim = values.shape[-1]
    stored = quantize(values)
    given_back = restored(stored, dim).astype(np.float64)
    rounding = np.spacing(np.abs(given_back).astype(np.float16)).astype(np.float64) / 2
    bound = spread(scales_of(stored, dim).astype(np.float64), dim) / 2 + rounding
    assert np.isfinite(given_back).all()
    assert (np.abs(given_back - values) <= bound).all()
    assert not given_back[values == 0].any()


@given(tokens())
def test_scales_are_the_largest_value_over_127(values: np.ndarray) -> None:
    dim = values.shape[-1]
    padded = np.pad(np.abs(values).astype(np.float64), ((0, 0), (0, -dim % SCALE_CHANNELS)))
    wanted = padded.reshape(len(values), -1, SCALE_CHANNELS).max(axis=-1) / 127
    scales = scales_of(quantize(values), dim).astype(np.float64)
    # 516 would be nearer to 65504 / 127, but 127 of it are infinite.
    assert (np.abs(scales - wanted) <= np.maximum(wanted * 2.0**-11 * 1.2, TINIEST)).all()
    assert ((scales == 0) == (wanted == 0)).all()


@given(tokens())
def test_a_second_time_changes_no_level_of_a_normal_scale(values: np.ndarray) -> None:
    dim = values.shape[-1]
    once = quantize(values)
    twice = quantize(restored(once, dim))
    scales = scales_of(once, dim)
    normal = scales >= np.finfo(np.float16).smallest_normal
    assert np.array_equal(twice[:, :dim][spread(normal, dim)], once[:, :dim][spread(normal, dim)])
    steps = scales_of(twice, dim).view(np.int16) - scales.view(np.int16)
    assert np.abs(steps).max() <= 1


def test_every_level_of_every_scale_gives_what_plain_arithmetic_gives() -> None:
    scales = np.arange(np.float16(515.5).view(np.uint16) + 1, dtype="<u2").view("<f2")
    levels = np.arange(-127, 128, dtype=np.int8)
    stored = np.empty((len(scales), stored_width(255)), np.int8)
    stored[:, :255] = levels
    stored[:, 255:] = scales.repeat(4)[:, None].view(np.int8).reshape(len(scales), -1)
    wanted = (scales.astype(np.float32)[:, None] * levels).astype(np.float16)
    assert np.isfinite(wanted).all()
    assert np.array_equal(restored(stored, 255), wanted)


def test_many_blocks_give_what_plain_arithmetic_gives() -> None:
    dim, shape = 200, (3, 7, BLOCK_VALUES // 200 // 10 + 1, 200)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    assert values.size > 2 * BLOCK_VALUES
    values[1, 2, 3] *= np.float16(1e-5)
    stored = quantize(values)
    assert np.array_equal(stored[..., :dim], plain_levels(values, scales_of(stored, dim)))
    assert np.array_equal(restored(stored, dim), plain_values(stored, dim))


def test_threads_do_not_share_their_memory() -> None:
    values = np.random.default_rng(1).standard_normal((8, 2000, 96)).astype(np.float16)
    alone = [quantize(item) for item in values]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(quantize, values))
        back = list(pool.map(lambda stored: restored(stored, 96), together))
    assert np.array_equal(together, alone)
    assert np.array_equal(back, [plain_values(stored, 96) for stored in alone])


def test_views_are_read_and_only_contiguous_memory_is_filled() -> None:
    wide = np.random.default_rng(2).standard_normal((5, 160)).astype(np.float16)
    assert np.array_equal(quantize(wide[::2, ::2]), quantize(wide[::2, ::2].copy()))
    stored = quantize(wide)
    assert np.array_equal(restored(stored[::2], 160), restored(stored, 160)[::2])
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(quantize(wide[:, :80]), wide[:, ::2])
    assert quantize(np.zeros((0, 70), np.float16)).shape == (0, 74)


@given(st.integers(1, 2000))
def test_layouts_know_the_stored_width(n_channels: int) -> None:
    layout = ArrayLayout(Grid(2, 3), 4, 4, 1, n_channels, dtype="int8")
    assert layout.stored_channels == stored_width(n_channels)
    assert layout.encoding_bytes == 6 * stored_width(n_channels)


def test_the_specification_reads_it() -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    (code,) = (block for block in text.split("```python")[1:] if '.view("<f2")' in block)
    values = np.random.default_rng(3).standard_normal((2, 3, 100)).astype(np.float16)
    names = {"np": np, "stored": quantize(values), "n_channels": 100}
    exec(code.split("```")[0], names)
    assert np.array_equal(names["encoding"], restored(names["stored"], 100))
