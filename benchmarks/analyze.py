"""`analyze` against the algorithm of the released metric script, on the same stored tokens.

The script has a function per metric, and each of the six goes through all frames of all clips again, 32 clips
at a time. Its algorithm is written here after its description (docs/analysis.md), over tokens from the store
instead of images through an encoder, which would take hours. Its loader hands out all frames of a batch in
float32, whatever a metric uses of them, and so does the side `released`; `released, sparing` makes only those
float32 that a metric uses. Sides run in turn, each run in a process of its own for its peak memory.

    python benchmarks/analyze.py --clips 200 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from store_bench import make_writer

from cosettle_cache.analysis.run import analyze_store, plan_analysis
from cosettle_cache.core.cluster import connect
from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import AnalyzeSettings, FramesSettings
from cosettle_cache.core.types import Manifest, MediaKind, Video
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store.plan import make_plan

BATCH_CLIPS, N_FRAMES, SIDE = 32, 40, 14
PERCENTS = (0.90, 0.95, 1.0)
SIDES = ("released", "released, sparing", "analyze", "analyze with 3 projections", "analyze, 2 workers")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps(run_side(options.side, open_store(options.store))))
        return
    folder = Path(tempfile.mkdtemp(prefix="analyze-benchmark-", dir=options.folder))
    try:
        store = write_store(folder / "frames.zarr", options.clips, options.dim)
        runs = _interleave(store, options)
    finally:
        shutil.rmtree(folder)
    figures = _figures(runs, options)
    Talk().table("analyze", ["figure", "value"], [[key, str(value)] for key, value in figures.items()])
    if options.json:
        options.json.write_text(json.dumps(figures) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--dim", type=int, default=384, help="384 is a ViT-S")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the store is written; default: the system's")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args()


def _interleave(store: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for _ in range(options.repeats):
        for side in options.sides:
            command = [sys.executable, __file__, "--side", side, "--store", str(store)]
            command += ["--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[side].append(json.loads(done.stdout))
    return runs


def _figures(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"clips": options.clips, "dim": options.dim, "threads": options.threads}
    for side, items in runs.items():
        for name in ("seconds", "peak_mb", "peak_above_imports_mb"):
            figures[f"{side}: {name}"] = round(statistics.median(item[name] for item in items), 2)
    ours = runs.get("analyze", [])
    for side in ("released", "released, sparing"):
        figures |= _compared(side, runs.get(side, []), ours)
    return figures


def _compared(side: str, released: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    if not released or not ours:
        return {}
    figures: dict[str, Any] = {}
    for name in ("seconds", "peak_mb", "peak_above_imports_mb"):
        ratios = [one[name] / other[name] for one, other in zip(released, ours, strict=True)]
        figures[f"{side} / analyze: {name}"] = round(statistics.median(ratios), 2)
    wanted, found = released[0]["values"], ours[0]["values"]
    differences = [abs(wanted[name] / found[name] - 1) for name in wanted]
    figures[f"{side}: largest relative difference of a value"] = f"{max(differences):.1e}"
    return figures


def run_side(side: str, store: FeatureStore) -> dict[str, Any]:
    """Return seconds, peak memory (of this process, workers apart) and values of one run."""
    # What both sides need anyway: the index, and the first use of every library.
    store.tokens(store.video_ids[0])
    torch.cdist(torch.zeros(2, 196, 4), torch.zeros(2, 196, 4)).sort()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    values = _SIDES[side](store)
    seconds = time.perf_counter() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "peak_mb": peak / 1e6,
        "peak_above_imports_mb": (peak - before) / 1e6,
        "values": values,
    }


def run_analyze(store: FeatureStore, n_projections: int = 0, run: Any = None) -> dict[str, float]:
    dim = store.arrays[0].n_channels
    heads = [(f"head{number}", Projection(dim, seed=number)) for number in range(n_projections)]
    report = analyze_store(store, plan_analysis(store, AnalyzeSettings(compat=True)), heads, run=run)
    total = report.measured[0].total
    names = ("inter_distance", "intra_distance", "effective_rank", "cycle_accuracy")
    sides = ("d_inter", "d_intra", "inter_diameter", "intra_diameter")
    names += tuple(f"{name}_{percent}" for name in sides for percent in (90, 95, 100))
    return {name: getattr(total, name) for name in names}


def run_with_workers(store: FeatureStore) -> dict[str, float]:
    with connect(workers=2, threads=1) as cluster:
        return run_analyze(store, run=cluster.run)


def run_released(store: FeatureStore, *, sparing: bool = False) -> dict[str, float]:
    """All metrics, one after the other."""
    batches = HalfBatches(store) if sparing else Batches(store)
    with torch.inference_mode():
        found = inter_distance(batches) | inter_radius(batches) | effective_rank(batches)
        diameters = intra_diameters(batches)
        return found | intra_distance(batches, diameters) | cycle_accuracy(batches)


class HalfBatches:
    """All frames of 32 clips at a time, [clip frame token dim] in float16; read anew in every pass."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.store.video_ids), BATCH_CLIPS):
            clips = [self.store.tokens(name) for name in self.store.video_ids[start : start + BATCH_CLIPS]]
            yield torch.from_numpy(np.stack(clips)).flatten(2, 3)


class Batches(HalfBatches):
    """The same in float32, as the script's loader hands its frames out."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch.float() for batch in HalfBatches.__iter__(self))


def middles(batches: HalfBatches) -> torch.Tensor:
    return torch.cat([batch[:, N_FRAMES // 2].float() for batch in batches])


def inter_distance(batches: HalfBatches) -> dict[str, float]:
    tokens = middles(batches)
    generator = torch.Generator().manual_seed(42)
    tokens = tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:8]]
    first, second = torch.triu_indices(len(tokens), len(tokens), 1)
    distances = [(tokens[first, place] - tokens[second, place]).norm(dim=-1) for place in range(8)]
    distance = torch.stack(distances).mean().item()
    flat = tokens.flatten(0, 1)
    radii = (flat - flat.mean(0)).norm(dim=-1).sort().values
    found = {"inter_distance": distance}
    for share in PERCENTS:
        radius = radii[int(share * len(radii)) - 1].item()
        found[f"d_inter_{round(100 * share)}"] = distance / (2 * radius + 1e-8)
    return found


def inter_radius(batches: HalfBatches) -> dict[str, float]:
    tokens = middles(batches).flatten(0, 1)
    radii = (tokens - tokens.mean(0)).norm(dim=-1)
    shares = {f"inter_diameter_{round(100 * share)}": share for share in PERCENTS}
    return {name: 2 * radii.quantile(share).item() for name, share in shares.items()}


def effective_rank(batches: HalfBatches) -> dict[str, float]:
    values = torch.linalg.svdvals(middles(batches).flatten(0, 1))
    shares = values / values.sum()
    entropy = -(shares * (shares + 1e-12).log()).sum()
    return {"effective_rank": (entropy.exp() / len(values)).item()}


def intra_diameters(batches: HalfBatches) -> list[list[float]]:
    found = []
    for batch in batches:
        tokens = batch.float().flatten(1, 2)
        radii = (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1)
        found += [[2 * clip.quantile(share).item() for share in PERCENTS] for clip in radii]
    return found


def intra_distance(batches: HalfBatches, diameters: list[list[float]]) -> dict[str, float]:
    found: list[float] = []
    for batch in batches:
        tokens = batch.float()
        moved = []
        for frame in range(3, N_FRAMES - 4):
            nearest = torch.cdist(tokens[:, frame], tokens[:, frame + 1]).min(-1).values
            moved.append(nearest.sort(-1).values[:, : nearest.shape[1] // 2].mean(-1))
        found += torch.stack(moved).mean(0).tolist()
    values = {"intra_distance": statistics.fmean(found)}
    for place, share in enumerate(PERCENTS):
        name = round(100 * share)
        values[f"intra_diameter_{name}"] = statistics.fmean(item[place] for item in diameters)
        quotients = (one / (item[place] + 1e-8) for one, item in zip(found, diameters, strict=True))
        values[f"d_intra_{name}"] = statistics.fmean(quotients)
    return values


def cycle_accuracy(batches: HalfBatches) -> dict[str, float]:
    means = []
    for batch in batches:
        found = []
        for share in (0.25, 0.35, 0.45, 0.55, 0.65):
            start, turn = int(share * N_FRAMES), int(round(share + 0.15, 2) * N_FRAMES)
            a, b = (pool(batch[:, frame].float()) for frame in (start, turn))
            there, back = (a @ b.mT / 0.03).softmax(-1), (b @ a.mT / 0.03).softmax(-1)
            ends = (there @ back).argmax(-1)
            found.append((ends == torch.arange(ends.shape[-1])).float().mean())
        means.append(torch.stack(found).mean().item())
    return {"cycle_accuracy": statistics.fmean(means)}


def pool(tokens: torch.Tensor) -> torch.Tensor:
    images = tokens.mT.unflatten(-1, (SIDE, SIDE))
    return torch.nn.functional.avg_pool2d(images, 2).flatten(2).mT


_SIDES: dict[str, Callable[[FeatureStore], dict[str, float]]] = {
    "released": run_released,
    "released, sparing": lambda store: run_released(store, sparing=True),
    "analyze": run_analyze,
    "analyze with 3 projections": lambda store: run_analyze(store, 3),
    "analyze, 2 workers": run_with_workers,
}


def write_store(path: Path, n_clips: int, dim: int) -> Path:
    """Write clips of 40 frames on a 14x14 grid in which content moves and changes a little."""
    videos = [
        Video(f"clip{number:05}", f"clip{number:05}", MediaKind.FRAMES, N_FRAMES, 224, 224)
        for number in range(n_clips)
    ]
    manifest = Manifest(tuple(videos), {"builder": "benchmark"})
    plan = make_plan(manifest, FramesSettings(size="224x224"), patch=16, dim=dim, slot_encodings=2 * N_FRAMES)
    writer = make_writer(path, plan, manifest)
    for index in writer.todo():
        slot = plan.slot(index)
        shard = writer.new_shard(slot)
        names = dict.fromkeys(encoding.video_id for encoding in slot.encodings)
        clips = [make_clip(int(name.removeprefix("clip")), dim) for name in names]
        shard.tokens[:] = np.concatenate(clips)
        writer.commit(slot, shard, {})
    writer.close()
    return path


def make_clip(seed: int, dim: int) -> np.ndarray:
    """Return tokens of squared length `dim`: a scene of decaying spectrum, a moving window, noise."""
    generator = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + np.arange(dim))
    basis = np.random.default_rng(0).standard_normal((dim, dim)) / np.sqrt(dim)
    scene = (generator.standard_normal((SIDE, SIDE + 12, dim)) * spectrum) @ basis
    scene += 0.5 * (generator.standard_normal(dim) * spectrum) @ basis
    frames = []
    for frame in range(N_FRAMES):
        column, part = divmod(frame * generator.uniform(0.2, 0.28), 1)
        window = slice(int(column), int(column) + SIDE)
        after = slice(window.start + 1, window.stop + 1)
        frames.append((1 - part) * scene[:, window] + part * scene[:, after])
    tokens = np.stack(frames)
    tokens += 0.2 * tokens.std() * generator.standard_normal(tokens.shape, np.float32)
    return (tokens / np.linalg.norm(tokens, axis=-1, keepdims=True) * np.sqrt(dim)).astype(np.float16)


if __name__ == "__main__":
    main()
