"""J&F from index maps against a plain array-expanding scorer: seconds and peak memory of both, same figures.

The plain scorer does what the benchmark's official tool does: it expands both clips to one float64 image per
object and frame and works on whole images. Each run has a fresh process; both are given the masks in memory.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --truth DAVIS/Annotations/480p --prediction results
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from cosettle_cache.datasets.davis import read_mask
from cosettle_cache.metrics import boundary_tolerance, davis_j_and_f

Clip = tuple[np.ndarray, np.ndarray]
Figures = list[tuple[float, float]]


def main() -> None:
    options = _options()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = {name: [] for name in SCORERS}
        for _ in range(options.repeats):
            for name in SCORERS:
                rows[name].append(pool.apply(_measure, (name, options)))
    figures = [np.array(rows[name][0]["figures"]) for name in SCORERS]
    print(json.dumps({"largest_difference": float(np.abs(figures[0] - figures[1]).max())}))
    for name, runs in rows.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = statistics.median(run["peak_mib"] for run in runs)
        print(f"{name:<12} {seconds:8.2f} s {peak:8.0f} MiB above the masks")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--truth", type=Path, help="folder of folders of masks; default: drawn discs")
    parser.add_argument("--prediction", type=Path)
    parser.add_argument("--frames", type=int, default=70, help="of the drawn clip")
    parser.add_argument("--objects", type=int, default=3, help="in the drawn clip")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def _measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    cv2.setNumThreads(1)
    clips = _real_clips(options) if options.truth else [_drawn_clip(options.frames, options.objects)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    figures = [pair for clip in clips for pair in SCORERS[name](*clip)]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"figures": figures, "seconds": seconds, "peak_mib": peak / 1024}


def _real_clips(options: argparse.Namespace) -> list[Clip]:
    folders = [path for path in sorted(options.prediction.iterdir()) if path.is_dir()]
    return [
        tuple(_read_clip(root / path.name) for root in (options.truth, options.prediction))
        for path in folders
    ]


def _read_clip(folder: Path) -> np.ndarray:
    return np.stack([read_mask(path) for path in sorted(folder.glob("*.png"))])


def _drawn_clip(n_frames: int, n_objects: int, height: int = 480, width: int = 854) -> Clip:
    truth, prediction = np.zeros((2, n_frames, height, width), np.uint8)
    for frame in range(n_frames):
        for index in range(n_objects):
            centre = (120 + 220 * index + 2 * frame, 160 + 60 * index)
            cv2.circle(truth[frame], centre, 90, index + 1, -1)
            cv2.circle(prediction[frame], (centre[0] + frame % 12, centre[1] + 5), 85, index + 1, -1)
    return truth, prediction


def score_index_maps(truth: np.ndarray, prediction: np.ndarray) -> Figures:
    return [(score.j_mean, score.f_mean) for score in davis_j_and_f(truth, prediction)]


def score_expanded(truth: np.ndarray, prediction: np.ndarray) -> Figures:
    """Expand to `[object frame height width]` in float64, then compare whole images."""
    ids = np.arange(1, int(np.where(truth[0] == 255, 0, truth[0]).max()) + 1)
    true, predicted = (
        (maps[None] == ids[:, None, None, None]).astype(np.float64) for maps in (truth, prediction)
    )
    true, predicted = true[:, 1:-1], predicted[:, 1:-1]
    both, either = (true * predicted).sum((2, 3)), np.maximum(true, predicted).sum((2, 3))
    j = np.divide(both, either, out=np.ones_like(both), where=either > 0)
    f = [
        [_whole_image_f(a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(true, predicted, strict=True)
    ]
    return list(zip(j.mean(1).tolist(), np.mean(f, axis=1).tolist(), strict=True))


def _whole_image_f(true: np.ndarray, predicted: np.ndarray) -> float:
    radius = boundary_tolerance(*true.shape)
    row, col = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (row**2 + col**2 <= radius**2).astype(np.uint8)
    edges = [_whole_image_edges(mask) for mask in (true, predicted)]
    counts = [edge.sum() for edge in edges]
    if not all(counts):
        return float(not any(counts))
    near = [cv2.dilate(edge.astype(np.uint8), disk) for edge in edges]
    precision, recall = (edges[1] * near[0]).sum() / counts[1], (edges[0] * near[1]).sum() / counts[0]
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _whole_image_edges(mask: np.ndarray) -> np.ndarray:
    mask = mask.astype(bool)
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


SCORERS: dict[str, Callable[..., Figures]] = {"index maps": score_index_maps, "expanded": score_expanded}


if __name__ == "__main__":
    main()
