"""Units of work done here, in threads or by workers, and their results put in order again.

Floating-point sums depend on their order: who adds up results in the order of the items has the same bits
whoever did the work, and however fast.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier, Event, Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from cosettle_cache.core.errors import UsageError

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Numbered(Protocol):
    """An item of work that knows its place in the order."""

    @property
    def number(self) -> int:
        """The place; no two items share one."""


_DEVICES = "cpu, cuda or cuda:NUMBER"

Item = TypeVar("Item", bound=Numbered)
AnyItem = TypeVar("AnyItem")
Result = TypeVar("Result")

#: Does a unit of work for every item and yields (item, result) in any order; `Cluster.run` is one.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]


def one_by_one(unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Do every item here, one after the other."""
    for item in items:
        yield item, unit(item)


def in_threads(unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Do items side by side, as many as torch has threads, each of them on one core.

    The threads inside torch wait for each other, spinning, at every small operation; items need not wait.
    """
    import torch

    n_threads = torch.get_num_threads()
    one_core = partial(torch.set_num_threads, 1)
    try:
        yield from map_ahead(lambda item: (item, unit(item)), items, n_threads, initializer=one_core)
    finally:
        torch.set_num_threads(n_threads)


def in_order(
    run: Run, unit: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) in the order of `items`; what is ready early waits for its turn."""
    waiting: dict[int, tuple[Item, Result]] = {}
    order = iter([item.number for item in items])
    awaited = next(order, None)
    for item, result in run(unit, items):
        waiting[item.number] = (item, result)
        while awaited in waiting:
            yield waiting.pop(awaited)
            awaited = next(order, None)


def map_ahead(
    task: Callable[[AnyItem], Result],
    items: Iterable[AnyItem],
    n_threads: int,
    *,
    n_ahead: int | None = None,
    stop: Event | None = None,
    initializer: Callable[[], object] | None = None,
) -> Generator[Result, None, None]:
    """Yield `task(item)` in the order of `items`; threads work up to `n_ahead` items ahead.

    `n_ahead` is `n_threads` unless given. After `stop` no more tasks begin. An error is raised where its
    result is due; then, and when the consumer stops early, tasks in work are waited for. A forked child has
    none of the threads and does the rest itself.
    """
    pending: deque[tuple[AnyItem, Future[Result]]] = deque()
    process = os.getpid()
    pool = ThreadPoolExecutor(n_threads, "ahead", initializer=initializer)

    def finish() -> Result:
        item, future = pending.popleft()
        return future.result() if os.getpid() == process else task(item)

    try:
        for item in items:
            if stop is not None and stop.is_set():
                break
            pending.append((item, pool.submit(task, item) if os.getpid() == process else Future()))
            if len(pending) > (n_threads if n_ahead is None else n_ahead):
                yield finish()
        while pending:
            yield finish()
    finally:
        if os.getpid() == process:
            pool.shutdown(cancel_futures=True)


def start_one_core_threads(n_threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of threads that have all begun, each with torch on one core; others keep their number."""
    import torch

    started = Barrier(n_threads + 1)
    before = torch.get_num_threads()

    def start() -> None:
        # A thread's first question sets its number to the common one, so it comes before.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(n_threads, name, initializer=start)
    for _ in range(n_threads):
        pool.submit(started.wait)
    for _ in range(2):  # all have started; then none has two of these tasks
        started.wait()
    # The number is a thread's own; but the last one set is what threads to come begin with.
    torch.set_num_threads(before)
    return pool


#: Pools of threads on one core each that are open, and the number of OpenCV's threads that the first found.
_pools: list[int] = []
_starting = Lock()


@contextmanager
def one_core_threads(n_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that compute on one core each, in torch as in OpenCV.

    Work that has not begun at the end is dropped. What other threads, and threads to come, compute on stays
    as it was; OpenCV's number is the process's and is put back when the last pool closes.
    """
    import cv2

    with _starting:
        pool = start_one_core_threads(n_threads, name)
        _pools.append(_pools[-1] if _pools else cv2.getNumThreads())
        cv2.setNumThreads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        with _starting:
            found = _pools.pop()
            if not _pools:
                cv2.setNumThreads(found)


def share_of_cores(workers: int) -> int:
    """Return how many of this process's cores each of `workers` processes gets, at least one."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, n_cores // workers)


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


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; the host does not wait for the copy to a GPU."""
    # `cuda` is another device than `cuda:0`, and what is on a GPU cannot be pinned: only types tell.
    if device.type in (tensor.device.type, "cpu"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory of the host, without content, that a device copies from and to: page-locked for a GPU."""
    import numpy as np
    import torch

    if device.type == "cuda":
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    # NumPy's memory comes in huge pages: four times as fast to touch first as torch's.
    return torch.from_numpy(np.empty(tuple(shape), str(dtype).removeprefix("torch.")))
