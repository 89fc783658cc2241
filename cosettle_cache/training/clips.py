"""Stored clips for heads that people train themselves: a torch data set of windows of frames, or of samples.

A store comes in, tensors of tokens come out. Equal seeds and epochs are equal clips, whatever the workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid, PlanKind
from cosettle_cache.heads.kinds import load_heads, make_kinds
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store.plan import ENCODINGS_PER_SAMPLE


class Clip(NamedTuple):
    """One clip: `tokens` `[frame row col dim]`, the video's id, and `frames`, their numbers in the video.

    A batch is the same with one more axis in front, and the ids of all.
    """

    tokens: Tensor
    video_id: str
    frames: Tensor


class _Source(NamedTuple):
    """A video, or a sample of a pairs store: rows of its encodings in the array, and their frames."""

    video_id: str
    rows: Int64[np.ndarray, " encoding"]
    frames: Int64[np.ndarray, " encoding"]


class TokenClips(Dataset[Clip]):
    """A torch data set of the clips of a store, for a `DataLoader` with any number of workers.

    An item is a named tuple: `tokens`, float16 `[frame row col dim]` as stored, or float32 through the
    projection in the file `projection`; `video_id`; and `frames`, int64 `[frame]`, numbers in the video.

    Of a frames store an item has `length` plain encodings, `stride` apart (as the store keeps them: in a
    store of every 2nd frame, stride 3 is 6 frames of the video). With `step` there is an item for every
    `step`-th start in a video, without it one per video, its start drawn from `seed`, the epoch
    (`set_epoch`) and the item's number. Without `length` an item is a whole video; where these differ in
    length, a loader takes them with `batch_size=None`. Videos with too few frames are left out; `too_short`
    names them.

    Of a pairs store an item is a sample: plain a, plain b, and a again with shifted positions.

    Pickled, it is opened anew. Raises `UsageError` for numbers that are too small, for a length that no video
    has or a pairs store is asked for, and for a store of several grids unless `grid` names one, such as
    `14x14`; `InputError` for a store that holds no clip yet.
    """

    def __init__(
        self,
        store: FeatureStore | str | Path,
        length: int | None = None,
        stride: int = 1,
        *,
        step: int | None = None,
        seed: int = 0,
        grid: str | None = None,
        projection: str | Path | None = None,
    ) -> None:
        for name, value, least in (
            ("length", length, 1),
            ("stride", stride, 1),
            ("step", step, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}", found=value)
        if step is not None and length is None:
            raise UsageError("whole videos have no step", wanted="a length", found=f"step {step}")
        self.store = store if isinstance(store, FeatureStore) else open_store(store)
        self.grid, self.stride, self.seed = _choose_grid(self.store, grid), stride, seed
        # Shared memory: workers that stay from epoch to epoch see what `set_epoch` says.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._span = None if length is None else (length - 1) * stride + 1
        heads = load_heads([] if projection is None else [Path(projection)], self.store)
        self._kind = make_kinds(heads, self.store.arrays[0].n_channels)[-1]
        is_pairs = self.store.plan_kind is PlanKind.PAIRS
        if is_pairs and (length is not None or stride != 1):
            raise UsageError(
                f"{self.store.path} holds samples of two frames: they have no length and no stride",
                wanted="a store of the frames plan",
                hint="cosettle-cache extract --plan frames makes one",
            )
        sources = _samples(self.store) if is_pairs else _videos(self.store, self.grid)
        if not sources:
            raise InputError(
                f"{self.store.path} holds no clip of {self.grid} tokens yet",
                hint="run the extract command to its end",
            )
        self._sources = [source for source in sources if len(source.rows) >= (self._span or 1)]
        #: Videos that have too few frames for a clip.
        self.too_short = tuple(item.video_id for item in sources if len(item.rows) < (self._span or 1))
        if not self._sources:
            raise UsageError(
                f"no video of {self.store.path} is long enough for a clip",
                wanted=f"{self._span} encodings: length {length}, stride {stride}",
                found=f"{max(len(source.rows) for source in sources)} in the longest",
            )
        ends = [self._n_starts(source) for source in self._sources]
        starts = [np.arange(0, end, step or end) for end in ends]
        self._starts = None if step is None else np.concatenate(starts)
        self._of = np.repeat(np.arange(len(starts)), list(map(len, starts)))

    def __len__(self) -> int:
        """Return the number of clips of an epoch."""
        return len(self._of)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose starts are drawn, before a loader begins with it; its workers see it too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Clip:
        """Return a clip; negative numbers count from the end."""
        index = range(len(self))[index]
        source = self._sources[self._of[index]]
        if self._starts is not None:
            start = int(self._starts[index])
        else:
            draw = np.random.default_rng((self.seed, int(self._epoch), index))
            start = int(draw.integers(self._n_starts(source)))
        window = slice(start, start + (self._span or len(source.rows)), self.stride)
        rows, n_channels = source.rows[window], self.store.arrays[0].n_channels
        tokens = torch.empty((len(rows), self.grid.rows, self.grid.cols, n_channels), dtype=torch.float16)
        if self.store.plan_kind is PlanKind.PAIRS:
            self.store.read_into(rows[:1] // ENCODINGS_PER_SAMPLE, tokens.numpy()[None])
        else:
            self.store.read_encodings(self.grid, rows, tokens.numpy())
        with torch.no_grad():
            return Clip(self._kind.apply(tokens), source.video_id, torch.from_numpy(source.frames[window]))

    def _n_starts(self, source: _Source) -> int:
        return len(source.rows) - (self._span or len(source.rows)) + 1


def _choose_grid(store: FeatureStore, wanted: str | None) -> Grid:
    """Return the grid of that name, or the only one; raise `UsageError` where none is clear."""
    grids = {str(layout.grid): layout.grid for layout in store.arrays}
    if wanted is None and len(grids) == 1:
        return store.arrays[0].grid
    if wanted is None or wanted not in grids:
        raise UsageError(
            f"a batch has one grid, and {store.path} has {'several' if wanted is None else 'no such one'}",
            wanted=" or ".join(f"grid={name!r}" for name in grids),
            found=wanted,
        )
    return grids[wanted]


def _videos(store: FeatureStore, grid: Grid) -> list[_Source]:
    """Return the videos of a frames store whose plain encodings are all present on that grid."""
    every, found = int(store.fingerprint.plan["every"]), []
    for video_id in store.video_ids:
        its_grid, rows = store.video_rows(video_id)
        if its_grid == grid:
            found.append(_Source(video_id, rows, np.arange(len(rows)) * every))
    return found


def _samples(store: FeatureStore) -> list[_Source]:
    """Return the samples of a pairs store, ascending."""
    first, n = store.sample_ids * ENCODINGS_PER_SAMPLE, ENCODINGS_PER_SAMPLE
    rows = first[:, None] + np.arange(n)
    places = np.searchsorted(store.index["row"].to_numpy(), rows)
    frames = store.index["frame"].to_numpy()[places]
    names = map(str, store.sample_table["video_id"].to_pylist())
    return [_Source(*source) for source in zip(names, rows, frames, strict=True)]
