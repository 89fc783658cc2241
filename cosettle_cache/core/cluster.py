"""Units of work over processes and machines: items go in, results come out in completion order.

`connect` starts worker processes on this machine or joins a running dask scheduler; `Cluster.run` submits
items, a few at a time. A unit must be safe to repeat: the item of a worker that dies is done again.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from threading import Event, Lock
from typing import Any, Generic, TypeVar

import dask
from distributed import (
    Client,
    Future,
    KilledWorker,
    Nanny,
    Scheduler,
    Security,
    SpecCluster,
    as_completed,
    get_worker,
)
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import backends
from distributed.scheduler import NoWorkerError

from cosettle_cache import __version__
from cosettle_cache.core.errors import ClusterError, CosettleError, UsageError, first_line
from cosettle_cache.core.parallel import Run, pick_device, share_of_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

#: How long to sleep when nothing is ready.
POLL_S = 0.01
#: How often the scheduler is asked who its workers are.
CENSUS_S = 1.0
CONNECT_TIMEOUT_S = 10
#: A scheduler at an address has this long to say that it is one, in so many bytes.
ANSWER_TIMEOUT_S, _MOST_GREETING = 3, 2**20
#: A worker that computes gets this long to leave when the cluster closes.
CLOSE_TIMEOUT_S = 5
#: Local workers that may die over one item before it is set aside; a running scheduler has its own setting.
LOCAL_DEATHS = 2
#: A local worker is replaced within seconds; after this long without any, nobody will come.
LOCAL_PATIENCE_S = 300.0
#: The tasks of one worker share its GPU, when it declares one.
GPU_SHARE = {"GPU": 0.01}

#: In a worker: the first unit imports its modules, and what half an import leaves is seen by nobody.
_unpickling = Lock()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers to hand units of work to; made by `connect`. `note` hears of waiting and of lost workers."""

    client: Client
    note: Callable[[str], object] = lambda text: None

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
        call = partial(_call, __version__, pickle.dumps(unit))
        run: _Run[Item] = _Run(self, call, stop or Event(), GPU_SHARE if on_gpus else {})
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
        yield Cluster(client, note)


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
    if workers and scheduler:
        raise UsageError("--workers and --scheduler exclude each other", wanted="one of the two")
    if device not in (None, "cpu", "cuda"):
        raise UsageError("workers are dealt their GPUs", wanted="--device cpu or cuda", found=device)
    gpus = [] if scheduler or pick_device(device) == "cpu" else _visible_gpus()
    with connect(workers=workers, scheduler=scheduler, threads=threads, gpus=gpus, note=note) as cluster:

        def run(unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
            on_gpus = device == "cuda" or (device is None and cluster.has_gpus())
            return cluster.run(unit, items, stop=stop, on_gpus=on_gpus)

        yield run


def _visible_gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


@dataclass(slots=True)
class _Run(Generic[Item]):
    """One call of `Cluster.run`: items that killed their workers, and workers as they were last counted."""

    cluster: Cluster
    call: Callable[[Item], Any]
    stop: Event
    resources: dict[str, float]
    killers: list[Item] = field(default_factory=list)
    workers: Mapping[str, int] = field(default_factory=dict)
    counted: float = float("-inf")

    def results(self, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        # Not all at once: the scheduler blames a death on every task that it has assigned to the worker, and
        # tasks with resources are all assigned at once. So as many are in hand as workers have threads.
        waiting, in_hand = iter(items), dict[Future[Any], Item]()
        finished = as_completed(loop=self.cluster.client.loop)
        try:
            while True:
                with _scheduler_gone(OSError):  # distributed's own are among them
                    self._count_workers()
                    # One at least: without workers it waits at the scheduler for the first to come.
                    n_threads = max(1, sum(self.workers.values()))
                    n_free = 0 if self.stop.is_set() else max(0, n_threads - len(in_hand))
                    if new := list(islice(waiting, n_free)):
                        futures = self.cluster.client.map(
                            self.call, new, pure=False, resources=self.resources
                        )
                        in_hand |= zip(futures, new, strict=True)
                        finished.update(futures)
                if not in_hand or (self.stop.is_set() and not self.workers):
                    return
                if not finished.has_ready():
                    time.sleep(POLL_S)
                for future in finished.next_batch(block=False):
                    item = in_hand.pop(future)
                    try:
                        result = _result(future)
                    except KilledWorker:
                        self.killers.append(item)
                    else:
                        yield item, result
        finally:
            if in_hand:
                with suppress(Exception):  # the cluster may be what failed
                    self.cluster.client.cancel(list(in_hand))

    def _count_workers(self) -> None:
        if time.monotonic() - self.counted < CENSUS_S:
            return
        threads = self.cluster.client.nthreads()
        if not threads and (self.workers or self.counted < 0):
            self.cluster.note("waiting for workers")
        elif lost := self.workers.keys() - threads.keys():
            self.cluster.note(f"workers lost: {len(lost)}; what they had in hand is done again")
        self.workers, self.counted = dict(threads), time.monotonic()


def _result(future: Future[Any]) -> Any:
    """Return the result of an item, or raise its unit's error, `KilledWorker` or `ClusterError`."""
    try:
        with _scheduler_gone(CancelledError):
            return future.result()
    except NoWorkerError as error:
        raise ClusterError("all worker processes died and none came back") from error
    except (ImportError, AttributeError, RuntimeError) as error:
        # A RuntimeError is the scheduler's when a task cannot be unpickled, else the unit's own.
        if isinstance(error, RuntimeError) and "deserialization" not in str(error):
            raise
        raise ClusterError(
            "a worker or the scheduler cannot import what it is asked to do",
            found=first_line(error).strip(),
            hint="install the same version of cosettle-cache wherever the scheduler and the workers run",
        ) from error


def _call(version: str, unit: bytes, item: Any) -> Any:
    """In a worker: return the result of an item."""
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
        return work(item)
    except CosettleError as error:
        error.details = (*error.details, f"on worker {get_worker().address}")
        raise


@contextmanager
def _scheduler_gone(told_by: type[Exception]) -> Iterator[None]:
    try:
        yield
    except told_by as error:
        hint = "run the same command again: what is finished is kept"
        raise ClusterError("the scheduler does not answer any more", hint=hint) from error


def _client(address: str | SpecCluster) -> Client:
    try:  # the client itself warns of other versions of Python, dask and numpy (`Client.get_versions`)
        if isinstance(address, str):
            _knock(address)
        return Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False, name="cosettle")
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"no scheduler answers at {address}",
            wanted="the address of a running dask scheduler, as tcp://host:8786",
            found=str(error) or type(error).__name__,
            hint="start one with: dask scheduler",
        ) from error


def _knock(address: str) -> None:
    """Raise an `OSError` or `ValueError` at once where the client would try again until its time is over."""
    scheme, place = parse_address(address)
    if scheme not in backends:
        raise ValueError(f"dask speaks no {scheme}")
    if scheme == "tls" and Security().get_connection_args("client")["ssl_context"] is None:
        raise ValueError("no certificate is configured (distributed.comm.tls in dask's settings)")
    if scheme in ("tcp", "tls"):
        with socket.create_connection(parse_host_port(place), ANSWER_TIMEOUT_S) as line:
            # A scheduler greets whoever connects, with the length of its greeting first.
            length = b"" if scheme == "tls" else line.recv(8, socket.MSG_WAITALL)
        if scheme == "tcp" and not 0 < int.from_bytes(length, "little") < _MOST_GREETING:
            raise ValueError("what listens there is no dask scheduler")


@contextmanager
def _local_cluster(workers: int, threads: int, gpus: Sequence[str]) -> Iterator[SpecCluster]:
    settings = {
        # Threads of numeric libraries are set per worker below, not to 1.
        "distributed.nanny.pre-spawn-environ": {},
        # On a busy machine a replaced worker needs its time.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # Asking a worker that has just died for its last result.
        "distributed.comm.timeouts.connect": "10s",
        "distributed.scheduler.no-workers-timeout": f"{LOCAL_PATIENCE_S}s",
        "distributed.scheduler.allowed-failures": LOCAL_DEATHS - 1,
    }
    # Whoever reaches a scheduler runs code as its owner, and every user of this machine reaches this address.
    secured = {"host": "127.0.0.1", "protocol": "tls://", "security": Security.temporary()}
    scheduler = {**secured, "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    threads_of_libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    cores = dict.fromkeys(threads_of_libraries, str(share_of_cores(workers)))
    dealt = [{"env": {**cores, "CUDA_VISIBLE_DEVICES": gpu}, "resources": {"GPU": 1}} for gpu in gpus]
    dealt = dealt or [{"env": cores}]
    with (
        tempfile.TemporaryDirectory(prefix="cosettle-", ignore_cleanup_errors=True) as scratch,
        dask.config.set(settings),
    ):
        options = {**secured, "nthreads": threads, "local_directory": scratch, "memory_limit": 0}
        options |= {"dashboard": False, "silence_logs": logging.CRITICAL}
        specs = {n: {"cls": Nanny, "options": {**options, **dealt[n % len(dealt)]}} for n in range(workers)}
        # A terminal sends Ctrl-C to the whole process group; workers are to finish what they have in hand, so
        # the threads and processes started here never see one. Python's resource tracker, started with the
        # first of them, would unblock it again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            cluster = SpecCluster(
                scheduler={"cls": Scheduler, "options": scheduler},
                workers=specs,
                security=secured["security"],
                silence_logs=logging.CRITICAL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield cluster
        finally:
            with suppress(TimeoutError):  # the processes end with this one
                cluster.close(timeout=CLOSE_TIMEOUT_S)
