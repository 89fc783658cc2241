"""Feeding: which samples an epoch visits in which order, and a ring of batch buffers that one thread fills.

Sample ids go in; batches of float16 tokens in reused buffers come out, read while the last one is in use.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float16
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]

#: Batches of sample ids of an epoch; the same for the same epoch, whenever it is asked.
EpochBatches = Callable[[int], Sequence[Ids]]

#: One buffer in use, one ready, one being filled.
N_BUFFERS = 3


@runtime_checkable
class SampleSource(Protocol):
    """Where samples come from; a pairs `FeatureStore` is one."""

    def read_into(self, ids: Ids, out: NDArray[np.float16], /) -> None:
        """Fill `out` `[n 3 row col dim]` with the samples `ids`."""


@dataclass(frozen=True, slots=True)
class ViewOrder:
    """Epoch `e` visits view set `e` modulo their number: every clip once, in an order of seed and epoch.

    A remainder that fills no batch is dropped, unless there is no full batch at all.
    """

    ids_by_view: tuple[Ids, ...]
    batch_size: int
    seed: int

    def __call__(self, epoch: int) -> Sequence[Ids]:
        """Return the batches of an epoch."""
        view = self.ids_by_view[epoch % len(self.ids_by_view)]
        ids = np.random.default_rng((self.seed, epoch)).permutation(view)
        n_batches = len(ids) // self.batch_size
        return np.split(ids[: n_batches * self.batch_size], n_batches) if n_batches else [ids]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its number from 0, its epoch, its place in epochs and fractions, its samples."""

    number: int
    epoch: int
    position: float
    ends_epoch: bool
    ids: Ids


def make_steps(batches: EpochBatches, epochs: int, start: int = 0) -> Iterator[Step]:
    """Yield the steps of a run from number `start` on, so that a resumed run sees what the whole run saw."""
    first = 0
    for epoch in range(epochs):
        of_epoch = batches(epoch)
        for number, ids in enumerate(of_epoch):
            if first + number >= start:
                position = epoch + number / len(of_epoch)
                yield Step(first + number, epoch, position, number + 1 == len(of_epoch), ids)
        first += len(of_epoch)


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one step; they lie in a ring buffer and are valid until the next batch is asked for."""

    step: Step
    samples: Float16[Tensor, "n 3 row col dim"]


class BatchRing:
    """Iterates over the batches of `steps`, reading ahead in one thread into `N_BUFFERS` reused buffers.

    `capacity` is the largest batch, `pin` puts the buffers in page-locked memory for copies to a GPU. Use as
    a context manager; `waited_s` counts the seconds that the consumer stood still for data.
    """

    def __init__(
        self,
        source: SampleSource,
        steps: Iterable[Step],
        sample_shape: tuple[int, int, int, int],
        capacity: int,
        *,
        pin: bool = False,
    ) -> None:
        self.waited_s = 0.0
        self._source, self._steps = source, steps
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Tensor, Batch] | BaseException | None] = queue.SimpleQueue()
        for _ in range(N_BUFFERS):
            self._free.put(torch.empty((capacity, *sample_shape), dtype=torch.float16, pin_memory=pin))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)

    def __enter__(self) -> BatchRing:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._free.put(torch.empty(0))  # wakes the thread where it waits for a buffer
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            item = self._ready.get()
            self.waited_s += time.perf_counter() - asked
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            buffer, batch = item
            yield batch
            self._free.put(buffer)

    def _fill(self) -> None:
        try:
            for step in self._steps:
                buffer = self._free.get()
                if self._closed.is_set():
                    return
                samples = buffer[: len(step.ids)]
                self._source.read_into(step.ids, samples.numpy())
                self._ready.put((buffer, Batch(step, samples)))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)  # raised again where the batch is asked for
