"""Filling slots: decode threads, the encoder and the disk work side by side.

Numbers of slots go in, committed slots come out in order. Decode threads write normalised images into a ring
of batch buffers, which the device copies from; tokens return into the memory of their slot while the next
batch is encoded. A batch never crosses a slot, so a slot's bytes do not depend on who fills it, since when.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count, groupby, pairwise
from pathlib import Path
from threading import Condition, Event, Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor

from cosettle_cache.core.errors import MediaError, UsageError
from cosettle_cache.core.parallel import host_memory, one_core_threads
from cosettle_cache.core.types import Encoding, MediaKind, Slot, Video
from cosettle_cache.encoders import Backbone
from cosettle_cache.extraction.images import Look, Views, resampling_of
from cosettle_cache.extraction.layers import SlotWriter
from cosettle_cache.store import Shard
from cosettle_cache.store.plan import Plan
from cosettle_cache.videos.frames import FrameReader

#: Frames per decode task of a frame folder at most: a folder is listed once per task.
FRAMES_PER_TASK = 4
#: Batch buffers: up to two that the device is not done with, the others being filled.
N_BUFFERS = 4
NOT_FINITE = "its tokens do not fit float16 (overflow or not a number)"


@dataclass(frozen=True, slots=True)
class FilledSlot:
    """A slot that was committed: how many encodings went through the encoder, and videos with reasons."""

    index: int
    n_encodings: int
    failures: Mapping[str, str]


@dataclass(slots=True)
class Clock:
    """Seconds by stage; the threads of one stage add up."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the stage `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - started})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by stage."""
        with self.lock:
            for name, value in seconds.items():
                self.seconds[name] += value


@dataclass(eq=False, slots=True)
class _Image:
    """One encoding: its position in the slot, the row of its view in the batch, and why there is none."""

    position: int
    row: int
    encoding: Encoding
    fault: str | None = None


@dataclass(eq=False, slots=True)
class _Frame:
    """A frame to decode: the images made of it, and by batch, in order, the row of each of its views."""

    images: list[_Image] = field(default_factory=list)
    rows: dict[_Batch, dict[Look, int]] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Task:
    """Frames of one video in one slot to decode together; `after` is the task that has to be done before."""

    reader: FrameReader
    views: Views
    frames: Mapping[int, _Frame]
    after: Event | None
    done: Event = field(default_factory=Event)


@dataclass(eq=False, slots=True)
class _Filling:
    """A slot in work: its tokens and which are finite, filled by the device, and what went wrong."""

    slot: Slot
    tokens: Float16[Tensor, "encoding row col channel"] | None = None
    finite: Bool[Tensor, " encoding"] | None = None
    n_encodings: int = 0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Batch:
    """Images of a slot that are encoded together; encodings of a frame with one crop and flip share a row.

    `tasks` begin with it, `missing` counts frames without views yet; `pixels` are there with the buffer.
    """

    filling: _Filling
    image_size: tuple[int, int]
    ends_slot: bool
    images: list[_Image] = field(default_factory=list)
    tasks: list[_Task] = field(default_factory=list)
    n_rows: int = 0
    missing: int = 0
    buffer: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """Images whose tokens are there when `done` is (on a GPU); `held` is what the device uses till then."""

    batch: _Batch
    images: Sequence[_Image]
    ends_batch: bool
    done: Any
    held: Sequence[Tensor]


#: A slot whose tokens are complete and not yet on disk.
_Encoded = tuple[Slot, Shard, FilledSlot]


class _Ring:
    """Batch buffers that decode threads fill; the thread that encodes hands them out and takes them back."""

    def __init__(self, n_numbers: int, device: torch.device) -> None:
        self.free = [host_memory((n_numbers,), torch.float32, device) for _ in range(N_BUFFERS)]
        self._changed = Condition()
        self._closed = False
        self._fault: BaseException | None = None

    def give(self, batch: _Batch) -> None:
        """Give a batch a buffer; there must be a free one."""
        with self._changed:
            batch.buffer = self.free.pop()
            shape = (batch.n_rows, 3, *batch.image_size)
            batch.pixels = batch.buffer[: int(np.prod(shape))].view(shape)
            self._changed.notify_all()

    def take_back(self, batch: _Batch) -> None:
        """Take the buffer of a batch that the device has done with."""
        assert batch.buffer is not None
        self.free.append(batch.buffer)
        batch.buffer = batch.pixels = None

    def wait_for_images(self, batch: _Batch) -> None:
        """Return when every view of a batch is there, or known not to come; raise what a thread raised."""
        with self._changed:
            self._changed.wait_for(lambda: not batch.missing or self._fault)
        if self._fault is not None:
            raise self._fault

    def wait_for_pixels(self, batch: _Batch) -> Tensor | None:
        """Return where the views of a batch go, once it has a buffer; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or batch.pixels is not None)
        return None if self._closed else batch.pixels

    def finish(self, batches: Iterable[_Batch]) -> None:
        """Note for each of these batches that the views of one more frame are there, or will not come."""
        with self._changed:
            for batch in batches:
                batch.missing -= 1
            self._changed.notify_all()

    def close(self, fault: BaseException | None = None) -> None:
        """Let no thread wait any longer."""
        with self._changed:
            self._closed, self._fault = True, fault
            self._changed.notify_all()


class _Lanes:
    """The way to a device and back: on a GPU a stream each, so that copies and the encoder overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._up, self._down = device, None, None
        if device.type == "cuda":
            self._up, self._down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def send(self, pixels: Tensor) -> Tensor:
        """Return images on the device; what is computed next waits for this copy alone."""
        if self._up is None:
            return pixels
        with torch.cuda.stream(self._up):
            there = pixels.to(self._device, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_event(self._up.record_event())
        return there

    def fetch(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Copy from the device into memory of the host, (from, to); return the event of the last copy."""
        if self._down is None:
            for source, target in pairs:
                target.copy_(source)
            return None
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return self._down.record_event()


@dataclass(slots=True)
class Turn:
    """Held by the thread that encodes; and how many images the device has room for, as far as is known."""

    lock: Lock = field(default_factory=Lock)
    most_images: int | None = None
    told: bool = False


@dataclass(frozen=True, slots=True)
class Filler:
    """One encoder and one store, with what lies between. Threads may share it: they take turns encoding.

    `encoded` is called with the size of every batch, `note` with what the user should know. Stages on the
    `clock`: `decode` and `write` are thread time, `encode` and `wait_images` belong to the thread that
    encodes, `wait_writer` is time without a free slot buffer.
    """

    plan: Plan
    videos: Mapping[str, Video]
    data_root: Path
    backbone: Backbone
    writer: SlotWriter
    batch_size: int = 16
    decode_threads: int = 1
    write_threads: int = 1
    encoded: Callable[[int], object] = lambda n_images: None
    note: Callable[[str], object] = lambda text: None
    clock: Clock = field(default_factory=Clock)
    turn: Turn = field(default_factory=Turn)

    def fill(self, slots: Iterable[int], stop: Event, *, retry_failed: bool = False) -> Iterator[FilledSlot]:
        """Yield those of `slots` that no other writer holds, once committed; `stop` ends after the next one.

        Each is claimed just before its first image is decoded. Raises `OutputError` when the store cannot be
        written, and `UsageError` for a device without room for one image; committed slots stay.
        """
        claimed: list[int] = []

        def claim() -> Iterator[int]:
            for index in slots:
                if self.writer.claim(index, retry_failed=retry_failed):
                    claimed.append(index)
                    yield index

        commits: deque[Future[FilledSlot]] = deque()

        def settle(pending: int) -> Iterator[FilledSlot]:
            while len(commits) > pending:
                with self.clock.stage("wait_writer"):
                    filled = commits.popleft().result()
                yield filled

        try:
            with (
                ThreadPoolExecutor(self.write_threads, "write") as writers,
                closing(self._encode(claim())) as encoded,
            ):
                for item in encoded:
                    commits.append(writers.submit(self._commit, *item))
                    yield from settle(self.write_threads)
                    if stop.is_set():
                        break
                yield from settle(0)
        finally:
            # After an error or an interrupt some are prepared and not committed.
            for index in claimed:
                self.writer.release(index)

    def fill_one(self, index: int) -> FilledSlot:
        """Fill one claimed slot; while it is written, another thread has the encoder."""
        (encoded,) = self._encode([index])
        return self._commit(*encoded)

    def _commit(self, slot: Slot, shard: Shard, filled: FilledSlot) -> FilledSlot:
        with self.clock.stage("write"):
            self.writer.commit(slot, shard, filled.failures)
        return filled

    def _encode(self, slots: Iterable[int]) -> Generator[_Encoded, None, None]:
        """Yield slots with their tokens; those of a batch are looked at when the next one is under way."""
        device = self.backbone.device
        sizes = [layout.grid.n_tokens * self.backbone.patch**2 for layout in self.plan.arrays]
        longest = max(layout.slot_encodings for layout in self.plan.arrays)
        ring, lanes = _Ring(min(self.batch_size, longest) * 3 * max(sizes), device), _Lanes(device)
        with closing(self._batches(slots, ring)) as batches:
            # Before the turn comes, the first images of a slot are under way.
            first = next(batches, None)
            with self.turn.lock:
                before: _Flight | None = None
                for batch in chain([] if first is None else [first], batches):
                    for flight in self._launch(batch, lanes):
                        if before is not None:
                            yield from self._land(before, ring)
                        before = flight
                if before is not None:
                    yield from self._land(before, ring)

    def _launch(self, batch: _Batch, lanes: _Lanes) -> Iterator[_Flight]:
        """Send a batch through the encoder, in parts where the device has no room for the whole."""
        for image in batch.images:
            if image.fault is not None:
                batch.filling.failures.setdefault(image.encoding.video_id, image.fault)
        todo = deque([[image for image in batch.images if image.fault is None]])
        while todo:
            images = todo.popleft()
            if len(images) > (self.turn.most_images or len(images)):
                size = _even(len(images), self.turn.most_images or 1)
                todo.extendleft([images[i : i + size] for i in range(0, len(images), size)][::-1])
                continue
            try:
                done, held = self._start(batch, images, lanes)
            except torch.OutOfMemoryError:
                done, held = None, None
            if held is None:  # outside of `except`, whose traceback would hold the memory
                self._make_room(batch, len(images))
                todo.appendleft(images)
                continue
            self._tell(batch)
            yield _Flight(batch, images, not todo, done, held)

    def _start(self, batch: _Batch, images: Sequence[_Image], lanes: _Lanes) -> tuple[Any, Sequence[Tensor]]:
        """Start encoding images; return the event of their tokens' arrival and what must live till then."""
        filling, device = batch.filling, self.backbone.device
        if filling.tokens is None or filling.finite is None:
            grid, n = filling.slot.grid, len(filling.slot.encodings)
            filling.tokens = host_memory((n, grid.rows, grid.cols, self.backbone.dim), torch.float16, device)
            filling.finite = host_memory((n,), torch.bool, device)
        if not images:
            return None, ()
        assert batch.pixels is not None
        images = sorted(images, key=lambda image: image.position)
        rows = [image.row for image in images]
        with self.clock.stage("encode"):
            pixels = lanes.send(batch.pixels[min(rows) : max(rows) + 1])
            views = [(image.row - min(rows), image.encoding.shift) for image in images]
            half = self.backbone.encode_views(pixels, views).to(torch.float16)
            finite = half.isfinite().flatten(1).all(dim=1)
            pairs = []
            for here, there in _stretches([image.position for image in images]):
                pairs += [(half[here], filling.tokens[there]), (finite[here], filling.finite[there])]
            return lanes.fetch(pairs), (pixels, half, finite)

    def _land(self, flight: _Flight, ring: _Ring) -> Iterator[_Encoded]:
        """Wait for the tokens of a flight and look for faults; yield the slot when it is complete."""
        filling = flight.batch.filling
        if flight.done is not None:
            with self.clock.stage("encode"):
                flight.done.synchronize()
        assert filling.tokens is not None and filling.finite is not None
        for image in flight.images:
            if not filling.finite[image.position]:
                filling.failures.setdefault(image.encoding.video_id, NOT_FINITE)
        filling.n_encodings += len(flight.images)
        self.encoded(len(flight.images))
        if flight.ends_batch:
            ring.take_back(flight.batch)
        if flight.ends_batch and flight.batch.ends_slot:
            slot = filling.slot
            filled = FilledSlot(slot.index, filling.n_encodings, filling.failures)
            yield slot, Shard(filling.tokens.numpy()), filled

    def _make_room(self, batch: _Batch, n_images: int) -> None:
        """Halve what goes through the encoder at a time; raise `UsageError` when one image was too much."""
        if n_images == 1:
            height, width = batch.image_size
            raise UsageError(
                f"{self.backbone.device} has no memory for one image of {height}x{width} pixels",
                hint="a smaller --size, --precision bf16, or another --device",
            )
        self.turn.most_images = -(-n_images // 2)

    def _tell(self, batch: _Batch) -> None:
        most, device = self.turn.most_images, self.backbone.device
        if most is not None and not self.turn.told:
            self.turn.told = True
            self.note(
                f"{device} has no memory for {len(batch.images)} images at a time: {most} from here on "
                f"(--batch {most} begins with that)"
            )

    def _batches(self, slots: Iterable[int], ring: _Ring) -> Generator[_Batch, None, None]:
        """Yield the batches of slots in order, their images prepared by threads ahead, in as many buffers."""
        planned, waiting = self._planned(slots), deque[_Batch]()
        with one_core_threads(self.decode_threads, "decode") as pool:
            try:
                while True:
                    while ring.free and (batch := next(planned, None)):
                        ring.give(batch)
                        for task in batch.tasks:
                            pool.submit(self._prepare, task, ring)
                        waiting.append(batch)
                    if not waiting:
                        return
                    with self.clock.stage("wait_images"):
                        ring.wait_for_images(waiting[0])
                    yield waiting.popleft()
            finally:
                ring.close()

    def _planned(self, slots: Iterable[int]) -> Iterator[_Batch]:
        reader: FrameReader | None = None
        last: _Task | None = None
        for slot in map(self.plan.slot, slots):
            n = len(slot.encodings)
            size, filling = _even(n, self.batch_size), _Filling(slot)
            image_size = (slot.grid.rows * self.backbone.patch, slot.grid.cols * self.backbone.patch)
            batches = [_Batch(filling, image_size, start + size >= n) for start in range(0, n, size)]
            order = count()
            positions = enumerate(slot.encodings)
            for video_id, items in groupby(positions, key=lambda item: item[1].video_id):
                video = self.videos[video_id]
                if reader is None or reader.video is not video:
                    reader, last = FrameReader(video, self.data_root), None
                mean, std = self.backbone.mean, self.backbone.std
                views = Views(self.plan.kind, *image_size, mean, std, resampling_of(self.plan))
                frames: defaultdict[int, _Frame] = defaultdict(_Frame)
                begins: dict[int, _Batch] = {}
                for position, encoding in sorted(items, key=lambda item: item[1].frame):
                    batch = batches[next(order) // size]
                    begins.setdefault(encoding.frame, batch)
                    _place(frames[encoding.frame], batch, position, encoding)
                for some in self._divided(video, list(frames), size):
                    after = last.done if last is not None and video.media_kind is MediaKind.FILE else None
                    last = _Task(reader, views, {frame: frames[frame] for frame in some}, after)
                    begins[some[0]].tasks.append(last)
            yield from batches

    def _divided(self, video: Video, frames: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        """Return the frames of a video by task: those of a file are one's, which decodes it forwards."""
        step = max(1, min(FRAMES_PER_TASK, batch_size // self.decode_threads))
        if video.media_kind is MediaKind.FILE:
            step = len(frames)
        return [frames[at : at + step] for at in range(0, len(frames), step)]

    def _prepare(self, task: _Task, ring: _Ring) -> None:
        left = list(task.frames.values())
        try:
            if task.after is not None:
                task.after.wait()  # two that read one file by turns would decode it again and again
            decoded = task.reader.read(list(task.frames))
            while left:
                with self.clock.stage("decode"):
                    resized = task.views.resize(next(decoded))
                # Batch by batch: a frame may be in more of them than there are buffers.
                for batch, rows in left.pop(0).rows.items():
                    if (pixels := ring.wait_for_pixels(batch)) is None:
                        return
                    with self.clock.stage("decode"):
                        task.views.write(resized, {look: pixels[row] for look, row in rows.items()})
                    ring.finish([batch])
        except MediaError as error:
            for frame in left:
                for image in frame.images:
                    # Without the data root: it is not the same everywhere, and the reason is kept.
                    image.fault = error.summary.removeprefix(f"{self.data_root}/")
                ring.finish(frame.rows)
        except BaseException as fault:
            ring.close(fault)  # raised again where the images are waited for
        finally:
            task.done.set()


def _place(frame: _Frame, batch: _Batch, position: int, encoding: Encoding) -> None:
    """Give an encoding a row of its batch, the one of its frame's encodings with equal crop and flip."""
    if batch not in frame.rows:
        frame.rows[batch] = {}
        batch.missing += 1
    row = frame.rows[batch].setdefault((encoding.crop, encoding.flip), batch.n_rows)
    batch.n_rows = max(batch.n_rows, row + 1)
    image = _Image(position, row, encoding)
    frame.images.append(image)
    batch.images.append(image)


def _even(n: int, most: int) -> int:
    """Return the size of equal parts of `n`, `most` at most; the last one may be smaller."""
    return -(-n // -(-n // most))


def _stretches(positions: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield where numbers that follow each other stand, and which they are."""
    bounds = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(positions)]
    for start, stop in pairwise(bounds):
        yield slice(start, stop), slice(positions[start], positions[stop - 1] + 1)
