"""Damage for readers of foreign bytes: valid files with bytes cut off, flipped, replaced or put between.

A Hypothesis test over `changes` and `cuts` asks a reader by `check_reader(path, damaged(valid, ...), read)`:
it returns, or raises a `CosettleError` of one sentence; whatever else it raises fails the test. An example is
tests/report/test_report_fuzz.py; with `-m slow` and FUZZ_EXAMPLES=100000 it takes long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from cosettle_cache.core.errors import CosettleError

#: What is put into files: brackets without end, numbers that fit no type, text that is none.
NASTY = (
    *(b"[" * 20_000, b'{"a":' * 5000, b"9" * 5000, b"1e999", b"-1", b"NaN", b"null", b'""', b"[]", b"{}"),
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"),
)

#: (where, as a share of the file; how many bytes go; what takes their place)
Change = tuple[float, int, bytes]

changes: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from([0, 1, 2, 4, 8, 64]), st.sampled_from(NASTY) | st.binary(max_size=8)
    ),
    max_size=4,
)
cuts = st.none() | st.floats(0, 1)


def damaged(data: bytes, found: list[Change], cut: float | None) -> bytes:
    """Return `data` with every change made in turn, and then cut off at a share of it."""
    for share, n_bytes, new in found:
        place = int(share * len(data))
        data = data[:place] + new + data[place + n_bytes :]
    return data if cut is None else data[: int(cut * len(data))]


def check_reader(path: Path, data: bytes, read: Callable[[Path], Any]) -> None:
    """Read what stands at `path` then; only a `CosettleError` with something to say may come."""
    path.write_bytes(data)
    try:
        read(path)
    except CosettleError as error:
        assert error.message and "\n" not in error.message
