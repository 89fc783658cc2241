"""One pass over the frame pairs of a store: groups of slots in, sums over corresponding unit tokens out.

A group is a unit of work for this process or for workers; the sums are added up in the order of the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64
from torch import Tensor

from cosettle_cache.core.console import Progress
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.handing import Run, in_order
from cosettle_cache.core.types import Grid
from cosettle_cache.search.affinity import unit_tokens
from cosettle_cache.search.correspondence import find_correspondence
from cosettle_cache.store import FeatureStore
from cosettle_cache.training.frame_pairs import FramePairs, PairReader
from cosettle_cache.training.spectrum import SpectralStatistics, place_index

#: Tokens per batch and frame: 32 samples of the released size.
BATCH_TOKENS = 32 * 196


@dataclass(frozen=True, slots=True)
class GatherUnit:
    """Sums up a group of frame pairs: a unit of work that any process can do with the store at hand."""

    store: FeatureStore
    correspondence: str
    places: Grid
    device: str = "cpu"

    def __call__(self, group: FramePairs) -> SpectralStatistics:
        """Return the sums over a group."""
        dim = self.store.arrays[0].n_channels
        total = SpectralStatistics.zero(dim, self.places.n_tokens)
        for batch in self.batches(group):
            total += batch.statistics()
        return total

    def batches(self, group: FramePairs) -> Iterator[UnitBatch]:
        """Yield the corresponding unit tokens of a group, a few pairs of frames at a time."""
        size = max(1, BATCH_TOKENS // group.grid.n_tokens)
        reader = PairReader(self.store, group.grid, min(size, len(group)))
        match = find_correspondence(self.correspondence)
        index = torch.from_numpy(place_index(group.grid, self.places)).to(self.device)
        for part in group.batches(size):
            first, second = (self._load(tokens, part) for tokens in reader.read(part))
            chosen = torch.from_numpy(part.representative).to(self.device)
            representatives = first[chosen][:, index].double()
            a, b = match(first, second)
            yield UnitBatch(part, a.double(), b.double(), representatives)

    def _load(
        self, tokens: Float16[np.ndarray, "pair row col dim"], part: FramePairs
    ) -> Float32[Tensor, "pair token dim"]:
        loaded = torch.from_numpy(tokens).to(self.device).flatten(1, 2)
        finite = loaded.isfinite().flatten(1).all(1).cpu().numpy()
        if not finite.all():
            rows = ", ".join(map(str, part.first[~finite][:8].tolist()))
            raise InputError(
                f"{int((~finite).sum())} pairs of frames hold tokens that are not finite",
                details=[f"array {part.grid}, from rows {rows}"],
                hint="extract these clips again into another store",
            )
        return unit_tokens(loaded)


@dataclass(frozen=True, slots=True, eq=False)
class UnitBatch:
    """Corresponding unit tokens of some pairs of frames, and the tokens that stand for videos."""

    pairs: FramePairs
    first: Float64[Tensor, "pair kept dim"]
    second: Float64[Tensor, "pair kept dim"]
    representatives: Float64[Tensor, "video place dim"]

    def statistics(self) -> SpectralStatistics:
        """Return the sums over this batch."""
        differences = (self.first - self.second).flatten(0, 1)
        tokens = self.representatives.flatten(0, 1)
        return SpectralStatistics(
            n_differences=len(differences),
            differences=(differences.T @ differences).cpu().numpy(),
            n_videos=len(self.representatives),
            products=(tokens.T @ tokens).cpu().numpy(),
            places=self.representatives.sum(0).cpu().numpy(),
        )


def gather(
    unit: GatherUnit, groups: Sequence[FramePairs], run: Run, progress: Progress
) -> SpectralStatistics:
    """Return the sums over all groups, added in their order."""
    total = SpectralStatistics.zero(unit.store.arrays[0].n_channels, unit.places.n_tokens)
    progress.start(sum(map(len, groups)), "pairs")
    try:
        for group, statistics in in_order(run, unit, groups):
            total += statistics
            progress.advance(len(group))
    finally:
        progress.finish()
    return total
