"""Stage one: manifest -> frames -> frozen encoder -> store. Decoding, encoding and writing overlap.

Decode threads prepare images a bounded number ahead, the calling thread encodes batch by batch, one thread
writes finished slots. A batch never crosses a slot, so a slot's bytes do not depend on where a run started.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain, groupby
from pathlib import Path
from threading import Event, Lock

import torch

from cosettle_cache.backbones import Backbone
from cosettle_cache.config import package_versions
from cosettle_cache.console import SILENT, Progress
from cosettle_cache.errors import MediaError
from cosettle_cache.frames import FrameReader
from cosettle_cache.manifest import manifest_digest
from cosettle_cache.plan import Plan
from cosettle_cache.store import SPEC_VERSION, Shard, StoreWriter
from cosettle_cache.types import Encoding, Fingerprint, Manifest, MediaKind, Slot, Video
from cosettle_cache.upload import PreparedImage, Upload, Uploader
from cosettle_cache.views import Views, make_views, views_rule

#: Frames per decode task of a frame folder: small enough to spread over threads.
FRAMES_PER_TASK = 4
#: Prepared images waiting for the encoder, in batches; bounds the memory of the decode threads.
BATCHES_AHEAD = 3
#: Finished slots waiting for the disk; one more is being filled meanwhile.
MAX_PENDING_COMMITS = 1
NOT_FINITE = "its tokens do not fit float16 (overflow or not a number)"


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds per stage: `decode` and `write` are thread time, the others the encoder thread's own.

    `wait_images` is time without an image to encode, `wait_writer` time without a free slot buffer.
    """

    decode: float
    encode: float
    write: float
    wait_images: float
    wait_writer: float
    total: float


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What one run of `extract` did; `failures` maps video ids to reasons, for this run's slots."""

    n_slots: int
    n_slots_before: int
    n_encodings: int
    failures: Mapping[str, str]
    seconds: StageSeconds
    interrupted: bool

    @property
    def images_per_s(self) -> float:
        """Encodings per second of wall time."""
        return self.n_encodings / self.seconds.total if self.seconds.total else 0.0


def make_fingerprint(backbone: Backbone, plan: Plan, manifest: Manifest) -> Fingerprint:
    """Return everything that decides the tokens of the store about to be written."""
    return Fingerprint(
        spec_version=SPEC_VERSION,
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        token_rule=backbone.token_rule,
        position_rule=backbone.position_rule,
        preprocessing=views_rule(plan, backbone.mean, backbone.std),
        plan=plan.to_json(),
        dtype="float16",
        precision=backbone.precision,
        manifest_digest=manifest_digest(manifest),
        versions=package_versions(),
    )


def extract(
    plan: Plan,
    manifest: Manifest,
    data_root: Path,
    backbone: Backbone,
    writer: StoreWriter,
    *,
    batch_size: int = 16,
    decode_threads: int = 2,
    retry_failed: bool = False,
    progress: Progress = SILENT,
    stop: Event | None = None,
) -> ExtractReport:
    """Encode every slot of `plan` that `writer` has not committed; `stop` ends after the slot in hand.

    With `retry_failed` slots that list failed videos are encoded again as well.

    A video that cannot be decoded is recorded in the store and in the report and does not end the run.
    Raises `OutputError` when the store cannot be written; committed slots stay.
    """
    videos = {video.video_id: video for video in manifest}
    run = _Extraction(plan, videos, data_root, backbone, writer, batch_size, progress, stop or Event())
    return run.run(writer.todo(retry_failed=retry_failed), decode_threads)


@dataclass(slots=True)
class _Clock:
    """Seconds by stage; the threads of one stage add up."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[name] += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class _Task:
    """Encodings of one video in one slot to prepare together, by frame: (position in the slot, encoding)."""

    slot: Slot
    reader: FrameReader
    views: Views
    frames: Mapping[int, Sequence[tuple[int, Encoding]]]

    @property
    def n_encodings(self) -> int:
        return sum(len(items) for items in self.frames.values())


Prepared = tuple[_Task, list[PreparedImage] | MediaError]


@dataclass(slots=True)
class _Extraction:
    """One run: the plan's todo slots through decode threads, encoder and writer thread."""

    plan: Plan
    videos: Mapping[str, Video]
    data_root: Path
    backbone: Backbone
    writer: StoreWriter
    batch_size: int
    progress: Progress
    stop: Event
    clock: _Clock = field(default_factory=_Clock)
    failures: dict[str, str] = field(default_factory=dict)
    n_encodings: int = 0

    def run(self, todo: Sequence[int], decode_threads: int) -> ExtractReport:
        self.progress.start(sum(self.plan.slot_length(index) for index in todo), "images")
        try:
            with self.clock.stage("total"):
                n_slots = self._encode_slots(todo, decode_threads)
        finally:
            self.progress.finish()
        return ExtractReport(
            n_slots=n_slots,
            n_slots_before=self.plan.n_slots - len(todo),
            n_encodings=self.n_encodings,
            failures=self.failures,
            seconds=StageSeconds(
                **{item.name: self.clock.seconds[item.name] for item in fields(StageSeconds)}
            ),
            interrupted=n_slots < len(todo),
        )

    def _encode_slots(self, todo: Sequence[int], decode_threads: int) -> int:
        """Encode slot after slot; return how many were committed."""
        decoders = ThreadPoolExecutor(decode_threads, "decode")
        commits: deque[Future[None]] = deque()
        n_slots = 0
        try:
            with ThreadPoolExecutor(1, "write") as writers:
                prepared = self._ahead(self._tasks(todo), decoders)
                for _, results in groupby(prepared, key=lambda result: result[0].slot.index):
                    commits.append(writers.submit(self._commit, *self._encode_slot(results)))
                    self._settle(commits, MAX_PENDING_COMMITS)
                    n_slots += 1
                    if self.stop.is_set():
                        break
                self._settle(commits, 0)
        finally:
            decoders.shutdown(cancel_futures=True)
        return n_slots

    def _settle(self, commits: deque[Future[None]], pending: int) -> None:
        with self.clock.stage("wait_writer"):
            while len(commits) > pending:
                commits.popleft().result()

    def _tasks(self, todo: Sequence[int]) -> Iterator[_Task]:
        reader: FrameReader | None = None
        for index in todo:
            slot = self.plan.slot(index)
            positions = enumerate(slot.encodings)
            for video_id, items in groupby(positions, key=lambda item: item[1].video_id):
                video = self.videos[video_id]
                if reader is None or reader.video is not video:
                    reader = FrameReader(video, self.data_root)
                yield from self._video_tasks(slot, reader, list(items))

    def _video_tasks(
        self, slot: Slot, reader: FrameReader, items: Sequence[tuple[int, Encoding]]
    ) -> Iterator[_Task]:
        size = self.plan.recipe.image_size(reader.video)
        views = make_views(self.plan, *size, self.backbone.mean, self.backbone.std)
        by_frame: dict[int, list[tuple[int, Encoding]]] = {}
        for position, encoding in items:
            by_frame.setdefault(encoding.frame, []).append((position, encoding))
        frames = sorted(by_frame)
        # A video file is decoded forwards by one task; the frames of a folder are independent.
        step = FRAMES_PER_TASK if reader.video.media_kind is MediaKind.FRAMES else len(frames)
        for start in range(0, len(frames), step):
            yield _Task(
                slot, reader, views, {frame: by_frame[frame] for frame in frames[start : start + step]}
            )

    def _ahead(self, tasks: Iterable[_Task], decoders: ThreadPoolExecutor) -> Iterator[Prepared]:
        """Prepare tasks in threads, yield them in order, hold a bounded number of images."""
        pending: deque[tuple[_Task, Future[list[PreparedImage] | MediaError]]] = deque()
        n_pending = 0
        for task in tasks:
            pending.append((task, decoders.submit(self._prepare, task)))
            n_pending += task.n_encodings
            while n_pending > BATCHES_AHEAD * self.batch_size and len(pending) > 1:
                first, future = pending.popleft()
                n_pending -= first.n_encodings
                yield first, self._result(future)
        for first, future in pending:
            yield first, self._result(future)

    def _result(self, future: Future[list[PreparedImage] | MediaError]) -> list[PreparedImage] | MediaError:
        with self.clock.stage("wait_images"):
            return future.result()

    def _prepare(self, task: _Task) -> list[PreparedImage] | MediaError:
        images: list[PreparedImage] = []
        try:
            with self.clock.stage("decode"):
                decoded = task.reader.read(list(task.frames))
                for items, image in zip(task.frames.values(), decoded, strict=True):
                    views = task.views.prepare(image, [encoding for _, encoding in items])
                    images += [PreparedImage(*item, view) for item, view in zip(items, views, strict=True)]
        except MediaError as error:
            return error
        return images

    def _encode_slot(self, results: Iterator[Prepared]) -> tuple[Slot, Shard, dict[str, str]]:
        first = next(results)
        slot = first[0].slot
        shard = self.writer.new_shard(slot)
        failures: dict[str, str] = {}
        batches = self._batches(chain([first], results), failures)
        for upload in Uploader(self.backbone.device).ahead(batches):
            self._encode(upload, shard, failures)
            self.n_encodings += len(upload.images)
            self.progress.advance(len(upload.images))
        return slot, shard, failures

    def _batches(
        self, results: Iterable[Prepared], failures: dict[str, str]
    ) -> Iterator[list[PreparedImage]]:
        batch: list[PreparedImage] = []
        for task, result in results:
            if isinstance(result, MediaError):
                failures[task.reader.video.video_id] = result.summary
                continue
            for image in result:
                batch.append(image)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _encode(self, upload: Upload, shard: Shard, failures: dict[str, str]) -> None:
        with self.clock.stage("encode"):
            half = self.backbone.encode_views(upload.pixels, upload.views).to(torch.float16)
            finite = half.isfinite().flatten(1).all(dim=1).tolist()
            shard.tokens[[image.position for image in upload.images]] = half.cpu().numpy()
        for image, is_finite in zip(upload.images, finite, strict=True):
            if not is_finite:
                failures[image.encoding.video_id] = NOT_FINITE

    def _commit(self, slot: Slot, shard: Shard, failures: Mapping[str, str]) -> None:
        with self.clock.stage("write"):
            self.writer.commit(slot, shard, failures)
        self.failures.update(failures)
