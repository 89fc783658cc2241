"""Work over processes: real schedulers and workers on this machine, killed, interrupted, absent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from cosettle_cache import distributed
from cosettle_cache.distributed import Cluster, connect
from cosettle_cache.errors import ClusterError, InputError, UsageError

N_WORKERS = 2


def square(number: int) -> int:
    return number * number


def process(number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def die_at(wanted: int, number: int) -> int:
    if number == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(mark: Path, number: int) -> int:
    """Kill the first process that comes here."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.02)
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse(number: int) -> int:
    raise InputError("nothing here", wanted="something", found=number)


def environment(names: tuple[str, ...], number: int) -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in names)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def cluster(notes: list[str]) -> Iterator[Cluster]:
    with connect(workers=N_WORKERS, gpus=("3", "5"), note=notes.append) as cluster:
        yield cluster


def test_every_item_comes_back_once_with_its_result(cluster: Cluster) -> None:
    found = sorted(cluster.run(square, range(25)))
    assert found == [(number, number * number) for number in range(25)]


def test_workers_share_cores_and_are_dealt_gpus(cluster: Cluster) -> None:
    assert cluster.has_gpus()
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    found = {result for _, result in cluster.run(partial(environment, names), range(20), on_gpus=True)}
    cores = str(max(1, len(os.sched_getaffinity(0)) // N_WORKERS))
    assert found == {("3", cores), ("5", cores)}
    pids = {result for _, result in cluster.run(process, range(20))}
    assert len(pids) == N_WORKERS
    assert os.getpid() not in pids


def test_a_stopped_run_ends_with_what_is_in_hand(cluster: Cluster) -> None:
    stop = Event()
    found = []
    for item, _ in cluster.run(process, range(1000), stop=stop):
        found.append(item)
        stop.set()
    assert 1 <= len(found) <= 2 * N_WORKERS
    assert len(list(cluster.run(square, range(5)))) == 5


def test_errors_of_a_unit_arrive_as_they_are(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="nothing here") as caught:
        list(cluster.run(refuse, range(5)))
    assert (caught.value.wanted, caught.value.details[0][:10]) == ("something", "on worker ")
    with pytest.raises(ZeroDivisionError):
        list(cluster.run(partial(divmod, 1), [0]))


def test_a_killed_worker_is_replaced_and_its_items_done(
    cluster: Cluster, notes: list[str], tmp_path: Path
) -> None:
    found = sorted(cluster.run(partial(die_once, tmp_path / "mark"), range(150)))
    assert found == [(number, number) for number in range(150)]
    cluster.client.wait_for_workers(N_WORKERS, timeout=30)
    assert any("workers lost" in note for note in notes)


def test_an_item_that_kills_workers_is_named_and_alone(cluster: Cluster) -> None:
    found = []
    with pytest.raises(ClusterError, match="at item 3;") as caught:
        for item, _ in cluster.run(partial(die_at, 3), range(8)):
            found.append(item)
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7]
    assert caught.value.hint is not None


def test_a_missing_scheduler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT_S", 0.3)
    for address in ("tcp://127.0.0.1:9", "nonsense", "tcp://no-such-host.invalid:8786"):
        with pytest.raises(ClusterError, match="no scheduler answers"), connect(scheduler=address):
            pass
    with pytest.raises(UsageError), connect():
        pass
