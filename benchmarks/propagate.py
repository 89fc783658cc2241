"""Propagation against the released code's dense way, frame by frame on the same tokens; and peak memory.

The dense side is what T-CORE and CropMAE do for a frame: gather the 21 frames of the context, the full
affinity in blocks of 100 queries, add the mask, divide, top-k, softmax, gather labels. All sides see the same
frame in turn, with a full queue; figures are medians. The floor is the product of every query with its
candidates alone, at the rate that this machine multiplies matrices with.

Peak memory is what a process has at most above what it has before the first frame, tokens made frame by
frame, each figure from a process of its own (Linux). Ours is measured for a short and a long clip, and for
the widest clip of DAVIS, `shooting` (480x1152). Of the dense side there are two: `dense`, which gathers the
context of one frame as the timed one does, and `released`, which gathers the contexts of all frames before it
begins, as T-CORE does; both keep the features of the whole clip.

    python benchmarks/propagate.py
    python benchmarks/propagate.py --rows 15 --cols 27 --dim 192 --frames 5
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.functional import interpolate, layer_norm, normalize

from cosettle_cache.core.console import Talk
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.propagation.propagator import Propagator
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.search.masked import in_window, make_slabs

CLIP_LENGTHS = (30, 150)
#: Columns of `shooting`, for 55 of the other clips.
WIDE = 72 / 55
#: Frames of the clip that `released` holds 21 times.
RELEASED_FRAMES = 40
#: Frames whose labels the dense sides compute: the peak is that of any of them.
DENSE_STEPS = 2


def main() -> None:
    options = _options()
    if options.memory:
        print(_measure_peak(options))
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
    parser.add_argument("--memory", choices=["ours", "dense", "released"], help=argparse.SUPPRESS)
    parser.add_argument("--clip", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _tokens(options: argparse.Namespace) -> Iterator[Tensor]:
    return make_tokens(options.rows, options.cols, options.dim)


def make_tokens(rows: int, cols: int, dim: int) -> Iterator[Tensor]:
    """Yield float16 tokens without end: a smooth scene under a panning camera, noise, LayerNorm.

    Cosines of neighbouring frames, 0.9 at the right place and 0.2 to 0.6 elsewhere, are those of a ViT-B.
    """
    generator = torch.Generator().manual_seed(0)
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
        self.features: list[Tensor] = []
        self._labels = [first_labels.to(device).flatten(0, 1)]
        self._shape = first_labels.shape

    def context(self, t: int) -> list[int]:
        """Return the frames that frame `t` looks at, copies of the first included."""
        return [0, *(max(frame, 0) for frame in range(t - self._protocol.n_context, t))]

    def step(self, tokens: Tensor) -> Tensor:
        """Return the label map of the next frame."""
        t = len(self.features)
        self._take(tokens)
        if t > 0:
            self.carry(t, torch.stack([self.features[frame] for frame in self.context(t)]))
        return self._labels[t].view(self._shape)

    def skip(self, frames: Iterable[Tensor]) -> None:
        """Take frames whose labels stay those of the first: what is kept is the same."""
        for tokens in frames:
            self._take(tokens)
            self._labels += [self._labels[0].clone()] * (len(self.features) - len(self._labels))

    def carry(self, t: int, keys: Tensor) -> None:
        """Compute the labels of frame `t` from the features of its context, and keep them."""
        labels = torch.stack([self._labels[frame] for frame in self.context(t)]).flatten(0, 1)
        queries = self.features[t].split(100)
        blocks = [self._block(q, keys, labels, 100 * i) for i, q in enumerate(queries)]
        self._labels[t:] = [torch.cat(blocks)]

    def _take(self, tokens: Tensor) -> None:
        self.features.append(normalize(tokens.to(self._mask.device).float(), dim=-1).flatten(0, 1))

    def _block(self, queries: Tensor, keys: Tensor, labels: Tensor, start: int) -> Tensor:
        affinity = torch.einsum("qd,fkd->qfk", queries, keys)
        affinity[:, 1:] += self._mask[start : start + len(queries), None]
        affinity /= self._protocol.temperature
        values, index = affinity.flatten(1).topk(self._protocol.top_k)
        return (torch.softmax(values, 1)[..., None] * labels[index]).sum(1)


def _time_frames(options: argparse.Namespace) -> dict[str, object]:
    protocol, first = make_protocol(), _first_labels(options)
    searches = ("torch",) if options.device != "cpu" else ("bf16", "faiss", "torch")
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
    floor = _floor(options, protocol)
    figures |= floor
    for search in searches:
        figures[f"{search}_over_floor"] = round(
            1e3 * statistics.median(full[search]) / floor["floor_product_ms"], 2
        )
        ratios = [dense / ours for dense, ours in zip(full["dense"], full[search], strict=True)]
        figures[f"dense_over_{search}"] = round(statistics.median(ratios), 2)
        figures[f"{search}_max_label_error"] = float((found[search] - found["dense"]).abs().max())
    return figures


def _floor(options: argparse.Namespace, protocol: EvalProtocol) -> dict[str, float]:
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
    short, long = CLIP_LENGTHS
    wide = ["--cols", str(round(WIDE * options.cols))]
    peaks = {
        f"ours_peak_mb_{short}_frames": _peak_mb("ours", short),
        f"ours_peak_mb_{long}_frames": _peak_mb("ours", long),
        f"ours_peak_mb_shooting_{long // 3}_frames": _peak_mb("ours", long // 3, *wide),
        f"dense_peak_mb_{RELEASED_FRAMES}_frames": _peak_mb("dense", RELEASED_FRAMES),
        f"dense_peak_mb_{long}_frames": _peak_mb("dense", long),
        f"released_peak_mb_{RELEASED_FRAMES}_frames": _peak_mb("released", RELEASED_FRAMES),
    }
    ours = peaks[f"ours_peak_mb_{long}_frames"]
    shares = {
        f"ours_over_{name.replace('_peak_mb', '')}": round(ours / peak, 3)
        for name, peak in peaks.items()
        if not name.startswith("ours")
    }
    return peaks | shares


def _peak_mb(side: str, n_frames: int, *more: str) -> float:
    arguments = [sys.executable, __file__, *sys.argv[1:], *more, "--memory", side, "--clip", str(n_frames)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def _measure_peak(options: argparse.Namespace) -> float:
    """Return the peak of resident memory in MB above what was resident before the first frame."""
    tokens = itertools.islice(_tokens(options), options.clip)
    work = {"ours": _run_ours, "dense": _run_dense, "released": _run_released}[options.memory]
    # The first product makes the math library allocate its buffers for good.
    _matrix_rate(options)
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    work(options, tokens)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return round((peak - before) / 1e6, 1)


def _run_ours(options: argparse.Namespace, tokens: Iterator[Tensor]) -> None:
    propagator = Propagator(
        _first_labels(options),
        make_protocol(),
        device=options.device,
        search=options.search,
        memory_limit=options.memory_limit,
    )
    for frame in tokens:
        propagator.step(frame)


def _run_dense(options: argparse.Namespace, tokens: Iterator[Tensor]) -> None:
    dense = Dense(_first_labels(options), make_protocol(), options.device)
    dense.skip(itertools.islice(tokens, options.clip - DENSE_STEPS))
    for frame in tokens:
        dense.step(frame)


def _run_released(options: argparse.Namespace, tokens: Iterator[Tensor]) -> None:
    """Gather the contexts of all frames at once, then compute the last ones."""
    dense = Dense(_first_labels(options), make_protocol(), options.device)
    dense.skip(tokens)
    contexts = [dense.context(t) for t in range(1, options.clip)]
    features = torch.stack(dense.features)
    keys = features[torch.tensor(contexts)]
    for t in range(options.clip - DENSE_STEPS, options.clip):
        dense.carry(t, keys[t - 1])


if __name__ == "__main__":
    main()
