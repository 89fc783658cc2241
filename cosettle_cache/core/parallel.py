"""Units of work handed out, here or to workers, and their results put in order again.

Floating-point sums depend on their order: who adds up results in the order of the items has the same bits
whoever did the work, and however fast.

Work on several slots at once, in threads.

In come a task and slots; results come out in order, a bounded number of slots ahead, until told to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Numbered(Protocol):
    """An item of work that knows its place in the order."""

    @property
    def number(self) -> int:
        """The place; no two items share one."""


Item = TypeVar("Item", bound=Numbered)
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
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(n_threads, "units", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            waiting.append((item, pool.submit(unit, item)))
            if len(waiting) > n_threads:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
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


AnyItem = TypeVar("AnyItem")


def map_ahead(
    task: Callable[[AnyItem], Result], items: Iterable[AnyItem], n_threads: int, stop: Event
) -> Iterator[Result]:
    """Yield `task(item)` in the order of `items`; after `stop` only for those that have begun.

    An error of a task is raised here, once the tasks in hand have ended.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_threads, "slots") as pool:
        try:
            for item in items:
                if stop.is_set():
                    break
                pending.append(pool.submit(task, item))
                if len(pending) > n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
