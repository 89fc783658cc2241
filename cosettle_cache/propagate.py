"""Stage three: labels of every video's first frame travel through stored tokens, are written and scored.

A feature store, annotated first frames and a protocol go in; palette masks, overlays and one score row per
object, for raw and for projected tokens, come out. Nothing kept grows with the length of a video.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.config import package_versions
from cosettle_cache.console import SILENT, Progress
from cosettle_cache.datasets.davis import DavisSequence, open_sequence, read_mask, write_mask
from cosettle_cache.errors import (
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    RemoteError,
    UsageError,
)
from cosettle_cache.files import make_folder
from cosettle_cache.frames import iter_frames
from cosettle_cache.kinds import TokenKind, make_kinds
from cosettle_cache.labels import (
    FirstLabels,
    Mask,
    Size,
    decode_mask,
    decode_mask_stretched,
    encode_mask,
    encode_mask_nearest,
)
from cosettle_cache.metrics import DavisScorer, ObjectScore
from cosettle_cache.pictures.overlays import write_overlays
from cosettle_cache.projection import Projection
from cosettle_cache.propagator import Propagator, propagate
from cosettle_cache.protocols import check_protocol, image_std
from cosettle_cache.search import make_ranker
from cosettle_cache.sizes import resolve_size
from cosettle_cache.store import FeatureStore
from cosettle_cache.types import EvalProtocol, Grid, PlanKind, Score, Video

__all__ = ["PropagationReport", "Propagator", "StageSeconds", "check_store", "propagate", "propagate_store"]

OVERLAYS = ("none", "first", "all")
#: The benchmark scores neither the first nor the last frame.
MIN_SCORED_FRAMES = 3
#: Where overlays go, beside one folder of masks per kind of tokens.
OVERLAY_FOLDER = "overlays"


@dataclass(slots=True)
class StageSeconds:
    """Seconds of the calling thread per stage, and of the whole run; overlays are drawn beside it."""

    read: float = 0.0
    propagate: float = 0.0
    write: float = 0.0
    score: float = 0.0
    wait_overlays: float = 0.0
    total: float = 0.0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """What one run of `propagate_store` did.

    `scores` has one row per video, kind of tokens and object, for videos annotated throughout and at least
    three frames long; `failures` maps video ids to reasons; `n_frames` counts frames once, however many
    projections shared them. `error` is what ended the run early (no space left, say, or an object store that
    does not answer); the scores until then are kept.
    """

    scores: tuple[Score, ...]
    n_frames: int
    failures: Mapping[str, str]
    seconds: StageSeconds
    peak_memory_bytes: int
    interrupted: bool
    error: OutputError | RemoteError | None = None


def propagate_store(
    store: FeatureStore,
    data_root: Path,
    protocol: EvalProtocol,
    out: Path,
    *,
    task: str = "davis",
    projections: Sequence[tuple[str, Projection]] = (),
    overlays: str = "first",
    search: str = "auto",
    device: str = "cpu",
    progress: Progress = SILENT,
    stop: Event | None = None,
) -> PropagationReport:
    """Propagate the first masks of every video of `store`; raw and projected tokens share each read.

    Writes `out/TOKENS/VIDEO/FRAME.png`, as the benchmark reads them, and overlays of no, the first or all
    videos. A video that cannot be read is recorded in the report and does not end the run; setting `stop`
    ends it after the video in hand. Raises `FingerprintError` when the store was made for another size.
    """
    check_store(store, protocol)
    kinds = make_kinds(projections, store.arrays[0].n_channels, device=device, reserved=[OVERLAY_FOLDER])
    make_ranker(search, torch.device(device))
    if overlays not in OVERLAYS:
        raise UsageError(f"{overlays!r} says nothing about overlays", wanted=", ".join(OVERLAYS))
    run = _Run(store, data_root, protocol, out, task, kinds, search, device, progress)
    return run.propagate(overlays, stop or Event())


def check_store(store: FeatureStore, protocol: EvalProtocol) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos at the protocol's size."""
    check_protocol(protocol)
    if store.plan_kind is not PlanKind.FRAMES:
        raise _wrong_store(store, "a frames plan", f"a {store.plan_kind} plan", protocol)
    plan = store.fingerprint.plan
    if int(plan["every"]) != 1:
        raise _wrong_store(store, "every frame", f"one frame in {plan['every']}", protocol)
    _check_std(store, protocol)
    for video in store.manifest:
        wanted, found = (_size(rule, video) for rule in (protocol.size, str(plan["size"])))
        if wanted != found:
            at = [f"{video.video_id} at {height}x{width}" for height, width in (wanted, found)]
            raise _wrong_store(store, at[0], at[1], protocol)


def _check_std(store: FeatureStore, protocol: EvalProtocol) -> None:
    """Raise `FingerprintError` when the images were not normalised as the protocol has it."""
    found = tuple(store.encoder.get("std", ()))
    wanted = image_std(protocol, found) if found else found
    if wanted != found:
        raise FingerprintError(
            f"the images of {store.path} were normalised otherwise than in the protocol {protocol.name}",
            wanted=f"red_std {protocol.red_std:g}",
            found=f"red_std {found[0]:g}",
            hint=f"--set red_std={found[0]:g} keeps to the store; the protocol's name then says so",
        )


def _wrong_store(store: FeatureStore, wanted: str, found: str, protocol: EvalProtocol) -> FingerprintError:
    return FingerprintError(
        f"{store.path} does not fit the protocol {protocol.name}",
        wanted=wanted,
        found=found,
        hint=f"cosettle-cache extract --plan frames --size {protocol.size}",
    )


def _size(rule: str, video: Video) -> Size:
    return resolve_size(rule, video.height, video.width)


@dataclass(frozen=True, slots=True)
class _LabelRules:
    """How the protocol turns masks into label maps and back, for frames encoded at `size`."""

    protocol: EvalProtocol
    size: Size

    def encode(self, mask: Mask, grid: Grid) -> FirstLabels:
        if self.protocol.label_encoding == "nearest":
            return encode_mask_nearest(mask, grid)
        return encode_mask(mask, self.size, grid)

    def decode(self, label_map: Float[Tensor, "row col class"], first: FirstLabels, mask_size: Size) -> Mask:
        decode = decode_mask_stretched if self.protocol.norm_mask else decode_mask
        at = self.size if self.protocol.decode_size == "input" else mask_size
        return decode(label_map, first.object_ids, at, mask_size)


_Frame = tuple[str, Float[Tensor, "row col dim"], Mask | None]


@dataclass(frozen=True, slots=True)
class _Track:
    """One kind of tokens on its way through one video."""

    kind: TokenKind
    propagator: Propagator
    scorer: DavisScorer
    folder: Path


@dataclass(slots=True)
class _Run:
    """One call of `propagate_store`: what it was given, and what comes of it."""

    store: FeatureStore
    data_root: Path
    protocol: EvalProtocol
    out: Path
    task: str
    kinds: list[TokenKind]
    search: str
    device: str
    progress: Progress
    seconds: StageSeconds = field(default_factory=StageSeconds)
    scores: list[Score] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    n_videos: int = 0
    n_frames: int = 0
    error: OutputError | RemoteError | None = None

    def propagate(self, overlays: str, stop: Event) -> PropagationReport:
        videos = self.store.manifest.videos
        self.progress.start(sum(video.n_frames for video in videos), "frames")
        try:
            with self.seconds.timed("total"):
                self._propagate_videos(videos, overlays, stop)
        finally:
            self.progress.finish()
        return PropagationReport(
            scores=tuple(self.scores),
            n_frames=self.n_frames,
            failures=self.failures,
            seconds=self.seconds,
            peak_memory_bytes=_peak_memory_bytes(),
            interrupted=self.n_videos < len(videos) and self.error is None,
            error=self.error,
        )

    def _propagate_videos(self, videos: Sequence[Video], overlays: str, stop: Event) -> None:
        drawings: dict[str, Future[None]] = {}
        # Overlays are drawn beside the propagation, from what is on disk.
        painter = ThreadPoolExecutor(1, "overlays")
        try:
            for video in videos:
                if stop.is_set() or self.error:
                    break
                sequence = self._try_video(video)
                if sequence and (overlays == "all" or (overlays == "first" and not drawings)):
                    drawings[video.video_id] = painter.submit(self._draw, sequence)
            with self.seconds.timed("wait_overlays"):
                self._collect(drawings)
        finally:
            painter.shutdown(cancel_futures=True)

    def _try_video(self, video: Video) -> DavisSequence | None:
        self.n_videos += 1
        try:
            sequence = open_sequence(video, self.data_root)
            self.scores.extend(self._propagate_video(sequence))
        except (InputError, DamagedStoreError) as error:
            self.failures[video.video_id] = error.summary
            return None
        except (OutputError, RemoteError) as error:
            self.error = error
            return None
        return sequence

    @torch.inference_mode()
    def _propagate_video(self, sequence: DavisSequence) -> list[Score]:
        video, first_mask = sequence.video, sequence.first_mask()
        size = _size(self.protocol.size, video)
        rules = _LabelRules(self.protocol, size)
        first = rules.encode(first_mask, self.store.grid(video.video_id))
        tracks = [self._make_track(kind, video, first, first_mask) for kind in self.kinds]
        for name, tokens, truth in self._read(sequence):
            for track in tracks:
                with self.seconds.timed("propagate"):
                    label_map = track.propagator.step(track.kind.apply(tokens))
                    mask = rules.decode(label_map, first, first_mask.shape)
                self._keep(track, name, mask, truth)
            self.n_frames += 1
            self.progress.advance()
        if len(sequence.labelled) < video.n_frames or video.n_frames < MIN_SCORED_FRAMES:
            return []
        return [self._score(video, track, item) for track in tracks for item in track.scorer.finish()]

    def _make_track(self, kind: TokenKind, video: Video, first: FirstLabels, first_mask: Mask) -> _Track:
        propagator = Propagator(first.label_map, self.protocol, device=self.device, search=self.search)
        folder = make_folder(self.out / kind.name / video.video_id)
        return _Track(kind, propagator, DavisScorer.from_first_mask(first_mask), folder)

    def _read(self, sequence: DavisSequence) -> Iterator[_Frame]:
        """Yield name, tokens and true mask of every frame; the only place that reads the store."""
        frames = self.store.stream_tokens(sequence.video.video_id)
        for index, name in enumerate(sequence.frame_names):
            with self.seconds.timed("read"):
                tokens = torch.from_numpy(next(frames)).to(self.device)
                truth = sequence.mask(index)
            yield name, tokens, truth

    def _keep(self, track: _Track, name: str, mask: Mask, truth: Mask | None) -> None:
        with self.seconds.timed("write"):
            write_mask(track.folder / f"{name}.png", mask)
        if truth is not None:
            with self.seconds.timed("score"):
                track.scorer.add(truth, mask)

    def _score(self, video: Video, track: _Track, item: ObjectScore) -> Score:
        fingerprint = self.store.fingerprint
        versions = {"extract": dict(fingerprint.versions), "propagate": package_versions()}
        return Score(
            task=self.task,
            dataset=video.dataset,
            video_id=video.video_id,
            object_id=item.object_id,
            tokens=track.kind.name,
            j_mean=item.j_mean,
            j_recall=item.j_recall,
            j_decay=item.j_decay,
            f_mean=item.f_mean,
            f_recall=item.f_recall,
            f_decay=item.f_decay,
            n_frames=video.n_frames,
            scored_size=f"{video.height}x{video.width}",
            boundary_tolerance_px=track.scorer.tolerance,
            protocol=self.protocol.name,
            protocol_json=json.dumps(self.protocol.to_json(), sort_keys=True),
            manifest_digest=fingerprint.manifest_digest,
            backbone=fingerprint.backbone,
            weights_sha256=fingerprint.weights_sha256,
            projection_sha256=track.kind.sha256,
            versions_json=json.dumps(versions, sort_keys=True),
        )

    def _draw(self, sequence: DavisSequence) -> None:
        video = sequence.video
        for kind in self.kinds:
            masks = self.out / kind.name / video.video_id
            write_overlays(
                iter_frames(video, self.data_root),
                (read_mask(masks / f"{name}.png") for name in sequence.frame_names),
                n_frames=video.n_frames,
                fps=video.fps,
                folder=self.out / OVERLAY_FOLDER / video.video_id,
                name=kind.name,
            )

    def _collect(self, drawings: Mapping[str, Future[None]]) -> None:
        for video_id, drawing in drawings.items():
            try:
                drawing.result()
            except (InputError, OutputError) as error:
                self.failures[video_id] = f"its overlays: {error.summary}"
            except Exception as error:
                # Whatever went wrong in a picture, the scores are worth more.
                self.failures[video_id] = f"its overlays: {error!r}"


def _peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Room(ModuleType):
    """This module, callable: the room and the public function have one name (`cosettle_cache.propagate`).

    Importing the room binds that name to the module, so whichever came first, calling it propagates.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Tensor:
        return propagate(*arguments, **settings)


sys.modules[__name__].__class__ = _Room
