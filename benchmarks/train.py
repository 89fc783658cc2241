"""Training from a store: over the released way, over tensors in memory, sweeps over one run, and memory.

Sides run in turn in one process on the same samples, batch and head; ratios are medians over the repeats. The
store holds random tokens of the size of ViT-B/16 (3 x 196 x 768 float16 per sample) and is read warm. The
released way runs an encoder of that size (random weights) on three images per sample, then the same step.
Figures with a target say whether they meet it; exit code 4 when one does not.

    python benchmarks/train.py --samples 512 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from store_bench import make_writer

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import PairsSettings, TrainSettings
from cosettle_cache.core.types import Manifest, MediaKind, Video
from cosettle_cache.encoders import load_backbone
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store.plan import make_plan
from cosettle_cache.training.batches import Batch, BatchRing, Ids, Portion, SampleSource, Step
from cosettle_cache.training.learner import Learner, Trainer
from cosettle_cache.training.samples import make_samples

SHAPE = (3, 14, 14, 768)
SAMPLE_BYTES = 2 * int(np.prod(SHAPE))

#: What the figures should be. Growth of memory is to be compared with the 0.9 MB of a sample.
TARGETS = {
    "store_over_released": (">=", 40.0),
    "store_over_memory": (">=", 0.8),
    "waiting_share": ("<=", 0.2),
    "sweep_over_one": ("<=", 3.0),
    "sweep_over_one_throttled": ("<=", 1.5),
    "resident_growth_mb": ("<=", 20.0),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(prefix="train-benchmark-", dir=options.folder))
    try:
        figures = _measure(options, folder)
    finally:
        shutil.rmtree(folder)
    rows = [[key, str(value), *_judge(key, value)] for key, value in figures.items()]
    Talk().table("training", ["figure", "value", "target", "met"], rows)
    text = json.dumps(figures)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(4 if any(row[-1] == "no" for row in rows) else 0)


def _judge(key: str, value: float | int | str) -> tuple[str, str]:
    """Return a figure's target and whether it is met; nothing for one without."""
    if key not in TARGETS:
        return "", ""
    sign, bound = TARGETS[key]
    met = float(value) >= bound if sign == ">=" else float(value) <= bound
    return f"{sign} {bound:g}", "yes" if met else "no"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8, help="members of the sweep")
    parser.add_argument("--sweep-samples", type=int, default=128, help="samples of the computing-bound sweep")
    parser.add_argument("--released-samples", type=int, default=8, help="samples of the released way")
    parser.add_argument("--backbone", default="timm/vit_base_patch16_224")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", help="of the head: float32, tf32, bf16, fp16")
    parser.add_argument("--slow-factor", type=float, default=12.0, help="throttled reading over one step")
    parser.add_argument("--folder", type=Path, help="where the store is written; default: the system's")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


@dataclass(frozen=True)
class Timing:
    """One run over some samples."""

    samples: int
    seconds: float
    waited_s: float

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds

    @property
    def waiting_share(self) -> float:
        """Share of the time without a batch to work on."""
        return self.waited_s / self.seconds


@dataclass(frozen=True)
class MemorySource:
    """Samples in memory, copied into the ring."""

    samples: np.ndarray

    def read_into(self, ids: Ids, out: np.ndarray, /) -> None:
        np.take(self.samples, ids, axis=0, out=out)


@dataclass(frozen=True)
class SlowSource:
    """A source that takes at least `seconds` per sample, as a remote store does."""

    source: SampleSource
    seconds: float

    def read_into(self, ids: Ids, out: np.ndarray, /) -> None:
        started = time.perf_counter()
        self.source.read_into(ids, out)
        time.sleep(max(started + self.seconds * len(ids) - time.perf_counter(), 0))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, float | int | str]:
    store = write_store(folder / "s.zarr", options.samples)
    source = make_samples([store], TrainSettings())
    ids = source.epoch_ids(0)
    few = ids[: options.sweep_samples]
    in_memory = torch.from_numpy(store.samples(ids)).to(options.device)
    images = torch.randn(3 * options.released_samples, 3, 224, 224)
    encoder = load_backbone(options.backbone, weights="random", device=options.device)
    learners = partial(make_learners, device=options.device, precision=options.precision)
    sides: dict[str, Callable[[], Timing]] = {
        "store": lambda: run(source, ids, options.batch, learners(1)),
        "memory": lambda: run_memory(in_memory, options.batch, learners(1)),
        "released": lambda: run_released(encoder.encode, images, options.released_samples, learners(1)),
        "one": lambda: run(source, few, options.batch, learners(1)),
        "sweep": lambda: run(source, few, options.batch, learners(options.heads)),
    }
    run(source, ids, options.batch, learners(1))
    rows = _interleave(sides, options.repeats)
    slow = SlowSource(source, options.slow_factor / statistics.median(t.rate for t in rows["one"]))
    slow_rows = _interleave(
        {
            "one": lambda: run(slow, few, options.batch // 4, learners(1)),
            "sweep": lambda: run(slow, few, options.batch // 4, learners(options.heads)),
        },
        options.repeats,
    )
    return _figures(options, rows, slow_rows) | _memory_figures(options)


def _interleave(sides: dict[str, Callable[[], Timing]], repeats: int) -> dict[str, list[Timing]]:
    rows: dict[str, list[Timing]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rows[name].append(side())
    return rows


def _figures(
    options: argparse.Namespace, rows: dict[str, list[Timing]], slow: dict[str, list[Timing]]
) -> dict[str, float | int | str]:
    def rate(name: str) -> float:
        return round(statistics.median(timing.rate for timing in rows[name]), 2)

    def ratio(a: list[Timing], b: list[Timing]) -> float:
        pairs = zip(a, b, strict=True)
        return round(statistics.median(x.seconds / x.samples / (y.seconds / y.samples) for x, y in pairs), 3)

    return {
        "samples": options.samples,
        "batch": options.batch,
        "threads": options.threads,
        "heads": options.heads,
        "store_samples_per_s": rate("store"),
        "store_gb_per_s": round(rate("store") * SAMPLE_BYTES / 1e9, 3),
        "memory_samples_per_s": rate("memory"),
        "released_samples_per_s": rate("released"),
        "one_ms_per_sample": round(1000 / rate("one"), 2),
        "sweep_ms_per_sample": round(1000 / rate("sweep"), 2),
        "store_over_released": ratio(rows["released"], rows["store"]),
        "store_over_memory": ratio(rows["memory"], rows["store"]),
        "waiting_share": round(statistics.median(t.waiting_share for t in rows["store"]), 4),
        "sweep_over_one": ratio(rows["sweep"], rows["one"]),
        "sweep_over_one_throttled": ratio(slow["sweep"], slow["one"]),
    }


def run(source: SampleSource, ids: Ids, batch: int, learners: Sequence[Learner]) -> Timing:
    """Train on every sample once, as `train` does."""
    trainer = Trainer(learners)
    with BatchRing(source, portions(ids, batch), SHAPE, batch, device=learners[0].device) as ring:
        started = time.perf_counter()
        for item in ring:
            trainer.feed(item)
        trainer.flush()
        return Timing(len(ids), time.perf_counter() - started, ring.waited_s)


def run_memory(samples: torch.Tensor, batch: int, learners: Sequence[Learner]) -> Timing:
    """Do the same steps on tensors that lie in memory already."""
    trainer = Trainer(learners)
    started = time.perf_counter()
    for portion in portions(np.arange(len(samples)), batch):
        trainer.feed(Batch(portion, samples[portion.ids[0] : portion.ids[-1] + 1]))
    trainer.flush()
    return Timing(len(samples), time.perf_counter() - started, 0.0)


def run_released(
    encode: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    n: int,
    learners: Sequence[Learner],
) -> Timing:
    """Encode three images per sample and take the same step, for one batch."""
    trainer = Trainer(learners)
    (portion,) = portions(np.arange(n), n)
    started = time.perf_counter()
    tokens = torch.cat([encode(part) for part in images.split(24)])
    trainer.feed(Batch(portion, tokens.half().reshape(n, *SHAPE)))
    trainer.flush()
    return Timing(n, time.perf_counter() - started, 0.0)


def make_learners(n: int, device: str = "cpu", precision: str = "float32") -> list[Learner]:
    """Return learners that differ in temperature and weight."""
    base = TrainSettings(precision=precision)
    settings = [replace(base, temperature=0.02 + 0.01 * i, separability_weight=1.0 + i) for i in range(n)]
    return [Learner(Projection(SHAPE[-1]).to(device), item) for item in settings]


def portions(ids: Ids, batch: int) -> list[Portion]:
    """Return one portion per batch."""
    parts = [ids[start : start + batch] for start in range(0, len(ids), batch)]
    return [Portion(Step(i, 0, i / len(parts), False, part), part, True) for i, part in enumerate(parts)]


def write_store(path: Path, n_samples: int) -> FeatureStore:
    """Write a store of random tokens, one sample per clip."""
    videos = tuple(Video(f"clip{i}", f"media/{i}", MediaKind.FRAMES, 20, 224, 224) for i in range(n_samples))
    manifest = Manifest(videos, {"builder": "benchmark"})
    plan = make_plan(manifest, PairsSettings(n_views=1), patch=16, dim=SHAPE[-1])
    writer = make_writer(path, plan, manifest)
    generator = np.random.default_rng(0)
    for index in writer.todo():
        slot = plan.slot(index)
        shard = writer.new_shard(slot)
        shard.tokens[:] = generator.standard_normal(shard.tokens.shape, dtype=np.float32)
        writer.commit(slot, shard, {})
    writer.close()
    return open_store(path)


@dataclass(frozen=True)
class RandomSource:
    """As many samples as asked for, made on the spot: memory must not depend on their number."""

    block: np.ndarray

    def read_into(self, ids: Ids, out: np.ndarray, /) -> None:
        np.take(self.block, ids % len(self.block), axis=0, out=out)


def _memory_figures(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Return the growth of resident memory from the first quarter of a longer run to its end."""
    source = RandomSource(
        np.random.default_rng(0).standard_normal((8, *SHAPE), dtype=np.float32).astype("f2")
    )
    trainer, process, seen = Trainer(make_learners(1)), psutil.Process(), []
    ids = np.arange(8 * options.sweep_samples)
    with BatchRing(source, portions(ids, 16), SHAPE, 16) as ring:
        for item in ring:
            trainer.feed(item)
            seen.append(process.memory_info().rss)
    quarter: Sequence[int] = seen[: len(seen) // 4]
    return {
        "resident_mb": round(max(seen) / 1e6),
        "resident_growth_mb": round((max(seen) - max(quarter)) / 1e6, 1),
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
