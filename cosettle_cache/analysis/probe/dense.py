"""Tasks on single tokens of images: classes of pixels by near tokens, and key points found in another image.

A store, settings and labels give a plan; images are then read one by one, for all kinds of tokens at a time,
and an outcome per kind goes out. Of a video the first frame counts.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
from cosettle_cache.core.types import Grid, LabelKind, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.search.vectors import nearest
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.image_pairs import ImagePair, read_pairs
from cosettle_cache.videos.masks import VOID, Mask, read_classes, sample_mask

#: Of open-hummingbird-eval 2.0.0 (`HbirdEvaluation`): neighbours, and what divides cosines in their softmax.
_NEIGHBORS, _TEMPERATURE = 30, 0.02
#: A key point is found within this share of the longer side of the object's box.
_NEAR = 0.1
#: Images whose tokens stay in memory: a category of SPair-71k's test split has fewer.
_IMAGES_KEPT = 40

UnitTokens = Float32[np.ndarray, "kind token dim"]
Shares = Float32[np.ndarray, "token class"]
# Pairs differ in key points.
Distances = Float64[np.ndarray, "_"]


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """Images by id, whose tokens are read, and the pairs of them that are asked about (spair)."""

    store: FeatureStore
    settings: ProbeSettings
    videos: Mapping[str, Video]
    missing: Mapping[str, str]
    data_root: Path = Path()
    pairs: tuple[ImagePair, ...] = ()
    device: str = "cpu"

    @property
    def video_ids(self) -> tuple[str, ...]:
        """All images that are read."""
        return tuple(self.videos)

    @property
    def digest(self) -> str:
        """Identifies which images with which places of masks, or pairs with which key points, took part."""
        pairs = [[p.name, p.source_points.tolist(), p.target_points.tolist(), p.side] for p in self.pairs]
        return digest(
            [pairs, [[video.video_id, video.split, video.labels] for video in self.videos.values()]]
        )

    def without(self, failed: Mapping[str, str]) -> ImagePlan:
        """Return the rest of the images, and the pairs of these."""
        videos = {name: video for name, video in self.videos.items() if name not in failed}
        pairs = tuple(pair for pair in self.pairs if {pair.source, pair.target} <= videos.keys())
        return replace(self, videos=videos, pairs=pairs)

    def part(self, is_train: bool, failed: Mapping[str, str]) -> list[str]:
        """Return the images to learn from, or those to be asked about; raise `InputError` for none."""
        found = [name for name, video in self.videos.items() if (video.split == "train") is is_train]
        left = [name for name in found if name not in failed]
        if not left:
            what, split = ("learn from", "train") if is_train else ("be asked about", "val")
            raise InputError(
                f"{self.store.path} has no images with classes of pixels to {what}",
                wanted=f"rows of the split {split} with masks, as of manifest build voc",
                details=[f"{name}: {reason}" for name, reason in list(failed.items())[:8]],
            )
        return left


def plan_segmentation(store: FeatureStore, settings: ProbeSettings, data_root: Path) -> ImagePlan:
    """Return the annotated images of the splits train and val (or test) that the store has tokens of."""
    listed = {video.video_id: video for video in store.manifest if video.split in ("train", "val", "test")}
    missing = missing_videos(store, listed)
    missing |= {v.video_id: "no mask" for v in listed.values() if v.label_kind is not LabelKind.CLASSES}
    plan = ImagePlan(store, settings, listed, missing, data_root).without(missing)
    for is_train in (True, False):
        plan.part(is_train, missing)
    return plan


def segment_images(
    plan: ImagePlan, kinds: Sequence[TokenKind], failures: MutableMapping[str, str], progress: Progress
) -> list[Outcome]:
    """Give every token of the images asked about the classes of the nearest ones of the training images.

    Dense retrieval as open-hummingbird-eval 2.0.0 measures it, without augmentation and without matching of
    classes: a remembered token has the shares of classes among its pixels, void counting as class 0; a token
    asked about takes the mean of its neighbours' with weights softmax(cosine / 0.02); these maps go
    bilinearly to the size of encoding, where the largest is compared with the mask.
    """
    settings, store, train = plan.settings, plan.store, plan.part(True, failures)
    n_classes = min(VOID, 1 + max(video.n_objects for video in plan.videos.values()))

    def read(name: str) -> tuple[UnitTokens, Mask]:
        return _read_tokens(store, kinds, plan.device, name), _read_mask(plan, name, n_classes)

    keys, labels = list[UnitTokens](), list[Shares]()
    n_each = max(1, settings.memory // len(train)) if settings.memory else None
    draw = np.random.default_rng(settings.memory_seed)
    for name, (tokens, mask) in each_video(train, read, failures, progress):
        shares = _class_shares(mask, store.grid(name), n_classes)
        chosen = slice(None) if n_each is None else _choose(shares, n_each, draw)
        keys.append(tokens[:, chosen])
        labels.append(shares[chosen])
    plan.part(True, failures)
    memory, remembered = np.concatenate(keys, axis=1), np.concatenate(labels)
    del keys
    there = torch.from_numpy(memory).to(plan.device)
    near = partial(nearest, search=settings.search, device=plan.device)
    k = min(settings.neighbors or _NEIGHBORS, len(remembered))
    counts = np.zeros((len(kinds), n_classes, n_classes), np.int64)
    answers: list[list[VideoAnswer]] = [[] for _ in kinds]
    for name, (tokens, mask) in each_video(plan.part(False, failures), read, failures, progress):
        grid, known = store.grid(name), mask != VOID
        truth = mask[known].astype(np.int64)
        for number, queries in enumerate(tokens):
            found = near(queries, memory[number], k, there=there[number])
            weights = torch.from_numpy(found.similarity / _TEMPERATURE).softmax(1).float().numpy()
            soft = np.einsum("qk,qkc->cq", weights, remembered[found.index])
            maps = torch.from_numpy(soft.reshape(1, n_classes, grid.rows, grid.cols))
            large = torch.nn.functional.interpolate(maps, size=mask.shape, mode="bilinear")
            said = large[0].argmax(0).numpy()[known]
            both = np.bincount(truth * n_classes + said, minlength=n_classes**2)
            counts[number] += both.reshape(n_classes, n_classes)
            share = float((said == truth).sum() / max(len(truth), 1))
            answers[number].append(VideoAnswer(name, "", "", share))
    plan.part(False, failures)
    protocol = {"neighbors": k, "temperature": _TEMPERATURE, "similarity": "cosine", "void": VOID}
    protocol |= {"memory": len(remembered), "memory_images": len(labels)}
    protocol |= {"memory_seed": settings.memory_seed} if settings.memory else {}
    return [
        Outcome(_overlaps(of_kind, len(said)), n_classes, protocol, tuple(said))
        for of_kind, said in zip(counts, answers, strict=True)
    ]


def _read_mask(plan: ImagePlan, name: str, n_classes: int) -> Mask:
    """Return the classes of an image at the size that it was encoded at, by nearest neighbour."""
    grid, patch = plan.store.grid(name), int(plan.store.encoder.get("patch", 16))
    mask = read_classes(plan.videos[name], plan.data_root)
    if mask[mask != VOID].max(initial=0) >= n_classes:
        raise MediaError(f"{plan.videos[name].labels} has classes that its manifest does not know")
    return sample_mask(mask, (grid.rows * patch, grid.cols * patch))


def _class_shares(mask: Mask, grid: Grid, n_classes: int) -> Shares:
    """Return the share of each class among the pixels of every token; void counts as class 0."""
    patches = np.where(mask == VOID, 0, mask).reshape(grid.rows, -1, grid.cols, mask.shape[1] // grid.cols)
    pixels = patches.swapaxes(1, 2).reshape(grid.n_tokens, -1, 1)
    shares: Shares = (pixels == np.arange(n_classes)).mean(1, dtype=np.float32)
    return shares


def _choose(shares: Shares, n_each: int, draw: np.random.Generator) -> Int64[np.ndarray, " chosen"]:
    """Return the tokens of an image that a limited memory takes, rare classes first (open-hummingbird-eval).

    Those of the smallest u * s: s adds up how many tokens have each of a token's classes; u is uniform.
    """
    present = shares > 0
    score = draw.random(len(shares)) * (present @ present.sum(0))
    return np.sort(np.argsort(score, kind="stable")[:n_each])


def _overlaps(counts: Int64[np.ndarray, "truth said"], n_images: int) -> tuple[Figure, ...]:
    """Return the mean over classes of intersection over union, and that of each class that occurs."""
    hits = np.diagonal(counts)
    unions = counts.sum(0) + counts.sum(1) - hits
    cases = {str(number): float(hits[number] / unions[number]) for number in np.flatnonzero(unions)}
    if not cases:
        raise InputError("no pixel of the images asked about has a class", wanted="masks that are not void")
    mean = Figure("miou", float(np.mean(list(cases.values()))), n_images)
    return mean, *(Figure("miou", value, n_images, case=name) for name, value in cases.items())


def plan_pairs(store: FeatureStore, settings: ProbeSettings, labels: Path) -> ImagePlan:
    """Return the pairs of SPair-71k (`labels`) whose images the store has; raise `InputError` for none."""
    pairs, missing = read_pairs(labels, settings.split or "test")
    places = {"/".join(PurePosixPath(video.media).parts[-2:]): video for video in store.manifest}
    lacking = missing_videos(store, [video.video_id for video in places.values()])
    known, usable = dict[str, Video](), list[ImagePair]()
    for pair in pairs:
        images = [places.get(name) for name in (pair.source, pair.target)]
        ids = {image.video_id: image for image in images if image is not None}
        if None in images:
            absent = (pair.source, pair.target)[images.index(None)]
            missing[pair.name] = f"the store has no image {absent}"
        elif lacking.keys() & ids.keys():
            missing |= {name: lacking[name] for name in ids if name in lacking}
        else:
            known |= ids
            source, target = (image.video_id for image in images if image is not None)
            usable.append(replace(pair, source=source, target=target))
    plan = ImagePlan(store, settings, known, missing, pairs=tuple(usable))
    _check_left(plan, plan.pairs, missing)
    return plan


def _check_left(plan: ImagePlan, pairs: Sequence[ImagePair], failures: Mapping[str, str]) -> None:
    if not pairs:
        details = [f"{name}: {reason}" for name, reason in list(failures.items())[:8]]
        raise InputError(f"{plan.store.path} holds no pair of images that can be used", details=details)


def match_key_points(
    plan: ImagePlan, kinds: Sequence[TokenKind], failures: MutableMapping[str, str], progress: Progress
) -> list[Outcome]:
    """Look for every source image's key points in the target: where the token nearest to theirs lies.

    A key point's token is the one that it lies in, a token lies at its middle, all in pixels of the images.
    Found is what is within 0.1 of the longer side of the target's box. `recall` is the share of a category's
    key points, mean over categories (Probe3D a1f1464); `pck` the share of a pair's key points, mean over
    pairs (SPair-71k).
    """
    pairs, settings = {pair.name: pair for pair in plan.pairs}, plan.settings
    read = lru_cache(_IMAGES_KEPT)(partial(_read_tokens, plan.store, kinds, plan.device))

    def measure(name: str) -> list[Distances]:
        pair = pairs[name]
        (source, per_pixel), (target, scale) = (_grid(plan, image) for image in (pair.source, pair.target))
        col, row = np.clip(np.floor(pair.source_points * per_pixel), 0, source - 1).astype(np.int64).T
        queries, keys, away = read(pair.source)[:, row * source[0] + col], read(pair.target), []
        for of_kind, among in zip(queries, keys, strict=True):
            near = nearest(of_kind, among, 1, search=settings.search, device=plan.device).index[:, 0]
            places = (np.stack([near % target[0], near // target[0]], axis=1) + 0.5) / scale
            away.append(np.linalg.norm(places - pair.target_points, axis=1) / pair.side)
        return away

    found = dict(each_video(list(pairs), measure, failures, progress))
    left = [pair for pair in plan.pairs if pair.name in found]
    _check_left(plan, left, failures)
    split = settings.split or "test"
    return [_found(left, [found[pair.name][number] for pair in left], split) for number in range(len(kinds))]


def _grid(plan: ImagePlan, name: str) -> tuple[Int64[np.ndarray, "2"], Float64[np.ndarray, "2"]]:
    """Return columns and rows of an image's tokens, and how many of each a pixel has."""
    grid, video = plan.store.grid(name), plan.videos[name]
    size = np.array([grid.cols, grid.rows])
    return size, size / [video.width, video.height]


def _found(pairs: Sequence[ImagePair], away: Sequence[Distances], split: str) -> Outcome:
    """Return both figures over all pairs and of every category; distances are shares of the box's side."""
    shares, figures = np.array([(of_pair <= _NEAR).mean() for of_pair in away]), list[Figure]()
    categories = np.array([pair.category for pair in pairs])
    for category in np.unique(categories).tolist():
        places = np.flatnonzero(categories == category)
        together = np.concatenate([away[place] for place in places.tolist()])
        figures.append(Figure("recall", float((together < _NEAR).mean()), len(places), case=category))
        figures.append(Figure("pck", float(shares[places].mean()), len(places), case=category))
    recall = mean_figure("recall", [figure.value for figure in figures[::2]], len(pairs))
    pck = Figure("pck", float(shares.mean()), len(pairs))
    protocol = {
        "split": split,
        "near": _NEAR,
        "of": "longer side of the target's box",
        "similarity": "cosine",
    }
    answers = [
        VideoAnswer(p.name, p.category, "", share) for p, share in zip(pairs, shares.tolist(), strict=True)
    ]
    return Outcome((recall, pck, *figures), len(figures) // 2, protocol, tuple(answers))


@torch.inference_mode()
def _read_tokens(store: FeatureStore, kinds: Sequence[TokenKind], device: str, video_id: str) -> UnitTokens:
    """Return an image's tokens of each kind, of length one; raise `InputError` where one is not finite."""
    raw = upload(torch.from_numpy(store.tokens(video_id, [0])), torch.device(device)).flatten(0, 2)
    found = torch.stack([unit_tokens(kind.apply(raw)) for kind in kinds]).cpu().numpy()
    if not np.isfinite(found).all():
        hint = "extract it again into another store"
        raise InputError(f"{video_id} has tokens that are not finite", hint=hint)
    return found
