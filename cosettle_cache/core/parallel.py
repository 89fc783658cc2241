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
from functools import partial
from threading import Event
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


def share_of_cores(workers: int) -> int:
    """Return how many of this process's cores each of `workers` processes gets, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


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
