"""What int8 tokens cost: errors, neighbours and J&F against float16 tokens of the same frames, and time.

A float16 frames store is extracted (or given), written again with `--dtype int8`, and for comparison with one
scale per token and as bfloat16, which are stores of tokens rounded that way. Every store is read back and
propagated as `cosettle-cache propagate` does. Errors are over all tokens of all frames; neighbours are the
nearest tokens of the whole next frame.

    python benchmarks/int8.py --data-root DATA --weights vit_tiny.safetensors
    python benchmarks/int8.py --task sprites --weights random --videos 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import EncoderSettings, FramesSettings, PropagateSettings
from cosettle_cache.core.types import Manifest, Score
from cosettle_cache.extraction.jobs import find_weights
from cosettle_cache.extraction.run import StoreJob, extract_store
from cosettle_cache.metrics.rows import mean_scores, sequence_means
from cosettle_cache.propagation import propagate_store
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore, StoreWriter, open_store, spec_version
from cosettle_cache.store._int8 import dequantize, quantize, stored_width
from cosettle_cache.store.plan import make_plan
from cosettle_cache.videos.find import evaluation_data, media_root

TOP_K = 7
#: Timed a frame at a time, as a store's chunks are made and read.
TIMED_FRAMES, REPEATS = 40, 15

Round = Callable[[np.ndarray], np.ndarray]
Figures = dict[str, float]


@dataclass(frozen=True)
class Way:
    """One way to keep tokens: the store's dtype, what is done to tokens before, bytes of a token."""

    name: str
    dtype: str
    rounded: Round
    token_bytes: Callable[[int], int]


def _as_is(tokens: np.ndarray) -> np.ndarray:
    return tokens


def _per_token(tokens: np.ndarray) -> np.ndarray:
    values = tokens.astype(np.float32)
    scales = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    return np.rint(values / np.where(scales == 0, 1, scales)).clip(-127, 127) * scales


def _bfloat16(tokens: np.ndarray) -> np.ndarray:
    return torch.from_numpy(tokens).bfloat16().float().numpy()


FLOAT16 = Way("float16", "float16", _as_is, lambda dim: 2 * dim)
WAYS = (
    FLOAT16,
    Way("int8", "int8", _as_is, stored_width),
    Way("int8-per-token", "float16", _per_token, lambda dim: dim + 2),
    Way("bfloat16", "float16", _bfloat16, lambda dim: 2 * dim),
)


@dataclass(frozen=True)
class Errors:
    """Against float16 tokens: cosine distances, |x - x'| / |x| (mean), share of common neighbours."""

    cosine_mean: float
    cosine_p99: float
    cosine_max: float
    relative_l2: float
    top_k_agreement: float


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="int8-benchmark-") as folder:
        out = options.out or Path(folder)
        _report(_measure(out, options), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("davis", "sprites"), default="davis")
    parser.add_argument("--data-root", type=Path, help="folder with DAVIS in its official layout")
    parser.add_argument("--backbone", default="timm/vit_tiny_patch16_224")
    parser.add_argument("--weights", help="checkpoint, here or under the data root, or random")
    parser.add_argument("--features", help="a float16 frames store, instead of extracting one")
    parser.add_argument("--videos", type=int, help="the first so many only (without --features)")
    parser.add_argument("--speed", action="store_true", help="time the casts only")
    parser.add_argument("--out", type=Path, help="folder that keeps the stores and masks")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def _measure(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    store = open_store(options.features or _extract(out, options))
    figures = {"channels": store.arrays[0].n_channels, "speed": _speed(store)}
    if options.speed:
        return figures
    return figures | {"ways": {way.name: _measure_way(store, way, out, options) for way in WAYS}}


def _measure_way(store: FeatureStore, way: Way, out: Path, options: argparse.Namespace) -> Figures:
    layout = store.arrays[0]
    figures: Figures = {"bytes_per_encoding": layout.grid.n_tokens * way.token_bytes(layout.n_channels)}
    other = store
    if way is not FLOAT16:
        other = _rewrite(store, out / f"{way.name}.zarr", way)
        figures |= asdict(_errors(store, other))
    return figures | _percentages(_propagate(other, out / way.name, options))


def _extract(out: Path, options: argparse.Namespace) -> str:
    talk = Talk()
    data = evaluation_data(options.task, options.data_root, talk)
    settings = FramesSettings(size=make_protocol(task=options.task).size)
    videos = Manifest(data.manifest.videos[: options.videos], data.manifest.provenance)
    weights = find_weights(options.weights, options.data_root)
    job = StoreJob(str(out / "float16.zarr"), data.root, EncoderSettings(options.backbone, weights), settings)
    extract_store(job, job.plan(videos), videos, talk)
    return job.out


def _rewrite(store: FeatureStore, path: Path, way: Way) -> FeatureStore:
    """Return a store of the same tokens, kept in another way: what extracting them anew would give."""
    settings = {key: store.fingerprint.plan[key] for key in FramesSettings.__dataclass_fields__}
    plan = make_plan(
        store.manifest,
        FramesSettings(**settings),
        patch=store.encoder["patch"],
        dim=store.arrays[0].n_channels,
        dtype=way.dtype,
    )
    fingerprint = replace(
        store.fingerprint, dtype=way.dtype, spec_version=spec_version(way.dtype), plan=plan.to_json()
    )
    arguments = (path, plan.arrays, fingerprint, store.manifest, store.encoder)
    with closing(StoreWriter.create_or_resume(*arguments)) as writer:
        for slot in map(plan.slot, writer.todo()):
            shard = writer.new_shard(slot)
            rows = range(slot.start, slot.start + len(slot.encodings))
            store.read_encodings(slot.grid, rows, shard.tokens)
            shard.tokens[:] = way.rounded(shard.tokens)
            writer.commit(slot, shard, {})
    return open_store(path)


def _errors(store: FeatureStore, other: FeatureStore) -> Errors:
    cosines, relative, agreements = [], [], []
    for video_id in store.video_ids:
        before: tuple[Tensor, Tensor] | None = None
        for exact, rounded in _frames(store, other, video_id):
            units = unit_tokens(exact), unit_tokens(rounded)
            # Half the square of the chord: 1 - cosine without its cancellation.
            cosines.append((units[0] - units[1]).square().sum(-1) / 2)
            relative.append((exact - rounded).norm(dim=-1) / exact.norm(dim=-1))
            if before is not None:
                found = [_nearest(*pair) for pair in zip(before, units, strict=True)]
                agreements.append(_share_of_common(*found))
            before = units
    distances = torch.cat(cosines).double().numpy()
    return Errors(
        float(distances.mean()),
        float(np.quantile(distances, 0.99)),
        float(distances.max()),
        float(torch.cat(relative).mean()),
        statistics.mean(agreements),
    )


def _frames(store: FeatureStore, other: FeatureStore, video_id: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every frame's tokens `[token dim]` of both stores in float32."""
    for pair in zip(store.iter_tokens(video_id), other.iter_tokens(video_id), strict=True):
        exact, rounded = (torch.from_numpy(tokens).flatten(0, 1).float() for tokens in pair)
        yield exact, rounded


def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.T).topk(TOP_K).indices


def _share_of_common(ours: Tensor, theirs: Tensor) -> float:
    return float((ours[:, :, None] == theirs[:, None, :]).any(-1).float().mean())


def _propagate(store: FeatureStore, out: Path, options: argparse.Namespace) -> tuple[Score, ...]:
    root = media_root(store.manifest, options.data_root)
    protocol = make_protocol(task=options.task)
    settings = PropagateSettings(overlays="none")
    report = propagate_store(store, root, protocol, out, settings, task=options.task)
    if report.failures or report.error:
        raise SystemExit(f"{out.name}: {report.failures or report.error}")
    return report.scores


def _percentages(scores: tuple[Score, ...]) -> Figures:
    (mean,) = mean_scores(scores)
    figures = {name: 100 * mean.figures[name] for name in ("jf_mean", "j_mean", "f_mean")}
    return figures | {
        f"jf_mean {video_id}": 100 * means[0].main for video_id, means in sequence_means(scores)
    }


def _speed(store: FeatureStore) -> dict[str, int]:
    """Return MB of float16 tokens per second, both ways and copied: medians of interleaved runs."""
    frames = store.iter_tokens(store.video_ids[0])
    tokens = [frame for frame, _ in zip(frames, range(TIMED_FRAMES), strict=False)]
    stored, back = [quantize(frame) for frame in tokens], [np.empty_like(frame) for frame in tokens]
    jobs: dict[str, Callable[[int], object]] = {
        "copy": lambda n: np.copyto(back[n], tokens[n]),
        "quantize": lambda n: quantize(tokens[n]),
        "dequantize": lambda n: dequantize(stored[n], back[n]),
    }
    n_bytes = sum(frame.nbytes for frame in tokens)
    figures: dict[str, int] = {}
    for n_threads in sorted({1, os.cpu_count() or 1}):
        with ThreadPoolExecutor(n_threads) as pool:
            seconds = _time_in_turn(jobs, len(tokens), pool, n_threads)
        for name, median in seconds.items():
            figures[f"{name}_mb_per_s_{n_threads}_threads"] = round(n_bytes / median / 1e6)
    return figures


def _time_in_turn(
    jobs: Mapping[str, Callable[[int], object]], n_items: int, pool: ThreadPoolExecutor, n_threads: int
) -> dict[str, float]:
    def share(job: Callable[[int], object], first: int) -> None:
        for number in range(first, n_items, n_threads):
            job(number)

    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(REPEATS):
        for name, job in jobs.items():
            started = time.perf_counter()
            list(pool.map(share, [job] * n_threads, range(n_threads)))
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def _report(figures: dict[str, Any], path: Path | None) -> None:
    talk = Talk()
    if ways := figures.get("ways"):
        keys = list(ways[WAYS[-1].name])
        rows = [[key, *(_cell(way.get(key)) for way in ways.values())] for key in keys]
        talk.table("tokens of the same frames, kept in several ways", ["figure", *ways], rows)
    speed = [[key, str(value)] for key, value in figures["speed"].items()]
    talk.table("MB of float16 tokens per second", ["figure", "value"], speed)
    text = json.dumps(figures)
    talk.result(text)
    if path:
        path.write_text(text + "\n")


def _cell(figure: float | None) -> str:
    if figure is None:
        return ""
    return str(figure) if isinstance(figure, int) else f"{figure:.5g}" if figure >= 0.1 else f"{figure:.2e}"


if __name__ == "__main__":
    main()
