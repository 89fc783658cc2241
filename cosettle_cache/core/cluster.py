"""Units of work over processes and machines: items go in, results come out in completion order.

`connect` starts worker processes on this machine or joins a running dask scheduler; `Cluster.run` submits
items, a few at a time. A unit must be safe to repeat: the item of a worker that dies is done again.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, Generic, TypeVar
from uuid import uuid4

import dask
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, get_worker

from cosettle_cache import __version__
from cosettle_cache.core.errors import ClusterError, CosettleError, UsageError
from cosettle_cache.core.parallel import Run

Item = TypeVar("Item")
Result = TypeVar("Result")

#: How long nothing may happen before the stop signal and the workers are looked at again.
POLL_S = 0.2
#: How often the scheduler is asked who its workers are.
CENSUS_S = 1.0
CONNECT_TIMEOUT_S = 10
#: A worker that computes gets this long to leave when the cluster closes.
CLOSE_TIMEOUT_S = 5
#: Local workers that may die over one item before it is set aside; a running scheduler has its own setting.
LOCAL_DEATHS = 2
#: A local worker is replaced within seconds; after this long without any, nobody will come.
LOCAL_PATIENCE_S = 300.0
#: The tasks of one worker share its GPU, when it declares one.
GPU_SHARE = {"GPU": 0.01}
_DEVICES = "cpu, cuda or cuda:NUMBER"

#: In a worker: runs that begin no further item.
_ended: set[str] = set()
#: In a worker: the first unit imports its modules, and what half an import leaves is seen by nobody.
_unpickling = Lock()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers to hand units of work to; made by `connect`. `note` hears of waiting and of lost workers.

    Without any worker for `patience_s` seconds a run fails.
    """

    client: Client
    note: Callable[[str], object] = lambda text: None
    patience_s: float = float("inf")

    def has_gpus(self) -> bool:
        """Say whether any worker there now declares the resource `GPU`."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return any(worker["resources"].get("GPU") for worker in workers)

    def run(
        self,
        unit: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        stop: Event | None = None,
        on_gpus: bool = False,
    ) -> Iterator[tuple[Item, Result]]:
        """Yield every item with `unit(item)`, as they get ready; as many are in hand as workers have threads.

        `unit` is any callable that a worker can unpickle; results should be small. `stop` ends the run after
        the items in hand, `on_gpus` uses only workers that declare a `GPU`. A unit's error is raised here.
        Raises `ClusterError` when workers cannot do what is asked, when the scheduler goes away, and at the
        end for items that killed every worker that tried them.
        """
        run: _Run[Item] = _Run(self, pickle.dumps(unit), stop or Event(), GPU_SHARE if on_gpus else {})
        try:
            yield from run.results(items)
            suspects, run.killers = run.killers, []
            for item in suspects:  # alone, so that nobody is blamed for a neighbour
                yield from run.results([item])
            if run.killers:
                raise ClusterError(
                    f"worker processes died over and over at item {', '.join(map(str, run.killers))}; "
                    "everything else was done",
                    hint="out of memory? try fewer workers or a smaller --batch, then run it again",
                )
        finally:
            run.end()


@contextmanager
def connect(
    *,
    workers: int = 0,
    scheduler: str | None = None,
    threads: int = 2,
    gpus: Sequence[str] = (),
    note: Callable[[str], object] = lambda text: None,
) -> Iterator[Cluster]:
    """Yield `workers` new processes on this machine, or the workers of the scheduler at an address.

    New processes share the cores, do `threads` items at a time each, and are dealt the devices `gpus` in
    turn. They see no Ctrl-C, are replaced when they die, and are gone at the end.
    """
    if bool(workers) == bool(scheduler):
        raise UsageError("work goes to new processes or to a running scheduler", wanted="one of the two")
    if scheduler:
        with closing(_client(scheduler)) as client:
            yield Cluster(client, note)
        return
    with _local_cluster(workers, threads, gpus) as cluster, closing(_client(cluster)) as client:
        yield Cluster(client, note, LOCAL_PATIENCE_S)


@contextmanager
def work_on(
    workers: int,
    scheduler: str | None,
    device: str | None = "cpu",
    *,
    threads: int = 2,
    stop: Event | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> Iterator[Run | None]:
    """Yield a function that runs units of work on workers; None where this process does all.

    `device` None uses GPUs where workers have some, `cuda` only those; `threads` and `note` as in `connect`.
    """
    if not workers and scheduler is None:
        yield None
        return
    gpus = check_workers(workers, scheduler, device)
    with connect(workers=workers, scheduler=scheduler, threads=threads, gpus=gpus, note=note) as cluster:

        def run(unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
            on_gpus = device == "cuda" or (device is None and cluster.has_gpus())
            return cluster.run(unit, items, stop=stop, on_gpus=on_gpus)

        yield run


def check_workers(workers: int, scheduler: str | None, device: str | None) -> Sequence[str]:
    """Return the GPUs of this machine to be dealt to workers; raise `UsageError` for what cannot be."""
    if workers and scheduler:
        raise UsageError("--workers and --scheduler exclude each other", wanted="one of the two")
    if device not in (None, "cpu", "cuda"):
        raise UsageError("workers are dealt their GPUs", wanted="--device cpu or cuda", found=device)
    if scheduler or pick_device(device) == "cpu":
        return ()
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def share_of_cores(workers: int) -> int:
    """Return how many of this process's cores each of `workers` processes gets, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


@dataclass(slots=True)
class _Run(Generic[Item]):
    """One call of `Cluster.run`: what is in hand, and what came of it."""

    cluster: Cluster
    unit: bytes
    stop: Event
    resources: Mapping[str, float]
    name: str = field(default_factory=lambda: uuid4().hex)
    in_hand: dict[Any, tuple[Future[Any], Item]] = field(default_factory=dict)
    ready: SimpleQueue[Future[Any]] = field(default_factory=SimpleQueue)
    killers: list[Item] = field(default_factory=list)
    ended: bool = False
    workers: Mapping[str, int] = field(default_factory=dict)
    counted: float = float("-inf")
    seen: float = field(default_factory=time.monotonic)

    def results(self, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        # Few at a time, not `Client.map`: the scheduler blames a death on all that its worker had in hand.
        waiting = iter(items)
        while True:
            try:
                self._count_workers()
                if self.stop.is_set():
                    self._begin_no_more()
                else:  # one at least: without workers it waits at the scheduler for the first to come
                    n_free = max(1, sum(self.workers.values())) - len(self.in_hand)
                    self._submit(islice(waiting, max(0, n_free)))
            except OSError as error:  # distributed's own are among them
                raise _scheduler_gone() from error
            if not self.in_hand or (self.ended and not self.workers):
                return
            with suppress(Empty):
                yield from self._answer(self.ready.get(timeout=POLL_S))

    def end(self) -> None:
        """Give up what is still in hand."""
        if self.in_hand:
            with suppress(Exception):  # the cluster may be what failed
                self._begin_no_more()
                self.cluster.client.cancel([future for future, _ in self.in_hand.values()])

    def _submit(self, items: Iterable[Item]) -> None:
        for item in items:
            future = self.cluster.client.submit(
                _call, __version__, self.name, self.unit, item, pure=False, resources=self.resources
            )
            self.in_hand[future.key] = (future, item)
            future.add_done_callback(self.ready.put)

    def _count_workers(self) -> None:
        now = time.monotonic()
        if now - self.counted < CENSUS_S:
            return
        threads = self.cluster.client.nthreads()
        if threads:
            self.seen = now
        elif now - self.seen > self.cluster.patience_s:
            raise ClusterError("all worker processes died and none came back")
        if not threads and (self.workers or self.counted < 0):
            self.cluster.note("waiting for workers")
        elif lost := self.workers.keys() - threads.keys():
            self.cluster.note(f"workers lost: {len(lost)}; what they had in hand is done again")
        self.workers, self.counted = dict(threads), now

    def _begin_no_more(self) -> None:
        if not self.ended:
            self.ended = True
            self.cluster.client.run(_end, self.name, on_error="ignore")

    def _answer(self, future: Future[Any]) -> Iterator[tuple[Item, Any]]:
        """Yield the item of a future with its result, if it has one."""
        _, item = self.in_hand.pop(future.key)
        try:
            began, result = future.result()
        except KilledWorker:
            self.killers.append(item)
        except CancelledError as error:
            raise _scheduler_gone() from error
        except (ImportError, AttributeError, RuntimeError) as error:
            # A RuntimeError is the scheduler's when a task cannot be unpickled, else the unit's own.
            if isinstance(error, RuntimeError) and "deserialization" not in str(error):
                raise
            raise ClusterError(
                "a worker or the scheduler cannot import what it is asked to do",
                found=str(error).splitlines()[0].strip(),
                hint="install the same version of cosettle-cache wherever the scheduler and the workers run",
            ) from error
        else:
            if began:
                yield item, result


def _call(version: str, run: str, unit: bytes, item: Item) -> tuple[bool, Any]:
    """In a worker: return whether the item was begun, and its result."""
    if run in _ended:
        return False, None
    if version != __version__:
        raise ClusterError(
            f"the worker {get_worker().address} has another version of cosettle-cache",
            wanted=version,
            found=__version__,
            hint="install the same version wherever the scheduler and the workers run",
        )
    with _unpickling:
        work = pickle.loads(unit)  # noqa: S301 - from whoever may run anything here anyway
    try:
        return True, work(item)
    except CosettleError as error:
        error.details = (*error.details, f"on worker {get_worker().address}")
        raise


def _end(run: str) -> None:
    """In a worker: begin no further item of a run."""
    _ended.add(run)


def _scheduler_gone() -> ClusterError:
    return ClusterError(
        "the scheduler does not answer any more", hint="run the same command again: what is finished is kept"
    )


def _client(address: str | SpecCluster) -> Client:
    try:
        return Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False, name="cosettle")
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {address}",
            wanted="the address of a running dask scheduler, as tcp://host:8786",
            found=str(error) or type(error).__name__,
            hint="start one with: dask scheduler",
        ) from error


@contextmanager
def _local_cluster(workers: int, threads: int, gpus: Sequence[str]) -> Iterator[SpecCluster]:
    settings = {
        # Threads of numeric libraries are set per worker below, not to 1.
        "distributed.nanny.pre-spawn-environ": {},
        # On a busy machine a replaced worker needs its time.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # Asking a worker that has just died for its last result.
        "distributed.comm.timeouts.connect": "10s",
    }
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    threads_of_libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    cores = str(share_of_cores(workers))
    with (
        tempfile.TemporaryDirectory(prefix="cosettle-", ignore_cleanup_errors=True) as scratch,
        dask.config.set(settings),
    ):
        specs: dict[int, Any] = {}
        for number in range(workers):
            options = {
                "host": "127.0.0.1",
                "nthreads": threads,
                "local_directory": scratch,
                "memory_limit": 0,
            }
            options |= {"dashboard": False, "silence_logs": logging.CRITICAL}
            options["env"] = environment = dict.fromkeys(threads_of_libraries, cores)
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
                options["resources"] = {"GPU": 1}
            specs[number] = {"cls": Nanny, "options": options}
        # A terminal sends Ctrl-C to the whole process group; workers are to finish what they have in hand, so
        # the threads and processes started here never see one. Python's resource tracker, started with the
        # first of them, would unblock it again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            cluster = SpecCluster(
                scheduler={"cls": Scheduler, "options": {**scheduler, "allowed_failures": LOCAL_DEATHS - 1}},
                workers=specs,
                silence_logs=logging.CRITICAL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield cluster
        finally:
            cluster.close(timeout=CLOSE_TIMEOUT_S)


def pick_device(device: str | None) -> str:
    """Return the device asked for, or the best one at hand; raise `UsageError` for one that is not there.

    A card with a number becomes the process's current one: pinned memory would open the first card as well.
    """
    found = find_device(device)
    if found.startswith("cuda:"):
        import torch

        torch.cuda.set_device(found)
    return found


def find_device(device: str | None) -> str:
    """Like `pick_device`; nothing is set."""
    import torch

    has_cuda = torch.cuda.is_available()
    if device is None:
        return "cuda" if has_cuda else "cpu"
    if device.partition(":")[0] == "mps":
        raise UsageError("Apple's GPUs are not supported", wanted=_DEVICES, found=device, hint="--device cpu")
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,4})?", device):
        raise UsageError(f"there is no device {device!r}", wanted=_DEVICES, found=device)
    kind, _, number = device.partition(":")
    if kind == "cuda" and (not has_cuda or int(number or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"{device} is not there", wanted="a CUDA device", found=f"{torch.cuda.device_count()} of them"
        )
    return device
