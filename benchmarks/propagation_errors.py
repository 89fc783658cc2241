"""Where do raw and projected tokens lose an object? From a finished run of `propagate --save-neighbors`.

Per sequence and kind of tokens: J&F frame by frame; what the neighbours of an object's tokens lie on in the
true masks (the same object, another one, the background), and those of the background; how far away they
are in tokens, and how many frames old; how much the object has changed since the first frame. Kept
neighbours are read, nothing is searched.

    cosettle-cache propagate --task davis --features STORE --projection ... --save-neighbors LISTS --out RUN
    python benchmarks/propagation_errors.py RUN --features STORE --neighbors LISTS --data-root DATA \
        --projection ... --out FOLDER --strip drift-straight
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from cosettle_cache import davis_j_and_f, open_store
from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import digest
from cosettle_cache.core.types import EvalProtocol, Video
from cosettle_cache.heads.kinds import TokenKind, load_heads, make_kinds
from cosettle_cache.metrics.rows import SCORES_FILE, read_scores
from cosettle_cache.pictures.drawing import draw_mask, side_by_side
from cosettle_cache.propagation.neighbor_files import load_neighbors, neighbors_key, neighbors_path
from cosettle_cache.search.masked import transition, unit_tokens
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.masks import open_sequence, read_mask, sample_mask

#: Shares of the weight of an object's neighbours (`leak`: of the background's), and means over them.
SHARES, MEANS = ("same", "other", "background", "leak"), ("distance", "age")


def main() -> None:
    options = _options()
    matplotlib.use("Agg")
    store = open_store(options.features)
    protocol = EvalProtocol(**json.loads(read_scores(options.run / SCORES_FILE)[0].protocol_json))
    kinds = make_kinds(load_heads(options.projection, store), store.arrays[0].n_channels)
    options.out.mkdir(parents=True, exist_ok=True)
    found, curves = {}, {}
    for video in store.manifest:
        masks = [_whole(open_sequence(video, options.data_root).mask(i)) for i in range(video.n_frames)]
        truth = np.stack(masks)
        found[video.video_id] = {
            "change": _change(store, video, truth),
            **{
                kind.name: _neighbours(store, video, kind, truth, protocol, options.neighbors)
                for kind in kinds
            },
        }
        curves[video.video_id] = {kind.name: _j_and_f(options.run, video, kind, truth) for kind in kinds}
        if video.video_id in options.strip:
            _strip(options, video, [kind.name for kind in kinds])
    _draw(curves, options.out / "frames.png")
    document = {
        "figures": found,
        "jf": {name: {k: float(v.mean()) for k, v in of.items()} for name, of in curves.items()},
    }
    (options.out / "errors.json").write_text(json.dumps(document, indent=1))
    _print(document, [kind.name for kind in kinds])


def _whole(mask: np.ndarray | None) -> np.ndarray:
    assert mask is not None, "every frame needs a true mask"
    return mask


def _on_grid(truth: np.ndarray, store: FeatureStore, video: Video) -> Tensor:
    """Return the object at every token, `[frame token]`."""
    grid = store.grid(video.video_id)
    return (
        torch.from_numpy(np.stack([sample_mask(mask, (grid.rows, grid.cols)) for mask in truth]))
        .flatten(1)
        .long()
    )


def _neighbours(
    store: FeatureStore,
    video: Video,
    kind: TokenKind,
    truth: np.ndarray,
    protocol: EvalProtocol,
    folder: Path,
) -> dict[str, float]:
    """Return weighted shares of neighbours by what they lie on, and their distance in tokens."""
    grid, objects = store.grid(video.video_id), _on_grid(truth, store, video)
    key = neighbors_key(
        protocol,
        video_id=video.video_id,
        tokens=digest([store.fingerprint.to_json(), kind.sha256]),
        content=store.content_digest(video.video_id),
        n_frames=video.n_frames,
        grid=grid,
    )
    per_frame: list[dict[str, float]] = []
    for frame, item in enumerate(load_neighbors(neighbors_path(folder, key), key), start=1):
        weight = transition(item.similarity, item.count, protocol.temperature)
        at, query = objects[item.frame.long(), item.position.long()], objects[frame][:, None]
        on_object = query[:, 0] > 0
        place = torch.arange(grid.n_tokens)[:, None]
        rows, cols = (
            place // grid.cols - item.position // grid.cols,
            place % grid.cols - item.position % grid.cols,
        )
        distance = (weight * torch.sqrt((rows**2 + cols**2).float())).sum(1)
        shares = {
            "same": (weight * (at == query)).sum(1)[on_object],
            "other": (weight * ((at != query) & (at > 0))).sum(1)[on_object],
            "background": (weight * (at == 0)).sum(1)[on_object],
            "leak": (weight * (at > 0)).sum(1)[~on_object],
            "distance": distance[on_object],
            "age": (weight * (frame - item.frame)).sum(1)[on_object],
        }
        if on_object.any():
            per_frame.append({name: float(values.mean()) for name, values in shares.items()})
    return {name: float(np.mean([item[name] for item in per_frame])) for name in SHARES + MEANS}


def _change(store: FeatureStore, video: Video, truth: np.ndarray) -> dict[str, float]:
    """Return how an object differs at the end from the first frame: cosine of its mean token, size, way.

    The way is that of the object's centre, in tokens, between one frame and the next.
    """
    objects, grid = _on_grid(truth, store, video), store.grid(video.video_id)
    tokens = unit_tokens(torch.from_numpy(store.tokens(video.video_id)).flatten(1, 2).float())
    late = range(3 * video.n_frames // 4, video.n_frames)
    cosines, sizes, ways = [], [], []
    for number in objects[0].unique()[1:]:
        masks = objects == number
        mean = [tokens[i][masks[i]].mean(0) for i in range(video.n_frames)]
        cosines += [float(torch.cosine_similarity(mean[0], mean[i], dim=0)) for i in late if masks[i].any()]
        sizes += [float(masks[i].sum() / masks[0].sum()) for i in late if masks[i].any()]
        places = [torch.nonzero(mask.view(grid.rows, grid.cols)).float().mean(0) for mask in masks]
        ways += [float((b - a).norm()) for a, b in pairwise(places) if (b - a).isfinite().all()]
    return {"cosine": float(np.mean(cosines)), "size": float(np.mean(sizes)), "way": float(np.mean(ways))}


def _j_and_f(run: Path, video: Video, kind: TokenKind, truth: np.ndarray) -> np.ndarray:
    """Return J&F of every scored frame, the mean over objects."""
    folder = run / kind.name / video.video_id
    prediction = np.stack([read_mask(path) for path in sorted(folder.glob("*.png"))])
    return np.mean([(item.j + item.f) / 2 for item in davis_j_and_f(truth, prediction)], axis=0)


def _strip(options: argparse.Namespace, video: Video, kinds: Sequence[str]) -> None:
    """Draw a few frames with the masks of every kind, one row per frame."""
    frames = [round(share * (video.n_frames - 1)) for share in (0.2, 0.5, 0.8)]
    rows = []
    for frame, image in zip(frames, iter_frames(video, options.data_root, frames), strict=True):
        names = {kind: sorted((options.run / kind / video.video_id).glob("*.png"))[frame] for kind in kinds}
        panels = {f"{kind}, frame {frame}": draw_mask(image, read_mask(path)) for kind, path in names.items()}
        rows.append(side_by_side(panels))
    picture = np.concatenate(rows)
    plt.imsave(
        options.out / f"{video.video_id}.png",
        picture[:: max(1, picture.shape[1] // 1800), :: max(1, picture.shape[1] // 1800)],
    )


def _draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    n_cols = 4
    n_rows = -(-len(curves) // n_cols)
    figure, axes = plt.subplots(n_rows, n_cols, figsize=(4 * n_cols, 2.4 * n_rows), layout="constrained")
    for axis, (name, of_video) in zip(axes.flat, curves.items(), strict=False):
        for kind, values in of_video.items():
            axis.plot(100 * values, label=kind, linewidth=2.2 if kind == "raw" else 1.2)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, 100)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.supylabel("J&F of a frame, percent")
    figure.savefig(path, dpi=90)


def _print(document: dict[str, Any], kinds: Sequence[str]) -> None:
    rows = []
    for name, of_video in document["figures"].items():
        change = of_video["change"]
        about = [f"{change['cosine']:.2f}", f"{change['size']:.2f}", f"{change['way']:.2f}"]
        for kind in kinds:
            item = of_video[kind]
            shares = [f"{100 * item[key]:.1f}" for key in SHARES] + [f"{item[key]:.1f}" for key in MEANS]
            jf = f"{100 * document['jf'][name][kind]:.1f}"
            rows.append([name, *about, kind, jf, *shares])
    header = ["sequence", "cosine", "size", "way", "tokens", "J&F", *SHARES, *MEANS]
    Talk().table("neighbours of object tokens, percent", header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--features", required=True)
    parser.add_argument("--neighbors", type=Path, required=True)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--projection", type=Path, nargs="*", default=[])
    parser.add_argument("--strip", nargs="*", default=[], help="Sequences to draw.")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
