"""The store against plain files: the same bytes, side by side, interleaved, medians of the repeats.

Tokens are made of a few smooth directions, noise and uneven channels behind a LayerNorm, as an encoder's are.
Cold reads come after the files were dropped from the page cache (`posix_fadvise`), so they reach the device
or what the host keeps of it. A ratio is plain seconds over ours: above 1 the store is faster.

    python benchmarks/store.py --folder DIR
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zarr

from cosettle_cache.config import FramesSettings, PairsSettings
from cosettle_cache.feeding import ShuffleShards
from cosettle_cache.manifest import manifest_digest
from cosettle_cache.plan import Plan, make_plan
from cosettle_cache.store import Shard, StoreWriter, open_store, spec_version
from cosettle_cache.types import Fingerprint, Manifest, MediaKind, Video

PATCH, DIM = 16, 768
BATCH = 64
THREADS = min(4, os.cpu_count() or 1)
#: Bytes the kernel reads ahead for a plain sequential reader.
PIECE_BYTES = 8 * 2**20

Side = Callable[[], None]


def main() -> None:
    options = _options()
    if options.memory:
        print(json.dumps(_resident_mb(options.memory, options.what)))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = _measure(folder, options)
    finally:
        shutil.rmtree(folder)
    for key, value in figures.items():
        print(f"{key:52s} {value}")
    print(json.dumps(figures))


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    pairs = Bench(folder / "pairs.zarr", *_pairs_plan(options.samples))
    frames = Bench(folder / "frames.zarr", *_frames_plan(options.frames))
    figures: dict[str, object] = {
        "threads": THREADS,
        "sample_mb": round(pairs.chunk_bytes / 1e6, 2),
        "store_gb": round(pairs.n_bytes / 1e9, 2),
    }
    figures |= _writing(folder, pairs, options.repeats)
    pairs.fill()
    frames.fill()
    figures |= _random_warm(pairs, options.repeats)
    figures |= _random_cold(pairs, options.repeats)
    figures |= _sequential_cold(pairs, options.repeats)
    figures |= _frames(frames, options.repeats)
    figures |= _memory(folder)
    figures |= _opening(folder, options.slots)
    return figures


class Bench:
    """One store and the same tokens in one plain file, chunk after chunk without checksums."""

    def __init__(self, path: Path, plan: Plan, manifest: Manifest) -> None:
        self.path, self.plain = path, path.with_suffix(".bin")
        self.plan, self.manifest, self.layout = plan, manifest, plan.arrays[0]
        self.chunk_bytes = self.layout.chunk_encodings * self.layout.encoding_bytes
        self.n_chunks = self.layout.n_encodings // self.layout.chunk_encodings
        self.n_bytes = self.n_chunks * self.chunk_bytes
        shape = (self.layout.chunk_encodings, *_token_shape(self.plan))
        self.buffer = aligned((BATCH, *shape))
        self.rows = [row.reshape(-1).view(np.uint8).data for row in self.buffer]

    def writer(self, path: Path) -> StoreWriter:
        return _writer(path, self.plan, self.manifest)

    def fill(self) -> None:
        writer = self.writer(self.path)
        with self.plain.open("wb") as file:
            for index in writer.todo():
                slot = self.plan.slot(index)
                shard = writer.new_shard(slot)
                shard.tokens[:] = tokens(index, len(slot.encodings), _token_shape(self.plan))
                writer.commit(slot, shard, {})
                file.write(shard.tokens.data)
        writer.close()

    def evict(self) -> None:
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


def _ours(bench: Bench, ids: Sequence[int]) -> None:
    store = open_store(bench.path)
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        store.read_into(batch, bench.buffer[: len(batch)])


def _ours_fresh(bench: Bench, ids: Sequence[int]) -> None:
    store = open_store(bench.path)
    for start in range(0, len(ids), BATCH):
        store.samples(ids[start : start + BATCH])


def _zarr_python(bench: Bench, ids: Sequence[int]) -> None:
    array = zarr.open_array(bench.path, path=f"tokens/{bench.layout.grid}", mode="r")
    n = bench.layout.chunk_encodings
    for number in ids:
        array[n * number : n * (number + 1)]


def _random_warm(bench: Bench, repeats: int) -> dict[str, object]:
    ids = random.Random(0).sample(range(bench.n_chunks), bench.n_chunks)
    few = ids[: max(BATCH, len(ids) // 8)]
    seconds = interleave(
        {
            "preadv": lambda: Plain(bench)(ids),
            "preadv_threads": lambda: Plain(bench, THREADS)(ids),
            "read_into": lambda: _ours(bench, ids),
            "fresh": lambda: _ours_fresh(bench, ids),
            "zarr": lambda: _zarr_python(bench, few),
        },
        repeats,
    )
    share = len(few) / len(ids)
    return {
        "warm_preadv_gb_s": rate(bench, seconds["preadv"]),
        "warm_preadv_threads_gb_s": rate(bench, seconds["preadv_threads"]),
        "warm_read_into_gb_s": rate(bench, seconds["read_into"]),
        "warm_fresh_memory_gb_s": rate(bench, seconds["fresh"]),
        "warm_read_into_over_preadv": ratio(seconds["preadv"], seconds["read_into"]),
        "warm_read_into_over_preadv_threads": ratio(seconds["preadv_threads"], seconds["read_into"]),
        "warm_read_into_over_zarr": round(ratio(seconds["zarr"], seconds["read_into"]) / share, 2),
        "warm_read_into_over_fresh_memory": ratio(seconds["fresh"], seconds["read_into"]),
    }


def _random_cold(bench: Bench, repeats: int) -> dict[str, object]:
    ids = random.Random(1).sample(range(bench.n_chunks), bench.n_chunks)
    sides = {
        "preadv": lambda: Plain(bench)(ids),
        "threads": lambda: Plain(bench, THREADS)(ids),
        "hints": lambda: Plain(bench, 1, hints=True)(ids),
        "threads_hints": lambda: Plain(bench, THREADS, hints=True)(ids),
        "read_into": lambda: _ours(bench, ids),
    }
    seconds = interleave(sides, repeats, before=bench.evict)
    best = min((name for name in sides if name != "read_into"), key=lambda name: median(seconds[name]))
    return {
        **{f"cold_{name}_gb_s": rate(bench, values) for name, values in seconds.items()},
        "cold_best_plain_way": best,
        "cold_read_into_over_best_plain": ratio(seconds[best], seconds["read_into"]),
    }


def _sequential_cold(bench: Bench, repeats: int) -> dict[str, object]:
    """Shards in random order, samples shuffled within a window of shards, against one pass over the file."""
    store = open_store(bench.path)
    shuffle = ShuffleShards(store.sample_slots, window=2)
    order = shuffle(np.arange(bench.n_chunks), np.random.default_rng(0))
    seconds = interleave(
        {
            "sequential": lambda: _read_through(bench.plain, bench.rows[0]),
            "shard_order": lambda: _ours(bench, order.tolist()),
        },
        repeats,
        before=bench.evict,
    )
    return {
        "cold_sequential_plain_gb_s": rate(bench, seconds["sequential"]),
        "cold_shard_order_gb_s": rate(bench, seconds["shard_order"]),
        "cold_shard_order_over_sequential": ratio(seconds["sequential"], seconds["shard_order"]),
    }


def _frames(bench: Bench, repeats: int) -> dict[str, object]:
    """Every frame of every video, in order, as propagation reads them."""

    def ours() -> None:
        store = open_store(bench.path)
        for video_id in store.video_ids:
            for _ in store.stream_tokens(video_id):
                pass

    sides = {"plain": lambda: _read_through(bench.plain, bench.rows[0]), "stream_tokens": ours}
    warm = interleave(sides, repeats)
    cold = interleave(sides, repeats, before=bench.evict)
    return {
        "frames_warm_plain_gb_s": rate(bench, warm["plain"]),
        "frames_warm_stream_tokens_gb_s": rate(bench, warm["stream_tokens"]),
        "frames_warm_stream_tokens_over_plain": ratio(warm["plain"], warm["stream_tokens"]),
        "frames_cold_plain_gb_s": rate(bench, cold["plain"]),
        "frames_cold_stream_tokens_over_plain": ratio(cold["plain"], cold["stream_tokens"]),
    }


def _read_through(path: Path, buffer: memoryview) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(descriptor, [buffer]):
            pass
    finally:
        os.close(descriptor)


def _writing(folder: Path, bench: Bench, repeats: int) -> dict[str, object]:
    """Slots from memory: shard and index part, flushed and renamed; a plain file with one flush per slot."""
    slots = [bench.plan.slot(index) for index in range(bench.plan.n_slots)]
    full = [slot for slot in slots if len(slot.encodings) == len(slots[0].encodings)]
    shard = Shard(tokens(0, len(slots[0].encodings), _token_shape(bench.plan)))

    def plain() -> None:
        with (folder / "written.bin").open("wb", buffering=0) as file:
            for _ in full:
                data = shard.tokens.data.cast("B")
                while len(data):
                    data = data[file.write(data) :]
                os.fdatasync(file.fileno())

    def ours() -> None:
        again = bench.writer(folder / "written.zarr")
        for slot in full:
            again.commit(slot, shard, {})
        again.close()

    def remove() -> None:
        (folder / "written.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "written.zarr", ignore_errors=True)
        os.sync()

    seconds = interleave({"plain": plain, "commit": ours}, repeats, before=remove)
    remove()
    n_bytes = len(full) * shard.tokens.nbytes
    return {
        "write_plain_fsync_mb_s": round(n_bytes / median(seconds["plain"]) / 1e6),
        "write_commit_mb_s": round(n_bytes / median(seconds["commit"]) / 1e6),
        "write_commit_over_plain": ratio(seconds["plain"], seconds["commit"]),
    }


def _memory(folder: Path) -> dict[str, object]:
    """Peak memory that reading (writing) a store adds, for one store and for one four times its size."""
    figures: dict[str, object] = {}
    for what in ("read", "write"):
        for n_samples in (200, 800):
            arguments = [sys.executable, __file__, "--folder", str(folder), "--memory", str(n_samples)]
            answer = subprocess.run([*arguments, "--what", what], check=True, capture_output=True, text=True)
            figures[f"{what}_peak_added_mb_{n_samples}_samples"] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def _resident_mb(n_samples: int, what: str) -> int:
    with tempfile.TemporaryDirectory(dir=sys.argv[sys.argv.index("--folder") + 1]) as folder:
        bench = Bench(Path(folder) / "pairs.zarr", *_pairs_plan(n_samples))
        if what == "read":
            bench.fill()
            store = open_store(bench.path)
            bench.buffer.fill(0)
            _ours(bench, store.sample_ids[:BATCH].tolist())
            before = _peak_mb()
            _ours(bench, random.Random(0).sample(range(bench.n_chunks), bench.n_chunks))
            return _peak_mb() - before
        before = _peak_mb()
        bench.fill()
        return _peak_mb() - before


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000


def _opening(folder: Path, n_slots: int) -> dict[str, object]:
    """A store of many slots whose index parts all exist; opening must not read them."""
    video = Video("clip", "clip", MediaKind.FRAMES, n_slots, PATCH, PATCH)
    plan = make_plan(Manifest((video,)), FramesSettings(size="native"), patch=PATCH, dim=8, slot_encodings=1)
    path = folder / "many.zarr"
    writer = _writer(path, plan, Manifest((video,)))
    slot = plan.slot(0)
    shard = writer.new_shard(slot)
    shard.tokens[:] = 1
    writer.commit(slot, shard, {})
    first = path / "index/1x1/000000.parquet"
    for number in range(1, n_slots):
        os.link(first, path / f"index/1x1/{number:06d}.parquet")
    writer.close()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        store = open_store(path)
        times.append(time.perf_counter() - started)
    assert store.n_slots == n_slots
    return {"slots": n_slots, "open_s": round(median(times), 3)}


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


def rate(bench: Bench, seconds: Sequence[float]) -> float:
    return round(bench.n_bytes / median(seconds) / 1e9, 2)


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


def _token_shape(plan: Plan) -> tuple[int, int, int]:
    layout = plan.arrays[0]
    return layout.grid.rows, layout.grid.cols, layout.n_channels


def _manifest(n_videos: int, n_frames: int, height: int, width: int) -> Manifest:
    return Manifest(
        tuple(
            Video(f"clip{number:06d}", f"clip{number}", MediaKind.FRAMES, n_frames, height, width)
            for number in range(n_videos)
        )
    )


def _pairs_plan(n_samples: int) -> tuple[Plan, Manifest]:
    manifest = _manifest(n_samples, 20, 224, 224)
    return make_plan(manifest, PairsSettings(n_views=1), patch=PATCH, dim=DIM), manifest


def _frames_plan(n_frames: int) -> tuple[Plan, Manifest]:
    manifest = _manifest(max(1, n_frames // 50), 50, 480, 880)
    return make_plan(manifest, FramesSettings(size="480x880"), patch=PATCH, dim=DIM), manifest


def _writer(path: Path, plan: Plan, manifest: Manifest) -> StoreWriter:
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--slots", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
