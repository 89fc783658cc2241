"""What the encoder and its projections trade: consistency within clips against separability between them.

A frames store and projections come in; the released metrics and the paper's, for raw and projected tokens, go
out. One pass reads every frame once; the middle frames are read again, in blocks, for pairs of clips.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cosettle_cache.analysis.definitions import Definition, Spread, find_definition
from cosettle_cache.analysis.files import AnalysisReport, Measured
from cosettle_cache.analysis.pooling import check_frames_plan, missing_videos
from cosettle_cache.analysis.trade_off import (
    FEWEST_CLIPS,
    BlockPair,
    Comparison,
    MiddleSums,
    block_pairs,
    combine,
    compare,
    inter_figures,
    make_spreads,
)
from cosettle_cache.analysis.within import Block, ClipFigures, block_slices, measure_clip
from cosettle_cache.core.console import SILENT, Progress
from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import Numbered, Run, in_order, in_threads
from cosettle_cache.core.settings import AnalyzeSettings
from cosettle_cache.core.types import Grid
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.search.correspondence import choose_places, place_index
from cosettle_cache.store import FeatureStore

#: Groups of clips at most: what each gives back must travel, so there are few whatever the store's size.
MAX_GROUPS = 256
#: A clip of more bytes than this is read anew in every pass instead of being held. One kind of its tokens
#: is held in float32 besides.
HELD_BYTES = 128_000_000
#: Bytes of middle frames per block of clips; two blocks are in memory at a time.
BLOCK_BYTES = 6_000_000
#: No grid has more places than this on a side.
_ALL = 1 << 30

Item = TypeVar("Item", bound=Numbered)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A video whose plain frames are all there: its rows, in frame order, in the array of its grid."""

    video_id: str
    grid: Grid
    rows: Int64[np.ndarray, " frame"]


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """What will be measured: definitions, clips, and the reasons why others are not."""

    definitions: tuple[Definition, ...]
    clips: tuple[Clip, ...]
    left_out: dict[str, str]
    places: Grid

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "definitions": [asdict(item) for item in self.definitions],
            "clips": len(self.clips),
            "frames": sum(len(clip.rows) for clip in self.clips),
            "places": str(self.places),
            "left_out": self.left_out,
        }


def plan_analysis(store: FeatureStore, settings: AnalyzeSettings) -> AnalysisPlan:
    """Return what `analyze_store` would measure.

    Raises `InputError` for a store of a pairs plan and for fewer than two clips that can be measured.
    """
    check_frames_plan(store, "analyze")
    names = ("compat" if settings.compat else "released", "paper")
    definitions = tuple(replace(find_definition(name), gamma=settings.gamma) for name in names)
    clips = [Clip(video_id, *store.video_rows(video_id)) for video_id in store.video_ids]
    video_ids = [video.video_id for video in store.manifest]
    left_out = missing_videos(store, video_ids, "its slots have not been extracted yet") | {
        clip.video_id: f"{len(clip.rows)} frames; the definition {item.name} needs {item.wanted_frames}"
        for item in reversed(definitions)
        for clip in clips
        if not item.fits(len(clip.rows))
    }
    kept = tuple(clip for clip in clips if clip.video_id not in left_out)
    _check_clips(store, len(kept), left_out)
    return AnalysisPlan(
        definitions, kept, left_out, choose_places([clip.grid for clip in kept], at_most=_ALL)
    )


def _check_clips(store: FeatureStore, n_clips: int, left_out: dict[str, str]) -> None:
    if n_clips < FEWEST_CLIPS:
        raise InputError(
            f"{store.path} has too few clips to measure: distances between clips need several",
            wanted=f"{FEWEST_CLIPS} clips",
            found=n_clips,
            details=[f"{name}: {reason}" for name, reason in list(left_out.items())[:8]],
        )


def analyze_store(
    store: FeatureStore,
    plan: AnalysisPlan,
    projections: Sequence[tuple[str, Projection]] = (),
    *,
    run: Run | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Measure every clip of `plan`, raw and through every projection.

    `run` distributes groups of clips to workers; figures and sums are put together in the order of the store,
    so that it does not matter whose work they are. A clip that cannot be read or holds tokens that are not
    finite is left out and named. Raises `UsageError` for projections of another width and `InputError` when
    fewer than two clips remain.
    """
    started, run, progress = time.perf_counter(), run or in_threads, progress or SILENT
    dim, n_places = store.arrays[0].n_channels, plan.places.n_tokens
    kinds = tuple(make_kinds(projections, dim))
    size = max(1, -(-len(plan.clips) // MAX_GROUPS))
    starts = range(0, len(plan.clips), size)
    groups = [_Group(number, plan.clips[start : start + size]) for number, start in enumerate(starts)]
    figures, left_out = list[_Figures](), dict(plan.left_out)
    sums = [MiddleSums.zero(n_places, dim) for _ in kinds]
    unit = _MeasureClips(store, kinds, plan.definitions, plan.places)
    for found in _results(run, unit, groups, progress, "clips", lambda group: len(group.clips)):
        figures += found.figures
        left_out |= found.left_out
        sums = [total + part for total, part in zip(sums, found.sums, strict=True)]
    clips = [clip for clip in plan.clips if clip.video_id not in left_out]
    _check_clips(store, len(clips), left_out)
    spreads = tuple(make_spreads(of_kind, plan.definitions) for of_kind in sums)
    middles = tuple((clip.grid, int(clip.rows[len(clip.rows) // 2])) for clip in clips)
    pairs = block_pairs(len(clips), max(1, BLOCK_BYTES // (4 * n_places * dim)))
    compare_blocks = _CompareBlocks(store, kinds, middles, plan.places, spreads)
    compared = list(_results(run, compare_blocks, pairs, progress, "pairs of blocks of clips"))
    return AnalysisReport(
        measured=tuple(_measured(plan.definitions, kinds, clips, figures, sums, compared)),
        video_ids=tuple(clip.video_id for clip in clips),
        n_frames=tuple(len(clip.rows) for clip in clips),
        left_out=left_out,
        places=plan.places,
        seconds=time.perf_counter() - started,
    )


def _results(
    run: Run,
    unit: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Progress,
    name: str,
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Result]:
    """Yield the results of `items` in their order; `progress` counts `name`, `count` of an item."""
    progress.start(sum(map(count, items)), name)
    try:
        for item, result in in_order(run, unit, items):
            yield result
            progress.advance(count(item))
    finally:
        progress.finish()


#: Of one clip, by kind of tokens and definition.
_Figures = tuple[tuple[ClipFigures, ...], ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring clips; `number` is the group's place in the order of the store."""

    number: int
    clips: tuple[Clip, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _GroupResult:
    """Figures of the clips that could be measured, why others could not, sums of middle frames by kind."""

    figures: list[_Figures]
    left_out: dict[str, str]
    sums: list[MiddleSums]


@dataclass(frozen=True, slots=True)
class _MeasureClips:
    """Measures a group of clips: a unit of work that any process can do with the store at hand."""

    store: FeatureStore
    kinds: tuple[TokenKind, ...]
    definitions: tuple[Definition, ...]
    places: Grid

    @torch.inference_mode()
    def __call__(self, group: _Group) -> _GroupResult:
        dim = self.store.arrays[0].n_channels
        result = _GroupResult([], {}, [MiddleSums.zero(self.places.n_tokens, dim) for _ in self.kinds])
        for clip in group.clips:
            try:
                figures, middles = self._measure(clip)
            except (InputError, DamagedStoreError) as error:
                result.left_out[clip.video_id] = error.summary
                continue
            result.figures.append(figures)
            for number, middle in enumerate(middles):
                result.sums[number] += MiddleSums.of(middle)
        return result

    def _measure(self, clip: Clip) -> tuple[_Figures, list[Float[Tensor, "1 place dim"]]]:
        n_bytes = 2 * len(clip.rows) * clip.grid.n_tokens * self.store.arrays[0].n_channels
        held = None if n_bytes > HELD_BYTES else _read(self.store, clip.grid, clip.rows)
        index = torch.from_numpy(place_index(clip.grid, self.places))
        figures, middles = [], []
        for kind in self.kinds:
            blocks = _Blocks(self.store, clip, kind, held)
            of_kind, middle = measure_clip(
                blocks if held is None else list(blocks), len(clip.rows), self.definitions
            )
            figures.append(of_kind)
            middles.append(middle.flatten(0, 1)[None, index])
        return tuple(figures), middles


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """The blocks of a clip, projected or not; without `held` tokens read anew in every pass."""

    store: FeatureStore
    clip: Clip
    kind: TokenKind
    held: Float[Tensor, "frame row col dim"] | None

    def __iter__(self) -> Iterator[Block]:
        grid, rows = self.clip.grid, self.clip.rows
        for part in block_slices(len(rows), grid.n_tokens):
            tokens = _read(self.store, grid, rows[part]) if self.held is None else self.held[part]
            yield self.kind.apply(tokens.float())


def _read(
    store: FeatureStore, grid: Grid, rows: Int64[np.ndarray, " frame"]
) -> Float[Tensor, "frame row col dim"]:
    tokens = np.empty((len(rows), grid.rows, grid.cols, store.arrays[0].n_channels), np.float16)
    store.read_encodings(grid, rows, tokens)
    return torch.from_numpy(tokens)


@dataclass(frozen=True, slots=True)
class _CompareBlocks:
    """Compares the middle frames of two blocks of clips, by kind: the other unit of work."""

    store: FeatureStore
    kinds: tuple[TokenKind, ...]
    middles: tuple[tuple[Grid, int], ...]
    places: Grid
    spreads: tuple[tuple[Spread, ...], ...]

    @torch.inference_mode()
    def __call__(self, pair: BlockPair) -> list[Comparison]:
        first = self._read(self.middles[pair.first])
        second = None if pair.alone else self._read(self.middles[pair.second])
        return [
            compare(kind.apply(first), None if second is None else kind.apply(second), spreads)
            for kind, spreads in zip(self.kinds, self.spreads, strict=True)
        ]

    def _read(self, middles: Sequence[tuple[Grid, int]]) -> Float[Tensor, "clip place dim"]:
        dim = self.store.arrays[0].n_channels
        out = torch.empty(len(middles), self.places.n_tokens, dim, dtype=torch.float16)
        for grid in {grid for grid, _ in middles}:
            here = [number for number, (other, _) in enumerate(middles) if other == grid]
            rows = np.array([middles[number][1] for number in here], np.int64)
            tokens = _read(self.store, grid, rows).flatten(1, 2)
            out[here] = tokens[:, torch.from_numpy(place_index(grid, self.places))]
        return out


def _measured(
    definitions: Sequence[Definition],
    kinds: Sequence[TokenKind],
    clips: Sequence[Clip],
    figures: Sequence[_Figures],
    sums: Sequence[MiddleSums],
    compared: Sequence[list[Comparison]],
) -> Iterator[Measured]:
    """Yield the figures of all clips, definition by definition, kind by kind."""
    n_frames = sum(len(clip.rows) for clip in clips)
    inter = [
        inter_figures(definitions, of_kind, [item[place] for item in compared])
        for place, of_kind in enumerate(sums)
    ]
    for number, definition in enumerate(definitions):
        for place, kind in enumerate(kinds):
            of_clips = tuple(of_clip[place][number] for of_clip in figures)
            total = combine(definition, of_clips, inter[place][number], n_frames)
            yield Measured(kind.name, kind.sha256, definition, total, of_clips)
