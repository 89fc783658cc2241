"""Filling slots: decode threads, the encoder and the disk work side by side.

Numbers of slots go in, committed slots come out in order. A batch never crosses a slot, so the bytes of a
slot do not depend on where a run started, nor on which process fills it.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Encoding, MediaKind, PositionShift, Slot, Video
from cosettle_cache.encoders import Backbone
from cosettle_cache.extraction.images import View, Views, resampling_of
from cosettle_cache.store import Shard, StoreWriter
from cosettle_cache.store.plan import Plan
from cosettle_cache.videos.frames import FrameReader

#: Frames per decode task of a frame folder: small enough to spread over threads.
FRAMES_PER_TASK = 4
#: Prepared images waiting for the encoder, in batches; bounds the memory of the decode threads.
BATCHES_AHEAD = 3
#: Finished slots waiting for the disk; one more is being filled meanwhile.
MAX_PENDING_COMMITS = 1
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


@dataclass(frozen=True, slots=True)
class _Task:
    """Encodings of one video in one slot to prepare together, by frame: (position in the slot, encoding)."""

    slot: Slot
    reader: FrameReader
    views: Views
    frames: Mapping[int, Sequence[tuple[int, Encoding]]]


@dataclass(frozen=True, slots=True)
class _Image:
    """One encoding's view and its position in the slot; encodings with equal pixels share the view."""

    position: int
    encoding: Encoding
    view: View


_Prepared = tuple[_Task, Future[list[_Image] | MediaError]]
#: A batch on the device: images, distinct views, and for every image the number of its view and its shift.
_Upload = tuple[Sequence[_Image], Tensor, Sequence[tuple[int, PositionShift | None]]]
#: A slot whose tokens are complete and not yet on disk.
_Encoded = tuple[Slot, Shard, FilledSlot]


@dataclass(frozen=True, slots=True)
class Filler:
    """One encoder and one store, with what lies between. Threads may share it: they take turns encoding.

    `encoded` is called with the size of every batch. Stages on the `clock`: `decode` and `write` are thread
    time, `encode` and `wait_images` belong to the thread that encodes, `wait_writer` is time without a free
    slot buffer.
    """

    plan: Plan
    videos: Mapping[str, Video]
    data_root: Path
    backbone: Backbone
    writer: StoreWriter
    decoders: ThreadPoolExecutor
    batch_size: int = 16
    encoded: Callable[[int], object] = lambda n_images: None
    clock: Clock = field(default_factory=Clock)
    turn: Lock = field(default_factory=Lock)

    def fill(self, slots: Iterable[int], stop: Event, *, retry_failed: bool = False) -> Iterator[FilledSlot]:
        """Yield those of `slots` that no other writer holds, once committed; `stop` ends after the next one.

        Each is claimed just before its first image is decoded. Raises `OutputError` when the store cannot be
        written; committed slots stay.
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
            with ThreadPoolExecutor(1, "write") as writers, closing(self._encode(claim())) as encoded:
                for item in encoded:
                    commits.append(writers.submit(self._commit, *item))
                    yield from settle(MAX_PENDING_COMMITS)
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
        with closing(self._prepared(slots)) as prepared:
            # Before the turn comes, the first images of a slot are under way.
            for slot, results in groupby(prepared, key=lambda result: result[0].slot):
                with self.turn:
                    n_encodings, failures = 0, dict[str, str]()
                    shard = self.writer.new_shard(slot)
                    for images, pixels, views in _uploads(
                        self._batches(results, failures), self.backbone.device
                    ):
                        with self.clock.stage("encode"):
                            half = self.backbone.encode_views(pixels, views).to(torch.float16)
                            finite = half.isfinite().flatten(1).all(dim=1).tolist()
                            shard.tokens[[image.position for image in images]] = half.cpu().numpy()
                        for image, is_finite in zip(images, finite, strict=True):
                            if not is_finite:
                                failures[image.encoding.video_id] = NOT_FINITE
                        n_encodings += len(images)
                        self.encoded(len(images))
                yield slot, shard, FilledSlot(slot.index, n_encodings, failures)

    def _batches(self, results: Iterable[_Prepared], failures: dict[str, str]) -> Iterator[list[_Image]]:
        batch: list[_Image] = []
        for task, future in results:
            with self.clock.stage("wait_images"):
                images = future.result()
            if isinstance(images, MediaError):
                # Without the data root: it is not the same everywhere, and the reason is kept.
                reason = images.summary.removeprefix(f"{self.data_root}/")
                failures[task.reader.video.video_id] = reason
                continue
            for image in images:
                batch.append(image)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _prepared(self, slots: Iterable[int]) -> Generator[_Prepared, None, None]:
        """Prepare the images of slots in threads, yield them in order, hold a bounded number of images."""
        pending: deque[_Prepared] = deque()
        n_pending = 0
        try:
            for task in self._tasks(slots):
                pending.append((task, self.decoders.submit(self._prepare, task)))
                n_pending += sum(map(len, task.frames.values()))
                while n_pending > BATCHES_AHEAD * self.batch_size and len(pending) > 1:
                    n_pending -= sum(map(len, pending[0][0].frames.values()))
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()

    def _tasks(self, slots: Iterable[int]) -> Iterator[_Task]:
        reader: FrameReader | None = None
        for slot in map(self.plan.slot, slots):
            positions = enumerate(slot.encodings)
            for video_id, items in groupby(positions, key=lambda item: item[1].video_id):
                video = self.videos[video_id]
                if reader is None or reader.video is not video:
                    reader = FrameReader(video, self.data_root)
                size = self.plan.recipe.image_size(video)
                views = Views(
                    self.plan.kind, *size, self.backbone.mean, self.backbone.std, resampling_of(self.plan)
                )
                by_frame: defaultdict[int, list[tuple[int, Encoding]]] = defaultdict(list)
                for position, encoding in items:
                    by_frame[encoding.frame].append((position, encoding))
                frames = sorted(by_frame)
                # A video file is decoded forwards by one task; the frames of a folder are independent.
                step = FRAMES_PER_TASK if video.media_kind is MediaKind.FRAMES else len(frames)
                for at in range(0, len(frames), step):
                    some = {frame: by_frame[frame] for frame in frames[at : at + step]}
                    yield _Task(slot, reader, views, some)

    def _prepare(self, task: _Task) -> list[_Image] | MediaError:
        images: list[_Image] = []
        try:
            with self.clock.stage("decode"):
                decoded = task.reader.read(list(task.frames))
                for items, image in zip(task.frames.values(), decoded, strict=True):
                    views = task.views.prepare(image, [encoding for _, encoding in items])
                    images += [_Image(*item, view) for item, view in zip(items, views, strict=True)]
        except MediaError as error:
            return error
        return images


def _uploads(batches: Iterable[Sequence[_Image]], device: torch.device) -> Iterator[_Upload]:
    """Yield batches on the device, each distinct view once; the next is under way when one is yielded."""
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    waiting: _Upload | None = None
    for batch in chain(batches, [None]):
        upload = None if batch is None else _upload(batch, device, stream)
        if waiting is not None:
            if stream is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                waiting[1].record_stream(current)
            yield waiting
        waiting = upload


def _upload(batch: Sequence[_Image], device: torch.device, stream: Any) -> _Upload:
    distinct = {id(image.view): image.view for image in batch}
    number = {key: place for place, key in enumerate(distinct)}
    pixels = torch.stack(list(distinct.values()))
    if stream is not None:
        # From pinned memory on a stream of its own, so that the copy overlaps with the batch before.
        with torch.cuda.stream(stream):
            pixels = pixels.pin_memory().to(device, non_blocking=True)
    return batch, pixels, [(number[id(image.view)], image.encoding.shift) for image in batch]
