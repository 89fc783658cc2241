"""Warming: a window of shards is read into the page cache in one go, before samples are drawn from it.

Portions of a shard-shuffled order go in and come out unchanged, each once its windows are warm. While a
window is in use the next one is read, in the order of the disk: so shuffled samples come at its best speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from cosettle_cache.training.feeding import EpochOrder, Ids, Portion, ShuffleShards

#: Reads samples into the page cache.
Warm = Callable[[Ids], None]


class Windows:
    """The windows of an order that shuffles shards, numbered as they are visited."""

    def __init__(self, order: EpochOrder, shuffle: ShuffleShards) -> None:
        self._order, self._shuffle = order, shuffle
        self._of_epoch = lru_cache(2)(self._number)

    def __call__(self, portion: Portion) -> Ids:
        """Return the window of each sample of a portion."""
        ids, windows = self._of_epoch(portion.step.epoch)
        found: Ids = windows[np.searchsorted(ids, portion.ids)]
        return found

    def _number(self, epoch: int) -> tuple[Ids, Ids]:
        ids = self._order.ids_of(epoch)
        windows = self._shuffle.windows(ids, self._order.generator(epoch))
        ascending = np.argsort(ids)
        return ids[ascending], windows[ascending]


def warmed(portions: Iterable[Portion], windows: Windows, warm: Warm) -> Iterator[Portion]:
    """Yield the portions when their windows are warm; raise what `warm` raises."""
    pool = ThreadPoolExecutor(1, "warm")
    ahead: tuple[Future[None], list[Portion]] | None = None
    try:
        for ids, complete in by_window(portions, windows):
            before, ahead = ahead, (pool.submit(warm, ids), complete)
            yield from _when_warm(before)
        yield from _when_warm(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _when_warm(window: tuple[Future[None], list[Portion]] | None) -> Iterator[Portion]:
    if window is not None:
        future, portions = window
        future.result()
        yield from portions


def by_window(portions: Iterable[Portion], windows: Windows) -> Iterator[tuple[Ids, list[Portion]]]:
    """Yield the samples of each window, and the portions for which it is the last that they need."""
    current: tuple[int, int] | None = None
    nothing = np.empty(0, np.int64)  # a process's share of a small batch may be empty
    ids, complete = [nothing], list[Portion]()
    for portion in portions:
        numbers = windows(portion)
        for number in np.unique(numbers).tolist():
            window = (portion.step.epoch, number)
            if current not in (None, window):
                yield np.concatenate(ids), complete
                ids, complete = [nothing], []
            current = window
            ids.append(portion.ids[numbers == number])
        complete.append(portion)
    yield np.concatenate(ids), complete
