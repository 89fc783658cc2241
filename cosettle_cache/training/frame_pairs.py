"""Pairs of neighbouring frames in a store: which there are, in groups of slots, and their tokens.

In a pairs store a pair is a sample's plain frames, in a frames store two plain frames that follow each other.
Groups can be worked through anywhere, in any order.
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

Frames = Float16[np.ndarray, "pair row col dim"]
Marks = Bool[np.ndarray, " pair"]


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
    representative: Marks

    def __len__(self) -> int:
        return len(self.first)

    def select(self, chosen: Marks | slice) -> FramePairs:
        """Return the chosen pairs of this group."""
        columns = (self.video, self.first, self.second, self.representative)
        return FramePairs(self.number, self.grid, *(column[chosen] for column in columns))


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
    present = store.index.filter(pc.is_null(store.index["error"])).select(_COLUMNS)
    if store.plan_kind is PlanKind.PAIRS:
        firsts, seconds, chosen = _sample_pairs(present)
    else:
        firsts, seconds, chosen = _neighbor_pairs(present, int(store.fingerprint.plan.get("every", 1)))
    if not len(firsts):
        raise InputError(
            f"{store.path} holds no two frames of one clip",
            wanted="samples, or clips of two frames and more",
            hint="run the extract command to its end",
        )
    columns = {name: firsts[name] for name in ("array", "slot", "video_id")}
    columns |= {"first": firsts["row"], "second": pa.array(seconds), "representative": pa.array(chosen)}
    table = pa.table(columns).sort_by([("slot", "ascending"), ("first", "ascending")])
    video_ids, video = np.unique(table["video_id"].to_numpy(), return_inverse=True)
    return PairList(tuple(map(str, video_ids)), tuple(_groups(store, table, video)))


def _sample_pairs(present: pa.Table) -> tuple[pa.Table, Int64[np.ndarray, " pair"], Marks]:
    """Return first frames, rows of second frames, and representatives, for the plain frames of samples."""
    firsts = present.filter(pc.equal(present["role"], str(Role.A)))
    firsts = firsts.sort_by([("video_id", "ascending"), ("view", "ascending")])
    lowest = np.zeros(len(firsts), bool)
    lowest[np.unique(firsts["video_id"].to_numpy(), return_index=True)[1]] = True
    return firsts, firsts["row"].to_numpy() + 1, lowest


def _neighbor_pairs(present: pa.Table, every: int) -> tuple[pa.Table, Int64[np.ndarray, " pair"], Marks]:
    """Return the same for plain frames that follow each other in a video, which keeps one in `every`."""
    plain = present.filter(pc.equal(present["role"], str(Role.PLAIN)))
    plain = plain.sort_by([("video_id", "ascending"), ("frame", "ascending")])
    videos, frames = plain["video_id"].to_numpy(), plain["frame"].to_numpy()
    follows = (videos[1:] == videos[:-1]) & (frames[1:] - frames[:-1] == every)
    firsts = plain.slice(0, len(follows)).filter(pa.array(follows))
    middle = np.zeros(len(firsts), bool)
    _, start, count = np.unique(firsts["video_id"].to_numpy(), return_index=True, return_counts=True)
    middle[start + count // 2] = True
    return firsts, plain["row"].to_numpy()[1:][follows], middle


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


def read_pairs(
    store: FeatureStore, group: FramePairs, size: int
) -> Iterator[tuple[FramePairs, Frames, Frames]]:
    """Yield up to `size` pairs of a group at a time, with the tokens of their first and second frames.

    One buffer is filled again and again: tokens are valid until the next ones are asked for.
    """
    layout = next(layout for layout in store.arrays if layout.grid == group.grid)
    in_samples, size = store.plan_kind is PlanKind.PAIRS, min(size, len(group))
    n_rows = (size, _SAMPLE) if in_samples else (2 * size,)
    buffer = np.empty((*n_rows, group.grid.rows, group.grid.cols, layout.n_channels), np.float16)
    for start in range(0, len(group), size):
        part = group.select(slice(start, start + size))
        if in_samples:
            samples = buffer[: len(part)]
            store.read_into(part.first // _SAMPLE, samples)
            yield part, samples[:, 0], samples[:, 1]
            continue
        # Every frame but the ends of a video is in two pairs and is read once.
        rows, place = np.unique(np.concatenate([part.first, part.second]), return_inverse=True)
        frames = buffer[: len(rows)]
        store.read_encodings(group.grid, rows, frames)
        yield part, frames[place[: len(part)]], frames[place[len(part) :]]
