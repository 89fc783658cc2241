"""What a propagation says about itself: per video, and per run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import Score


@dataclass(slots=True)
class StageSeconds:
    """Seconds of the calling thread per stage, and of the whole run; overlays are drawn beside it.

    Over several workers all but `total` are sums.
    """

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

    def add(self, other: StageSeconds) -> None:
        """Add the stages of another clock."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True, slots=True)
class VideoReport:
    """What became of one video; `failure` says why there is nothing else.

    `n_reused` counts the kinds of tokens whose neighbours had been kept.
    """

    n_frames: int = 0
    scores: tuple[Score, ...] = ()
    failure: str | None = None
    n_reused: int = 0
    seconds: StageSeconds = field(default_factory=StageSeconds)
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PropagationReport:
    """What one run of `propagate_store` did, and what earlier runs in the same folder had done.

    `scores` has the rows of every finished video that could be scored, in the manifest's order; `failures`
    maps video ids to reasons. `n_frames` counts the frames of this run once, however many projections shared
    them, `n_videos_before` the videos that were there already, `n_reused` the neighbour lists of videos that
    were read instead of searched. `error` is what ended the run early (no space left, say, or an object store
    that does not answer); what was finished until then is kept.
    """

    scores: tuple[Score, ...]
    n_frames: int
    failures: Mapping[str, str]
    seconds: StageSeconds
    peak_memory_bytes: int
    interrupted: bool
    error: CosettleError | None = None
    n_videos_before: int = 0
    n_reused: int = 0


def peak_memory_bytes() -> int:
    """Return the most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
