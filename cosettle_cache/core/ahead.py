"""Work on several slots at once, in threads.

In come a task and slots; results come out in order, a bounded number of slots ahead, until told to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    task: Callable[[Item], Result], items: Iterable[Item], n_threads: int, stop: Event
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
