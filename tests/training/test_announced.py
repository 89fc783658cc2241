"""Shards are announced to the store one window before samples are drawn from them."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from remote_cases import check_samples
from store_cases import frames_case, pairs_case

from cosettle_cache.store import open_store
from cosettle_cache.training.batches import (
    EpochOrder,
    Ids,
    Portion,
    Replicas,
    ShuffleShards,
    announced,
    make_portions,
    make_steps,
)


def make_stream(
    n: int = 40,
    per_shard: int = 5,
    window: int = 2,
    batch: int = 6,
    share: tuple[int, int] = (0, 1),
    parts: int = 1,
) -> tuple[ShuffleShards, list[Portion]]:
    """Return two epochs of a process's portions; the second epoch has other ids, in descending order."""
    shuffle = ShuffleShards(lambda ids: ids % n // per_shard, window)
    order = EpochOrder(lambda epoch: np.arange(n)[:: -1 if epoch else 1] + epoch * n, batch, 3, shuffle)
    return shuffle, list(make_portions(make_steps(order, 2), parts, Replicas(*share).share))


@given(
    n=st.integers(1, 60),
    per_shard=st.integers(1, 9),
    window=st.integers(1, 4),
    batch=st.integers(1, 20),
    share=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    parts=st.integers(1, 3),
)
def test_portions_come_in_order_when_their_shards_were_announced(
    n: int, per_shard: int, window: int, batch: int, share: tuple[int, int], parts: int
) -> None:
    shuffle, portions = make_stream(n, per_shard, window, batch, share, parts)
    known: set[int] = set()
    seen = []
    for portion in announced(portions, window, shuffle.slots_of, lambda new: known.update(new.tolist())):
        seen.append(portion)
        assert set(shuffle.slots_of(portion.ids).tolist()) <= known
    assert [id(portion) for portion in seen] == [id(portion) for portion in portions]


def test_one_window_ahead() -> None:
    shuffle, portions = make_stream(batch=5)
    order = list(dict.fromkeys(slot for p in portions for slot in shuffle.slots_of(p.ids).tolist()))
    new: list[Ids] = []
    for number, _ in enumerate(announced(portions[:8], 2, shuffle.slots_of, new.append)):
        in_use = 2 * (5 * number // 10) + 2
        known = set(np.concatenate(new).tolist())
        assert min(in_use + 2, 8) <= len(known) <= in_use + 4
    assert known == set(order)


def test_an_error_of_the_store_is_raised() -> None:
    shuffle, portions = make_stream(batch=5)

    def will_need(slots: Ids) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(announced(portions, 2, shuffle.slots_of, will_need))


def test_shards_come_into_the_page_cache(tmp_path: Path) -> None:
    case = frames_case((("bear", 400, 8, 8),), dim=64, slot_encodings=200)
    path = case.write(tmp_path / "store.zarr")
    shards = sorted(path.glob("tokens/*/c.*"))
    for shard in shards:
        _evict(shard)
    if any(_n_cached(shard) for shard in shards):
        pytest.skip("this file system does not drop pages when asked")
    open_store(path).will_need([1])
    deadline = time.monotonic() + 60
    while _n_cached(shards[1]) < shards[1].stat().st_size and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _n_cached(shards[1]) == shards[1].stat().st_size
    assert not _n_cached(shards[0])


def test_announced_samples_are_the_same(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr"))
    store.will_need(range(store.n_slots))
    check_samples(case, store)


def test_damage_is_left_to_the_reader(tmp_path: Path) -> None:
    path = pairs_case().write(tmp_path / "store.zarr")
    store = open_store(path)
    for shard in path.glob("tokens/*/c.*"):
        shard.write_bytes(b"no shard")
    store.will_need(range(store.n_slots))


def _evict(path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("nothing drops pages here")
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _n_cached(path: Path) -> int:
    """Return the bytes of a file in the page cache, without touching them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        view = np.frombuffer(memory, np.uint8)
        resident = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        address, vector = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(resident.ctypes.data)
        assert libc.mincore(address, ctypes.c_size_t(len(view)), vector) == 0
        del view
    return min(path.stat().st_size, int((resident & 1).sum()) * mmap.PAGESIZE)
