"""Retrieval of 10,000 videos against the plain way, which sorts each query's similarities on its own.

Vectors of ViT-B width are drawn around 101 class centres. All sides get the same pooled vectors and give mAP,
R@1 and R@5 of leave-one-out queries; the plain one is timed on some of the queries and scaled to all. The
target is ten seconds on two cores.

    python benchmarks/probe.py
    python benchmarks/probe.py --videos 2000 --json probe.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cosettle_cache.analysis.probe.videos import Labelled, retrieve, vote
from cosettle_cache.core.settings import ProbeSettings
from cosettle_cache.core.types import MediaKind, Video

TARGET_S = 10.0
Figures = tuple[float, float, float]


def main() -> None:
    options = _options()
    torch.set_num_threads(2)
    vectors, classes = make_vectors(options.videos, options.dim, options.classes)
    labelled = _labelled(classes)
    queries = np.random.default_rng(1).choice(
        options.videos, min(options.plain, options.videos), replace=False
    )
    sides: dict[str, Callable[[], Figures | None]] = {
        "retrieval, faiss": lambda: _figures(
            retrieve(replace(labelled, settings=ProbeSettings(search="faiss")), vectors)
        ),
        "retrieval, torch": lambda: _figures(
            retrieve(replace(labelled, settings=ProbeSettings(search="torch")), vectors)
        ),
        "k-NN, faiss": lambda: _nothing(vote(labelled, vectors)),
        "plain": lambda: plain(vectors, classes, queries),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    figures: dict[str, Figures | None] = {}
    for _ in range(options.repeats):
        for name, side in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            figures[name] = side()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    of_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    for values in (medians, of_cpu):
        values["plain"] *= options.videos / len(queries)
    _report(options, medians, of_cpu, figures, _agreement(vectors, classes, queries, labelled))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--plain", type=int, default=500, help="queries of the plain way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def make_vectors(n_videos: int, dim: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, n_classes, n_videos)
    centres = rng.standard_normal((n_classes, dim))
    # Shared by all, as the mean of real tokens is.
    common = 2 * rng.standard_normal(dim)
    vectors = common + centres[classes] + 3 * rng.standard_normal((n_videos, dim))
    return vectors.astype(np.float32), classes


def _labelled(classes: np.ndarray) -> Labelled:
    videos = tuple(
        Video(f"{number}", f"{number}", MediaKind.FILE, 1, 1, 1, class_name=f"{name:03d}")
        for number, name in enumerate(classes.tolist())
    )
    return Labelled(videos, ProbeSettings(search="faiss"))


def _figures(outcome: object) -> Figures:
    return tuple(figure.value for figure in outcome.figures)  # type: ignore[attr-defined, return-value]


def _nothing(outcome: object) -> None:
    return None


def plain(vectors: np.ndarray, classes: np.ndarray, queries: np.ndarray) -> Figures:
    """One query after the other: similarities, a stable sort, precision at every hit."""
    unit = _unit(vectors)
    return tuple(np.mean([_plain_query(unit, classes, query) for query in queries], axis=0))  # type: ignore[return-value]


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / lengths).astype(np.float32).astype(np.float64)


def _plain_query(unit: np.ndarray, classes: np.ndarray, query: int) -> Figures:
    order = np.argsort(-(unit @ unit[query]), kind="stable")
    hits = classes[order[order != query]] == classes[query]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return (float(precision[hits].mean()), float(hits[0]), float(hits[:5].any()))


def _agreement(vectors: np.ndarray, classes: np.ndarray, queries: np.ndarray, labelled: Labelled) -> float:
    """Return the largest difference of a query's average precision between the two ways."""
    answers = {int(answer.video_id): answer.value for answer in retrieve(labelled, vectors).answers}
    unit = _unit(vectors)
    return max(abs(answers[int(query)] - _plain_query(unit, classes, query)[0]) for query in queries[:200])


def _report(
    options: argparse.Namespace,
    medians: dict[str, float],
    cpu: dict[str, float],
    figures: dict[str, Figures | None],
    difference: float,
) -> None:
    sizes = f"{options.videos} videos, {options.dim} channels, {options.classes} classes"
    print(f"{sizes}, medians of {options.repeats}")
    for name, seconds in medians.items():
        mark = "" if not name.startswith("retrieval") else f"   target {TARGET_S:.0f} s"
        values = figures[name]
        shown = "" if values is None else "   mAP {:.4f}  R@1 {:.4f}  R@5 {:.4f}".format(*values)
        print(f"{name:<18} {seconds:8.2f} s  {cpu[name]:8.2f} CPU s{mark}{shown}")
    print(f"largest difference of an average precision: {difference:.2e}")
    if options.json:
        document = {
            "videos": options.videos,
            "dim": options.dim,
            "seconds": medians,
            "cpu": cpu,
            "figures": figures,
        }
        options.json.write_text(json.dumps(document | {"difference": difference}, indent=2) + "\n")


if __name__ == "__main__":
    main()
