"""Pairs of neighbouring frames in a store: which there are, in groups of slots, and their tokens.

A store comes in; a list of groups that can be worked through anywhere, in any order, and a reader that fills
one buffer again and again go out. In a pairs store a pair is a sample's plain frames, in a frames store two
plain frames that follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float16, Int64

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import Grid, PlanKind, Role
from cosettle_cache.store import FeatureStore

#: Groups of slots at most: what each gives back must travel, so there are few whatever the store's size.
MAX_GROUPS = 256

#: Encodings in a sample; a row of a pairs store is sample * 3 + place.
_SAMPLE = 3

_COLUMNS = ["array", "row", "slot", "video_id", "frame", "view", "role"]


@dataclass(frozen=True, slots=True, eq=False)
class FramePairs:
    """Pairs of rows of one array whose first frames lie in neighbouring slots.

    `number` is the group's place in the order of the store. `video` counts `PairList.video_ids`.
    `representative` marks the one pair per video whose first frame stands for it: of the first view set in a
    pairs store, the middle frame in a frames store.
    """

    number: int
    grid: Grid
    video: Int64[np.ndarray, " pair"]
    first: Int64[np.ndarray, " pair"]
    second: Int64[np.ndarray, " pair"]
    representative: Bool[np.ndarray, " pair"]

    def __len__(self) -> int:
        return len(self.first)

    def select(self, chosen: Bool[np.ndarray, " pair"] | slice) -> FramePairs:
        """Return the chosen pairs of this group."""
        columns = (self.video, self.first, self.second, self.representative)
        return FramePairs(self.number, self.grid, *(column[chosen] for column in columns))

    def batches(self, size: int) -> Iterator[FramePairs]:
        """Yield the pairs in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))


@dataclass(frozen=True, slots=True, eq=False)
class PairList:
    """All pairs of a store in groups, and the videos that have any."""

    video_ids: tuple[str, ...]
    groups: tuple[FramePairs, ...]

    def of_videos(self, chosen: Bool[np.ndarray, " video"]) -> tuple[FramePairs, ...]:
        """Return the groups with the pairs of the chosen videos only; a group without any is left out."""
        groups = (group.select(chosen[group.video]) for group in self.groups)
        return tuple(group for group in groups if len(group))


def list_pairs(store: FeatureStore) -> PairList:
    """Return the pairs of the committed slots; a failed frame costs the pairs that it would be in.

    Raises `InputError` when there are none.
    """
    index = store.index
    present = index.filter(pc.is_null(index["error"])).select(_COLUMNS)
    table = _sample_pairs(present) if store.plan_kind is PlanKind.PAIRS else _neighbor_pairs(store, present)
    if not len(table):
        raise InputError(
            f"{store.path} holds no two frames of one clip",
            wanted="samples, or clips of two frames and more",
            hint="run the extract command to its end",
        )
    video_ids, video = np.unique(table["video_id"].to_numpy(), return_inverse=True)
    return PairList(tuple(map(str, video_ids)), tuple(_groups(store, table, video)))


def _sample_pairs(present: pa.Table) -> pa.Table:
    """Return a table of rows `first` and `second` for the plain frames of every sample."""
    firsts = present.filter(pc.equal(present["role"], str(Role.A)))
    firsts = firsts.sort_by([("video_id", "ascending"), ("view", "ascending")])
    videos = firsts["video_id"].to_numpy()
    lowest = np.zeros(len(videos), bool)
    lowest[np.unique(videos, return_index=True)[1]] = True
    return _pair_table(firsts, pc.add(firsts["row"], 1), lowest)


def _neighbor_pairs(store: FeatureStore, present: pa.Table) -> pa.Table:
    """Return a table of rows `first` and `second` for plain frames that follow each other in a video."""
    plain = present.filter(pc.equal(present["role"], str(Role.PLAIN)))
    plain = plain.sort_by([("video_id", "ascending"), ("frame", "ascending")])
    videos, frames = plain["video_id"].to_numpy(), plain["frame"].to_numpy()
    step = int(store.fingerprint.plan.get("every", 1))
    follows = (videos[1:] == videos[:-1]) & (frames[1:] - frames[:-1] == step)
    firsts = plain.slice(0, len(follows)).filter(pa.array(follows))
    seconds = plain["row"].to_numpy()[1:][follows]
    kept = firsts["video_id"].to_numpy()
    middle = np.zeros(len(kept), bool)
    _, start, count = np.unique(kept, return_index=True, return_counts=True)
    middle[start + count // 2] = True
    return _pair_table(firsts, seconds, middle)


def _pair_table(
    firsts: pa.Table, seconds: Int64[np.ndarray, " pair"] | pa.ChunkedArray, chosen: Bool[np.ndarray, " pair"]
) -> pa.Table:
    columns = {name: firsts[name] for name in ("array", "slot", "video_id")}
    columns |= {"first": firsts["row"], "second": pa.array(seconds), "representative": pa.array(chosen)}
    return pa.table(columns).sort_by([("slot", "ascending"), ("first", "ascending")])


def _groups(store: FeatureStore, table: pa.Table, video: Int64[np.ndarray, " pair"]) -> Iterator[FramePairs]:
    grids = table["array"].to_numpy()
    spans = table["slot"].to_numpy() // -(-store.n_slots // MAX_GROUPS)
    # A group lies in one array, so that its tokens fit one buffer.
    new = np.append(True, (spans[1:] != spans[:-1]) | (grids[1:] != grids[:-1]))
    starts = np.flatnonzero(new)
    first, second, chosen = (table[name].to_numpy() for name in ("first", "second", "representative"))
    for number, (start, stop) in enumerate(zip(starts, np.append(starts[1:], len(table)), strict=True)):
        part = slice(int(start), int(stop))
        grid = Grid.parse(str(grids[start]))
        yield FramePairs(number, grid, video[part], first[part], second[part], chosen[part])


class PairReader:
    """Reads pairs of one grid into one buffer; what `read` returns is valid until the next call."""

    def __init__(self, store: FeatureStore, grid: Grid, capacity: int) -> None:
        layout = next(layout for layout in store.arrays if layout.grid == grid)
        self._store, self._grid = store, grid
        self._samples = store.plan_kind is PlanKind.PAIRS
        views = (_SAMPLE,) if self._samples else ()
        n_rows = capacity if self._samples else 2 * capacity
        self._buffer = np.empty((n_rows, *views, grid.rows, grid.cols, layout.n_channels), np.float16)

    def read(
        self, pairs: FramePairs
    ) -> tuple[Float16[np.ndarray, "pair row col dim"], Float16[np.ndarray, "pair row col dim"]]:
        """Return the tokens of the first and of the second frames, at most `capacity` pairs."""
        if self._samples:
            samples = self._buffer[: len(pairs)]
            self._store.read_into(pairs.first // _SAMPLE, samples)
            return samples[:, 0], samples[:, 1]
        # Every frame but the ends of a video is in two pairs and is read once.
        rows, place = np.unique(np.concatenate([pairs.first, pairs.second]), return_inverse=True)
        frames = self._buffer[: len(rows)]
        self._store.read_encodings(self._grid, rows, frames)
        return frames[place[: len(pairs)]], frames[place[len(pairs) :]]
