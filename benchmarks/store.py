"""The store against plain files: the same bytes, side by side, interleaved, medians of the repeats.

Tokens are made of a few smooth directions, noise and uneven channels behind a LayerNorm, as an encoder's are.
Cold reads come after the files were dropped from the page cache (`posix_fadvise`), so they reach the device
or what the host keeps of it. A ratio is plain seconds over ours: above 1 the store is faster. The exit code
is 4 when a target is missed.

    python benchmarks/store.py --folder DIR --json store.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import zarr
from store_bench import (
    BATCH,
    PATCH,
    Bench,
    Plain,
    frames_plan,
    interleave,
    make_writer,
    median,
    pairs_plan,
    rate,
    ratio,
    read_through,
    token_shape,
    tokens,
    write_through,
)

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import FramesSettings, TrainSettings
from cosettle_cache.core.types import Manifest, MediaKind, Video
from cosettle_cache.store import FeatureStore, Shard, open_store
from cosettle_cache.store.plan import make_plan
from cosettle_cache.training.batches import (
    BatchRing,
    EpochOrder,
    ShuffleShards,
    announced,
    make_portions,
    make_steps,
)
from cosettle_cache.training.samples import make_samples

THREADS = min(4, os.cpu_count() or 1)
#: Samples of the two stores whose reading and writing must take the same memory.
SMALL, LARGE = 200, 800
#: File systems bound the links to one file (ext4: 65,000).
LINKS_PER_FILE = 50_000

Figures = dict[str, object]


@dataclass(frozen=True)
class Target:
    """What a figure must reach: at least `least`, or at most `most`."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        return f">= {self.least}" if self.most is None else f"<= {self.most}"

    def is_met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


TARGETS = {
    "warm_read_into_over_preadv": Target(least=0.8),
    "warm_read_into_over_zarr": Target(least=8),
    "warm_read_into_over_fresh_memory": Target(least=1),
    "cold_read_into_over_best_plain": Target(least=0.9),
    "cold_shard_order_over_sequential": Target(least=0.8),
    "frames_cold_stream_over_plain": Target(least=0.8),
    "write_commit_over_plain_fsync": Target(least=0.7),
    "read_added_mb_of_four_times_the_store": Target(most=20),
    "write_added_mb_of_four_times_the_store": Target(most=20),
    "open_s": Target(most=1),
}


def main() -> int:
    options = _options()
    if options.memory:
        print(_added_mb(options.folder, options.memory, options.what))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="store-benchmark-", dir=options.folder))
    try:
        figures = _measure(folder, options)
    finally:
        shutil.rmtree(folder)
    return _report(figures, options.json)


def _measure(folder: Path, options: argparse.Namespace) -> Figures:
    pairs = Bench(folder / "pairs.zarr", *pairs_plan(options.samples))
    frames = Bench(folder / "frames.zarr", *frames_plan(options.frames))
    figures: Figures = {
        "threads": THREADS,
        "sample_mb": round(pairs.chunk_bytes / 1e6, 2),
        "store_gb": round(pairs.n_bytes / 1e9, 2),
    }
    figures |= _writing(folder, pairs, options.repeats)
    pairs.fill()
    frames.fill()
    figures |= _random_warm(pairs, options.repeats)
    figures |= _random_cold(pairs, options.repeats)
    figures |= _shard_order_cold(pairs, options.repeats)
    figures |= _frames(frames, options.repeats)
    figures |= _memory(folder)
    figures |= _opening(folder, options.slots)
    return figures


def _report(figures: Figures, path: Path | None) -> int:
    missed = [name for name, target in TARGETS.items() if not target.is_met(float(str(figures[name])))]
    rows = [
        [name, str(value), str(TARGETS.get(name, "")), "missed" if name in missed else ""]
        for name, value in figures.items()
    ]
    Talk().table("the store over plain files", ["figure", "value", "target", ""], rows)
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    return 4 if missed else 0


def _ours(store: FeatureStore, bench: Bench, ids: list[int]) -> None:
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        store.read_into(batch, bench.buffer[: len(batch)])


def _ours_fresh(store: FeatureStore, ids: list[int]) -> None:
    for start in range(0, len(ids), BATCH):
        store.samples(ids[start : start + BATCH])


def _zarr_python(bench: Bench, ids: list[int]) -> None:
    array = zarr.open_array(bench.path, path=f"tokens/{bench.layout.grid}", mode="r")
    n = bench.layout.chunk_encodings
    for number in ids:
        array[n * number : n * (number + 1)]


def _random_warm(bench: Bench, repeats: int) -> Figures:
    ids = random.Random(0).sample(range(bench.n_chunks), bench.n_chunks)
    few = ids[: max(BATCH, len(ids) // 8)]
    # Opened once, as training does; what opening takes has its own figure.
    store = open_store(bench.path)
    seconds = interleave(
        {
            "preadv": partial(Plain(bench), ids),
            "preadv_threads": partial(Plain(bench, THREADS), ids),
            "read_into": partial(_ours, store, bench, ids),
            "fresh_memory": partial(_ours_fresh, store, ids),
            "zarr": partial(_zarr_python, bench, few),
        },
        repeats,
    )
    seconds["zarr"] = [value * len(ids) / len(few) for value in seconds["zarr"]]
    ours = seconds["read_into"]
    others = {name: values for name, values in seconds.items() if name != "read_into"}
    return {
        **{f"warm_{name}_gb_s": rate(bench.n_bytes, values) for name, values in seconds.items()},
        **{f"warm_read_into_over_{name}": ratio(values, ours) for name, values in others.items()},
    }


def _random_cold(bench: Bench, repeats: int) -> Figures:
    ids = random.Random(1).sample(range(bench.n_chunks), bench.n_chunks)
    plain_ways = {
        "preadv": partial(Plain(bench), ids),
        "threads": partial(Plain(bench, THREADS), ids),
        "hints": partial(Plain(bench, 1, hints=True), ids),
        "threads_hints": partial(Plain(bench, THREADS, hints=True), ids),
    }
    seconds = interleave(plain_ways, repeats, before=bench.evict)
    best = min(plain_ways, key=lambda name: median(seconds[name]))
    # Only two, so that each file is read equally often: a host keeps what a virtual disk was asked for.
    sides = {best: plain_ways[best], "read_into": partial(_ours, open_store(bench.path), bench, ids)}
    against = interleave(sides, repeats, before=bench.evict)
    return {
        **{f"cold_{name}_gb_s": rate(bench.n_bytes, values) for name, values in (seconds | against).items()},
        "cold_best_plain_way": best,
        "cold_read_into_over_best_plain": ratio(against[best], against["read_into"]),
    }


def _shard_order_cold(bench: Bench, repeats: int) -> Figures:
    """`train --order shards` without the training, window 2, against one pass over the file."""
    samples = make_samples([open_store(bench.path)], TrainSettings())
    shuffle = ShuffleShards(samples.slots, window=2)
    order = EpochOrder(samples.epoch_ids, BATCH, seed=0, shuffle=shuffle)

    def shard_order() -> None:
        portions = announced(make_portions(make_steps(order, 1)), 2, samples.slots, samples.will_need)
        with BatchRing(samples, portions, samples.shape, BATCH) as ring:
            for _ in ring:
                pass

    sides = {
        "sequential": lambda: read_through(bench.plain, bench.rows[0]),
        "shard_order": shard_order,
    }
    seconds = interleave(sides, repeats, before=bench.evict)
    return {
        "cold_sequential_plain_gb_s": rate(bench.n_bytes, seconds["sequential"]),
        "cold_shard_order_gb_s": rate(bench.n_bytes, seconds["shard_order"]),
        "cold_shard_order_over_sequential": ratio(seconds["sequential"], seconds["shard_order"]),
    }


def _frames(bench: Bench, repeats: int) -> Figures:
    """Every frame of every video, in order, as propagation reads them."""

    store = open_store(bench.path)

    def ours() -> None:
        for video_id in store.video_ids:
            for _ in store.stream_tokens(video_id):
                pass

    sides = {"plain": lambda: read_through(bench.plain, bench.rows[0]), "stream": ours}
    figures: Figures = {}
    for state, before in (("warm", None), ("cold", bench.evict)):
        seconds = interleave(sides, repeats, before)
        for name, values in seconds.items():
            figures[f"frames_{state}_{name}_gb_s"] = rate(bench.n_bytes, values)
        figures[f"frames_{state}_stream_over_plain"] = ratio(seconds["plain"], seconds["stream"])
    return figures


def _writing(folder: Path, bench: Bench, repeats: int) -> Figures:
    """Full slots from memory, each shard and index part flushed and renamed, against one plain file."""
    slots = [bench.plan.slot(index) for index in range(bench.plan.n_slots)]
    full = [slot for slot in slots if len(slot.encodings) == len(slots[0].encodings)]
    shard = Shard(tokens(0, len(slots[0].encodings), token_shape(bench.plan)))
    plain = partial(write_through, folder / "written.bin", shard.tokens.data, len(full))

    def ours() -> None:
        writer = make_writer(folder / "written.zarr", bench.plan, bench.manifest)
        for slot in full:
            writer.commit(slot, shard, {})
        writer.close()

    def remove() -> None:
        (folder / "written.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "written.zarr", ignore_errors=True)
        os.sync()

    sides = {
        "plain_fsync": partial(plain, sync_each=True),
        "plain_one_fsync": partial(plain, sync_each=False),
        "commit": ours,
    }
    seconds = interleave(sides, repeats, before=remove)
    remove()
    n_bytes = len(full) * shard.tokens.nbytes
    return {
        **{f"write_{name}_gb_s": rate(n_bytes, values) for name, values in seconds.items()},
        "write_commit_over_plain_fsync": ratio(seconds["plain_fsync"], seconds["commit"]),
        "write_commit_over_plain_one_fsync": ratio(seconds["plain_one_fsync"], seconds["commit"]),
    }


def _memory(folder: Path) -> Figures:
    """Peak memory that reading (writing) a store adds, for one store and for one four times its size."""
    figures: Figures = {}
    for what in ("read", "write"):
        added = []
        for n_samples in (SMALL, LARGE):
            words = [sys.executable, __file__, "--folder", str(folder), "--memory", str(n_samples)]
            answer = subprocess.run([*words, "--what", what], check=True, capture_output=True, text=True)
            added.append(int(answer.stdout.split()[-1]))
            figures[f"{what}_peak_added_mb_{n_samples}_samples"] = added[-1]
        figures[f"{what}_added_mb_of_four_times_the_store"] = added[1] - added[0]
    return figures


def _added_mb(parent: Path, n_samples: int, what: str) -> int:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        bench = Bench(Path(folder) / "pairs.zarr", *pairs_plan(n_samples))
        if what == "write":
            before = _peak_mb()
            bench.fill()
            return _peak_mb() - before
        # In another process: its peak would hide what reading adds.
        subprocess.run([sys.executable, "-c", _FILL, str(bench.path), str(n_samples)], check=True)
        bench.buffer.fill(0)
        store = open_store(bench.path)
        _ours(store, bench, list(range(BATCH)))
        before = _peak_mb()
        _ours(store, bench, random.Random(0).sample(range(bench.n_chunks), bench.n_chunks))
        return _peak_mb() - before


_FILL = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from store_bench import Bench, pairs_plan
Bench(Path(sys.argv[1]), *pairs_plan(int(sys.argv[2]))).fill()
"""


def _peak_mb() -> int:
    """Return the largest resident memory so far; `getrusage` would count the process that started this."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1000


def _opening(folder: Path, n_slots: int) -> Figures:
    """A store of many slots whose index parts all exist; opening must not read them."""
    video = Video("clip", "clip", MediaKind.FRAMES, n_slots, PATCH, PATCH)
    manifest = Manifest((video,))
    plan = make_plan(manifest, FramesSettings(size="native"), patch=PATCH, dim=8, slot_encodings=1)
    path = folder / "many.zarr"
    writer = make_writer(path, plan, manifest)
    slot = plan.slot(0)
    shard = writer.new_shard(slot)
    shard.tokens[:] = 1
    writer.commit(slot, shard, {})
    writer.close()
    _link_parts(path / "index/1x1", n_slots)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        store = open_store(path)
        times.append(time.perf_counter() - started)
    assert store._chunks.committed.sum() == n_slots
    return {"slots": n_slots, "open_s": round(median(times), 3)}


def _link_parts(folder: Path, n_slots: int) -> None:
    """Let all parts be the first one, by links."""
    numbers = iter(range(1, n_slots))
    source = folder / "000000.parquet"
    while batch := list(islice(numbers, LINKS_PER_FILE)):
        copy = folder / f"{batch[0]:06d}.parquet"
        shutil.copy(source, copy)
        for number in batch[1:]:
            os.link(copy, folder / f"{number:06d}.parquet")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--slots", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
