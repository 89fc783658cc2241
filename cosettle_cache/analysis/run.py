"""Stage three, what the encoder and its projections trade: consistency within clips against separability.

A frames store and projections go in; the released metrics and the paper's, for raw and projected tokens,
come out. One pass reads every frame once; the middle frames are read again, in blocks, for pairs of clips.

The clips of a frames store as units of work: where their frames lie, in groups, and how they are read.

A store comes in; clips that can be read anywhere, by whoever has the store at hand, go out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor

from cosettle_cache.analysis.between import (
    BlockPair,
    Comparison,
    MiddleSums,
    block_pairs,
    compare,
    inter_figures,
    make_spreads,
)
from cosettle_cache.analysis.definitions import Definition, Spread, find_definition
from cosettle_cache.analysis.files import AnalysisReport, Measured
from cosettle_cache.analysis.trade_off import FEWEST_CLIPS, combine
from cosettle_cache.analysis.within import ClipFigures, block_frames, make_blocks, measure_clip
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import Run, in_order, in_threads
from cosettle_cache.core.types import Grid, PlanKind
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.search.correspondence import choose_places, place_index
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


#: Bytes of middle frames per block of clips; two blocks are in memory at a time.
BLOCK_BYTES = 6_000_000
#: No grid has more places than this on a side.
_ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """What will be measured: definitions, clips, and the reasons why others are not."""

    definitions: tuple[Definition, ...]
    clips: tuple[Clip, ...]
    left_out: dict[str, str]
    places: Grid


def plan_analysis(store: FeatureStore, *, compat: bool = False, gamma: float | None = None) -> AnalysisPlan:
    """Return what `analyze_store` would measure.

    Raises `InputError` for a store of a pairs plan and for fewer than two clips that can be measured.
    """
    definitions = [find_definition("compat" if compat else "released"), find_definition("paper")]
    if gamma is not None:
        definitions = [replace(item, gamma=gamma) for item in definitions]
    clips = list_clips(store)
    left_out = _absent(store) | _unfit(clips, definitions)
    kept = tuple(clip for clip in clips if clip.video_id not in left_out)
    _check_clips(store, len(kept), left_out)
    places = choose_places([clip.grid for clip in kept], at_most=_ALL)
    return AnalysisPlan(tuple(definitions), kept, left_out, places)


def analyze_store(
    store: FeatureStore,
    plan: AnalysisPlan,
    projections: Sequence[tuple[str, Projection]] = (),
    *,
    run: Run | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Measure every clip of `plan`, raw and through every projection.

    `run` hands groups of clips to workers; figures and sums are put together in the order of the store, so
    that it does not matter whose work they are. A clip that cannot be read or holds tokens that are not
    finite is left out and named. Raises `UsageError` for projections of another width and `InputError` when
    fewer than two clips remain.
    """
    started = time.perf_counter()
    kinds = tuple(make_kinds(projections, store.arrays[0].n_channels))
    hand_out, report = run or in_threads, progress or SILENT
    whole = _measure_clips(store, plan, kinds, hand_out, report)
    left_out = plan.left_out | whole.left_out
    _check_clips(store, len(whole.clips), left_out)
    measured = _measure_pairs(store, plan, kinds, whole, hand_out, report)
    return AnalysisReport(
        measured=tuple(measured),
        video_ids=tuple(clip.video_id for clip in whole.clips),
        n_frames=tuple(len(clip.rows) for clip in whole.clips),
        left_out=left_out,
        places=plan.places,
        seconds=time.perf_counter() - started,
    )


def _absent(store: FeatureStore) -> dict[str, str]:
    present = set(store.video_ids)
    absent = (video.video_id for video in store.manifest if video.video_id not in present)
    return {name: store.failures.get(name, "its slots have not been extracted yet") for name in absent}


def _unfit(clips: Iterable[Clip], definitions: Sequence[Definition]) -> dict[str, str]:
    return {
        clip.video_id: f"{len(clip.rows)} frames; the definition {item.name} needs {item.wanted_frames}"
        for item in reversed(definitions)
        for clip in clips
        if not item.fits(len(clip.rows))
    }


def _check_clips(store: FeatureStore, n_clips: int, left_out: dict[str, str]) -> None:
    if n_clips < FEWEST_CLIPS:
        raise InputError(
            f"{store.path} has too few clips to measure: distances between clips need several",
            wanted=f"{FEWEST_CLIPS} clips",
            found=n_clips,
            details=[f"{name}: {reason}" for name, reason in list(left_out.items())[:8]],
        )


@dataclass(frozen=True, slots=True, eq=False)
class _ClipResult:
    """Figures of a clip by kind and definition, or the reason why there are none."""

    clip: Clip
    figures: tuple[tuple[ClipFigures, ...], ...]
    failure: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _GroupResult:
    """The clips of a group, and by kind the sums over their middle frames."""

    clips: tuple[_ClipResult, ...]
    sums: tuple[MiddleSums, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """The first pass over a store: what could be measured, what not, and the sums over middle frames."""

    clips: tuple[Clip, ...]
    figures: tuple[tuple[tuple[ClipFigures, ...], ...], ...]
    sums: tuple[MiddleSums, ...]
    left_out: dict[str, str]


@dataclass(frozen=True, slots=True)
class ClipUnit:
    """Measures a group of clips: a unit of work that any process can do with the store at hand."""

    store: FeatureStore
    kinds: tuple[TokenKind, ...]
    definitions: tuple[Definition, ...]
    places: Grid

    @torch.inference_mode()
    def __call__(self, group: ClipGroup) -> _GroupResult:
        """Return the figures of a group and the sums over its middle frames."""
        dim = self.store.arrays[0].n_channels
        sums = [MiddleSums.zero(self.places.n_tokens, dim) for _ in self.kinds]
        results = []
        for clip in group.clips:
            try:
                figures, middles = self._measure(clip)
            except (InputError, DamagedStoreError) as error:
                results.append(_ClipResult(clip, (), error.summary))
                continue
            results.append(_ClipResult(clip, figures))
            sums = [total + MiddleSums.of(middle) for total, middle in zip(sums, middles, strict=True)]
        return _GroupResult(tuple(results), tuple(sums))

    def _measure(self, clip: Clip) -> tuple[tuple[tuple[ClipFigures, ...], ...], list[Tensor]]:
        blocks = open_clip(self.store, clip)
        index = _place_tensor(clip.grid, self.places)
        figures, middles = [], []
        for kind in self.kinds:
            measure = measure_clip(blocks(kind.apply), len(clip.rows), self.definitions)
            figures.append(measure.figures)
            middles.append(measure.middle.flatten(0, 1)[None, index])
        return tuple(figures), middles


def _measure_clips(
    store: FeatureStore, plan: AnalysisPlan, kinds: tuple[TokenKind, ...], run: Run, progress: Progress
) -> _Whole:
    unit = ClipUnit(store, kinds, plan.definitions, plan.places)
    dim = store.arrays[0].n_channels
    sums = tuple(MiddleSums.zero(plan.places.n_tokens, dim) for _ in kinds)
    results: list[_ClipResult] = []
    progress.start(len(plan.clips), "clips")
    try:
        for group, result in in_order(run, unit, group_clips(plan.clips)):
            sums = tuple(total + part for total, part in zip(sums, result.sums, strict=True))
            results.extend(result.clips)
            progress.advance(len(group.clips))
    finally:
        progress.finish()
    good = [item for item in results if item.failure is None]
    left_out = {item.clip.video_id: item.failure for item in results if item.failure is not None}
    return _Whole(tuple(item.clip for item in good), tuple(item.figures for item in good), sums, left_out)


@dataclass(frozen=True, slots=True)
class PairUnit:
    """Compares the middle frames of two blocks of clips, by kind: the other unit of work."""

    store: FeatureStore
    kinds: tuple[TokenKind, ...]
    clips: tuple[tuple[Grid, int], ...]
    places: Grid
    spreads: tuple[tuple[Spread, ...], ...]

    @torch.inference_mode()
    def __call__(self, pair: BlockPair) -> tuple[Comparison, ...]:
        """Return what the two blocks give, by kind."""
        first = self._read(pair.first)
        second = None if pair.alone else self._read(pair.second)
        return tuple(
            compare(kind.apply(first), None if second is None else kind.apply(second), spreads)
            for kind, spreads in zip(self.kinds, self.spreads, strict=True)
        )

    def _read(self, clips: range) -> Float[Tensor, "clip place dim"]:
        chosen = self.clips[clips.start : clips.stop]
        out = torch.empty(
            len(chosen), self.places.n_tokens, self.store.arrays[0].n_channels, dtype=torch.float16
        )
        for grid in {grid for grid, _ in chosen}:
            here = [number for number, (other, _) in enumerate(chosen) if other == grid]
            rows = np.array([chosen[number][1] for number in here], np.int64)
            tokens = torch.from_numpy(read_frames(self.store, grid, rows)).flatten(1, 2)
            out[here] = tokens[:, _place_tensor(grid, self.places)]
        return out


def _measure_pairs(
    store: FeatureStore,
    plan: AnalysisPlan,
    kinds: tuple[TokenKind, ...],
    whole: _Whole,
    run: Run,
    progress: Progress,
) -> Iterator[Measured]:
    spreads = tuple(make_spreads(sums, plan.definitions) for sums in whole.sums)
    middles = tuple((clip.grid, clip.middle_row) for clip in whole.clips)
    unit = PairUnit(store, kinds, middles, plan.places, spreads)
    size = max(1, BLOCK_BYTES // (4 * plan.places.n_tokens * store.arrays[0].n_channels))
    pairs = list(block_pairs(len(whole.clips), size))
    found: list[tuple[Comparison, ...]] = []
    progress.start(len(pairs), "pairs of blocks of clips")
    try:
        for _, comparisons in in_order(run, unit, pairs):
            found.append(comparisons)
            progress.advance()
    finally:
        progress.finish()
    n_frames = sum(len(clip.rows) for clip in whole.clips)
    inter = [
        inter_figures(plan.definitions, sums, [item[place] for item in found])
        for place, sums in enumerate(whole.sums)
    ]
    for number, definition in enumerate(plan.definitions):
        for place, kind in enumerate(kinds):
            clips = tuple(figures[place][number] for figures in whole.figures)
            total = combine(definition, clips, inter[place][number], n_frames)
            yield Measured(kind.name, kind.sha256, definition, total, clips)


def _place_tensor(grid: Grid, places: Grid) -> Tensor:
    return torch.from_numpy(place_index(grid, places))
