"""J&F from index maps against a plain array-expanding scorer: seconds and peak memory of both, same figures.

The plain scorer goes the official tool's way: it compares both clips, as float64, with one float64 image per
object and frame, and works on whole images, J over all frames at once and F frame by frame, void images
beside them. Each run has a fresh process and one thread; both are given the masks in memory: none decodes.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --truth DAVIS/Annotations/480p --prediction results
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from cosettle_cache.core.console import Talk
from cosettle_cache.core.tables import write_json
from cosettle_cache.metrics import boundary_tolerance, davis_j_and_f
from cosettle_cache.videos.masks import read_mask

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
    document = {"largest_difference": float(np.abs(figures[0] - figures[1]).max())}
    for key in ("seconds", "peak_mib"):
        ours, expanded = ([run[key] for run in rows[name]] for name in SCORERS)
        document |= {f"ours_{key}": statistics.median(ours), f"expanded_{key}": statistics.median(expanded)}
        ratios = [b / max(a, 1e-9) for a, b in zip(ours, expanded, strict=True)]
        document[f"expanded_over_ours_{key}"] = statistics.median(ratios)
    lines = [[key, f"{value:.4g}"] for key, value in document.items()]
    Talk().table("J&F of the same masks, one process and one thread each", ["figure", "value"], lines)
    if options.json:
        write_json(options.json, document)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--truth", type=Path, help="folder of folders of masks; default: drawn discs")
    parser.add_argument("--prediction", type=Path)
    parser.add_argument("--frames", type=int, default=70, help="of the drawn clip")
    parser.add_argument("--objects", type=int, default=3, help="in the drawn clip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def _measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    cv2.setNumThreads(1)
    clips = _real_clips(options) if options.truth else [_drawn_clip(options.frames, options.objects)]
    before = _forget_peak()
    start = time.perf_counter()
    figures = [pair for clip in clips for pair in SCORERS[name](*clip)]
    seconds = time.perf_counter() - start
    return {"figures": figures, "seconds": seconds, "peak_mib": (_memory_kib("VmHWM") - before) / 1024}


def _forget_peak() -> int:
    """Make the peak of resident memory what is resident now (Linux), and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_kib("VmRSS")


def _memory_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


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
    """Compare with an image per object, `[object frame height width]` in float64; work on whole images."""
    true = _expand(np.where(truth == 255, 0, truth), int(np.where(truth[0] == 255, 0, truth[0]).max()))
    true, predicted = true[:, 1:-1], _expand(prediction[1:-1], len(true))
    return [_object_figures(*pair) for pair in zip(true, predicted, strict=True)]


def _expand(maps: np.ndarray, n_objects: int) -> np.ndarray:
    each = np.ones((n_objects, *maps.shape)) * np.arange(1, n_objects + 1)[:, None, None, None]
    return each == maps.astype(np.float64)[None]


def _object_figures(true: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    counted = ~(true == 255)
    both = (true & predicted & counted).sum((1, 2))
    either = ((true | predicted) & counted).sum((1, 2))
    j = np.divide(both, either, out=np.ones(len(true)), where=either > 0)
    f = [_whole_image_f(*frame) for frame in zip(true & counted, predicted & counted, strict=True)]
    return float(j.mean()), float(np.mean(f))


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
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


SCORERS: dict[str, Callable[..., Figures]] = {"index maps": score_index_maps, "expanded": score_expanded}


if __name__ == "__main__":
    main()
