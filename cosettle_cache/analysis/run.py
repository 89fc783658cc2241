"""What the encoder and its projections trade: consistency within clips against separability between them.

A frames store and projections come in; the released metrics and the paper's, for raw and projected tokens, go
out, as tables in which every row carries definition, digests and versions (docs/analysis.md). One pass reads
every frame once; the middle frames are read again, in blocks, for pairs of clips.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cosettle_cache.analysis.pooling import check_frames_plan, missing_videos
from cosettle_cache.analysis.trade_off import (
    CLIP_FIGURES,
    DEFINITIONS,
    FEWEST_CLIPS,
    Block,
    BlockPair,
    ClipFigures,
    Comparison,
    Definition,
    MiddleSums,
    Spread,
    TradeOff,
    block_pairs,
    block_slices,
    combine,
    compare,
    inter_figures,
    make_spreads,
    measure_clip,
)
from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import Run, in_order, in_threads, pick_device, upload
from cosettle_cache.core.settings import AnalyzeSettings, digest, make_provenance
from cosettle_cache.core.tables import make_table, write_json, write_table
from cosettle_cache.core.types import Grid
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.search.correspondence import choose_places, place_index
from cosettle_cache.store import FeatureStore

#: One row per kind of tokens and definition; one row per clip besides; means and provenance; the plane.
ANALYSIS_FILE, VIDEOS_FILE = "analysis.parquet", "analysis_videos.parquet"
SUMMARY_FILE, PLANE_FILE, PLANE_SVG = "analysis.json", "tradeoff.png", "tradeoff.svg"
#: What stands beside every figure.
PROVENANCE = (
    *("dataset", "definition_json", "places", "plan_json", "manifest_digest", "store_digest"),
    *("backbone", "weights_sha256", "projection_sha256", "versions_json"),
)

#: Groups of clips at most: what each gives back must travel, so there are few whatever the store's size.
MAX_GROUPS = 256
#: A clip of more bytes than this is read anew in every pass instead of being held. One kind of its tokens
#: is held in float32 besides.
HELD_BYTES = 128_000_000
#: Bytes of middle frames per block of clips; two blocks are in memory at a time.
BLOCK_BYTES = 6_000_000

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A video whose plain frames are all there: its rows, in frame order, in the array of its grid."""

    video_id: str
    grid: Grid
    rows: Int64[np.ndarray, " frame"]


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """Definitions, clips, by id why others are left out, and the places at which clips are compared."""

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


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one kind of tokens under one definition: of all clips, and of each."""

    tokens: str
    projection_sha256: str
    definition: Definition
    total: TradeOff
    clips: tuple[ClipFigures, ...]


@dataclass(frozen=True, slots=True)
class AnalysisReport:
    """What `analyze_store` found; `plan` has the clips of `Measured.clips`, in order, and those left out."""

    plan: AnalysisPlan
    measured: tuple[Measured, ...]
    seconds: float


def plan_analysis(store: FeatureStore, settings: AnalyzeSettings) -> AnalysisPlan:
    """Return what would be measured; raise `InputError` for a pairs plan and for fewer than two fit clips."""
    check_frames_plan(store, "analyze")
    names = ("compat" if settings.compat else "released", "paper")
    definitions = tuple(replace(DEFINITIONS[name], gamma=settings.gamma) for name in names)
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
    places = choose_places([clip.grid for clip in kept], at_most=sys.maxsize)
    return AnalysisPlan(definitions, kept, left_out, places)


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
    device: str | None = "cpu",
    run: Run | None = None,
    progress: Progress | None = None,
) -> AnalysisReport:
    """Measure every clip of `plan`, raw and through every projection, on `device` (None: the best at hand).

    `run` distributes groups of clips to workers; figures and sums are put together in the order of the store,
    so that it does not matter whose work they are. A clip that cannot be read or holds tokens that are not
    finite is left out and named. Raises `UsageError` for other widths, `InputError` for less than two clips.
    """
    started, progress = time.perf_counter(), progress or SILENT
    dim, definitions, places = store.arrays[0].n_channels, plan.definitions, plan.places
    # Workers move the projections to their own devices; threads would move the same ones at the same time.
    kinds = tuple(make_kinds(projections, dim, device="cpu" if run else pick_device(device)))
    run = run or in_threads
    size = max(1, -(-len(plan.clips) // MAX_GROUPS))
    starts = range(0, len(plan.clips), size)
    groups = [_Group(number, plan.clips[start : start + size]) for number, start in enumerate(starts)]
    figures, sums, left_out = list[_Figures](), list[MiddleSums](), dict(plan.left_out)
    measure = partial(_measure_group, store, kinds, definitions, places, device)
    sizes = [len(group.clips) for group in groups]
    for found, of_group, reasons in _results(run, measure, groups, progress, "clips", sizes):
        figures += found
        sums = [total + part for total, part in zip(sums, of_group, strict=True)] if sums else of_group
        left_out |= reasons
    clips = tuple(clip for clip in plan.clips if clip.video_id not in left_out)
    _check_clips(store, len(clips), left_out)
    spreads = [make_spreads(of_kind, definitions) for of_kind in sums]
    middles = [(clip.grid, int(clip.rows[len(clip.rows) // 2])) for clip in clips]
    pairs = block_pairs(len(clips), max(1, BLOCK_BYTES // (4 * places.n_tokens * dim)))
    with_spreads = tuple(zip(kinds, spreads, strict=True))
    compare_blocks = partial(_compare_blocks, store, with_spreads, places, middles, device)
    names = "pairs of blocks of clips"
    compared = list(_results(run, compare_blocks, pairs, progress, names, [1] * len(pairs)))
    n_frames = sum(len(clip.rows) for clip in clips)
    of_kinds = zip(sums, zip(*compared, strict=True), strict=True)
    inter = [inter_figures(definitions, of_kind, comparisons) for of_kind, comparisons in of_kinds]
    measured = []
    for number, definition in enumerate(definitions):
        for place, kind in enumerate(kinds):
            of_clips = tuple(of_clip[place][number] for of_clip in figures)
            total = combine(definition, of_clips, inter[place][number], n_frames)
            measured.append(Measured(kind.name, kind.sha256, definition, total, of_clips))
    measured_plan = replace(plan, clips=clips, left_out=left_out)
    return AnalysisReport(measured_plan, tuple(measured), time.perf_counter() - started)


def _results(
    run: Run,
    unit: Callable[[Any], Result],
    items: Sequence[Any],
    progress: Progress,
    name: str,
    sizes: Sequence[int],
) -> Iterator[Result]:
    """Yield the results of `items` in their order; `progress` counts `name`, so many of each item."""
    with counting(progress, sum(sizes), name) as advance:
        for size, (_, result) in zip(sizes, in_order(run, unit, items), strict=True):
            yield result
            advance(size)


#: Of one clip, by kind of tokens and definition.
_Figures = tuple[tuple[ClipFigures, ...], ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring clips; `number` is the group's place in the order of the store."""

    number: int
    clips: tuple[Clip, ...]


@torch.inference_mode()
def _measure_group(
    store: FeatureStore,
    kinds: Sequence[TokenKind],
    definitions: Sequence[Definition],
    places: Grid,
    device: str | None,
    group: _Group,
) -> tuple[list[_Figures], list[MiddleSums], dict[str, str]]:
    """Return figures of the clips that could be measured, sums of their middle frames by kind, and by id why
    others could not be: a unit of work that any process can do with the store at hand.
    """
    dim, figures, left_out = store.arrays[0].n_channels, list[_Figures](), dict[str, str]()
    where = torch.device(pick_device(device))
    kinds = [kind.on(where) for kind in kinds]
    sums = [MiddleSums.of(torch.empty(0, places.n_tokens, kind.width(dim), device=where)) for kind in kinds]
    for clip in group.clips:
        n_bytes = 2 * len(clip.rows) * clip.grid.n_tokens * dim
        index, found = upload(torch.from_numpy(place_index(clip.grid, places)), where), []
        try:
            held = None if n_bytes > HELD_BYTES else _read(store, clip.grid, clip.rows, where)
            for kind in kinds:
                blocks: Callable[[], Iterable[Block]] = partial(_blocks, store, clip, kind, held, where)
                if held is not None:
                    blocks = partial(iter, list(blocks()))
                found.append(measure_clip(blocks, len(clip.rows), definitions))
        except (InputError, DamagedStoreError) as error:
            left_out[clip.video_id] = error.summary
            continue
        figures.append(tuple(of_kind for of_kind, _ in found))
        middles = [middle.flatten(0, 1)[None, index] for _, middle in found]
        sums = [total + MiddleSums.of(middle) for total, middle in zip(sums, middles, strict=True)]
    return figures, [total.cpu() for total in sums], left_out


def _blocks(
    store: FeatureStore,
    clip: Clip,
    kind: TokenKind,
    held: Float[Tensor, "frame row col dim"] | None,
    where: torch.device,
) -> Iterator[Block]:
    """Yield the blocks of a clip, projected or not; without `held` tokens they are read."""
    for part in block_slices(len(clip.rows), clip.grid.n_tokens):
        tokens = _read(store, clip.grid, clip.rows[part], where) if held is None else held[part]
        yield kind.apply(tokens.float())


def _read(
    store: FeatureStore, grid: Grid, rows: Int64[np.ndarray, " frame"], where: torch.device
) -> Float[Tensor, "frame row col dim"]:
    tokens = np.empty((len(rows), grid.rows, grid.cols, store.arrays[0].n_channels), np.float16)
    store.read_encodings(grid, rows, tokens)
    return upload(torch.from_numpy(tokens), where)


@torch.inference_mode()
def _compare_blocks(
    store: FeatureStore,
    kinds: Sequence[tuple[TokenKind, tuple[Spread, ...]]],
    places: Grid,
    middles: Sequence[tuple[Grid, int]],
    device: str | None,
    pair: BlockPair,
) -> list[Comparison]:
    """Compare the middle frames of two blocks of clips, by kind: the other unit of work."""
    blocks, where, on_host = [], torch.device(pick_device(device)), torch.device("cpu")
    for part in [pair.first] if pair.alone else [pair.first, pair.second]:
        chosen = middles[part]
        block = torch.empty(len(chosen), places.n_tokens, store.arrays[0].n_channels, dtype=torch.float16)
        for grid in {grid for grid, _ in chosen}:
            here = [number for number, (other, _) in enumerate(chosen) if other == grid]
            rows = np.array([chosen[number][1] for number in here], np.int64)
            tokens = _read(store, grid, rows, on_host).flatten(1, 2)
            block[here] = tokens[:, torch.from_numpy(place_index(grid, places))]
        blocks.append(upload(block, where))
    return [compare(spreads, *map(kind.on(where).apply, blocks)) for kind, spreads in kinds]


def _schema(names: Sequence[str], figures: Sequence[str]) -> pa.Schema:
    """Return the columns of a table: `names`, `figures`, and the provenance."""
    kinds = dict.fromkeys(figures, pa.float64()) | dict.fromkeys(("n_videos", "n_frames"), pa.int64())
    return pa.schema([(name, kinds.get(name, pa.string())) for name in (*names, *figures, *PROVENANCE)])


ANALYSIS_SCHEMA = _schema(("tokens", "definition"), [item.name for item in fields(TradeOff)])
VIDEOS_SCHEMA = _schema(("video_id", "tokens", "definition", "n_frames"), CLIP_FIGURES)


def write_analysis(folder: Path, store: FeatureStore, report: AnalysisReport) -> None:
    """Write both tables, the summary, and the picture of distances within clips against those between."""
    rows, video_rows = [], []
    for item in report.measured:
        names = {"tokens": item.tokens, "definition": item.definition.name}
        common = names | _provenance(store, report, item)
        rows.append(asdict(item.total) | common)
        for clip, figures in zip(report.plan.clips, item.clips, strict=True):
            video_rows.append({"video_id": clip.video_id, "n_frames": len(clip.rows), **figures, **common})
    write_table(folder / ANALYSIS_FILE, make_table(rows, ANALYSIS_SCHEMA))
    write_table(folder / VIDEOS_FILE, make_table(video_rows, VIDEOS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(store, report))
    # matplotlib takes 60 MB, and the measuring imports this module.
    from cosettle_cache.pictures.charts import PlanePoint, plane_chart, save_chart

    points = []
    for item in report.measured:
        title = f"{item.definition.name}: {item.total.n_videos} clips, distances in diameters (100 %)"
        distances = (item.total.d_intra_100, item.total.d_inter_100)
        encoder = store.fingerprint.backbone
        points.append(PlanePoint(title, item.definition.gamma, encoder, item.tokens, *distances))
    save_chart(plane_chart(points), folder / PLANE_FILE, folder / PLANE_SVG)


def remove_analysis(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed."""
    for name in (ANALYSIS_FILE, VIDEOS_FILE, SUMMARY_FILE, PLANE_FILE, PLANE_SVG):
        (folder / name).unlink(missing_ok=True)


def summary_json(store: FeatureStore, report: AnalysisReport) -> dict[str, Any]:
    """Return figures by definition and kind of tokens, what was left out and why, and the provenance once."""
    figures: dict[str, dict[str, Any]] = {}
    for item in report.measured:
        figures.setdefault(item.definition.name, {})[item.tokens] = asdict(item.total)
    common = _provenance(store, report, report.measured[0])
    of_rows = ("definition_json", "projection_sha256")
    return {
        "complete": not report.plan.left_out,
        "figures": figures,
        "definitions": {item.definition.name: asdict(item.definition) for item in report.measured},
        "projections": {item.tokens: item.projection_sha256 for item in report.measured},
        "left_out": report.plan.left_out,
        "provenance": {name: common[name] for name in PROVENANCE if name not in of_rows},
    }


def _provenance(store: FeatureStore, report: AnalysisReport, item: Measured) -> dict[str, Any]:
    dataset = ", ".join(dict.fromkeys(video.dataset for video in store.manifest))
    return asdict(make_provenance("analyze", dataset, store.fingerprint, item.projection_sha256)) | {
        "definition_json": json.dumps(asdict(item.definition), sort_keys=True),
        "places": str(report.plan.places),
        "plan_json": json.dumps(dict(store.fingerprint.plan), sort_keys=True),
        "store_digest": digest(store.fingerprint.to_json()),
    }
