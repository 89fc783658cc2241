"""Pictures of stored tokens: their first three principal components as colours, raw and projected.

A feature store and the frames it was made from go in; PNGs and films come out. The components are those of a
whole video, or of the whole store, so that a colour keeps its meaning from frame to frame. Nothing grows with
the length of a video.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cosettle_cache.analysis.components import FOREGROUNDS, Painter, align_signs, fit_painter
from cosettle_cache.analysis.pooling import check_frames_plan
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, InputError, OutputError, RemoteError, UsageError
from cosettle_cache.core.types import Video
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.pictures.pca import FILMS, write_pictures
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import Image8, iter_frames

#: Whose tokens share their components.
PER = ("video", "store")
#: The frame's panel, so no projection may be called so.
FRAME = "frame"

Colours = UInt8[np.ndarray, "row col 3"]


@dataclass(frozen=True, slots=True)
class PcaSettings:
    """What is drawn: components `per` video or store, which `foreground`, which film, stills."""

    per: str = "video"
    foreground: str = "none"
    film: str = "mp4"
    stills: bool = True


@dataclass(frozen=True, slots=True)
class KindShares:
    """How much of the variance of one kind's unit tokens each of the three components holds."""

    video_id: str
    tokens: str
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PcaReport:
    """What one run of `draw_store` did; `failures` maps video ids to reasons, `error` ended the run early."""

    shares: tuple[KindShares, ...]
    n_videos: int
    n_frames: int
    failures: Mapping[str, str]
    seconds: float
    interrupted: bool
    error: OutputError | RemoteError | None = None


def draw_store(
    store: FeatureStore,
    data_root: Path,
    out: Path,
    *,
    videos: Sequence[str] = (),
    projections: Sequence[tuple[str, Projection]] = (),
    settings: PcaSettings | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
    stop: Event | None = None,
) -> PcaReport:
    """Draw `videos` (default: all) of a frames store to `out/VIDEO/KIND/FRAME.png` and `out/VIDEO.mp4`.

    A video that cannot be drawn is recorded in the report and does not end the run; setting `stop` ends it
    after the video in hand. Raises `InputError` for unknown videos and for stores of other plans,
    `UsageError` for settings.
    """
    settings = settings or PcaSettings()
    check_request(store, videos, settings)
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=(FRAME,))
    run = _Run(store, data_root, out, kinds, settings, device, progress)
    return run.draw(chosen_videos(store, videos), stop or Event())


def check_request(store: FeatureStore, videos: Sequence[str], settings: PcaSettings) -> None:
    """Raise what `draw_store` raises, before anything is drawn."""
    choices = {"per": PER, "foreground": FOREGROUNDS, "film": FILMS}
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            found = getattr(settings, name)
            raise UsageError(f"{found!r} says nothing about {name}", wanted=" or ".join(known), found=found)
    if settings.film == "none" and not settings.stills:
        raise UsageError("neither stills nor a film: nothing would be drawn", wanted="one of them")
    check_frames_plan(store, "pca")
    for video_id in videos:
        store.n_frames(video_id)


def chosen_videos(store: FeatureStore, videos: Sequence[str]) -> list[Video]:
    """Return the rows of `videos`, or of all that are there, in the manifest's order."""
    wanted = set(videos or store.video_ids)
    return [video for video in store.manifest if video.video_id in wanted]


@dataclass(slots=True)
class _Run:
    """One call of `draw_store`: what it was given, and what comes of it."""

    store: FeatureStore
    data_root: Path
    out: Path
    kinds: list[TokenKind]
    settings: PcaSettings
    device: str
    progress: Progress

    def draw(self, videos: Sequence[Video], stop: Event) -> PcaReport:
        started, shares = time.perf_counter(), list[KindShares]()
        failures: dict[str, str] = {}
        n_videos = n_frames = 0
        error: OutputError | RemoteError | None = None
        self.progress.start(len(videos), "videos")
        try:
            common = self._common(shares) if self.settings.per == "store" else None
            for video in videos:
                if stop.is_set():
                    break
                n_videos += 1
                try:
                    self._draw_video(video, common or self._fit([video.video_id], video.video_id, shares))
                    n_frames += self.store.n_frames(video.video_id)
                except (InputError, DamagedStoreError) as problem:
                    failures[video.video_id] = problem.summary
                self.progress.advance()
        except (OutputError, RemoteError) as problem:
            error = problem
        finally:
            self.progress.finish()
        interrupted = n_videos < len(videos) and error is None
        seconds = time.perf_counter() - started
        return PcaReport(tuple(shares), n_videos, n_frames, failures, seconds, interrupted, error)

    def _common(self, shares: list[KindShares]) -> list[Painter]:
        return self._fit(list(self.store.video_ids), "all videos", shares)

    def _fit(self, video_ids: Sequence[str], name: str, shares: list[KindShares]) -> list[Painter]:
        """Return the painter of each kind of tokens, all videos together, and note their shares.

        Colours of projected tokens take their signs from the raw ones.
        """
        painters: list[Painter] = []
        for kind in self.kinds:
            frames = partial(self._tokens, video_ids, kind)
            painter = fit_painter(frames, foreground=self.settings.foreground)
            if painters:
                pairs = zip(self._tokens(video_ids, self.kinds[0]), frames(), strict=True)
                painter = align_signs(painter, painters[0], pairs)
            painters.append(painter)
            shares.append(KindShares(name, kind.name, tuple(painter.components.shares.tolist())))
        return painters

    @torch.inference_mode()
    def _tokens(self, video_ids: Iterable[str], kind: TokenKind) -> Iterator[Float[Tensor, "row col dim"]]:
        for video_id in video_ids:
            for frame in self.store.stream_tokens(video_id):
                yield kind.apply(torch.from_numpy(frame).to(self.device).float())

    def _draw_video(self, video: Video, painters: Sequence[Painter]) -> None:
        every = int(self.store.fingerprint.plan["every"])
        frames = self._frames(video, painters, range(0, video.n_frames, every))
        fps = video.fps / every if video.fps else None
        write_pictures(
            frames, fps, self.out / video.video_id, film=self.settings.film, stills=self.settings.stills
        )

    def _frames(
        self, video: Video, painters: Sequence[Painter], indices: range
    ) -> Iterator[tuple[str, Image8, Mapping[str, Colours]]]:
        images = iter_frames(video, self.data_root, indices)
        tokens = self.store.stream_tokens(video.video_id)
        for index, image, frame in zip(indices, images, tokens, strict=True):
            raw = torch.from_numpy(frame).to(self.device).float()
            with torch.inference_mode():
                pairs = zip(self.kinds, painters, strict=True)
                colours = {kind.name: painter.paint(kind.apply(raw)) for kind, painter in pairs}
            yield f"{index:05d}", image, colours
