"""Training samples: what a pairs store holds, what a frames store can make, and several stores as one.

Stores go in; out comes one source of samples with ids, that reads them, names them and knows their clips and
shards. A sample is the views that a walk visits on its way out, and the first of them shifted. Equal ids are
equal samples, in every epoch and process. Some clips may be held out of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from cosettle_cache.core.errors import FingerprintError, InputError, UsageError
from cosettle_cache.core.settings import TrainSettings, draw_mark
from cosettle_cache.core.types import PlanKind
from cosettle_cache.store import FeatureStore
from cosettle_cache.store.plan import choose_pair
from cosettle_cache.training.batches import Ids

#: What must be equal for tokens of several stores to lie in one space.
_ENCODER_KEYS = ("backbone", "weights_sha256", "token_rule", "position_rule", "preprocessing")


def walk_of(n_views: int) -> tuple[int, ...]:
    """Return the positions that a walk visits: out over the plain views, back, and to the shifted first one.

    Three views (two frames) give 0, 1, 2; four (three frames) give 0, 1, 2, 1, 3.
    """
    out = range(n_views - 1)
    return (*out, *reversed(out[1:-1]), n_views - 1)


class _StoreSamples:
    """What both kinds of stores share: `n_rounds` epochs of samples of `n_frames` plain views."""

    def __init__(self, store: FeatureStore, n_frames: int, n_rounds: int) -> None:
        self._store, self._layout, self.n_rounds = store, store.arrays[0], n_rounds
        grid = self._layout.grid
        self.shape = (n_frames + 1, grid.rows, grid.cols, self._layout.n_channels)

    def will_need(self, slots: Ids) -> None:
        self._store.will_need(slots)


class _PairsSamples(_StoreSamples):
    """The samples of a pairs store; epoch `e` visits view set `e` modulo their number."""

    def __init__(self, store: FeatureStore) -> None:
        table = store.sample_table
        if not len(table):
            raise InputError("this store holds no samples yet", hint="run the extract command to its end")
        self._table = table
        self._ids = table["sample"].to_numpy().astype(np.int64)
        views = table["view"].to_numpy()
        self._by_view: list[Ids] = [self._ids[views == view] for view in np.unique(views)]
        super().__init__(store, 2, len(self._by_view))

    def epoch_ids(self, epoch: int) -> Ids:
        return self._by_view[epoch % self.n_rounds]

    def read_into(self, ids: Ids, out: NDArray[np.float16], /) -> None:
        self._store.read_into(ids, out)

    def slots(self, ids: Ids) -> Ids:
        return self._store.sample_slots(ids)

    def videos(self, ids: Ids) -> list[str]:
        rows = pa.array(np.searchsorted(self._ids, ids))
        return [str(name) for name in self._table["video_id"].take(rows).to_pylist()]

    def name(self, sample: int) -> str:
        row = int(np.searchsorted(self._ids, sample))
        return f"sample {sample}: {self._table['video_id'][row]}, view set {self._table['view'][row]}"


@dataclass(frozen=True, slots=True)
class _Clip:
    """Rows of a clip's encodings: the plain ones by frame, the shifted ones by shift and frame."""

    video_id: str
    plain: Int64[np.ndarray, " frame"]
    shifted: Int64[np.ndarray, "shift frame"]


class _FramesSamples(_StoreSamples):
    """Samples drawn from a frames store with shifted encodings: every epoch draws each clip's frames anew.

    Sample `clip + n_clips * epoch` is a draw from seed, epoch and clip, so that ids stay plain numbers.
    """

    def __init__(self, store: FeatureStore, settings: TrainSettings) -> None:
        if not store.fingerprint.plan.get("n_shifted"):
            raise InputError(
                "training needs samples with a shifted view, and this store has none",
                wanted="a store of the pairs plan, or of the frames plan with shifted encodings",
                found="a store of the frames plan without shifted encodings",
                hint="cosettle-cache extract --plan pairs makes one",
            )
        if len(store.arrays) != 1:
            raise InputError(
                "training needs one grid, and this store has several",
                wanted="one grid",
                found=", ".join(str(layout.grid) for layout in store.arrays),
                hint="cosettle-cache extract --plan frames --shifted 1 --size 224x224 makes one",
            )
        self._settings, self._clips = settings, _clips(store, settings.palindrome)
        super().__init__(store, settings.palindrome, settings.epochs)

    def epoch_ids(self, epoch: int) -> Ids:
        return np.arange(len(self._clips)) + epoch * len(self._clips)

    def read_into(self, ids: Ids, out: NDArray[np.float16], /) -> None:
        rows = np.concatenate([self._rows(int(sample)) for sample in ids])
        self._store.read_encodings(self._layout.grid, rows, out.reshape(len(rows), *out.shape[2:]))

    def slots(self, ids: Ids) -> Ids:
        firsts = np.array([self._rows(int(sample))[0] for sample in ids], np.int64)
        return firsts // self._layout.slot_encodings

    def videos(self, ids: Ids) -> list[str]:
        return [self._clips[int(sample) % len(self._clips)].video_id for sample in ids]

    def name(self, sample: int) -> str:
        clip, frames, shift = self._draw(sample)
        shown = ", ".join(map(str, frames))
        return f"sample {sample}: {clip.video_id}, kept frames {shown}, shift {shift + 1}"

    def _rows(self, sample: int) -> Int64[np.ndarray, " view"]:
        clip, frames, shift = self._draw(sample)
        return np.append(clip.plain[list(frames)], clip.shifted[shift, frames[0]])

    def _draw(self, sample: int) -> tuple[_Clip, tuple[int, ...], int]:
        epoch, number = divmod(sample, len(self._clips))
        clip, settings = self._clips[number], self._settings
        draws = np.random.default_rng((settings.seed, epoch, number)).random(1 + settings.palindrome)
        frames = choose_frames(len(clip.plain), settings.gap, draws[1:].tolist())
        return clip, frames, int(draws[0] * len(clip.shifted))


_Source = _PairsSamples | _FramesSamples


class JoinedSamples:
    """The samples of all stores: sample `i` of source `s` of `n` is number `i * n + s`.

    `shape` is views, rows, columns and channels of a sample, `n_rounds` the epochs that differ in more than
    their order: view sets, or the epochs asked for.
    """

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = tuple(sources)
        self.shape = sources[0].shape
        self.n_rounds = max(source.n_rounds for source in sources)

    def epoch_ids(self, epoch: int) -> Ids:
        """Return the ids of an epoch: one sample of every clip of every source."""
        n = len(self._sources)
        return np.concatenate([s.epoch_ids(epoch) * n + number for number, s in enumerate(self._sources)])

    def arrange(self, ids: Ids) -> Ids:
        """Return the ids source by source, so that each is read in one go."""
        return ids[np.argsort(ids % len(self._sources), kind="stable")]

    def read_into(self, ids: Ids, out: NDArray[np.float16], /) -> None:
        """Fill `out` `[n view row col dim]` with the samples `ids`; each run of one source is one read."""
        for source, local, place in self._runs(ids):
            source.read_into(local, out[place])

    def will_need(self, slots: Ids) -> None:
        """Let shards that are read soon come into the page cache, where there is one."""
        n = len(self._sources)
        for number, source in enumerate(self._sources):
            source.will_need(slots[slots % n == number] // n)

    def slots(self, ids: Ids) -> Ids:
        """Return the shard in which each sample (of a frames store: its first frame) lies."""
        found, n = np.empty(len(ids), np.int64), len(self._sources)
        for number, source in enumerate(self._sources):
            mine = ids % n == number
            found[mine] = source.slots(ids[mine] // n) * n + number
        return found

    def videos(self, ids: Ids) -> list[str]:
        """Return the clip of each sample."""
        names: list[str] = []
        for source, local, _ in self._runs(ids):
            names += source.videos(local)
        return names

    def name(self, sample: int) -> str:
        """Name a sample by what its source calls it and the number of the store."""
        local, number = divmod(sample, len(self._sources))
        name = self._sources[number].name(local)
        return name if len(self._sources) == 1 else f"store {number + 1}, {name}"

    def _runs(self, ids: Ids) -> Iterator[tuple[_Source, Ids, slice]]:
        """Yield the source, its own ids and the place of every run of one source."""
        local, number = np.divmod(ids, len(self._sources))
        bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(bounds):
            if stop > start:
                yield self._sources[number[start]], local[start:stop], slice(start, stop)


def make_samples(stores: Sequence[FeatureStore], settings: TrainSettings) -> JoinedSamples:
    """Return the samples of all stores; raise unless their tokens lie in one space and on one grid.

    Raises `InputError` for a store without shifted views, `FingerprintError` for stores of several encoders.
    """
    wanted = stores[0].fingerprint.to_json()
    for store in stores[1:]:
        found = store.fingerprint.to_json()
        differing = [key for key in _ENCODER_KEYS if wanted[key] != found[key]]
        if differing:
            raise FingerprintError(
                f"{store.path} holds tokens of another encoder than {stores[0].path}",
                details=[f"{key}: wanted {wanted[key]}, found {found[key]}" for key in differing],
                hint="train on each store alone, or extract one of them again",
            )
    sources = [_source(store, settings) for store in stores]
    for store, source in zip(stores, sources, strict=True):
        if source.shape != sources[0].shape:
            raise InputError(
                f"{store.path} holds samples of another shape than {stores[0].path}",
                wanted=sources[0].shape,
                found=source.shape,
            )
    return JoinedSamples(sources)


@dataclass(frozen=True)
class HeldOut:
    """Marks the samples of held-out clips: those whose hash of seed and video id falls below `share`."""

    samples: JoinedSamples
    share: float
    seed: int
    _known: dict[str, bool] = field(default_factory=dict, compare=False)

    def __call__(self, ids: Ids) -> Bool[np.ndarray, " n"]:
        """Return whether each sample is held out."""
        videos = self.samples.videos(ids)
        for video in set(videos) - self._known.keys():
            mark = draw_mark(self.seed, video)
            self._known[video] = int.from_bytes(mark[:8], "big") < self.share * 2**64
        return np.array([self._known[video] for video in videos], bool)

    @cached_property
    def ids(self) -> Ids:
        """The held-out samples of the first epoch, by which all epochs are measured."""
        first = self.samples.epoch_ids(0)
        held_out: Ids = first[self(first)]
        return held_out


def find_not_finite(samples: JoinedSamples, ids: Ids) -> list[int]:
    """Return the ids among `ids` whose tokens are not all finite, reading them once more."""
    buffer, bad = np.empty((1, *samples.shape), np.float16), []
    for sample in ids:
        samples.read_into(sample[None], buffer)
        if not np.isfinite(buffer).all():
            bad.append(int(sample))
    return bad


def choose_frames(n_frames: int, gap: float, draws: Sequence[float]) -> tuple[int, ...]:
    """Return as many frames as draws, `int(gap * n_frames)` apart; two are chosen as the pairs plan does.

    Where the clip is too short for the gap, the gap shrinks to what fits, and frames repeat at the last.
    """
    if len(draws) == 2:
        return choose_pair(n_frames, gap, draws[0], draws[1])
    steps = len(draws) - 1
    distance = min(max(int(gap * n_frames + 1e-9), 1), (n_frames - 1) // steps)
    start = int(draws[0] * (n_frames - steps * distance))
    return tuple(start + number * distance for number in range(len(draws)))


def _source(store: FeatureStore, settings: TrainSettings) -> _Source:
    if store.plan_kind is PlanKind.FRAMES:
        return _FramesSamples(store, settings)
    if settings.palindrome != 2:
        raise UsageError(
            "a pairs store has two frames of a clip in one crop, which is too few for longer walks",
            wanted="a store of the frames plan with shifted encodings",
            found=f"{store.path}, palindrome {settings.palindrome}",
            hint="cosettle-cache extract --plan frames --shifted 1 makes one",
        )
    return _PairsSamples(store)


def _clips(store: FeatureStore, n_frames: int) -> tuple[_Clip, ...]:
    """Return the clips that have enough frames and whose encodings are all present, in row order.

    A clip's rows follow each other: plain by frame, then shifted by shift and frame (docs/store.md).
    """
    index = store.index.filter(pc.is_null(store.index["error"])).sort_by("row")
    rows, videos = index["row"].to_numpy(), index["video_id"].to_numpy()
    names, starts = np.unique(videos, return_index=True)
    order = np.argsort(starts)
    n_plans, present = 1 + int(store.fingerprint.plan["n_shifted"]), set(store.video_ids)
    found = []
    for name, mine in zip(names[order], np.split(rows, starts[order][1:]), strict=True):
        n_kept, rest = divmod(len(mine), n_plans)
        if name in present and not rest and n_kept >= n_frames and mine[-1] - mine[0] + 1 == len(mine):
            found.append(_Clip(str(name), mine[:n_kept], mine[n_kept:].reshape(n_plans - 1, n_kept)))
    if not found:
        raise InputError(f"no clip of {store.path} has {n_frames} frames and all its shifted encodings")
    return tuple(found)
