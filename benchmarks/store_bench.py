"""What `store.py` measures with: a store and a plain file of the same tokens, sides in turn, ratios."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import Fingerprint, Manifest, MediaKind, Video
from cosettle_cache.store import StoreWriter, spec_version
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.manifest import manifest_digest

PATCH, DIM = 16, 768
BATCH = 64

Side = Callable[[], None]


class Bench:
    """One store and the same tokens in one plain file, chunk after chunk without checksums."""

    def __init__(self, path: Path, plan: Plan, manifest: Manifest) -> None:
        self.path, self.plain = path, path.with_suffix(".bin")
        self.plan, self.manifest, self.layout = plan, manifest, plan.arrays[0]
        self.chunk_bytes = self.layout.chunk_encodings * self.layout.encoding_bytes
        self.n_chunks = self.layout.n_encodings // self.layout.chunk_encodings
        self.n_bytes = self.n_chunks * self.chunk_bytes
        self.buffer = aligned((BATCH, self.layout.chunk_encodings, *token_shape(plan)))
        self.rows = [row.reshape(-1).view(np.uint8).data for row in self.buffer]

    def fill(self) -> None:
        writer = make_writer(self.path, self.plan, self.manifest)
        with self.plain.open("wb") as file:
            for index in writer.todo():
                slot = self.plan.slot(index)
                shard = writer.new_shard(slot)
                shard.tokens[:] = tokens(index, len(slot.encodings), token_shape(self.plan))
                writer.commit(slot, shard, {})
                file.write(shard.tokens.data)
        writer.close()

    def evict(self) -> None:
        """Drop both from the page cache."""
        for path in [self.plain, *self.path.rglob("*")]:
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


@dataclass(frozen=True)
class Plain:
    """Reads of the plain file with `os.preadv`, batch by batch into the bench's buffer."""

    bench: Bench
    n_threads: int = 1
    hints: bool = False

    def __call__(self, ids: Sequence[int]) -> None:
        descriptor = os.open(self.bench.plain, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(self.n_threads) as pool:
                for start in range(0, len(ids), BATCH):
                    self._batch(descriptor, ids[start : start + BATCH], pool)
        finally:
            os.close(descriptor)

    def _batch(self, descriptor: int, ids: Sequence[int], pool: ThreadPoolExecutor) -> None:
        size = self.bench.chunk_bytes
        if self.hints:
            for number in ids:
                os.posix_fadvise(descriptor, number * size, size, os.POSIX_FADV_WILLNEED)
        items = list(zip(ids, self.bench.rows, strict=False))
        if self.n_threads == 1:
            self._share(descriptor, items)
        else:
            shares = [items[first :: self.n_threads] for first in range(self.n_threads)]
            list(pool.map(partial(self._share, descriptor), shares))

    def _share(self, descriptor: int, items: Iterable[tuple[int, memoryview]]) -> None:
        size = self.bench.chunk_bytes
        for number, row in items:
            assert os.preadv(descriptor, [row], number * size) == size


def read_through(path: Path, buffer: memoryview) -> None:
    """Read a plain file from its beginning to its end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(descriptor, [buffer]):
            pass
    finally:
        os.close(descriptor)


def write_through(path: Path, data: memoryview, n_times: int, *, sync_each: bool) -> None:
    """Write `data` to a plain file again and again, flushed every time or once at the end."""
    with path.open("wb", buffering=0) as file:
        for number in range(n_times):
            rest = data.cast("B")
            while len(rest):
                rest = rest[file.write(rest) :]
            if sync_each or number == n_times - 1:
                os.fdatasync(file.fileno())


def interleave(sides: dict[str, Side], repeats: int, before: Side | None = None) -> dict[str, list[float]]:
    """Return the seconds of every side in every repeat; the order turns round from repeat to repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    if before is None:
        for side in sides.values():
            side()
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(reversed(sides))
        for name in names:
            if before is not None:
                before()
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(plain: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of the repeats' ratios."""
    return round(median([a / b for a, b in zip(plain, ours, strict=True)]), 2)


def rate(n_bytes: int, seconds: Sequence[float]) -> float:
    """Return GB/s."""
    return round(n_bytes / median(seconds) / 1e9, 2)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return page-aligned memory, as torch's allocator gives it; numpy's own is off by 16 bytes."""
    flat = np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * 2), np.float16)
    flat[:] = 0
    return flat.reshape(shape)


def tokens(seed: int, n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return encodings `[n row col channel]` like an encoder's: correlated, uneven channels."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((24, shape[-1]), dtype=np.float32)
    latent = rng.standard_normal((n, *shape[:2], 24), dtype=np.float32)
    values = latent @ mixing + 2 * rng.standard_normal((n, *shape), dtype=np.float32)
    values = (values - values.mean(-1, keepdims=True)) / values.std(-1, keepdims=True)
    gains = np.random.default_rng(1).lognormal(0, 0.5, shape[-1]).astype(np.float32)
    return (values * gains).astype(np.float16)


def token_shape(plan: Plan) -> tuple[int, int, int]:
    layout = plan.arrays[0]
    return layout.grid.rows, layout.grid.cols, layout.n_channels


def pairs_plan(n_samples: int) -> tuple[Plan, Manifest]:
    manifest = _manifest(n_samples, 20, 224, 224)
    return make_plan(manifest, PairsSettings(n_views=1), patch=PATCH, dim=DIM), manifest


def frames_plan(n_frames: int) -> tuple[Plan, Manifest]:
    manifest = _manifest(max(1, n_frames // 50), 50, 480, 880)
    return make_plan(manifest, FramesSettings(size="480x880"), patch=PATCH, dim=DIM), manifest


def make_writer(path: Path, plan: Plan, manifest: Manifest) -> StoreWriter:
    layout = plan.arrays[0]
    fingerprint = Fingerprint(
        spec_version=spec_version(layout.dtype, layout.codec),
        backbone="benchmark",
        weights_sha256="0" * 64,
        token_rule="none",
        position_rule="none",
        preprocessing="none",
        plan=plan.to_json(),
        dtype=layout.dtype,
        precision="fp32",
        manifest_digest=manifest_digest(manifest),
        versions={},
    )
    return StoreWriter.create_or_resume(path, plan.arrays, fingerprint, manifest, {})


def _manifest(n_videos: int, n_frames: int, height: int, width: int) -> Manifest:
    return Manifest(
        tuple(
            Video(f"clip{number:06d}", f"clip{number}", MediaKind.FRAMES, n_frames, height, width)
            for number in range(n_videos)
        )
    )
