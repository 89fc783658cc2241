"""Score rows on disk and in tables: one row per object, each with its whole provenance, and their means.

A number never travels alone: protocol, sizes, digests and versions stand in every row and in the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa

from cosettle_cache import tables
from cosettle_cache.types import Score

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64()}
SCHEMA = pa.schema([(name, _ARROW[kind]) for name, kind in get_type_hints(Score).items()])

SCORES_FILE, SUMMARY_FILE = "scores.parquet", "summary.json"

#: Fields that must agree within one summary; they are reported once.
PROVENANCE = (
    "task",
    "dataset",
    "protocol",
    "protocol_json",
    "manifest_digest",
    "backbone",
    "weights_sha256",
    "versions_json",
)


@dataclass(frozen=True, slots=True)
class Mean:
    """Unweighted means over objects (the benchmark's rule) for one kind of tokens; shares from 0 to 1."""

    tokens: str
    n_videos: int
    n_objects: int
    jf_mean: float
    j_mean: float
    j_recall: float
    j_decay: float
    f_mean: float
    f_recall: float
    f_decay: float


def mean_scores(scores: Sequence[Score]) -> list[Mean]:
    """Return one mean per kind of tokens, in order of first appearance."""
    kinds = dict.fromkeys(score.tokens for score in scores)
    return [_mean(kind, [score for score in scores if score.tokens == kind]) for kind in kinds]


def sequence_means(scores: Sequence[Score]) -> list[tuple[str, list[Mean]]]:
    """Return (video_id, means over its objects per kind of tokens) for every video."""
    ordered = sorted(scores, key=lambda score: score.video_id)
    grouped = groupby(ordered, key=lambda score: score.video_id)
    return [(video_id, mean_scores(list(rows))) for video_id, rows in grouped]


def write_scores(folder: Path, scores: Sequence[Score], *, complete: bool = True) -> tuple[Path, Path]:
    """Write `scores.parquet` (all rows) and `summary.json` (means and provenance) into `folder`.

    `complete` says whether every video had its turn; it stands in the summary.
    """
    rows, summary = folder / SCORES_FILE, folder / SUMMARY_FILE
    tables.write_table(rows, tables.make_table([asdict(score) for score in scores], SCHEMA))
    tables.write_json(summary, {"complete": complete, **summary_json(scores)})
    return rows, summary


def remove_scores(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed."""
    for name in (SCORES_FILE, SUMMARY_FILE):
        (folder / name).unlink(missing_ok=True)


def read_scores(path: Path) -> list[Score]:
    """Read the rows of a `scores.parquet`."""
    return [Score(**row) for row in tables.read_table(path).to_pylist()]


def summary_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Return means per kind of tokens and per sequence with the rows' common provenance."""
    return {
        "means": {mean.tokens: asdict(mean) for mean in mean_scores(scores)},
        "sequences": {
            video_id: {mean.tokens: mean.jf_mean for mean in means}
            for video_id, means in sequence_means(scores)
        },
        "projections": {score.tokens: score.projection_sha256 for score in scores},
        "scored_sizes": {score.video_id: score.scored_size for score in scores},
        "boundary_tolerance_px": {score.video_id: score.boundary_tolerance_px for score in scores},
        "provenance": {name: _common(scores, name) for name in PROVENANCE},
    }


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table people read: one line per sequence, then the mean over objects."""
    header = ["sequence", "tokens", "objects", "J&F", "J", "F"]
    rows = [[video_id, *_cells(mean)] for video_id, means in sequence_means(scores) for mean in means]
    return header, rows + [["mean over objects", *_cells(mean)] for mean in mean_scores(scores)]


def _mean(kind: str, scores: Sequence[Score]) -> Mean:
    names = ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    means = {name: sum(getattr(score, name) for score in scores) / len(scores) for name in names}
    return Mean(kind, len({score.video_id for score in scores}), len(scores), **means)


def _cells(mean: Mean) -> list[str]:
    figures = (mean.jf_mean, mean.j_mean, mean.f_mean)
    return [mean.tokens, str(mean.n_objects), *(f"{100 * figure:.2f}" for figure in figures)]


def _common(scores: Sequence[Score], name: str) -> str:
    return "; ".join(dict.fromkeys(str(getattr(score, name)) for score in scores))
