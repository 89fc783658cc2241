"""What only a GPU can tell: the CPU's numbers, waits, and speed against what the card itself can do.

Nine sections, each in a process of its own with a time limit, in under eight minutes on an H100; all figures
come as a table and as JSON, and a check that fails, or a section that does, makes exit code 4. Needs neither
FAISS nor PyAV, nor any data.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --only search,davis
    python benchmarks/gpu.py --tiny --device cpu        the same code at toy sizes, where there is no GPU
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import PropagateSettings, TrainSettings
from cosettle_cache.core.types import EvalProtocol, Grid, PositionShift
from cosettle_cache.encoders import Backbone, load_backbone
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics import DavisScorer
from cosettle_cache.propagation.context import ContextSearch
from cosettle_cache.propagation.propagator import LabelCarrier, propagate
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.propagation.run import propagate_store
from cosettle_cache.search.masked import in_window
from cosettle_cache.store import open_store
from cosettle_cache.training.batches import Batch, Portion, Step
from cosettle_cache.training.learner import Learner, Trainer
from cosettle_cache.videos.masks import read_mask, write_mask

#: Sections and the seconds that each may take.
SECTIONS = {
    "ceilings": 30,
    "parity": 75,
    "sanity": 40,
    "encoder": 60,
    "extract": 60,
    "train": 75,
    "search": 50,
    "davis": 70,
    "metrics": 15,
}
DAVIS_FRAMES = 1999
Figures = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How large things are, on a GPU and in a trial run."""

    device: str
    matrix: int = 8192
    megabytes: int = 1024
    backbone: str = "timm/vit_base_patch16_224"
    side: int = 224
    batches: tuple[int, ...] = (64, 128, 256)
    rows: int = 30
    cols: int = 55
    dim: int = 768
    frames: int = 86
    clips: int = 400
    jpeg: tuple[int, int] = (256, 340)
    train_batch: int = 512
    heads: int = 8
    davis_clips: int = 3
    davis_frames: int = 67
    picture: tuple[int, int] = (480, 854)
    pixels: str = "480x880"

    @classmethod
    def tiny(cls, device: str) -> Sizes:
        return cls(
            *(device, 64, 1, "timm/test_vit", 160, (2, 4), 6, 9, 32, 26, 6, (64, 96), 4, 2),
            *(1, 6, (64, 96), "64x96"),
        )

    @property
    def grid(self) -> Grid:
        return Grid(self.rows, self.cols)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        run_section(options.section, _sizes(options), options.out)
        return
    wanted = options.only.split(",") if options.only else list(SECTIONS)
    document = {name: _in_process(name, options) for name in wanted}
    rows = [
        [name, key, str(value)]
        for name, figures in document.items()
        for key, value in figures.items()
        if key != "checks"
    ]
    Talk().table("what this machine's GPU does", ["section", "figure", "value"], rows)
    failed = [
        f"{name}: {check}"
        for name, figures in document.items()
        for check, passed in figures["checks"].items()
        if not passed
    ]
    (options.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({"out": str(options.out / "gpu.json"), "failed": failed}))
    sys.exit(4 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="folder for figures and logs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _sizes(options: argparse.Namespace) -> Sizes:
    return Sizes.tiny(options.device) if options.tiny else Sizes(options.device)


def _in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a section; return its figures, with a check that says whether it came to its end."""
    path, log = options.out / f"{name}.json", options.out / f"{name}.log"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--section", name, "--out", options.out, "--device", options.device]
    started = time.perf_counter()
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [*command, *["--tiny"] * options.tiny],
                stdout=stream,
                stderr=stream,
                timeout=None if options.tiny else SECTIONS[name],
                check=False,
            )
            ended = done.returncode == 0
        except subprocess.TimeoutExpired:
            ended = False
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"checks": {}}
    figures["checks"]["ended"] = ended
    figures["seconds"] = round(time.perf_counter() - started, 1)
    if not ended:
        print(f"{name} did not end; {log} ends with:", *log.read_text().splitlines()[-8:], sep="\n  ")
    return figures


def run_section(name: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """Run a section here and write its figures as they come; a value that is True or False is a check."""
    figures: dict[str, Any] = {"checks": {}}
    section: Callable[[Sizes], Figures] = globals()[name]
    for key, value in section(sizes):
        (figures["checks"] if isinstance(value, bool) else figures)[key] = value
        (out / f"{name}.json").write_text(json.dumps(figures, indent=1))
    if sizes.on_gpu:
        figures["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        (out / f"{name}.json").write_text(json.dumps(figures, indent=1))
    return figures


def _seconds(work: Callable[[], object], sizes: Sizes, repeats: int = 5) -> float:
    """Return the median seconds of a piece of work, waited for."""
    found = []
    for _ in range(repeats + 1):
        sizes.wait()
        started = time.perf_counter()
        work()
        sizes.wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _difference(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def _counted_waits(sizes: Sizes) -> Iterator[dict[str, int]]:
    """Count where the host waits for the GPU, by line of the package, as torch itself notices it."""
    places: dict[str, int] = {}
    if not sizes.on_gpu:
        yield places
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for item in seen:
        if "synchroniz" in str(item.message):
            place = f"{Path(item.filename).name}:{item.lineno}"
            places[place] = places.get(place, 0) + 1


def moving_tokens(n: int, grid: Grid, dim: int) -> Tensor:
    """Return float16 tokens of a panning scene; see benchmarks/propagate.py."""
    from propagate import make_tokens

    frames = make_tokens(grid.rows, grid.cols, dim)
    return torch.stack([next(frames) for _ in range(n)])


def _first_labels(grid: Grid) -> Tensor:
    labels = torch.zeros(grid.rows, grid.cols, 3)
    labels[..., 0] = 1
    for number, col in ((1, grid.cols // 4), (2, grid.cols // 2)):
        labels[grid.rows // 4 : grid.rows // 2, col : col + max(2, grid.cols // 10)] = torch.eye(3)[number]
    return labels


def ceilings(sizes: Sizes) -> Figures:
    """What this very card multiplies and copies: other figures are compared with these."""
    yield "torch", torch.__version__
    yield "card", torch.cuda.get_device_name() if sizes.on_gpu else "none"
    yield "cores", os.cpu_count()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(sizes.matrix, sizes.matrix, device=sizes.device, dtype=dtype) for _ in range(2))
        seconds = _seconds(partial(torch.mm, a, b), sizes)
        yield f"product_{name}_tflops", round(2 * sizes.matrix**3 / seconds / 1e12, 2)
    there = torch.empty(sizes.megabytes * 2**18, device=sizes.device)
    copy = torch.empty_like(there)
    yield "copy_gb_per_s", round(2 * there.nbytes / _seconds(partial(copy.copy_, there), sizes) / 1e9, 1)
    host = torch.empty(there.shape)
    for name, memory in (("pageable", host), ("pinned", host.pin_memory() if sizes.on_gpu else host)):
        for way, work in (("up", partial(there.copy_, memory)), ("down", partial(memory.copy_, there))):
            seconds = _seconds(partial(work, non_blocking=True), sizes)
            yield f"{way}_{name}_gb_per_s", round(there.nbytes / seconds / 1e9, 1)


def parity(sizes: Sizes) -> Figures:
    """The CPU's numbers, within what rounding allows, and the same bits twice."""
    shifts = [None, PositionShift(10.0, 3, 4), None, PositionShift(10.0, 0, 1)]
    images = torch.randn(4, 3, sizes.side, sizes.side, generator=torch.Generator().manual_seed(0))
    wanted = load_backbone(sizes.backbone, weights="random").encode(images, shifts)
    for precision, limit in (("fp32", 2e-5), ("bf16", 2e-2), ("fp16", 3e-3)):
        backbone = load_backbone(sizes.backbone, weights="random", device=sizes.device, precision=precision)
        found = backbone.encode(images, shifts)
        yield f"tokens_{precision}_error", f"{_difference(found, wanted):.1e}"
        yield f"tokens_{precision}", _difference(found, wanted) < limit
        yield f"tokens_{precision}_twice", torch.equal(found, backbone.encode(images, shifts))
        alone = torch.cat([backbone.encode(images[i : i + 1], shifts[i : i + 1]) for i in range(4)])
        yield f"tokens_{precision}_alone_error", f"{_difference(alone, found):.1e}"
    here, there, again = (_train(device, sizes.dim) for device in ("cpu", sizes.device, sizes.device))
    yield "weights_error", f"{_difference(there, here):.1e}"
    yield "weights", _difference(there, here) < 1e-3
    yield "weights_twice", torch.equal(there, again)
    tokens, labels = moving_tokens(5, sizes.grid, sizes.dim), _first_labels(sizes.grid)
    for preset in ("cosettle", "dino", "crw"):
        protocol = make_protocol(preset)
        maps = propagate(tokens, labels, protocol, search="torch")
        found = propagate(tokens, labels, protocol, device=sizes.device)
        yield f"labels_{preset}_error", f"{float((maps - found).abs().max()):.1e}"
        yield f"labels_{preset}", float((maps.argmax(-1) == found.argmax(-1)).double().mean()) > 0.9995


def _train(device: str, dim: int, n_steps: int = 20) -> Tensor:
    """Return the weights after some steps on the same samples."""
    torch.manual_seed(0)
    learner = Learner(Projection(dim).to(device), TrainSettings(base_lr=1e-2))
    trainer, generator = Trainer([learner]), torch.Generator().manual_seed(0)
    for number in range(n_steps):
        scene = torch.randn(4, 1, 14, 14, dim, generator=generator)
        samples = (scene + 0.5 * torch.randn(4, 3, 14, 14, dim, generator=generator)).half()
        step = Step(number, 0, number / n_steps, False, np.arange(4))
        trainer.feed(Batch(Portion(step, np.arange(4), True), samples))
    return torch.cat([item.detach().flatten().cpu() for item in learner.projection.parameters()])


def sanity(sizes: Sizes) -> Figures:
    """Waits where none belong, float32 that stays float32, and memory that does not grow."""
    tokens, protocol = moving_tokens(12, sizes.grid, sizes.dim).to(sizes.device), make_protocol(n_context=4)
    search = _search(sizes, protocol, 8)
    _search_all(search, tokens[:4])
    with _counted_waits(sizes) as waits:
        _search_all(search, tokens[4:12])
    yield "waits_of_eight_searched_frames", waits
    yield "search_waits_once", sum(waits.values()) <= 1
    backbone = load_backbone(sizes.backbone, weights="random", device=sizes.device)
    images = torch.randn(4, 3, sizes.side, sizes.side, device=sizes.device)
    exact = backbone.encode(images)
    with _counted_waits(sizes) as waits:
        backbone.encode(images)
    yield "waits_of_a_batch", waits
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as other libraries do
    try:
        yield "float32_stays_exact", torch.equal(backbone.encode(images), exact)
        yield "flags_are_left_as_found", torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    if sizes.on_gpu:
        held = []
        for _ in range(10):
            backbone.encode(images)
            _search_all(_search(sizes, protocol, 8), tokens)
            held.append(torch.cuda.memory_reserved())
        yield "memory_does_not_grow", held[-1] <= held[3]


def encoder(sizes: Sizes) -> Figures:
    """Images per second of the bare encoder."""
    for precision in ("fp32", "bf16"):
        backbone = load_backbone(sizes.backbone, weights="random", device=sizes.device, precision=precision)
        for batch in sizes.batches:
            yield f"{precision}_batch_{batch}_images_per_s", round(_bare(backbone, batch, sizes), 1)


def _bare(backbone: Backbone, batch: int, sizes: Sizes) -> float:
    images = torch.randn(batch, 3, sizes.side, sizes.side, device=sizes.device)
    shifts = [None if i % 3 else PositionShift(10.0, 3, 4) for i in range(batch)]
    return batch / _seconds(lambda: backbone.encode(images, shifts), sizes)


def extract(sizes: Sizes) -> Figures:
    """Extraction of clips of JPEG frames by the command, over the bare encoder at the same batch."""
    batch = sizes.batches[-2]
    backbone = load_backbone(sizes.backbone, weights="random", device=sizes.device, precision="bf16")
    bare = _bare(backbone, batch, sizes)
    yield "bare_images_per_s", round(bare, 1)
    del backbone
    with _folder() as root:
        _write_clips(root / "clips", sizes.clips, 8, sizes.jpeg)
        _command(
            "manifest", "build", "folder", root / "clips", "--data-root", root, "--out", root / "c.parquet"
        )
        report = _command(
            *("extract", "--backbone", sizes.backbone, "--weights", "random", "--precision", "bf16"),
            *("--manifest", root / "c.parquet", "--data-root", root, "--out", root / "s.zarr"),
            *("--device", sizes.device, "--batch", batch),
        )
        yield "images_per_s", round(report["images_per_s"], 1)
        yield "over_bare", round(report["images_per_s"] / bare, 3)
        yield "stages_s", {name: round(value, 2) for name, value in report["seconds"].items()}


def train(sizes: Sizes) -> Figures:
    """Samples per second of one head and of a sweep by the command, and of reading alone."""
    n = 3 * sizes.train_batch
    with _folder() as root:
        from train import write_store

        store = write_store(root / "s.zarr", n)
        ids = store.sample_ids
        out = np.empty((sizes.train_batch, *store.samples(ids[:1]).shape[1:]), np.float16)
        read = _seconds(partial(store.read_into, ids[: sizes.train_batch], out), sizes)
        yield "reading_samples_per_s", round(sizes.train_batch / read, 1)
        values = ",".join(f"{0.02 + 0.01 * i:g}" for i in range(sizes.heads))
        seconds = {}
        for precision in ("float32", "bf16"):
            for name, more in (("one", []), ("sweep", ["--sweep", f"temperature={values}"])):
                report = _command(
                    *("train", "--features", root / "s.zarr", "--batch", sizes.train_batch, "--epochs", 2),
                    *("--precision", precision, "--device", sizes.device),
                    *("--out", root / f"{name} {precision}", *more),
                )
                seconds[name] = report["seconds"]
                yield f"{name}_{precision}_samples_per_s", round(2 * n / seconds[name], 1)
            yield f"sweep_over_one_{precision}", round(seconds["sweep"] / seconds["one"], 2)


def search(sizes: Sizes) -> Figures:
    """Milliseconds per frame of the search with a full queue, and what share of the product's rate it is."""
    grid, n_full = sizes.grid, 22
    tokens = moving_tokens(n_full, grid, sizes.dim)
    tokens = torch.cat([tokens] * (sizes.frames // n_full + 1))[: sizes.frames].to(sizes.device)
    protocol, n_timed = make_protocol(), sizes.frames - n_full
    kinds = [("cosettle", name) for name in ("auto", "triton", "faiss")]
    for preset, kind in (*kinds, ("dino", "auto"), ("crw", "auto")):
        try:
            milliseconds = _search_ms(sizes, make_protocol(preset), kind, tokens, n_full)
        except Exception as error:  # FAISS or Triton is not there, or not for this GPU
            yield f"{preset}_{kind}", f"{type(error).__name__}: {str(error)[:100]}"
            continue
        yield f"{preset}_{kind}_ms_per_frame", round(milliseconds, 3)
        if (preset, kind) == ("cosettle", "auto"):
            flops = 2 * sizes.dim * _candidates(grid, protocol)
            half = torch.float16 if sizes.on_gpu else torch.bfloat16
            a = torch.randn(grid.n_tokens, sizes.dim, device=sizes.device, dtype=half)
            keys = torch.randn(21 * grid.n_tokens, sizes.dim, device=sizes.device, dtype=half)
            rate = 2 * keys.numel() * len(a) / _seconds(lambda: keys @ a.T, sizes)  # noqa: B023
            yield "product_tflops_at_this_shape", round(rate / 1e12, 2)
            yield "share_of_that_rate_in_windows", round(flops / rate / (milliseconds / 1e3), 3)
    lists = list(_search(sizes, protocol, n_timed).steps(tokens[:n_timed]))
    carrier = LabelCarrier(_first_labels(grid), protocol, device=sizes.device)
    seconds = _seconds(lambda: list(carrier.steps(lists[1:])), sizes, 2)
    yield "labels_ms_per_frame", round(1e3 * seconds / (n_timed - 1), 3)


def _search(sizes: Sizes, protocol: EvalProtocol, n_at_once: int, kind: str = "auto") -> ContextSearch:
    device = torch.device(sizes.device)
    return ContextSearch(sizes.grid, sizes.dim, protocol, device=device, search=kind, n_at_once=n_at_once)


def _search_all(search: ContextSearch, tokens: Tensor) -> None:
    for frames in tokens.split(search.n_at_once):
        list(search.steps(frames))


def _search_ms(sizes: Sizes, protocol: EvalProtocol, kind: str, tokens: Tensor, n_full: int) -> float:
    """Return the milliseconds of a frame after the first `n_full`, which warm up and fill the queue."""
    search = _search(sizes, protocol, len(tokens) - n_full, kind)
    _search_all(search, tokens[:n_full])
    sizes.wait()
    started = time.perf_counter()
    _search_all(search, tokens[n_full:])
    sizes.wait()
    return 1e3 * (time.perf_counter() - started) / (len(tokens) - n_full)


def _candidates(grid: Grid, protocol: EvalProtocol) -> int:
    """Return how many tokens all queries of a frame look at."""
    cell = torch.arange(grid.n_tokens)
    down, right = cell[:, None] // grid.cols - cell // grid.cols, cell[:, None] % grid.cols - cell % grid.cols
    inside = int(in_window(down, right, protocol.window, protocol.radius).sum())
    return grid.n_tokens**2 + protocol.n_context * inside


def davis(sizes: Sizes) -> Figures:
    """Clips in DAVIS's layout, from frames to scores, scaled to the 1,999 frames of its validation split."""
    with _folder() as root:
        data = root / "DAVIS"
        names = _write_clips(data / "JPEGImages/480p", sizes.davis_clips, sizes.davis_frames, sizes.picture)
        (data / "ImageSets/2017").mkdir(parents=True)
        (data / "ImageSets/2017/val.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            (data / "Annotations/480p" / name).mkdir(parents=True)
            for t, mask in enumerate(_moving_discs(sizes.davis_frames, sizes.picture)):
                write_mask(data / "Annotations/480p" / name / f"{t:05d}.png", mask)
        _command("manifest", "build", "davis", data, "--data-root", root, "--out", root / "d.parquet")
        report = _command(
            *("extract", "--backbone", sizes.backbone, "--weights", "random", "--precision", "bf16"),
            *("--plan", "frames", "--size", sizes.pixels, "--device", sizes.device),
            *("--manifest", root / "d.parquet", "--data-root", root, "--out", root / "s.zarr"),
        )
        yield "whole_extract_s", round(DAVIS_FRAMES / report["images_per_s"], 1)
        n_frames = sizes.davis_clips * sizes.davis_frames
        store, protocol = open_store(root / "s.zarr"), make_protocol(size=sizes.pixels)
        settings = PropagateSettings(overlays="none")
        for name in ("cold", "warm"):  # kernels loaded, tokens in the page cache
            done = propagate_store(store, root, protocol, root / name, settings, device=sizes.device)
            yield f"{name}_ms_per_frame", round(1e3 * done.seconds / n_frames, 2)
        yield "whole_propagate_s", round(DAVIS_FRAMES * done.seconds / n_frames, 1)
        yield "every_object_is_scored", len(done.scores) == 2 * sizes.davis_clips and done.complete


def metrics(sizes: Sizes) -> Figures:
    """What stands beside the GPU in a propagation: J&F and PNG files, on this machine's cores."""
    masks = list(_moving_discs(20, sizes.picture))

    def score(_: int = 0) -> None:
        scorer = DavisScorer.from_first_mask(masks[0])
        for truth, prediction in pairwise(masks):
            scorer.add(truth, prediction)

    cv2.setNumThreads(1)
    yield "j_and_f_ms", round(1e3 * _seconds(score, sizes, 3) / 19, 3)
    n_threads = min(14, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool:
        seconds = _seconds(lambda: list(pool.map(score, range(2 * n_threads))), sizes, 2)
    yield f"j_and_f_ms_in_{n_threads}_threads", round(1e3 * seconds / (2 * n_threads * 19), 3)
    with _folder() as root:
        path = root / "mask.png"
        yield "png_write_ms", round(1e3 * _seconds(partial(write_mask, path, masks[3]), sizes), 3)
        yield "png_read_ms", round(1e3 * _seconds(partial(read_mask, path), sizes), 3)


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a folder in memory where there is such a place: disks are measured elsewhere."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="gpu-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_clips(folder: Path, n_clips: int, n_frames: int, size: tuple[int, int]) -> list[str]:
    """Write clips of JPEG frames, smooth and each another; return their names."""
    names = [f"clip{number:03d}" for number in range(n_clips)]
    generator = np.random.default_rng(0)
    scene = cv2.resize(generator.integers(0, 255, (24, 96, 3), np.uint8), (4 * size[1], 2 * size[0]))
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for t in range(n_frames):
            x, y = (7 * number + 3 * t) % (3 * size[1]), 5 * number % size[0]
            cv2.imwrite(str(folder / name / f"{t:05d}.jpg"), scene[y : y + size[0], x : x + size[1]])
    return names


def _moving_discs(n_frames: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    for t in range(n_frames):
        mask = np.zeros(size, np.uint8)
        for thing in (1, 2):
            cv2.circle(mask, (size[1] * thing // 3 + t, size[0] // 2), size[0] // 6, thing, -1)
        yield mask


def _command(*words: object) -> dict[str, Any]:
    """Run a command of the package and return its JSON document."""
    command = [sys.executable, "-m", "cosettle_cache.cli", *map(str, words), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-800:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


if __name__ == "__main__":
    main()
