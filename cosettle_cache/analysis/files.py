"""What `analyze` found, and how it lies on disk: one table of sets of clips, one of clips, one summary.

Figures come in; files go out in which every row carries definition, digests and versions. docs/analysis.md
lists the columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from cosettle_cache.analysis.clips import ClipFigures, Definition
from cosettle_cache.analysis.trade_off import TradeOff
from cosettle_cache.core.settings import digest, make_provenance
from cosettle_cache.core.tables import make_table, write_json, write_table
from cosettle_cache.core.types import Grid
from cosettle_cache.store import FeatureStore

#: One row per kind of tokens and definition; one row per clip besides; means and provenance; the plane.
ANALYSIS_FILE, VIDEOS_FILE = "analysis.parquet", "analysis_videos.parquet"
SUMMARY_FILE, PLANE_FILE, PLANE_SVG = "analysis.json", "tradeoff.png", "tradeoff.svg"


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
    """What one run of `analyze_store` found.

    `video_ids` and `n_frames` name the clips that were measured, in the order of `Measured.clips`;
    `left_out` gives the reason by video id. `places` are those at which clips are compared.
    """

    measured: tuple[Measured, ...]
    video_ids: tuple[str, ...]
    n_frames: tuple[int, ...]
    left_out: dict[str, str]
    places: Grid
    seconds: float


#: What stands beside every figure.
PROVENANCE = ("dataset", "definition_json", "places", "plan_json", "manifest_digest", "store_digest")
PROVENANCE += ("backbone", "weights_sha256", "projection_sha256", "versions_json")


def _schema(names: Sequence[str], figures: type) -> pa.Schema:
    """Return the columns of a table: `names`, the fields of `figures`, and the provenance."""
    numbers = [item.name for item in fields(figures)]
    kinds = dict.fromkeys(numbers, pa.float64()) | dict.fromkeys(("n_videos", "n_frames"), pa.int64())
    return pa.schema([(name, kinds.get(name, pa.string())) for name in (*names, *numbers, *PROVENANCE)])


ANALYSIS_SCHEMA = _schema(("tokens", "definition"), TradeOff)
VIDEOS_SCHEMA = _schema(("video_id", "tokens", "definition", "n_frames"), ClipFigures)


def write_analysis(folder: Path, store: FeatureStore, report: AnalysisReport) -> None:
    """Write both tables, the summary, and the picture of distances within clips against those between."""
    rows, video_rows = [], []
    for item in report.measured:
        names = {"tokens": item.tokens, "definition": item.definition.name}
        common = names | _provenance(store, report, item)
        rows.append(asdict(item.total) | common)
        for video_id, n_frames, clip in zip(report.video_ids, report.n_frames, item.clips, strict=True):
            video_rows.append({"video_id": video_id, "n_frames": n_frames} | asdict(clip) | common)
    write_table(folder / ANALYSIS_FILE, make_table(rows, ANALYSIS_SCHEMA))
    write_table(folder / VIDEOS_FILE, make_table(video_rows, VIDEOS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(store, report))
    # matplotlib takes 60 MB, and the measuring imports this module.
    from cosettle_cache.pictures.charts import Plane, PlanePoint, plane_chart, save_chart

    backbone, planes = store.fingerprint.backbone, []
    for definition in dict.fromkeys(item.definition for item in report.measured):
        points = [
            PlanePoint(backbone, item.tokens, item.total.d_intra_100, item.total.d_inter_100)
            for item in report.measured
            if item.definition == definition
        ]
        title = f"{definition.name}: {len(report.video_ids)} clips, distances in diameters (100 %)"
        planes.append(Plane(title, definition.gamma, points))
    save_chart(plane_chart(planes), folder / PLANE_FILE, folder / PLANE_SVG)


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
        "complete": not report.left_out,
        "figures": figures,
        "definitions": {item.definition.name: asdict(item.definition) for item in report.measured},
        "projections": {item.tokens: item.projection_sha256 for item in report.measured},
        "left_out": report.left_out,
        "provenance": {name: common[name] for name in PROVENANCE if name not in of_rows},
    }


def _provenance(store: FeatureStore, report: AnalysisReport, item: Measured) -> dict[str, Any]:
    dataset = ", ".join(dict.fromkeys(video.dataset for video in store.manifest))
    return asdict(make_provenance("analyze", dataset, store.fingerprint, item.projection_sha256)) | {
        "definition_json": json.dumps(asdict(item.definition), sort_keys=True),
        "places": str(report.places),
        "plan_json": json.dumps(dict(store.fingerprint.plan), sort_keys=True),
        "store_digest": digest(store.fingerprint.to_json()),
    }
