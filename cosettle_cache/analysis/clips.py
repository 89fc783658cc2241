"""The clips of a frames store as units of work: where their frames lie, in groups, and how they are read.

A store comes in; clips that can be read anywhere, by whoever has the store at hand, go out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int64
from torch import Tensor

from cosettle_cache.analysis.within import block_frames, make_blocks
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import Grid, PlanKind
from cosettle_cache.store import FeatureStore

#: Groups at most: what each gives back must travel, so there are few whatever the store's size.
MAX_GROUPS = 256

#: A clip of more bytes than this is read anew in every pass instead of being held. One kind of its tokens
#: is held in float32 besides.
HELD_BYTES = 128_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A video whose plain frames are all there: its rows, in frame order, in the array of its grid."""

    video_id: str
    grid: Grid
    rows: Int64[np.ndarray, " frame"]

    @property
    def middle_row(self) -> int:
        """The row of the frame that stands for the clip."""
        return int(self.rows[len(self.rows) // 2])


@dataclass(frozen=True, slots=True)
class ClipGroup:
    """Neighbouring clips; `number` is the group's place in the order of the store."""

    number: int
    clips: tuple[Clip, ...]


def list_clips(store: FeatureStore) -> list[Clip]:
    """Return the clips that are all there, in the order of the manifest.

    Raises `InputError` for a pairs store.
    """
    if store.plan_kind is not PlanKind.FRAMES:
        raise InputError(
            f"{store.path} holds pairs of frames, and clips are measured by all of theirs",
            wanted="a store of a frames plan",
            found=f"a {store.plan_kind} plan",
            hint="cosettle-cache extract --plan frames --size 224x224 --out clips.zarr",
        )
    return [Clip(video_id, *store.video_rows(video_id)) for video_id in store.video_ids]


def group_clips(clips: Sequence[Clip]) -> list[ClipGroup]:
    """Return the clips in groups; which are together depends on nothing but the clips."""
    size = max(1, -(-len(clips) // MAX_GROUPS))
    starts = range(0, len(clips), size)
    return [ClipGroup(number, tuple(clips[start : start + size])) for number, start in enumerate(starts)]


def read_frames(
    store: FeatureStore, grid: Grid, rows: Int64[np.ndarray, " frame"]
) -> Float16[np.ndarray, "frame row col dim"]:
    """Return the tokens of some rows of one array."""
    dim = store.arrays[0].n_channels
    tokens = np.empty((len(rows), grid.rows, grid.cols, dim), np.float16)
    store.read_encodings(grid, rows, tokens)
    return tokens


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """A clip on disk as `measure_clip` wants it: read anew, block by block, in every pass."""

    store: FeatureStore
    clip: Clip
    apply: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[Float32[Tensor, "frame row col dim"]]:
        size = block_frames(self.clip.grid.rows, self.clip.grid.cols)
        for start in range(0, len(self.clip.rows), size):
            tokens = read_frames(self.store, self.clip.grid, self.clip.rows[start : start + size])
            yield self.apply(torch.from_numpy(tokens).float())


def open_clip(
    store: FeatureStore, clip: Clip
) -> Callable[[Callable[[Tensor], Tensor]], Iterable[Float32[Tensor, "frame row col dim"]]]:
    """Return what gives the blocks of a clip, projected or not; the clip is read once if it can be held."""
    layout = store.arrays[0]
    n_bytes = 2 * len(clip.rows) * clip.grid.n_tokens * layout.n_channels
    if n_bytes > HELD_BYTES:
        return lambda apply: ReadBlocks(store, clip, apply)
    tokens = torch.from_numpy(read_frames(store, clip.grid, clip.rows))
    return lambda apply: make_blocks(tokens, apply)
