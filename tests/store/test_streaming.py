"""Frames come in order while another thread reads ahead; errors, early ends and forks in the middle of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from forking import forked
from store_cases import frames_case
from test_damage import flip, shard_of

from cosettle_cache.core.errors import DamagedStoreError
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store import _chunks as chunks

N = 60


class Task:
    """Returns its number; remembers in which thread each was worked on."""

    def __init__(self, seconds: float = 0.0, bad: int = -1) -> None:
        self.threads: dict[int, str] = {}
        self._seconds, self._bad = seconds, bad

    def __call__(self, number: int) -> int:
        self.threads[number] = threading.current_thread().name
        time.sleep(self._seconds)
        if number == self._bad:
            raise OSError("gone")
        return number


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("busy_s", [0.0, 0.001])
@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_in_order_and_bounded(n_threads: int, busy_s: float, seconds: float) -> None:
    task = Task(seconds)
    for number, found in enumerate(map_ahead(task, range(N), n_threads, n_ahead=4)):
        assert found == number
        time.sleep(busy_s)
        assert max(task.threads) <= number + 4
    assert number == N - 1
    assert threading.current_thread().name not in task.threads.values()


@pytest.mark.parametrize("bad", [0, 1, 30, 31, N - 1])
def test_an_error_is_raised_where_its_item_is_due(bad: int) -> None:
    seen = []
    with pytest.raises(OSError, match="gone"):
        for found in map_ahead(Task(bad=bad), range(N), 2):
            seen.append(found)
    assert seen == list(range(bad))


def test_closed_early() -> None:
    task = Task(0.001)
    found = map_ahead(task, range(N), 2, n_ahead=4)
    for _ in range(20):
        next(found)
    assert isinstance(found, Iterator)
    with closing(found):
        pass
    n_done = len(task.threads)
    time.sleep(0.02)
    assert len(task.threads) == n_done <= 20 + 4


def test_a_forked_child_goes_on_alone() -> None:
    found = map_ahead(Task(0.001), range(N), 2)
    for _ in range(20):
        next(found)

    def child() -> None:
        assert list(found) == list(range(20, N))

    assert forked(child) == 0
    assert list(found) == list(range(20, N))


def test_a_forked_child_drops_it() -> None:
    found = map_ahead(Task(0.001), range(N), 2)
    for _ in range(20):
        next(found)
    assert forked(found.close) == 0


CASE = frames_case((("bear", N, 2, 3),), slot_encodings=7)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return open_store(CASE.write(tmp_path / "store.zarr"))


@pytest.mark.parametrize("n_bytes", [0, 200, 2**21])
@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "none"), ("float16", "zstd")])
def test_frames_are_what_plain_reading_gives_and_may_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int, dtype: str, codec: str
) -> None:
    monkeypatch.setattr(chunks, "_NEAR_BYTES", n_bytes)
    case = frames_case((("bear", N, 2, 3),), slot_encodings=7, dtype=dtype, codec=codec)
    store = open_store(case.write(tmp_path / "store.zarr"))
    kept = list(store.iter_tokens("bear"))
    assert np.array_equal(kept, store.tokens("bear"))
    assert np.array_equal(kept, case.array(store.grid("bear")))


def test_damage_is_raised_after_the_frames_before_it(store: FeatureStore) -> None:
    flip(shard_of(Path(store.path), 2, "2x3"), 128 * 3)
    seen = []
    with pytest.raises(DamagedStoreError, match="slot 2 "):
        for frame in store.iter_tokens("bear"):
            seen.append(frame)
    assert 14 <= len(seen) <= 17
    assert np.array_equal(seen, CASE.array(store.grid("bear"))[: len(seen)])


def test_a_forked_child_reads_the_rest_of_a_video(store: FeatureStore) -> None:
    frames, wanted = store.iter_tokens("bear"), CASE.array(store.grid("bear"))
    for _ in range(5):
        next(frames)

    def child() -> None:
        assert np.array_equal(list(frames), wanted[5:])

    assert forked(child) == 0
    assert np.array_equal(list(frames), wanted[5:])
