"""Streaming: chunks in order, read ahead by other threads while the last one is in use.

Stretches and a function that fills one go in; the stretches come out in order, filled. Near (a local disk)
the consumer reads too, as long as it would only wait; far (an object store) it waits for threads that do.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Container, Generator, Sequence
from concurrent.futures import Executor, Future, wait
from queue import SimpleQueue
from threading import Lock

from cosettle_cache.store.stretches import Stretch

#: Prepares reading of a stretch, in another thread; raises nothing.
Begin = Callable[[Stretch], None]

#: Fills a stretch; says whether that took no waiting for the disk.
Fill = Callable[[Stretch], bool]

#: Stretches that exist at once near: one in use, one that each thread reads, one read ahead.
NEAR_STRETCHES = 4

#: How many stretches before a shard its reading begins.
_BEGIN_AHEAD = 6

#: Bytes that must have been at hand in a row before a second thread reads: more than kernels read ahead.
_STEADY_BYTES = 16 * 2**20


class AtHand:
    """How much was read in a row without waiting for the disk, by all streams of a store.

    One that begins where another ended warm is helped from the start.
    """

    def __init__(self) -> None:
        self._n_bytes = 0

    def note(self, part: Stretch, at_hand: bool) -> None:
        """Count a stretch, or begin anew where it was not at hand."""
        self._n_bytes = self._n_bytes + sum(out.nbytes for out in part.outs) if at_hand else 0

    @property
    def is_steady(self) -> bool:
        """Whether the page cache, not the kernel's read-ahead, holds what comes next."""
        return self._n_bytes >= _STEADY_BYTES


def stream_far(
    parts: Sequence[Stretch], fill: Fill, pool: Executor, n_readers: int
) -> Generator[Stretch, None, None]:
    """Yield the stretches filled; `n_readers` are on their way: a read is a round trip, or a codec's work."""
    pending: deque[tuple[Stretch, Future[bool]]] = deque()
    process = os.getpid()
    try:
        for part in parts:
            pending.append((part, pool.submit(fill, part)))
            if len(pending) > n_readers:
                yield _await(pending)
        while pending:
            yield _await(pending)
    finally:
        if os.getpid() == process:  # a forked child has nobody to wait for
            wait([future for _, future in pending if not future.cancel()])


def _await(pending: deque[tuple[Stretch, Future[bool]]]) -> Stretch:
    part, future = pending.popleft()
    future.result()
    return part


class NearReading:
    """Stretches that the consumer and one helper claim in turn, while their memory is free.

    To wake a thread costs as much as to read a frame from the page cache, so neither waits for the other
    while there is something to read. The helper ends where there is not, and where the disk has to be waited
    for: a lone reader in order is twice as fast there, as the kernel's read-ahead takes it for what it is.

    `begin` is called for stretches whose numbers are in `starts`, a while before they are filled.
    """

    def __init__(
        self,
        parts: Sequence[Stretch],
        starts: Container[int],
        fill: Fill,
        begin: Begin,
        at_hand: AtHand,
        pool: Executor,
    ) -> None:
        self._parts, self._starts, self._fill, self._begin = parts, starts, fill, begin
        self._at_hand, self._n_released = at_hand, 0
        self._start_afresh(pool)

    def stream(self) -> Generator[Stretch, None, None]:
        """Yield the stretches filled, at most `NEAR_STRETCHES` of them in use or ahead at a time."""
        try:
            for number, part in enumerate(self._parts):
                self._finish(number)
                yield part
                # Without the lock, which a forked child may find held for ever; nobody else writes this.
                self._n_released += 1
        finally:
            self._close()

    def _start_afresh(self, pool: Executor | None) -> None:
        self._process, self._pool = os.getpid(), pool
        self._lock = Lock()
        self._helper: Future[None] | None = None
        self._n_claimed = self._n_released
        self._ended: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()
        self._outcomes: dict[int, Exception | None] = {}

    def _finish(self, number: int) -> None:
        """Return when stretch `number` is filled; raise what filling it raised."""
        if self._is_forked:
            # None of the parent's threads is here: what they were reading is read again, by this one.
            self._start_afresh(None)
        self._start_helper()
        while number not in self._outcomes:
            claimed = self._claim() if self._ended.empty() else None
            if claimed is not None:
                self._outcomes[claimed] = self._read(claimed)
            else:
                ended, error = self._ended.get()
                self._outcomes[ended] = error
        error = self._outcomes.pop(number)
        if error is not None:
            raise error

    def _close(self) -> None:
        """Return when nobody fills anything any more."""
        if self._is_forked:
            return
        with self._lock:
            self._n_claimed = len(self._parts)
        if self._helper is not None:
            self._helper.result()

    def _start_helper(self) -> None:
        is_free = self._helper is None or self._helper.done()
        if self._pool and is_free and self._at_hand.is_steady and self._n_claimed < len(self._parts):
            self._helper = self._pool.submit(self._help)

    def _help(self) -> None:
        while self._at_hand.is_steady and (claimed := self._claim()) is not None:
            self._ended.put((claimed, self._read(claimed)))

    @property
    def _is_forked(self) -> bool:
        return self._process != os.getpid()

    def _claim(self) -> int | None:
        """Return the next stretch to read, if there is memory for it."""
        with self._lock:
            if self._n_claimed >= min(len(self._parts), self._n_released + NEAR_STRETCHES):
                return None
            self._n_claimed += 1
            return self._n_claimed - 1

    def _read(self, number: int) -> Exception | None:
        """Fill a stretch; an error is for the moment when the stretch is asked for."""
        self._begin_shards(number)
        part = self._parts[number]
        try:
            self._at_hand.note(part, self._fill(part))
        except Exception as error:
            return error
        return None

    def _begin_shards(self, number: int) -> None:
        """Begin the shard that comes `_BEGIN_AHEAD` stretches later; with the first stretch all up to it."""
        last = number + _BEGIN_AHEAD
        for upcoming in range(last if number else 0, last + 1):
            if self._pool and upcoming in self._starts:
                self._pool.submit(self._begin, self._parts[upcoming])
