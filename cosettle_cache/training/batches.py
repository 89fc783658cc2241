"""Feeding: which samples an epoch visits in which order, and a ring of batch buffers that one thread fills.

Sample ids go in; batches of float16 tokens come out in reused buffers on the device, read and copied while
the last is in use. Reads in an order by shards are announced to the store one window of shards ahead.
Replicas, the processes of one run as torchrun starts them, each work on their share of every batch and add up
gradients and figures.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float16
from numpy.typing import NDArray
from torch import Tensor

from cosettle_cache.core.errors import CosettleError, UsageError
from cosettle_cache.core.parallel import host_memory

Ids = NDArray[np.int64]

#: One buffer in use, one ready, one being filled.
_N_BUFFERS = 3


@runtime_checkable
class SampleSource(Protocol):
    """Where samples come from; a pairs `FeatureStore` is one."""

    def read_into(self, ids: Ids, out: NDArray[np.float16], /) -> None:
        """Fill `out` `[n view row col dim]` with the samples `ids`."""


def shuffle_samples(ids: Ids, generator: np.random.Generator) -> Ids:
    """Return the ids in any order."""
    return generator.permutation(ids)


@dataclass(frozen=True, slots=True)
class ShuffleShards:
    """Shards in random order, samples shuffled within every `window` shards that follow each other.

    Reads stay within a few shards at a time: for object stores and spinning disks.
    """

    slots_of: Callable[[Ids], Ids]
    window: int

    def __call__(self, ids: Ids, generator: np.random.Generator) -> Ids:
        """Return the ids in such an order."""
        _, shard = np.unique(self.slots_of(ids), return_inverse=True)
        windows = generator.permutation(shard.max() + 1)[shard] // self.window
        shuffled = generator.permutation(len(ids))
        return ids[shuffled[np.argsort(windows[shuffled], kind="stable")]]


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The batches of an epoch: every training sample once, in an order of seed and epoch.

    `held_out` marks samples that are left out after shuffling, so that all others keep their order. A
    remainder that fills no batch is dropped, unless there is no full batch at all. `arrange` may reorder the
    samples within a batch (to read each store in one go).
    """

    ids_of: Callable[[int], Ids]
    batch_size: int
    seed: int
    shuffle: Callable[[Ids, np.random.Generator], Ids] = shuffle_samples
    held_out: Callable[[Ids], NDArray[np.bool_]] | None = None
    arrange: Callable[[Ids], Ids] | None = None

    def __call__(self, epoch: int) -> Sequence[Ids]:
        """Return the batches of an epoch; none when every sample is held out."""
        ids = self.visited(epoch)
        n_batches = len(ids) // self.batch_size
        if not len(ids):
            return []
        batches = np.split(ids[: n_batches * self.batch_size], n_batches) if n_batches else [ids]
        return [self.arrange(batch) for batch in batches] if self.arrange else batches

    def visited(self, epoch: int) -> Ids:
        """Return the training samples of an epoch in their order, a remainder included."""
        ids = self.shuffle(self.ids_of(epoch), np.random.default_rng((self.seed, epoch)))
        return ids if self.held_out is None else ids[~self.held_out(ids)]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its number from 0, its epoch, its place in epochs and fractions, its samples."""

    number: int
    epoch: int
    position: float
    ends_epoch: bool
    ids: Ids


def make_steps(batches: Callable[[int], Sequence[Ids]], epochs: int, start: int = 0) -> Iterator[Step]:
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
class Portion:
    """What is read in one go: samples of a step, and whether they are its last."""

    step: Step
    ids: Ids
    ends_step: bool


def make_portions(
    steps: Iterable[Step], n_portions: int = 1, share: Callable[[Ids], Ids] | None = None
) -> Iterator[Portion]:
    """Yield every step in `n_portions` parts of nearly equal size; `share` picks this process's ids."""
    for step in steps:
        parts = np.array_split(step.ids if share is None else share(step.ids), n_portions)
        for number, ids in enumerate(parts):
            yield Portion(step, ids, number + 1 == n_portions)


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of a portion, on the device; they lie in a buffer that the next batches are read into.

    What the device is asked to do before the next batch is asked for still sees them.
    """

    portion: Portion
    samples: Float16[Tensor, "n view row col dim"]


class BatchRing:
    """Iterates over the batches of `portions`, reading ahead in one thread into three reused buffers.

    `capacity` is the largest portion. For a GPU the buffers are page-locked, and batches go on to two buffers
    there while the one before is worked on. Use as a context manager; `waited_s` counts the seconds that the
    consumer stood still for data.
    """

    def __init__(
        self,
        source: SampleSource,
        portions: Iterable[Portion],
        sample_shape: tuple[int, int, int, int],
        capacity: int,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.waited_s = 0.0
        self._source, self._portions = source, portions
        #: Buffers, and the event of a GPU after which each may be filled again.
        self._free: queue.SimpleQueue[tuple[Tensor, Any]] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Tensor, Batch] | BaseException | None] = queue.SimpleQueue()
        self._shape, self._device = (capacity, *sample_shape), torch.device(device)
        for _ in range(_N_BUFFERS):
            self._free.put((host_memory(self._shape, torch.float16, self._device), None))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)

    def __enter__(self) -> BatchRing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._free.put((torch.empty(0), None))  # wakes the thread where it waits for a buffer
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        if self._device.type == "cuda":
            yield from self._on_gpu()
            return
        for buffer, batch in self._filled():
            yield batch
            self._free.put((buffer, None))

    def _on_gpu(self) -> Iterator[Batch]:
        """Yield batches in two buffers of a GPU; a stream of its own copies while the device computes."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        computing = torch.cuda.current_stream(self._device)
        there = [torch.empty(self._shape, dtype=torch.float16, device=self._device) for _ in range(2)]
        used = [computing.record_event() for _ in there]
        for number, (buffer, batch) in enumerate(self._filled()):
            samples = there[number % 2][: len(batch.samples)]
            stream.wait_event(used[number % 2])
            with torch.cuda.stream(stream):
                samples.copy_(batch.samples, non_blocking=True)
            uploaded = stream.record_event()
            self._free.put((buffer, uploaded))
            computing.wait_event(uploaded)
            yield Batch(batch.portion, samples)
            used[number % 2] = computing.record_event()

    def _filled(self) -> Iterator[tuple[Tensor, Batch]]:
        while True:
            asked = time.perf_counter()
            item = self._ready.get()
            self.waited_s += time.perf_counter() - asked
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # a thread's own; the first card else
        try:
            for portion in self._portions:
                buffer, uploaded = self._free.get()
                if self._closed.is_set():
                    return
                if uploaded is not None:
                    uploaded.synchronize()
                samples = buffer[: len(portion.ids)]
                if len(portion.ids):
                    self._source.read_into(portion.ids, samples.numpy())
                self._ready.put((buffer, Batch(portion, samples)))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)  # raised again where the batch is asked for


def announced(
    portions: Iterable[Portion], window: int, slots_of: Callable[[Ids], Ids], will_need: Callable[[Ids], None]
) -> Iterator[Portion]:
    """Yield the portions unchanged; `will_need` is called with new shards one window before they are read.

    The portions in waiting lie in the windows of `window` shards in use and the next one.
    """
    waiting: deque[tuple[Portion, Ids]] = deque()
    n_waiting: Counter[int] = Counter()  # portions by shard
    for portion in portions:
        slots = np.unique(slots_of(portion.ids))
        new = np.array([slot for slot in slots.tolist() if slot not in n_waiting], np.int64)
        if len(new):
            will_need(new)
        waiting.append((portion, slots))
        n_waiting.update(slots.tolist())
        while len(n_waiting) > 2 * window and len(waiting) > 1:
            due, slots = waiting.popleft()
            n_waiting.subtract(slots.tolist())
            n_waiting = +n_waiting
            yield due
    yield from (portion for portion, _ in waiting)


@dataclass(frozen=True, slots=True)
class Replicas:
    """This process's number and how many there are; the first one writes files and reports."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, ids: Ids) -> Ids:
        """Return this process's part of a step's ids; parts differ by at most one in length."""
        return np.array_split(ids, self.count)[self.rank]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave once all processes are here; a known error of one of them is raised in all."""
        error: CosettleError | None = None
        try:
            yield
        except CosettleError as caught:
            error = caught
        errors = [error] * self.count
        if self.count > 1:
            dist.all_gather_object(errors, error)
        if found := next(filter(None, errors), None):
            raise found

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Replicas()


@contextmanager
def join_replicas(device: str) -> Iterator[tuple[Replicas, str]]:
    """Join the processes that torchrun started; yield this one's place and its device.

    Without torchrun's environment this process is alone. `cuda` becomes the GPU of the local rank. Raises
    `UsageError` for one GPU named for all processes, and for a process without a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    place: torch.device | None = None
    if device.startswith("cuda"):
        rank, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device != "cuda":
            raise UsageError("torchrun deals the GPUs to its processes", wanted="--device cuda", found=device)
        if rank >= n_gpus:
            wanted = f"--nproc-per-node {n_gpus} or fewer"
            raise UsageError(
                f"process {rank} of this machine has no GPU", wanted=wanted, found=f"{n_gpus} GPUs"
            )
        device = f"cuda:{rank}"
        place = torch.device(device)
        torch.cuda.set_device(place)
    dist.init_process_group("gloo" if place is None else "nccl", device_id=place)
    try:
        yield Replicas(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
