"""Warming: windows of shards are read before samples are drawn from them, one window ahead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_cases import check_samples
from store_cases import frames_case, pairs_case

from cosettle_cache.store import open_store
from cosettle_cache.store._local import LocalFile
from cosettle_cache.training.batches import (
    EpochOrder,
    Ids,
    Portion,
    Replicas,
    ShuffleShards,
    Windows,
    by_window,
    make_portions,
    make_steps,
    warmed,
)


def make_stream(
    n: int = 40,
    per_shard: int = 5,
    window: int = 2,
    batch: int = 6,
    share: tuple[int, int] = (0, 1),
    parts: int = 1,
) -> tuple[EpochOrder, Windows, list[Portion]]:
    """Return two epochs of a process's portions; the second epoch has other ids, in descending order."""
    shuffle = ShuffleShards(lambda ids: ids % n // per_shard, window)
    order = EpochOrder(lambda epoch: np.arange(n)[:: -1 if epoch else 1] + epoch * n, batch, 3, shuffle)
    portions = make_portions(make_steps(order, 2), parts, Replicas(*share).share)
    return order, Windows(order, shuffle), list(portions)


@given(
    n=st.integers(1, 60),
    per_shard=st.integers(1, 9),
    window=st.integers(1, 4),
    batch=st.integers(1, 20),
    share=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    parts=st.integers(1, 3),
)
def test_portions_come_in_order_when_their_samples_are_warm(
    n: int, per_shard: int, window: int, batch: int, share: tuple[int, int], parts: int
) -> None:
    _, windows, portions = make_stream(n, per_shard, window, batch, share, parts)
    warm, seen = [], []
    for ids, complete in by_window(portions, windows):
        warm += ids.tolist()
        for portion in complete:
            seen.append(portion)
            assert set(portion.ids.tolist()) <= set(warm)
    assert [id(portion) for portion in seen] == [id(portion) for portion in portions]
    assert sorted(warm) == sorted(item for portion in portions for item in portion.ids.tolist())


def test_a_window_is_all_that_is_drawn_from_its_shards() -> None:
    order, windows, portions = make_stream(n=40, per_shard=5, window=2, batch=8)
    groups = [ids for ids, _ in by_window(portions, windows)]
    assert len(groups) == 2 * 4
    for ids in groups:
        assert len(ids) == 10
        assert len(np.unique(ids % 40 // 5)) == 2
    visited = np.split(order.visited(0), 4)
    assert [sorted(ids.tolist()) for ids in groups[:4]] == [sorted(ids.tolist()) for ids in visited]


def test_one_window_ahead() -> None:
    _, windows, portions = make_stream(batch=5)
    begun: list[Ids] = []
    for number, _ in enumerate(warmed(portions, windows, begun.append)):
        time.sleep(0.002)
        in_use = 5 * number // 10
        assert in_use + 1 <= len(begun) <= in_use + 2


def test_an_error_is_raised_where_the_samples_are_asked_for() -> None:
    _, windows, portions = make_stream(batch=5)
    begun: list[Ids] = []

    def warm(ids: Ids) -> None:
        begun.append(ids)
        if len(begun) == 3:
            raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for portion in warmed(portions, windows, warm):
            seen.append(portion)
    assert len(seen) == 4


def test_closed_early() -> None:
    _, windows, portions = make_stream(batch=5)
    begun: list[Ids] = []
    stream = warmed(portions, windows, begun.append)
    next(stream)
    assert isinstance(stream, Iterator)
    stream.close()
    assert len(begun) <= 2


@pytest.mark.parametrize("n_bytes", [10 * 2**20 + 1, 2**20])
def test_bytes_are_read_into_the_page_cache(tmp_path: Path, n_bytes: int) -> None:
    path, start = tmp_path / "shard", 20 * 2**20 + 3
    path.write_bytes(bytes(64 * 2**20))
    _evict(path)
    file = LocalFile(path)
    if _n_cached(file, start, n_bytes):
        pytest.skip("this file system does not drop pages when asked")
    file.warm(start, n_bytes)
    deadline = time.monotonic() + 60
    while _n_cached(file, start, n_bytes) < n_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _n_cached(file, start, n_bytes) == n_bytes


def test_warm_samples_are_the_same(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr"))
    store.warm(store.sample_ids)
    check_samples(case, store)


def test_warming_leaves_damage_to_the_reader(tmp_path: Path) -> None:
    path = pairs_case().write(tmp_path / "store.zarr")
    store = open_store(path)
    for shard in path.glob("tokens/*/c.*"):
        shard.write_bytes(b"no shard")
    store.warm(store.sample_ids)


def test_frames_are_warmed(tmp_path: Path) -> None:
    case = frames_case((("bear", 40, 2, 3),))
    store = open_store(case.write(tmp_path / "store.zarr"))
    store.warm_encodings(store.grid("bear"), [3, 4, 39])
    assert (store.tokens("bear", [39]) == case.array(store.grid("bear"))[39]).all()


def _evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _n_cached(file: LocalFile, start: int, n_bytes: int) -> int:
    return file.read_cached([memoryview(bytearray(n_bytes))], start)
