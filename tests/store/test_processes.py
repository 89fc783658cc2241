"""Open stores in other processes and threads: forked, spawned, shared; whatever happens, nothing hangs."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from forking import PATIENCE_S, forked
from remote_cases import (
    BUCKET,
    Server,
    check_samples,
    running_server,
    samples_of,
    start,
    unpickle_and_read,
)
from store_cases import crash_case, frames_case, pairs_case

from cosettle_cache.core.errors import UsageError
from cosettle_cache.store import FeatureStore, open_store

CASE = crash_case()
FRAMES = frames_case((("bear", 40, 2, 3),))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASE.write(tmp_path_factory.mktemp("stores") / "store.zarr")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return CASE.write(f"s3://{BUCKET}/store.zarr")


@contextlib.contextmanager
def busy_reader(store: FeatureStore) -> Iterator[None]:
    """Keep another thread reading through the pool meanwhile."""
    stop, faults = Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                check_samples(CASE, store)
        except BaseException as error:
            faults.append(error)

    thread = Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not faults


def test_forked_after_reading(path: Path) -> None:
    store = open_store(path)
    check_samples(CASE, store)
    assert forked(lambda: check_samples(CASE, store)) == 0
    check_samples(CASE, store)


def test_forked_while_another_thread_reads(path: Path) -> None:
    store = open_store(path)
    with busy_reader(store):
        assert [forked(lambda: check_samples(CASE, store)) for _ in range(10)] == [0] * 10


def test_a_forked_child_forks(path: Path) -> None:
    store = open_store(path)
    check_samples(CASE, store)

    def child() -> None:
        check_samples(CASE, store)
        assert forked(lambda: check_samples(CASE, store)) == 0

    assert forked(child) == 0


def test_forked_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    store = open_store(FRAMES.write(tmp_path / "store.zarr"))
    wanted = FRAMES.array(store.grid("bear"))
    frames = store.iter_tokens("bear")
    next(frames)
    assert forked(lambda: _compare(store.tokens("bear"), wanted)) == 0
    assert forked(lambda: _compare(np.stack(list(store.iter_tokens("bear"))), wanted)) == 0
    assert sum(1 for _ in frames) == 39


@pytest.mark.parametrize(("dtype", "codec"), [("int8", "none"), ("float16", "zstd"), ("int8", "zstd")])
def test_other_layouts_forked(tmp_path: Path, dtype: str, codec: str) -> None:
    case = pairs_case(dtype=dtype, codec=codec)
    store = open_store(case.write(tmp_path / "store.zarr"))
    check_samples(case, store)
    assert forked(lambda: check_samples(case, store)) == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    store = open_store(path)
    check_samples(CASE, store)
    process = context.Process(target=unpickle_and_read, args=(pickle.dumps(store),))
    process.start()
    process.join(2 * PATIENCE_S)
    code = process.exitcode
    process.kill()
    assert code == 0


def test_many_threads_share_a_store(path: Path) -> None:
    store, wanted = open_store(path), samples_of(CASE)

    def read(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, len(wanted), 20)
        _compare(store.samples(ids), wanted[ids])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(100)))


def test_pickled_stores_are_opened_anew(path: Path, url: str, tmp_path: Path) -> None:
    cached = open_store(url, cache_dir=tmp_path / "cache", cache_bytes=12_345_678)
    for store in (open_store(path), open_store(url), cached):
        check_samples(CASE, store)
        again = pickle.loads(pickle.dumps(store))
        check_samples(CASE, again)
        assert again.path == store.path
    assert again._storage.limit == 12_345_678


def test_remote_stores_refuse_a_fork(url: str, tmp_path: Path) -> None:
    remote = open_store(url)
    cached = open_store(url, cache_dir=tmp_path / "cache")
    for store in (remote, cached):
        check_samples(CASE, store)
        for task in (lambda store=store: store.samples([1]), lambda: open_store(url)):
            assert forked(lambda task=task: _is_refused(task)) == 0
        check_samples(CASE, store)


def test_local_stores_go_on_beside_remote_ones(url: str, path: Path) -> None:
    check_samples(CASE, open_store(url))
    local = open_store(path)
    assert forked(lambda: check_samples(CASE, local)) == 0


def test_remote_stores_in_workers(url: str, tmp_path: Path) -> None:
    stores = [open_store(url), open_store(url, cache_dir=tmp_path / "cache")]
    processes = [start(unpickle_and_read, pickle.dumps(store)) for store in stores]
    for process in processes:
        process.join(PATIENCE_S)
        code = process.exitcode
        process.kill()
        assert code == 0


def _compare(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.array_equal(found, wanted)


def _is_refused(task: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="forked") as caught:
        task()
    assert "spawn" in str(caught.value.hint)
