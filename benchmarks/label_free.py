"""Can heads be ranked without labels? Criteria on clips without masks, beside scores on sequences with masks.

Of every clip the first frame's tokens are put into eight groups (k-means of raw unit tokens) and into forty
blocks of the grid; both, and the frame's colours, are carried to later frames with each kind of tokens:

* `round`: groups, `round_blocks`: blocks, carried to the last frame and back, against the first (mIoU);
* `flow`, `flow_blocks`: against where optical flow (DIS, checked forth and back) takes every token (mIoU);
* `colour`: mean absolute error of the carried colours (Lab, in hundredths), negated.

With --scores, runs of `propagate` whose kinds of tokens have the same names: Spearman's rank correlation of
each criterion with J&F, and its 90 % interval over sequences drawn with replacement.

    python benchmarks/label_free.py --features held_out.zarr --data-root DATA --projection HEAD... \
        --out held_out.json --scores runs/davis
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import one_hot

from cosettle_cache import make_protocol, open_store
from cosettle_cache.core.console import Talk
from cosettle_cache.core.types import EvalProtocol, Video
from cosettle_cache.heads.kinds import TokenKind, load_heads, make_kinds
from cosettle_cache.metrics.rows import SCORES_FILE, read_scores
from cosettle_cache.propagation.propagator import propagate
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames

N_GROUPS, BLOCKS = 8, (5, 8)
N_BLOCKS = BLOCKS[0] * BLOCKS[1]
GROUPS, BLOCK, COLOUR = slice(0, N_GROUPS), slice(N_GROUPS, N_GROUPS + N_BLOCKS), slice(-3, None)
#: Pixels of flow per token, the error that a way forth and back may have, and frames that are followed.
PIXELS, MOST_ERROR, N_FLOW = 12, 2.0, 9
LEAST_FRAMES, N_DRAWS = 6, 2000


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    store = open_store(options.features)
    kinds = make_kinds(load_heads(options.projection, store), store.arrays[0].n_channels)
    protocol = make_protocol("cosettle", radius=options.radius, n_context=7)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for video in store.manifest:
        tokens = torch.from_numpy(store.tokens(video.video_id))[: options.frames].float()
        of_clip = found.setdefault(video.video_id, {})
        if len(tokens) >= LEAST_FRAMES and {kind.name for kind in kinds} - of_clip.keys():
            of_clip |= measure(store, video, tokens, kinds, protocol, options.data_root)
        options.out.write_text(json.dumps(found))
    clips = {name: of_clip for name, of_clip in found.items() if of_clip}
    means = {kind.name: _means([of_clip[kind.name] for of_clip in clips.values()]) for kind in kinds}
    scores = read_j_and_f(options.scores)
    _print(means, scores)


@torch.inference_mode()
def measure(
    store: FeatureStore,
    video: Video,
    tokens: Tensor,
    kinds: Sequence[TokenKind],
    protocol: EvalProtocol,
    data_root: Path,
) -> dict[str, dict[str, float]]:
    """Return the criteria of every kind of tokens on one clip."""
    n_frames, rows, cols, _ = tokens.shape
    every = int(store.fingerprint.plan["every"])
    images = [np.asarray(image) for image in iter_frames(video, data_root, range((n_frames - 1) * every + 1))]
    colours = torch.stack([_colours(image, rows, cols) for image in images[::every]])
    groups = k_means(unit_tokens(tokens[0]).flatten(0, 1), N_GROUPS).view(rows, cols)
    blocks = (torch.arange(rows) * BLOCKS[0] // rows)[:, None] * BLOCKS[1] + torch.arange(cols) * BLOCKS[
        1
    ] // cols
    first = torch.cat([one_hot(groups, N_GROUPS), one_hot(blocks, N_BLOCKS), colours[0]], -1)
    ways = follow(images, rows, cols, every, min(n_frames, N_FLOW))
    found = {}
    for kind in kinds:
        of_kind = kind.apply(tokens)
        maps = propagate(of_kind, first, protocol)
        last = [maps[-1][..., part].argmax(-1) for part in (GROUPS, BLOCK)]
        start = torch.cat([one_hot(last[0], N_GROUPS), one_hot(last[1], N_BLOCKS)], -1).float()
        back = propagate(of_kind.flip(0), start, protocol)[-1]
        flow = [
            [miou(labels.flatten()[there], maps[j][..., part].argmax(-1).flatten()[cells[there]])]
            for labels, part in ((groups, GROUPS), (blocks, BLOCK))
            for j, (cells, there) in enumerate(ways)
            if j > 1
        ]
        half = len(flow) // 2
        found[kind.name] = {
            "round": miou(groups, back[..., GROUPS].argmax(-1)),
            "round_blocks": miou(blocks, back[..., BLOCK].argmax(-1)),
            "flow": _mean(flow[:half]),
            "flow_blocks": _mean(flow[half:]),
            "colour": -float((maps[1:, ..., COLOUR] - colours[1:]).abs().mean()),
        }
    return found


def k_means(unit: Tensor, k: int) -> Tensor:
    """Return the group of every unit token, by cosine, from seeded tokens on."""
    centres = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[:k]]
    for _ in range(20):
        group = (unit @ centres.T).argmax(1)
        means = [unit[group == i].mean(0) if (group == i).any() else centres[i] for i in range(k)]
        centres = torch.nn.functional.normalize(torch.stack(means), dim=1)
    return group


def miou(truth: Tensor, found: Tensor) -> float:
    """Return the mean over labels that are there of intersection over union; NaN of nothing."""
    values = [
        ((truth == i) & (found == i)).sum() / ((truth == i) | (found == i)).sum() for i in truth.unique()
    ]
    return float(torch.stack(values).mean()) if values else float("nan")


def follow(
    images: Sequence[np.ndarray], rows: int, cols: int, every: int, n_frames: int
) -> list[tuple[Tensor, Tensor]]:
    """Return where flow takes every token of the first frame in each kept one, and which can be followed."""
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    size = (cols * PIXELS, rows * PIXELS)
    grey = [
        cv2.cvtColor(cv2.resize(i, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for i in images
    ]
    at = np.indices((rows, cols)).reshape(2, -1).T[:, ::-1].astype(np.float32) * PIXELS + PIXELS / 2
    there, ways = np.ones(len(at), bool), [(np.arange(len(at)), np.ones(len(at), bool))]
    for i in range(1, (n_frames - 1) * every + 1):
        forth, back = flow.calc(grey[i - 1], grey[i], None), flow.calc(grey[i], grey[i - 1], None)
        ahead = at + _sampled(forth, at)
        there &= np.linalg.norm(ahead + _sampled(back, ahead) - at, axis=1) < MOST_ERROR
        there &= ((ahead >= 0) & (ahead < size)).all(1)
        at = ahead.astype(np.float32)
        if i % every == 0:
            col, row = np.clip((at // PIXELS).astype(int), 0, (cols - 1, rows - 1)).T
            ways.append((row * cols + col, there.copy()))
    return [(torch.from_numpy(cells), torch.from_numpy(ok)) for cells, ok in ways]


def _sampled(flow: np.ndarray, at: np.ndarray) -> np.ndarray:
    x, y = at.T[:, None].astype(np.float32)
    return np.asarray(cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0])


def _colours(image: np.ndarray, rows: int, cols: int) -> Tensor:
    small = cv2.resize(image, (cols, rows), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return torch.from_numpy(cv2.cvtColor(small, cv2.COLOR_RGB2LAB) / 100)


def _mean(values: Sequence[Any]) -> float:
    known = np.asarray(values, float)
    return float(known[np.isfinite(known)].mean()) if np.isfinite(known).any() else float("nan")


def _means(clips: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: _mean([of_clip[name] for of_clip in clips]) for name in clips[0]}


def read_j_and_f(runs: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Return J&F in percent by kind of tokens and sequence, the mean over its objects."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for score in read_scores(run / SCORES_FILE):
            values[score.tokens][score.video_id].append(100 * score.figures["jf_mean"])
    return {kind: {name: float(np.mean(jf)) for name, jf in of.items()} for kind, of in values.items()}


def _print(means: Mapping[str, Mapping[str, float]], scores: Mapping[str, Mapping[str, float]]) -> None:
    kinds, names = [kind for kind in means if kind in scores or not scores], list(next(iter(means.values())))
    jf = {kind: np.array(list(scores[kind].values())) for kind in kinds} if scores else {}
    kinds.sort(key=lambda kind: -jf[kind].mean() if jf else 0)
    rows = [
        [kind, f"{jf[kind].mean():.2f}" if jf else "", *(f"{means[kind][name]:.4f}" for name in names)]
        for kind in kinds
    ]
    Talk().table("criteria without labels", ["tokens", "J&F", *names], rows)
    if not jf:
        return
    by_kind, draw = np.stack([jf[kind] for kind in kinds]), np.random.default_rng(0)
    drawn = draw.integers(0, by_kind.shape[1], (N_DRAWS, by_kind.shape[1]))
    lines = []
    for name in names:
        values = [means[kind][name] for kind in kinds]
        found = spearmanr(values, by_kind.mean(1))
        low, high = np.quantile(
            [spearmanr(values, by_kind[:, i].mean(1)).statistic for i in drawn], (0.05, 0.95)
        )
        best = kinds[int(np.argmax(values))]
        interval = f"{low:+.2f} to {high:+.2f}"
        lines.append([name, f"{found.statistic:+.2f}", interval, best, f"{jf[best].mean():.2f}"])
    header = ["criterion", "Spearman with J&F", "90 % over sequences", "chooses", "its J&F"]
    Talk().table(f"{len(kinds)} kinds of tokens, {by_kind.shape[1]} sequences", header, lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", required=True)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--projection", type=Path, nargs="*", default=[])
    parser.add_argument("--scores", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON; clips that are there are not done again."
    )
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--radius", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
