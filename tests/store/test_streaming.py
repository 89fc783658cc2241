"""Streaming near: the consumer and its helper share the stretches, within the memory that there is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from forking import forked

from cosettle_cache.store import _chunks as streaming
from cosettle_cache.store._chunks import NEAR_STRETCHES, AtHand, Fill, NearReading, Stretch, stream_far

N = 60


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _help_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_STEADY_BYTES", 16)


def make_parts() -> list[Stretch]:
    ring = [np.zeros(4, np.float16) for _ in range(NEAR_STRETCHES)]
    return [Stretch(number, [ring[number % NEAR_STRETCHES]]) for number in range(N)]


def stream(
    fill: Fill, pool: ThreadPoolExecutor, begun: list[int] | None = None
) -> Generator[Stretch, None, None]:
    """Stream all parts; every tenth begins a shard."""
    begun = [] if begun is None else begun
    return NearReading(
        make_parts(), range(10, N, 10), fill, lambda part: begun.append(part.first), AtHand(), pool
    ).stream()


class Filler:
    """Writes a stretch's number into its memory; remembers who read what."""

    def __init__(self, *, at_hand: Callable[[int], bool] = lambda number: True, seconds: float = 0.0) -> None:
        self.readers: dict[int, str] = {}
        self._at_hand, self._seconds = at_hand, seconds

    def __call__(self, part: Stretch) -> bool:
        self.readers[part.first] = threading.current_thread().name
        time.sleep(self._seconds)
        part.outs[0][:] = part.first
        return self._at_hand(part.first)

    @property
    def helped(self) -> set[int]:
        me = threading.current_thread().name
        return {number for number, name in self.readers.items() if name != me}


@pytest.mark.parametrize("busy_s", [0.0, 0.001])
@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_in_order_within_the_ring(pool: ThreadPoolExecutor, busy_s: float, seconds: float) -> None:
    fill = Filler(seconds=seconds)
    for number, part in enumerate(stream(fill, pool)):
        assert part.first == number
        time.sleep(busy_s)
        assert (part.outs[0] == number).all()
        assert max(fill.readers) < number + NEAR_STRETCHES
    assert number == N - 1
    if busy_s or seconds:
        assert fill.helped


def test_nobody_helps_where_the_disk_is_waited_for(pool: ThreadPoolExecutor) -> None:
    fill = Filler(at_hand=lambda number: number % 2 == 0)
    assert [part.first for part in stream(fill, pool)] == list(range(N))
    assert not fill.helped


def test_help_ends_where_the_disk_is_waited_for(pool: ThreadPoolExecutor) -> None:
    fill = Filler(at_hand=lambda number: number < 20, seconds=0.001)
    assert [part.first for part in stream(fill, pool)] == list(range(N))
    assert fill.helped
    assert max(fill.helped) < 20 + NEAR_STRETCHES


@pytest.mark.parametrize("bad", [0, 1, 30, 31, N - 1])
def test_an_error_is_raised_where_its_stretch_is_asked_for(pool: ThreadPoolExecutor, bad: int) -> None:
    filler = Filler()

    def fill(part: Stretch) -> bool:
        if part.first == bad:
            raise OSError("gone")
        return filler(part)

    seen = []
    with pytest.raises(OSError, match="gone"):
        for part in stream(fill, pool):
            seen.append(part.first)
            assert (part.outs[0] == part.first).all()
    assert seen == list(range(bad))


def test_closed_early(pool: ThreadPoolExecutor) -> None:
    fill = Filler(seconds=0.001)
    parts = stream(fill, pool)
    for _ in range(20):
        next(parts)
    parts.close()
    n_read = len(fill.readers)
    time.sleep(0.02)
    assert len(fill.readers) == n_read <= 20 + NEAR_STRETCHES


def test_a_forked_child_goes_on_alone(pool: ThreadPoolExecutor) -> None:
    fill = Filler(seconds=0.001)
    parts = stream(fill, pool)
    for _ in range(20):
        next(parts)

    def child() -> None:
        parent = os.getppid()
        assert [int(part.outs[0][0]) for part in parts] == list(range(20, N))
        assert os.getppid() == parent

    assert forked(child) == 0
    assert [int(part.outs[0][0]) for part in parts] == list(range(20, N))


def test_a_forked_child_drops_a_stream(pool: ThreadPoolExecutor) -> None:
    parts = stream(Filler(seconds=0.001), pool)
    for _ in range(20):
        next(parts)
    assert forked(parts.close) == 0


def test_shards_are_begun_before_they_are_read(pool: ThreadPoolExecutor) -> None:
    begun: list[int] = []
    fill = Filler(seconds=0.001)
    for part in stream(fill, pool, begun):
        assert begun == sorted(begun)
        assert {number for number in range(10, N, 10) if number <= part.first} <= set(begun)
    assert begun == list(range(10, N, 10))


def test_far_a_closed_stream_leaves_nobody_reading(pool: ThreadPoolExecutor) -> None:
    fill = Filler(seconds=0.001)
    parts = stream_far(make_parts(), fill, pool, 2)
    for number in range(5):
        assert int(next(parts).outs[0][0]) == number
    parts.close()
    n_read = len(fill.readers)
    time.sleep(0.02)
    assert len(fill.readers) == n_read <= 8


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_a_shard_near_the_beginning_is_begun(pool: ThreadPoolExecutor, start: int) -> None:
    begun: list[int] = []
    parts = NearReading(
        make_parts(), {start}, Filler(), lambda part: begun.append(part.first), AtHand(), pool
    ).stream()
    assert len(list(parts)) == N
    pool.shutdown()
    assert begun == [start]


def test_a_stream_that_follows_a_warm_one_is_helped_at_once(pool: ThreadPoolExecutor) -> None:
    at_hand, fill = AtHand(), Filler(seconds=0.001)
    at_hand.note(Stretch(0, [np.zeros(8, np.float16)]), True)
    parts = NearReading(make_parts(), (), fill, lambda part: None, at_hand, pool).stream()
    next(parts)
    parts.close()
    assert fill.helped
    at_hand.note(Stretch(0, [np.zeros(8, np.float16)]), False)
    assert not at_hand.is_steady
