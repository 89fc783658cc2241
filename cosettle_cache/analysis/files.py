"""What `analyze` found, and how it lies on disk: one table of sets of clips, one of clips, one summary.

Figures come in; files go out in which every row carries definition, digests and versions. docs/analysis.md
lists the columns.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from cosettle_cache.analysis.definitions import Definition
from cosettle_cache.analysis.trade_off import TradeOff
from cosettle_cache.analysis.within import ClipFigures
from cosettle_cache.core.settings import digest, package_versions
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

    @property
    def complete(self) -> bool:
        """Whether every clip of the manifest was measured."""
        return not self.left_out


#: What stands beside every figure.
PROVENANCE = (
    "dataset",
    "definition_json",
    "places",
    "plan_json",
    "manifest_digest",
    "store_digest",
    "backbone",
    "weights_sha256",
    "projection_sha256",
    "versions_json",
)
_COUNTS = ("n_videos", "n_frames")
_TEXTS = [(name, pa.string()) for name in PROVENANCE]


def _columns(figures: type) -> list[tuple[str, pa.DataType]]:
    names = (item.name for item in fields(figures))
    return [(name, pa.int64() if name in _COUNTS else pa.float64()) for name in names]


ANALYSIS_SCHEMA = pa.schema(
    [("tokens", pa.string()), ("definition", pa.string()), *_columns(TradeOff), *_TEXTS]
)
VIDEOS_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("tokens", pa.string()),
        ("definition", pa.string()),
        ("n_frames", pa.int64()),
        *_columns(ClipFigures),
        *_TEXTS,
    ]
)


def write_analysis(folder: Path, store: FeatureStore, report: AnalysisReport) -> None:
    """Write `analysis.parquet`, `analysis_videos.parquet` and `analysis.json` into `folder`."""
    rows = [_row(item) | asdict(item.total) | _provenance(store, report, item) for item in report.measured]
    write_table(folder / ANALYSIS_FILE, make_table(rows, ANALYSIS_SCHEMA))
    write_table(folder / VIDEOS_FILE, make_table(_video_rows(store, report), VIDEOS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(store, report))


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
    return {
        "complete": report.complete,
        "figures": figures,
        "definitions": {item.definition.name: item.definition.to_json() for item in report.measured},
        "projections": {item.tokens: item.projection_sha256 for item in report.measured},
        "left_out": report.left_out,
        "provenance": {
            name: value
            for name, value in common.items()
            if name not in ("definition_json", "projection_sha256")
        },
    }


def _row(item: Measured) -> dict[str, Any]:
    return {"tokens": item.tokens, "definition": item.definition.name}


def _video_rows(store: FeatureStore, report: AnalysisReport) -> list[dict[str, Any]]:
    rows = []
    for item in report.measured:
        provenance = _provenance(store, report, item)
        for video_id, n_frames, clip in zip(report.video_ids, report.n_frames, item.clips, strict=True):
            rows.append({"video_id": video_id, "n_frames": n_frames} | _row(item) | asdict(clip) | provenance)
    return rows


def _provenance(store: FeatureStore, report: AnalysisReport, item: Measured) -> dict[str, Any]:
    fingerprint = store.fingerprint
    versions = {"extract": dict(fingerprint.versions), "analyze": package_versions()}
    return {
        "dataset": ", ".join(dict.fromkeys(video.dataset for video in store.manifest)),
        "definition_json": json.dumps(item.definition.to_json(), sort_keys=True),
        "places": str(report.places),
        "plan_json": json.dumps(dict(fingerprint.plan), sort_keys=True),
        "manifest_digest": fingerprint.manifest_digest,
        "store_digest": digest(fingerprint.to_json()),
        "backbone": fingerprint.backbone,
        "weights_sha256": fingerprint.weights_sha256,
        "projection_sha256": item.projection_sha256,
        "versions_json": json.dumps(versions, sort_keys=True),
    }
