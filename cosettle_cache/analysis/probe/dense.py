"""Tasks on single tokens of images: classes of pixels by near tokens, and key points found in another image.

A store, settings and labels give a plan; images are then read one by one, for all kinds of tokens at a time,
and an outcome per kind goes out. Of a video the first frame counts.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from cosettle_cache.analysis.pooling import each_video, missing_videos
from cosettle_cache.analysis.probe import Figure, Outcome, VideoAnswer
from cosettle_cache.analysis.probe.linear import mean_figure
from cosettle_cache.core.console import Progress
from cosettle_cache.core.errors import InputError, MediaError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.settings import ProbeSettings, digest
from cosettle_cache.core.types import LabelKind, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.search.vectors import VectorIndex, nearest
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.image_pairs import ImagePair, read_pairs
from cosettle_cache.videos.masks import VOID, Mask, read_classes, sample_mask

#: Of open-hummingbird-eval 2.0.0 (`HbirdEvaluation`): neighbours, and what divides cosines in their softmax.
_NEIGHBORS, _TEMPERATURE = 30, 0.02
#: A key point is found within this share of the longer side of the object's box.
_NEAR = 0.1

UnitTokens = Float32[np.ndarray, "kind token dim"]


@dataclass(frozen=True, slots=True)
class SegmentationPlan:
    """Images whose tokens are remembered with their classes, and images that are asked about."""

    store: FeatureStore
    settings: ProbeSettings
    data_root: Path
    train: tuple[Video, ...]
    test: tuple[Video, ...]
    missing: dict[str, str]
    device: str = "cpu"

    @property
    def video_ids(self) -> tuple[str, ...]:
        """All images that are read."""
        return tuple(video.video_id for video in (*self.train, *self.test))

    @property
    def n_classes(self) -> int:
        """Classes are numbered up to the largest of any mask."""
        return 1 + max(video.n_objects for video in (*self.train, *self.test))

    @property
    def digest(self) -> str:
        """Identifies which images with which masks took part."""
        return digest([[video.video_id, video.split, video.labels] for video in (*self.train, *self.test)])

    def without(self, failed: Mapping[str, str]) -> SegmentationPlan:
        """Return the plan without some images; raise `InputError` when a part is empty then."""
        parts = [[v for v in part if v.video_id not in failed] for part in (self.train, self.test)]
        if not all(parts):
            raise InputError(
                f"{self.store.path} lacks images with classes of pixels to learn from, or to be asked about",
                wanted="images of the splits train and val (manifest build voc)",
                found=f"{len(parts[0])} and {len(parts[1])}",
                details=_some({**self.missing, **failed}),
            )
        return replace(self, train=tuple(parts[0]), test=tuple(parts[1]))

    def read_labels(self, video: Video) -> Mask:
        """Return the classes of an image at the size that it was encoded at, by nearest neighbour."""
        grid, patch = self.store.grid(video.video_id), int(self.store.encoder.get("patch", 16))
        mask = sample_mask(read_classes(video, self.data_root), (grid.rows * patch, grid.cols * patch))
        if mask[mask != VOID].max(initial=0) >= self.n_classes:
            raise MediaError(f"{video.labels} has classes that its manifest does not know")
        return mask


def plan_segmentation(store: FeatureStore, settings: ProbeSettings, data_root: Path) -> SegmentationPlan:
    """Return the annotated images of the splits train and val (or test) that the store has tokens of."""
    listed = [video for video in store.manifest if video.split in ("train", "val", "test")]
    missing = missing_videos(store, [video.video_id for video in listed])
    missing |= {v.video_id: "it has no mask" for v in listed if v.label_kind is not LabelKind.CLASSES}
    train, test = (
        tuple(
            video
            for video in listed
            if (video.split == "train") is is_train and video.video_id not in missing
        )
        for is_train in (True, False)
    )
    return SegmentationPlan(store, settings, data_root, train, test, missing)


def segment_images(
    plan: SegmentationPlan, kinds: Sequence[TokenKind], failures: MutableMapping[str, str], progress: Progress
) -> list[Outcome]:
    """Give every token of the test images the classes of its nearest ones among the training images'.

    Dense retrieval as open-hummingbird-eval 2.0.0 measures it, without augmentation and without matching of
    classes: a remembered token has the shares of classes among its pixels, void counting as class 0; a token
    asked about takes the mean of its neighbours' with weights softmax(cosine / 0.02); these maps go
    bilinearly to the size of encoding, where the largest is compared with the mask. Of a limited memory every
    image gives an equal part, tokens of its rarer classes first, by chance (`_choose`).
    """
    settings, n_classes = plan.settings, plan.n_classes
    videos = {video.video_id: video for video in (*plan.train, *plan.test)}

    def read(video_id: str) -> tuple[UnitTokens, Mask]:
        mask = plan.read_labels(videos[video_id])
        return _read_tokens(plan.store, kinds, video_id, plan.device), mask

    draw = np.random.default_rng(settings.memory_seed)
    n_each = max(1, settings.memory // len(plan.train)) if settings.memory else None
    keys, labels = [], []
    for video_id, (tokens, mask) in each_video([v.video_id for v in plan.train], read, failures, progress):
        grid = plan.store.grid(video_id)
        shares = _class_shares(np.where(mask == VOID, 0, mask), (grid.rows, grid.cols), n_classes)
        chosen = slice(None) if n_each is None else _choose(shares, n_each, draw)
        keys.append(tokens[:, chosen])
        labels.append(shares[chosen])
    plan = plan.without(failures)
    memory, remembered = np.concatenate(keys, axis=1), np.concatenate(labels)
    del keys
    k = min(settings.neighbors or _NEIGHBORS, len(remembered))
    indices = [VectorIndex(of_kind, search=settings.search, device=plan.device) for of_kind in memory]
    counts = np.zeros((len(kinds), n_classes, n_classes), np.int64)
    answers: list[list[VideoAnswer]] = [[] for _ in kinds]
    for video_id, (tokens, mask) in each_video([v.video_id for v in plan.test], read, failures, progress):
        grid, known = plan.store.grid(video_id), mask != VOID
        for number, index in enumerate(indices):
            found = index.nearest(tokens[number], k)
            weights = np.exp((found.similarity - found.similarity[:, :1]) / _TEMPERATURE)
            weights /= weights.sum(1, keepdims=True)
            soft = np.einsum("qk,qkc->cq", weights, remembered[found.index]).astype(np.float32)
            maps = torch.from_numpy(soft.reshape(1, n_classes, grid.rows, grid.cols))
            large = torch.nn.functional.interpolate(maps, size=mask.shape, mode="bilinear")
            said = large[0].argmax(0).numpy()[known]
            pairs = np.bincount(mask[known].astype(np.int64) * n_classes + said, minlength=n_classes**2)
            counts[number] += pairs.reshape(n_classes, n_classes)
            share = float((said == mask[known]).mean()) if known.any() else 0.0
            answers[number].append(VideoAnswer(video_id, "", "", share))
    plan.without(failures)
    protocol = {
        "neighbors": k,
        "temperature": _TEMPERATURE,
        "memory": len(remembered),
        "memory_seed": settings.memory_seed if settings.memory else None,
        "memory_images": len(plan.train),
        "similarity": "cosine",
        "void": VOID,
    }
    return [
        Outcome(_overlaps(of_kind, len(said)), n_classes, protocol, tuple(said))
        for of_kind, said in zip(counts, answers, strict=True)
    ]


def _class_shares(mask: Mask, shape: tuple[int, int], n_classes: int) -> Float32[np.ndarray, "token class"]:
    """Return the share of each class among the pixels of every token of a grid of `shape`."""
    rows, cols = (np.arange(n) * side // n for n, side in zip(mask.shape, shape, strict=True))
    token = rows[:, None] * shape[1] + cols
    n_tokens = shape[0] * shape[1]
    counts = np.bincount((token * n_classes + mask).ravel(), minlength=n_tokens * n_classes)
    return (counts.reshape(n_tokens, n_classes) / (mask.size / n_tokens)).astype(np.float32)


def _choose(
    shares: Float32[np.ndarray, "token class"], n_each: int, draw: np.random.Generator
) -> Int64[np.ndarray, " chosen"]:
    """Return the tokens of an image that are remembered, as open-hummingbird-eval draws them.

    Those with the smallest u * s: s is the sum, over the classes of a token, of the number of the image's
    tokens that have the class, u is uniform.
    """
    present = shares > 0
    score = draw.random(len(shares)) * (present @ present.sum(0))
    return np.sort(np.argsort(score, kind="stable")[:n_each])


def _overlaps(counts: Int64[np.ndarray, "truth said"], n_images: int) -> tuple[Figure, ...]:
    """Return the mean over classes of intersection over union, and that of each class that occurs."""
    hits = np.diagonal(counts)
    unions = counts.sum(0) + counts.sum(1) - hits
    cases = {str(number): hits[number] / unions[number] for number in np.flatnonzero(unions).tolist()}
    if not cases:
        raise InputError(
            "no pixel of the images asked about has a class", wanted="masks that are not all void"
        )
    mean = Figure("miou", float(np.mean(list(cases.values()))), n_images)
    return mean, *(Figure("miou", float(value), n_images, case=name) for name, value in cases.items())


@dataclass(frozen=True, slots=True)
class PairsPlan:
    """Pairs of images with key points in common; `source` and `target` of a pair are ids of the store."""

    store: FeatureStore
    settings: ProbeSettings
    pairs: tuple[ImagePair, ...]
    missing: dict[str, str]
    device: str = "cpu"

    @property
    def video_ids(self) -> tuple[str, ...]:
        """All images that are read."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name in (pair.source, pair.target)))

    @property
    def digest(self) -> str:
        """Identifies which pairs with which key points took part."""
        points = [[p.name, p.source_points.tolist(), p.target_points.tolist(), p.side] for p in self.pairs]
        return digest(points)

    def without(self, failed: Mapping[str, str]) -> PairsPlan:
        """Return the plan without the pairs of some images; raise `InputError` when none is left."""
        pairs = tuple(pair for pair in self.pairs if not failed.keys() & {pair.source, pair.target})
        if not pairs:
            details = _some({**self.missing, **failed})
            raise InputError(f"{self.store.path} holds no pair of images that can be used", details=details)
        return replace(self, pairs=pairs)


def plan_pairs(store: FeatureStore, settings: ProbeSettings, labels: Path) -> PairsPlan:
    """Return the pairs of SPair-71k (`labels`) whose images the store has, by category and file name."""
    found, missing = read_pairs(labels, settings.split or "test")
    places = {"/".join(PurePosixPath(video.media).parts[-2:]): video.video_id for video in store.manifest}
    lacking = missing_videos(store, places.values())
    pairs = []
    for pair in found:
        ids = [places.get(image, "") for image in (pair.source, pair.target)]
        if "" in ids:
            missing[pair.name] = f"the store has no image {(pair.source, pair.target)[ids.index('')]}"
        elif lacking.keys() & {*ids}:
            missing |= {name: lacking[name] for name in ids if name in lacking}
        else:
            pairs.append(replace(pair, source=ids[0], target=ids[1]))
    return PairsPlan(store, settings, tuple(pairs), missing)


def match_key_points(
    plan: PairsPlan, kinds: Sequence[TokenKind], failures: MutableMapping[str, str], progress: Progress
) -> list[Outcome]:
    """Look for every source image's key points in the target: where the token nearest to theirs lies.

    A key point's token is the one that it lies in, a token lies at its middle, all in pixels of the images.
    Found is what is within 0.1 of the longer side of the target's box. `recall` is the share of a category's
    key points, mean over categories (Probe3D a1f1464); `pck` the share of a pair's key points, mean over
    pairs (SPair-71k).
    """
    store, videos = plan.store, {video.video_id: video for video in plan.store.manifest}
    read = partial(_read_tokens, store, kinds, device=plan.device)
    scale = {  # columns and rows per pixel
        name: np.array(
            [store.grid(name).cols / videos[name].width, store.grid(name).rows / videos[name].height]
        )
        for name in plan.video_ids
    }
    asked: dict[str, UnitTokens] = {}
    by_source = _by([pair.source for pair in plan.pairs], plan.pairs)
    for name, tokens in each_video(list(by_source), read, failures, progress):
        rows, cols = store.grid(name).rows, store.grid(name).cols
        for pair in by_source[name]:
            places = np.floor(pair.source_points * scale[name]).astype(np.int64)
            col, row = np.clip(places, 0, [cols - 1, rows - 1]).T
            asked[pair.name] = tokens[:, row * cols + col]
    by_target = _by([pair.target for pair in plan.pairs], plan.pairs)
    distances: list[dict[str, Float64[np.ndarray, " point"]]] = [{} for _ in kinds]
    for name, tokens in each_video(list(by_target), read, failures, progress):
        for pair in by_target[name]:
            for number, queries in enumerate(asked.get(pair.name, ())):
                found = nearest(queries, tokens[number], 1, search=plan.settings.search, device=plan.device)
                row, col = np.divmod(found.index[:, 0], store.grid(name).cols)
                places = (np.stack([col, row], axis=1) + 0.5) / scale[name]
                away = np.linalg.norm(places - pair.target_points, axis=1)
                distances[number][pair.name] = away / pair.side
    pairs = plan.without(failures).pairs
    return [_found(pairs, of_kind, plan.settings.split or "test") for of_kind in distances]


def _found(
    pairs: Sequence[ImagePair], distances: dict[str, Float64[np.ndarray, " point"]], split: str
) -> Outcome:
    """Return both figures over all pairs and of every category; distances are shares of the box's side."""
    shares = {pair.name: float((distances[pair.name] <= _NEAR).mean()) for pair in pairs}
    figures = []
    for category, of_category in sorted(_by([pair.category for pair in pairs], pairs).items()):
        together = np.concatenate([distances[pair.name] for pair in of_category])
        n_pairs = len(of_category)
        figures.append(Figure("recall", float((together < _NEAR).mean()), n_pairs, case=category))
        pck = float(np.mean([shares[pair.name] for pair in of_category]))
        figures.append(Figure("pck", pck, n_pairs, case=category))
    recall = mean_figure("recall", [figure.value for figure in figures[::2]], len(pairs))
    pck_of_pairs = Figure("pck", float(np.mean(list(shares.values()))), len(pairs))
    protocol = {
        "split": split,
        "near": _NEAR,
        "of": "longer side of the target's box",
        "similarity": "cosine",
    }
    answers = tuple(VideoAnswer(pair.name, pair.category, "", shares[pair.name]) for pair in pairs)
    return Outcome((recall, pck_of_pairs, *figures), len(figures) // 2, protocol, answers)


def _by(keys: Sequence[str], pairs: Sequence[ImagePair]) -> dict[str, list[ImagePair]]:
    groups: dict[str, list[ImagePair]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        groups.setdefault(key, []).append(pair)
    return groups


def _some(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in list(reasons.items())[:8]]


@torch.inference_mode()
def _read_tokens(store: FeatureStore, kinds: Sequence[TokenKind], video_id: str, device: str) -> UnitTokens:
    """Return an image's tokens of each kind, of length one; raise `InputError` where one is not finite."""
    raw = upload(torch.from_numpy(store.tokens(video_id, [0])), torch.device(device)).flatten(0, 2)
    found = torch.stack([unit_tokens(kind.apply(raw)) for kind in kinds]).cpu().numpy()
    if not np.isfinite(found).all():
        hint = "extract it again into another store"
        raise InputError(f"{video_id} has tokens that are not finite", hint=hint)
    return found
