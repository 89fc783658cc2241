"""One video, all kinds of tokens: read once, searched, labels carried, written, scored, marked as finished.

A video is a unit of work for this process or for any other that has the store, the data and the output folder
at hand: `VideoWork` can be pickled. Neighbours are searched, or taken from the lists that an earlier search
kept: they do not depend on labels.
"""

from __future__ import annotations

import platform
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cosettle_cache.core.errors import CosettleError, DamagedStoreError, InputError
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.precision import exact_float32
from cosettle_cache.core.settings import PropagateSettings, digest, make_provenance
from cosettle_cache.core.types import EvalProtocol, Score, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.metrics.rows import video_row
from cosettle_cache.propagation.context import FRAMES_AT_ONCE, ContextSearch, Neighbors
from cosettle_cache.propagation.folder import RunFolder
from cosettle_cache.propagation.neighbor_files import (
    load_neighbors,
    neighbor_writer,
    neighbors_key,
    neighbors_path,
)
from cosettle_cache.propagation.propagator import LabelCarrier, check_length
from cosettle_cache.propagation.tasks import Task, load
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Setting, Subject
from cosettle_cache.search.masked import limit_on
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import resolve_size

Tokens = Float[Tensor, "row col dim"]
#: Of some frames and all kinds of tokens, what label maps stand for.
Decoded = Shaped[np.ndarray, "frame kind ..."]

#: Held while a GPU is searched on: by one video at a time.
_searching = Lock()
#: Stretches of a video's frames that wait to be written, at most.
_N_WAITING = 2


@dataclass(frozen=True, slots=True)
class VideoWork:
    """What a run is about; pickling it sends settings and paths only.

    `device` None is the worker's choice.
    """

    store: FeatureStore
    data_root: Path
    protocol: EvalProtocol
    folder: RunFolder
    settings: PropagateSettings
    task: Task
    kinds: tuple[TokenKind, ...]
    device: str | None

    @property
    def videos(self) -> tuple[Video, ...]:
        """The manifest; videos go by their number in it."""
        return self.store.manifest.videos

    def setting(self, number: int) -> Setting:
        """Return what labels and maps of a video depend on."""
        video = self.videos[number]
        size = resolve_size(self.protocol.size, video.height, video.width, store_patch(self.store))
        return Setting(self.protocol, size, self.store.grid(video.video_id), number)

    def torch_device(self) -> torch.device:
        """Return where to compute."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def store_patch(store: FeatureStore) -> int:
    """Return the encoder's patch in pixels; 16 where a store does not say it."""
    patch = store.encoder.get("patch")
    return patch if isinstance(patch, int) else 16


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What became of one video; `failure` says why there is nothing else, `not_drawn` why no pictures.

    `n_reused` counts the kinds of tokens whose neighbours had been kept.
    """

    n_frames: int = 0
    scores: tuple[Score, ...] = ()
    failure: str | None = None
    n_reused: int = 0
    peak_memory_bytes: int = 0
    not_drawn: str | None = None


def propagate_video(
    work: VideoWork, number: int, advance: Callable[[], object] = lambda: None
) -> VideoReport:
    """Propagate through video `number` and mark it as finished; `advance` is called after every frame.

    What is wrong with the video or with its tokens becomes the report's `failure`; other errors are raised.
    """
    for path, what in ((work.data_root, "the data root"), (work.folder.progress, "the output folder")):
        if not path.is_dir():
            raise InputError(
                f"{path} is not a folder on {platform.node()}",
                wanted=f"{what} under the same path on every worker",
            )
    video = work.videos[number]
    try:
        work.folder.reopen(video.video_id)
        check_length(video.n_frames)
        subject: Subject = load(work.task.open)(video, work.data_root, work.setting(number))
        tracks = _carry(work, number, subject, advance)
        n_reused = sum(track.kept for track in tracks)
        scores: list[Score] = []
        for kind, track in zip(work.kinds, tracks, strict=True):
            origin = make_provenance("propagate", video.dataset, work.store.fingerprint, kind.sha256)
            row = video_row(
                work.task.name, video, kind.name, work.protocol.name, work.protocol.to_json(), origin
            )
            scores += track.predictions.rows(row)
        files = [path for track in tracks for path in track.predictions.files]
        work.folder.finish(video, work.data_root, files, scores)
    except (InputError, DamagedStoreError) as error:
        return VideoReport(failure=error.reason)
    return VideoReport(video.n_frames, tuple(scores), None, n_reused, peak_memory_bytes())


def _carry(work: VideoWork, number: int, subject: Subject, advance: Callable[[], object]) -> list[_Track]:
    """Carry the labels of a video through its frames; write and score what each stands for.

    A GPU searches one video at a time, and a thread writes it, beside the search of what comes next.
    """
    if work.torch_device().type == "cpu":
        return _search(work, number, subject, partial(_write, subject, advance))
    waiting = deque[Future[None]]()
    with ThreadPoolExecutor(1, "writing") as writer:

        def hand_over(tracks: list[_Track], start: int, decoded: Decoded) -> None:
            waiting.append(writer.submit(_write, subject, advance, tracks, start, decoded))
            if len(waiting) > _N_WAITING:
                waiting.popleft().result()

        with _searching:
            tracks = _search(work, number, subject, hand_over)
        for job in waiting:
            job.result()
    return tracks


def _search(
    work: VideoWork, number: int, subject: Subject, write: Callable[[list[_Track], int, Decoded], object]
) -> list[_Track]:
    """Search a video and decode its label maps; `write` takes those of some frames, from a first one on."""
    video, device = work.videos[number], work.torch_device()
    kinds = [kind.on(device) for kind in work.kinds]
    with torch.inference_mode(), exact_float32(device.type), ExitStack() as open_files:
        content = "" if work.settings.neighbors is None else work.store.content_digest(video.video_id)
        tracks = [_open_track(work, kind, number, subject, open_files, content) for kind in kinds]
        stream = None if all(track.kept for track in tracks) else work.store.stream_tokens(video.video_id)
        n_at_once = min(track.n_at_once for track in tracks)
        for start in range(0, video.n_frames, n_at_once):
            n_frames = min(n_at_once, video.n_frames - start)
            coming = islice(stream or (), n_frames)
            tokens = [upload(torch.from_numpy(frame), device) for frame in coming]
            labels = [track.carrier.steps(track.find(tokens, n_frames)) for track in tracks]
            decoded = [[subject.decode(label_map) for label_map in maps] for maps in labels]
            # One copy, for which the host waits.
            by_frame = torch.stack(list(chain.from_iterable(zip(*decoded, strict=True)))).cpu()
            write(tracks, start, by_frame.view(n_frames, len(tracks), *by_frame.shape[1:]).numpy())
    return tracks


def _write(
    subject: Subject, advance: Callable[[], object], tracks: list[_Track], start: int, decoded: Decoded
) -> None:
    """Write and score what was decoded of frames from `start` on."""
    for index, of_frame in enumerate(decoded, start=start):
        truth = subject.truth(index)
        for track, found in zip(tracks, of_frame, strict=True):
            prediction = subject.correct(index, subject.finish(found))
            track.predictions.write(index, prediction)
            if truth is not None and track.predictions.score is not None:
                track.predictions.score(truth, prediction)
        advance()


def draw_video(work: VideoWork, number: int) -> str | None:
    """Draw the pictures of a finished video; return what went wrong, if anything did."""
    video = work.videos[number]
    predictions = {kind.name: work.folder.path / kind.name for kind in work.kinds}
    folder = work.folder.pictures(video.video_id)
    try:
        drawing = Drawing(video, work.data_root, work.setting(number), predictions, make_folder(folder))
        load(work.task.draw)(drawing)
        work.folder.finish_pictures(video.video_id)
    except CosettleError as error:
        return f"its overlays: {error.summary}"
    except Exception as error:
        # Whatever went wrong in a picture, the scores are worth more.
        return f"its overlays: {error!r}"
    return None


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Track(NamedTuple):
    """One kind of tokens in one video.

    `find` returns the neighbours of the next frames, of which it is given the tokens and the number, at most
    `n_at_once`; lists that were `kept` need no tokens.
    """

    find: Callable[[Sequence[Tokens], int], Iterator[Neighbors | None]]
    n_at_once: int
    kept: bool
    carrier: LabelCarrier
    predictions: Predictions


def _open_track(
    work: VideoWork,
    kind: TokenKind,
    number: int,
    subject: Subject,
    open_files: ExitStack,
    content: str,
) -> _Track:
    """Begin one kind of tokens; neighbour lists that are to be kept are written to a file in `open_files`.

    `content` is the digest of the video's stored tokens, which those lists name.
    """
    setting, video, device = work.setting(number), work.videos[number], work.torch_device()
    carrier = LabelCarrier(subject.label_map, work.protocol, device=device, given=subject.given)
    predictions = subject.begin(work.folder.path / kind.name)
    write: Callable[[Neighbors], None] | None = None
    if work.settings.neighbors is not None:
        key = neighbors_key(
            work.protocol,
            video_id=video.video_id,
            tokens=digest([work.store.fingerprint.to_json(), kind.sha256]),
            content=content,
            n_frames=video.n_frames,
            grid=setting.grid,
        )
        path = neighbors_path(work.settings.neighbors, key)
        try:
            lists = chain([None], load_neighbors(path, key))
            n_at_once = 1 if device.type == "cpu" else FRAMES_AT_ONCE
            return _Track(lambda _, n_frames: islice(lists, n_frames), n_at_once, True, carrier, predictions)
        except InputError:  # none, or none that can be used: made anew
            write = open_files.enter_context(neighbor_writer(path, key))
    limit = limit_on(device, work.settings.memory_limit)
    search = ContextSearch(
        setting.grid,
        kind.width(work.store.arrays[0].n_channels),
        work.protocol,
        device=device,
        search=work.settings.search,
        memory_limit=None if limit is None else limit // len(work.kinds),
        labels_bytes=carrier.nbytes,
        n_at_once=min(FRAMES_AT_ONCE, video.n_frames),
    )

    def find(tokens: Sequence[Tokens], n_frames: int) -> Iterator[Neighbors | None]:
        for found in search.steps(map(kind.apply, tokens)):
            if found is not None and write is not None:
                write(found)
            yield found

    return _Track(find, search.n_at_once, False, carrier, predictions)
