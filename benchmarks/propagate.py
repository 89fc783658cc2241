"""Propagation against the released code's dense way, frame by frame on the same tokens; and resident memory.

The dense side is what T-CORE and CropMAE do for a frame: gather the 21 frames of the context, the full
affinity in blocks of 100 queries, add the mask, divide, top-k, softmax, gather labels. All sides see the same
frame in turn, with a full queue; figures are medians. The floor is the product of every query with its
candidates alone, at the rate that this machine multiplies matrices with. Memory is measured for clips of 20
and 100 frames, each in a process of its own, with tokens made frame by frame.

    python benchmarks/propagate.py
    python benchmarks/propagate.py --rows 15 --cols 27 --dim 192 --frames 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm, normalize

from cosettle_cache.affinity import in_window
from cosettle_cache.console import Talk
from cosettle_cache.propagator import Propagator
from cosettle_cache.protocols import make_protocol
from cosettle_cache.slabs import make_slabs
from cosettle_cache.types import EvalProtocol, Grid

CLIP_LENGTHS = (20, 100)


def main() -> None:
    options = _options()
    if options.memory:
        print(json.dumps(_measure_memory(options)))
        return
    figures = _time_frames(options) | _memory_figures(options)
    rows = [[key, str(value)] for key, value in figures.items()]
    Talk().table("propagation of one frame, full queue", ["figure", "value"], rows)
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--cols", type=int, default=55)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--frames", type=int, default=9, help="frames timed after the queue is full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--search", default="auto", help="of the memory measurement")
    parser.add_argument("--memory-limit", type=int, help="bytes, of the memory measurement")
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _tokens(options: argparse.Namespace) -> Iterator[Tensor]:
    """Yield float16 tokens without end: a smooth scene under a panning camera, noise, LayerNorm.

    Cosines of neighbouring frames, 0.9 at the right place and 0.2 to 0.6 elsewhere, are those of a ViT-B.
    """
    generator = torch.Generator().manual_seed(0)
    rows, cols, dim = options.rows, options.cols, options.dim
    scene = torch.randn(1, 32, rows // 4 + 2, cols, generator=generator)
    scene = interpolate(scene, size=(rows, 8 * cols), mode="bicubic")[0].permute(1, 2, 0)
    lift = torch.randn(32, dim, generator=generator)
    common = 3 * torch.randn(dim, generator=generator)
    pan = 0
    while True:
        pan = (pan + 1) % (7 * cols)
        noise = 1.5 * torch.randn(rows, cols, dim, generator=generator)
        yield layer_norm(scene[:, pan : pan + cols] @ lift + common + noise, (dim,)).half()


def _first_labels(options: argparse.Namespace) -> Tensor:
    labels = torch.zeros(options.rows, options.cols, 3)
    labels[..., 0] = 1
    for number, col in ((1, options.cols // 4), (2, options.cols // 2)):
        labels[options.rows // 4 : options.rows // 2, col : col + 5] = torch.eye(3)[number]
    return labels


class Dense:
    """The released way, one frame at a time; soft labels as `Propagator` gives them."""

    def __init__(self, first_labels: Tensor, protocol: EvalProtocol, device: str) -> None:
        rows, cols, _ = first_labels.shape
        cell = torch.arange(rows * cols, device=device)
        down = cell[:, None] // cols - cell // cols
        right = cell[:, None] % cols - cell % cols
        inside = in_window(down, right, protocol.window, protocol.radius)
        self._mask = torch.zeros(inside.shape, device=device).masked_fill_(~inside, -1e10)
        self._protocol = protocol
        self._features: list[Tensor] = []
        self._labels = [first_labels.to(device).flatten(0, 1)]
        self._shape = first_labels.shape

    def step(self, tokens: Tensor) -> Tensor:
        """Return the label map of the next frame."""
        t, n_context = len(self._features), self._protocol.n_context
        self._features.append(normalize(tokens.to(self._mask.device).float(), dim=-1).flatten(0, 1))
        if t > 0:
            context = [0, *(max(frame, 0) for frame in range(t - n_context, t))]
            keys = torch.stack([self._features[frame] for frame in context])
            labels = torch.stack([self._labels[frame] for frame in context]).flatten(0, 1)
            queries = self._features[t].split(100)
            blocks = [self._block(q, keys, labels, 100 * i) for i, q in enumerate(queries)]
            self._labels.append(torch.cat(blocks))
        return self._labels[t].view(self._shape)

    def _block(self, queries: Tensor, keys: Tensor, labels: Tensor, start: int) -> Tensor:
        affinity = torch.einsum("qd,fkd->qfk", queries, keys)
        affinity[:, 1:] += self._mask[start : start + len(queries), None]
        affinity /= self._protocol.temperature
        values, index = affinity.flatten(1).topk(self._protocol.top_k)
        return (torch.softmax(values, 1)[..., None] * labels[index]).sum(1)


def _time_frames(options: argparse.Namespace) -> dict[str, object]:
    protocol, first = make_protocol(), _first_labels(options)
    searches = ("torch",) if options.device != "cpu" else ("faiss", "torch")
    sides: dict[str, Callable[[Tensor], Tensor]] = {"dense": Dense(first, protocol, options.device).step}
    for search in searches:
        sides[search] = Propagator(first, protocol, device=options.device, search=search).step
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, tokens in enumerate(_tokens(options)):
        found = {name: _timed(step, tokens, seconds[name]) for name, step in sides.items()}
        if number == protocol.n_context + options.frames:
            break
    full = {name: values[protocol.n_context + 1 :] for name, values in seconds.items()}
    figures: dict[str, object] = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "tokens": f"{options.rows}x{options.cols}x{options.dim}",
        "frames_timed": options.frames,
    }
    for name, values in full.items():
        figures[f"{name}_ms"] = round(1000 * statistics.median(values), 1)
    figures |= _floor(options, protocol)
    for search in searches:
        ratios = [dense / ours for dense, ours in zip(full["dense"], full[search], strict=True)]
        figures[f"dense_over_{search}"] = round(statistics.median(ratios), 2)
        figures[f"{search}_max_label_error"] = float((found[search] - found["dense"]).abs().max())
    return figures


def _floor(options: argparse.Namespace, protocol: EvalProtocol) -> dict[str, object]:
    """Return how long the products of a frame take at best: of its windows, of its slabs, of everything."""
    grid = Grid(options.rows, options.cols)
    reached = [(slab.query_cols, slab.positions) for slab in make_slabs(grid, protocol, torch.device("cpu"))]
    in_slabs = sum((q.stop - q.start) * grid.rows * (k.stop - k.start) for q, k in reached)
    cell = torch.arange(grid.n_tokens)
    down, right = cell[:, None] // grid.cols - cell // grid.cols, cell[:, None] % grid.cols - cell % grid.cols
    in_windows = int(in_window(down, right, protocol.window, protocol.radius).sum())
    rate = _matrix_rate(options)
    first = grid.n_tokens**2
    flops = {
        name: 2 * options.dim * (first + protocol.n_context * pairs)
        for name, pairs in (("floor", in_windows), ("slabs", in_slabs), ("whole", first))
    }
    milliseconds = {f"{name}_product_ms": round(1000 * count / rate, 1) for name, count in flops.items()}
    return {"matrix_gflop_per_s": round(rate / 1e9, 1), **milliseconds}


def _matrix_rate(options: argparse.Namespace) -> float:
    """Return the float operations per second of a large float32 product, the best of five."""
    a = torch.randn(options.rows * options.cols, options.dim, device=options.device)
    b = torch.randn(options.dim, 8192, device=options.device)
    out = torch.empty(len(a), 8192, device=options.device)
    seconds: list[float] = []
    for _ in range(6):
        _timed(lambda _: torch.mm(a, b, out=out), a, seconds)
    return 2 * a.numel() * 8192 / min(seconds[1:])


def _timed(step: Callable[[Tensor], Tensor], tokens: Tensor, seconds: list[float]) -> Tensor:
    started = time.perf_counter()
    labels = step(tokens)
    if labels.is_cuda:
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
    return labels


def _memory_figures(options: argparse.Namespace) -> dict[str, object]:
    figures: dict[str, object] = {}
    for n_frames in CLIP_LENGTHS:
        arguments = [sys.executable, __file__, *sys.argv[1:], "--memory", str(n_frames)]
        answer = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        measured = json.loads(answer.splitlines()[-1])
        figures |= {f"{key}_{n_frames}_frames": value for key, value in measured.items()}
    return figures


def _measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Return resident MB after the last of `options.memory` frames, and how much of it propagation added."""
    propagator = Propagator(
        _first_labels(options),
        make_protocol(),
        device=options.device,
        search=options.search,
        memory_limit=options.memory_limit,
    )
    process, before = psutil.Process(), 0
    for number, tokens in zip(range(options.memory), _tokens(options), strict=False):
        if number == 0:
            before = process.memory_info().rss
        propagator.step(tokens)
    after = process.memory_info().rss
    return {"resident_mb": round(after / 1e6), "resident_added_mb": round((after - before) / 1e6)}


if __name__ == "__main__":
    main()
