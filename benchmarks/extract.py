"""Extraction against the bare encoder: images per second of both, side by side, interleaved, medians.

The bare side runs the same encoder on the same prepared images, already in memory, in the same batches, and
throws the tokens away. The ratio is what decoding, preparing, checking and writing cost. For a timm encoder
at its own image size, timm's own `forward_features` runs as a third side (without position shifts).

    python benchmarks/extract.py --backbone timm/vit_base_patch16_224 --clips 8
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import Encoding, Manifest
from cosettle_cache.encoders import Backbone, load_backbone
from cosettle_cache.extraction.images import View, Views
from cosettle_cache.extraction.run import (
    ExtractReport,
    decode_threads,
    default_batch,
    extract,
    make_fingerprint,
)
from cosettle_cache.store import StoreWriter
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.find import manifest_data, sprites_data
from cosettle_cache.videos.frames import iter_frames


def main() -> None:
    options = _options()
    data = manifest_data(options.manifest, options.data_root) if options.manifest else sprites_data("train")
    manifest = Manifest(data.manifest.videos[: options.clips])
    settings = (
        FramesSettings(size=options.size)
        if options.plan == "frames"
        else PairsSettings(n_views=options.views)
    )
    backbone = load_backbone(
        options.backbone, weights=options.weights, device=options.device, precision=options.precision
    )
    plan = make_plan(manifest, settings, patch=backbone.patch, dim=backbone.dim)
    options.batch = options.batch or default_batch(plan, options.device)
    batches = _prepared_batches(plan, manifest, data.root, backbone, options.batch)
    _bare(backbone, batches[:2])
    model = _timm_model(options)
    rows = [
        Row(
            _bare(backbone, batches),
            _timm(model, batches, options.device) if model else float("nan"),
            _extract(plan, manifest, data.root, backbone, options),
        )
        for _ in range(options.repeats)
    ]
    _report(options, plan, rows)


@dataclass(frozen=True)
class Row:
    """Images per second of the encoder alone and of timm's own forward, and the extraction beside them."""

    bare: float
    timm: float
    report: ExtractReport


def _timm_model(options: argparse.Namespace) -> torch.nn.Module | None:
    if options.plan == "frames" or not options.backbone.startswith("timm/"):
        return None
    return timm.create_model(options.backbone.removeprefix("timm/"), num_classes=0).eval().to(options.device)


def _timm(model: torch.nn.Module, batches: list[list[tuple[View, Encoding]]], device: str) -> float:
    """Return images per second of timm's forward."""
    stacked = [torch.stack([view for view, _ in items]) for items in batches]
    started = time.perf_counter()
    with torch.inference_mode():
        for images in stacked:
            tokens = model.forward_features(images.to(device))
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return sum(map(len, batches)) / (time.perf_counter() - started)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="timm/vit_base_patch16_224")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--manifest", type=Path, help="default: the built-in sprites clips")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--plan", choices=("pairs", "frames"), default="pairs")
    parser.add_argument("--size", default="480x880", help="of a frames plan")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--batch", type=int, help="default: as extract chooses")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="decode threads; default: as extract chooses")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def _prepared_batches(
    plan: Plan, manifest: Manifest, root: Path, backbone: Backbone, batch: int
) -> list[list[tuple[View, Encoding]]]:
    """Return the plan's images, prepared, in even batches within a slot, as extraction forms them."""
    videos = {video.video_id: video for video in manifest}
    batches = []
    for index in range(plan.n_slots):
        items: list[tuple[View, Encoding]] = []
        for encoding in plan.slot(index).encodings:
            video = videos[encoding.video_id]
            views = Views(plan.kind, *plan.recipe.image_size(video), backbone.mean, backbone.std)
            (image,) = iter_frames(video, root, [encoding.frame])
            view = torch.empty(3, views.height, views.width)
            views.write(views.resize(image), {(encoding.crop, encoding.flip): view})
            items.append((view, encoding))
        size = -(-len(items) // -(-len(items) // batch))
        batches += [items[start : start + size] for start in range(0, len(items), size)]
    return batches


def _bare(backbone: Backbone, batches: list[list[tuple[View, Encoding]]]) -> float:
    """Return images per second of the encoder alone."""
    stacked = [(torch.stack([v for v, _ in items]), [e.shift for _, e in items]) for items in batches]
    started = time.perf_counter()
    for images, shifts in stacked:
        tokens = backbone.encode(images.to(backbone.device), shifts)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return sum(map(len, batches)) / (time.perf_counter() - started)


def _extract(
    plan: Plan, manifest: Manifest, root: Path, backbone: Backbone, options: argparse.Namespace
) -> ExtractReport:
    folder = Path(tempfile.mkdtemp(prefix="extract-benchmark-"))
    try:
        fingerprint = make_fingerprint(backbone, plan, manifest)
        writer = StoreWriter.create_or_resume(folder / "s.zarr", plan.arrays, fingerprint, manifest, {})
        threads = options.threads or decode_threads()
        return extract(
            plan, manifest, root, backbone, writer, batch_size=options.batch, decode_threads=threads
        )
    finally:
        shutil.rmtree(folder)


def _report(options: argparse.Namespace, plan: Plan, rows: list[Row]) -> None:
    bare = statistics.median(row.bare for row in rows)
    full = statistics.median(row.report.images_per_s for row in rows)
    ratio = statistics.median(row.report.images_per_s / row.bare for row in rows)
    over_timm = statistics.median(row.report.images_per_s / row.timm for row in rows)
    seconds = rows[-1].report.seconds
    figures = {
        "backbone": options.backbone,
        "device": options.device,
        "precision": options.precision,
        "plan": options.plan,
        "batch": options.batch,
        "images": plan.n_encodings,
        "bare_images_per_s": round(bare, 2),
        "extract_images_per_s": round(full, 2),
        "ratio": round(ratio, 3),
        "ratio_over_timm": None if math.isnan(over_timm) else round(over_timm, 3),
        "decode_s": round(seconds.decode, 2),
        "encode_s": round(seconds.encode, 2),
        "write_s": round(seconds.write, 2),
        "wait_images_s": round(seconds.wait_images, 2),
        "wait_writer_s": round(seconds.wait_writer, 2),
    }
    Talk().table(
        "extraction over the bare encoder", ["figure", "value"], [[k, str(v)] for k, v in figures.items()]
    )
    text = json.dumps(figures)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
