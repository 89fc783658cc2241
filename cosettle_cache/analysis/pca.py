"""Pictures of stored tokens: their first three principal components as colours, raw and projected.

A feature store and the frames it was made from go in; PNGs and films come out. The components are those of a
whole video, or of the whole store, so that a colour keeps its meaning from frame to frame. Frames are read
several times over and nothing grows with their number; sums are float64, equal tokens give equal colours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from cosettle_cache.analysis.pooling import check_frames_plan, each_video, stream_batches
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import InputError, OutputError, RemoteError, UsageError
from cosettle_cache.core.files import inside, own_folder
from cosettle_cache.core.settings import PcaSettings
from cosettle_cache.core.types import Video
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.pictures.drawing import write_pictures
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames

#: The frame's panel, so no projection may be called so.
FRAME = "frame"
#: Red, green, blue.
N_COMPONENTS = 3
#: A component's darkest and brightest shade: a few odd tokens shall not make the others pale.
PERCENTILES = (1.0, 99.0)
#: Percentiles are read from counts in bins over so many standard deviations on either side of the mean.
_REACH, _BINS = 8.0, 4096
_CENTRES = (np.arange(_BINS) + 0.5) * (2 * _REACH / _BINS) - _REACH

Tokens = Float[Tensor, "row col dim"]
#: Says which tokens are drawn at all: those on one side of a split of the first component.
Mask = Callable[[Float[Tensor, "*token dim"]], Bool[Tensor, "*token"]]
#: Gives the frames of a video (or of all videos) anew with every call.
Frames = Callable[[], Iterable[Tokens]]
Colours = UInt8[np.ndarray, "row col 3"]


@dataclass(frozen=True, slots=True)
class KindShares:
    """How much of the variance of one kind's unit tokens each of the three components holds."""

    video_id: str
    tokens: str
    shares: tuple[float, ...]


@dataclass(slots=True)
class PcaReport:
    """What one run of `draw_store` did; `failures` maps video ids to reasons, `error` ended the run early."""

    shares: list[KindShares] = field(default_factory=list)
    n_videos: int = 0
    n_frames: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    error: OutputError | RemoteError | None = None


def plan_pca(store: FeatureStore, settings: PcaSettings, video_ids: Sequence[str] = ()) -> list[Video]:
    """Return the rows of `video_ids`, or of all videos that are there, in the manifest's order.

    Raises `InputError` for unknown videos and for stores of other plans, `UsageError` for settings.
    """
    if settings.film == "none" and not settings.stills:
        raise UsageError("neither stills nor a film: nothing would be drawn", wanted="one of them")
    check_frames_plan(store, "pca")
    for video_id in video_ids:
        store.n_frames(video_id)
    wanted = set(video_ids or store.video_ids)
    return [video for video in store.manifest if video.video_id in wanted]


def draw_store(
    store: FeatureStore,
    videos: Sequence[Video],
    settings: PcaSettings,
    data_root: Path,
    out: Path,
    *,
    projections: Sequence[tuple[str, Projection]] = (),
    device: str = "cpu",
    progress: Progress = SILENT,
    stop: Event | None = None,
) -> PcaReport:
    """Draw `videos` of `plan_pca` to `out/VIDEO/KIND/FRAME.png` and `out/VIDEO.mp4`.

    A video that cannot be drawn is recorded in the report and does not end the run; setting `stop` ends it
    after the video in hand. Raises `UsageError` when `out` holds anything but pictures of this command.
    """
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=(FRAME,))
    rows, every = {video.video_id: video for video in videos}, int(store.fingerprint.plan["every"])
    started, report, common = time.perf_counter(), PcaReport(), list[Painter]()

    @torch.inference_mode()
    def fit(video_ids: Sequence[str], name: str) -> list[Painter]:
        painters: list[Painter] = []
        for kind in kinds:
            frames = partial(_stored_tokens, store, video_ids, kind, device)
            painter = fit_painter(frames, foreground=settings.foreground)
            if painters:
                # Colours of projected tokens take their signs from the raw ones.
                pairs = zip(_stored_tokens(store, video_ids, kinds[0], device), frames(), strict=True)
                painter = align_signs(painter, painters[0], pairs)
            painters.append(painter)
            shares = tuple(painter.components.shares.tolist())
            report.shares.append(KindShares(name, kind.name, shares))
        return painters

    @torch.inference_mode()
    def draw(video_id: str) -> int:
        report.n_videos += 1
        folder, video = inside(out, video_id), rows[video_id]
        painters = common or fit([video_id], video_id)
        pairs = list(zip(kinds, painters, strict=True))
        indices = range(0, video.n_frames, every)
        images = iter_frames(video, data_root, indices)
        painted = _painted(store, video_id, pairs, device)
        pictures = (
            (f"{index:05d}", image, colours)
            for index, image, colours in zip(indices, images, painted, strict=True)
        )
        fps = video.fps / every if video.fps else None
        write_pictures(pictures, fps, folder, film=settings.film, stills=settings.stills)
        return store.n_frames(video_id)

    try:
        with own_folder(out, "pca"):
            if settings.per == "store":
                common = fit(store.video_ids, "all videos")
            for _, n_frames in each_video(list(rows), draw, report.failures, progress, stop):
                report.n_frames += n_frames
    except (OutputError, RemoteError) as problem:
        report.error = problem
    report.interrupted = report.n_videos < len(rows) and report.error is None
    report.seconds = time.perf_counter() - started
    return report


def _stored_tokens(
    store: FeatureStore, video_ids: Iterable[str], kind: TokenKind, device: str
) -> Iterator[Tokens]:
    for video_id in video_ids:
        for batch in stream_batches(store, video_id, device):
            yield from map(kind.apply, batch)


def _painted(
    store: FeatureStore, video_id: str, pairs: Sequence[tuple[TokenKind, Painter]], device: str
) -> Iterator[dict[str, Colours]]:
    """Yield the colours of every frame by kind of tokens."""
    names = [kind.name for kind, _ in pairs]
    for batch in stream_batches(store, video_id, device):
        kinds = [torch.stack([painter.colours(kind.apply(raw)) for raw in batch]) for kind, painter in pairs]
        for frame in torch.stack(kinds, dim=1).cpu().numpy():
            yield dict(zip(names, frame, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The directions (columns) in which unit tokens vary most, their deviations and shares of variance."""

    mean: Float64[Tensor, " dim"]
    basis: Float64[Tensor, "dim component"]
    spreads: Float64[Tensor, " component"]
    shares: Float64[Tensor, " component"]

    def apply(self, tokens: Float[Tensor, "*token dim"]) -> Float64[Tensor, "*token component"]:
        """Return the components of tokens in standard deviations."""
        centred = normalize(tokens.double(), dim=-1) - self.mean
        return centred @ self.basis / self.spreads.clamp(min=torch.finfo(torch.float64).tiny)


class Histogram:
    """Counts of components in bins, from which percentiles are read to 1/256 of a standard deviation."""

    def __init__(self) -> None:
        self._counts: Int64[Tensor, "component bin"] | None = None

    def add(
        self, values: Float64[Tensor, "token component"], weights: Int64[Tensor, " token"] | None = None
    ) -> None:
        """Count tokens in, those with weight 1 if there are weights; beyond the reach is at its end."""
        bins = ((values + _REACH) * (_BINS / (2 * _REACH))).floor().clamp(0, _BINS - 1).long().T
        if self._counts is None:
            self._counts = bins.new_zeros(N_COMPONENTS, _BINS)
        self._counts.scatter_add_(
            1, bins, torch.ones_like(bins) if weights is None else weights.expand_as(bins)
        )

    @property
    def counts(self) -> Int64[np.ndarray, "component bin"]:
        """The counts in the memory of the host."""
        return (
            np.zeros((N_COMPONENTS, _BINS), np.int64) if self._counts is None else self._counts.cpu().numpy()
        )

    def percentiles(self, *percents: float) -> list[Float64[np.ndarray, " component"]]:
        """Return the middles of the bins below or in which so many percent of the tokens lie."""
        counts = self.counts
        shares = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
        return [np.asarray(_CENTRES[(shares < percent / 100).sum(axis=1)]) for percent in percents]

    def split(self) -> float:
        """Return the value that parts the first component best into two groups (Otsu's)."""
        counts = self.counts[0].astype(np.float64)
        below = counts.cumsum()
        sums = (counts * _CENTRES).cumsum()
        above = below[-1] - below
        with np.errstate(divide="ignore", invalid="ignore"):
            between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
        # Empty bins between two groups are all as good: the middle of them.
        best = np.flatnonzero(np.nan_to_num(between) >= np.nanmax(np.nan_to_num(between)) * (1 - 1e-12))
        return float(_CENTRES[best].mean() + _REACH / _BINS)


@dataclass(frozen=True, slots=True, eq=False)
class Painter:
    """Gives tokens colours: components between `low` and `high` become 0 to 255, background is black."""

    components: Components
    low: Float64[np.ndarray, " component"]
    high: Float64[np.ndarray, " component"]
    foreground: Mask | None = None

    def colours(self, tokens: Tokens) -> UInt8[Tensor, "row col 3"]:
        """Return the colour of every token of a frame, where the tokens are."""
        widths = np.where(self.high > self.low, self.high - self.low, 1.0).tolist()
        # Numbers, not arrays, so that a GPU is sent nothing.
        places = zip(self.components.apply(tokens).unbind(-1), self.low.tolist(), widths, strict=True)
        shares = torch.stack([(values - low) / width for values, low, width in places], dim=-1)
        colours = (255 * shares.clamp(0, 1)).round().to(torch.uint8)
        return colours if self.foreground is None else colours * self.foreground(tokens)[..., None]


def align_signs(painter: Painter, reference: Painter, pairs: Iterable[tuple[Tokens, Tokens]]) -> Painter:
    """Return `painter` with every component turned so that it goes up where that of `reference` does.

    `pairs` are the same frames in the reference's and in the painter's own kind of tokens. The sign of a
    component means nothing; turned like this, colours of two kinds can be compared.
    """
    agreement = torch.zeros(N_COMPONENTS, dtype=torch.float64, device=painter.components.mean.device)
    for one, other in pairs:
        agreement += (reference.components.apply(one) * painter.components.apply(other)).sum(dim=(0, 1))
    signs = torch.where(agreement < 0, -1.0, 1.0).double()
    components = replace(painter.components, basis=painter.components.basis * signs)
    up = signs.cpu().numpy() > 0
    low, high = np.where(up, painter.low, -painter.high), np.where(up, painter.high, -painter.low)
    return replace(painter, components=components, low=low, high=high)


def fit_painter(frames: Frames, *, foreground: str = "none") -> Painter:
    """Return the painter of all frames together, after two passes over them; four with a `foreground`.

    With one the first component over all tokens is split in two (Otsu); the `high` or the `low` side is the
    foreground, or (`auto`) the one that the middle of the frames has more of than the whole; the colours are
    those of the foreground's own components. Raises `InputError` when there are no tokens, or none in it.
    """
    side = None if foreground == "none" else _find_foreground(frames, foreground)
    components, histogram = _fit(frames, side), Histogram()
    for tokens in frames():
        weights = None if side is None else side(tokens).flatten().long()
        histogram.add(components.apply(tokens).flatten(0, 1), weights)
    low, high = histogram.percentiles(*PERCENTILES)
    return Painter(components, low, high, side)


def _fit(frames: Frames, side: Mask | None) -> Components:
    """Return the first three; each points where its largest weight is positive, so signs are settled."""
    n_tokens: int | Tensor = 0
    sums, products = torch.zeros(()), torch.zeros(())
    for tokens in frames():
        unit = normalize(tokens.flatten(0, 1).double(), dim=-1)
        n_chosen: int | Tensor = len(unit)
        if side is not None:
            # The background gets no length. Taking it out would make the host wait for a GPU, for its size.
            weights = side(tokens).flatten()
            unit, n_chosen = unit * weights[:, None], weights.sum()
        sums, products, n_tokens = sums + unit.sum(dim=0), products + unit.T @ unit, n_tokens + n_chosen
    n_tokens = int(n_tokens)
    if not n_tokens:
        wanted = "a video, with a foreground where that is asked"
        raise InputError("there are no tokens to draw", wanted=wanted)
    mean, products = sums / n_tokens, products / n_tokens
    if len(mean) < N_COMPONENTS:
        raise InputError("these tokens have too few channels", wanted=N_COMPONENTS, found=len(mean))
    values, vectors = torch.linalg.eigh(products - torch.outer(mean, mean))
    basis = vectors[:, -N_COMPONENTS:].flip(1)
    strongest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    values = values.clamp(min=0)
    first = values[-N_COMPONENTS:].flip(0)
    total = values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Components(mean, basis * strongest.sign(), first.sqrt(), first / total)


def _find_foreground(frames: Frames, which: str) -> Mask:
    components, histogram, middle = _fit(frames, None), Histogram(), Histogram()
    for tokens in frames():
        values, (rows, cols, _) = components.apply(tokens), tokens.shape
        histogram.add(values.flatten(0, 1))
        # The middle half of the rows and columns.
        middle.add(values[rows // 4 : rows - rows // 4, cols // 4 : cols - cols // 4].flatten(0, 1))
    split = histogram.split()
    counts = [item.counts[0] for item in (middle, histogram)]
    inside, everywhere = (item[split < _CENTRES].sum() / item.sum() for item in counts)
    above = which == "high" or (which == "auto" and bool(inside > everywhere))
    return lambda tokens: (components.apply(tokens)[..., 0] > split) == above
