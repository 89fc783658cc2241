"""Where the figures of the page come from: protocols, digests and versions, folded away.

Runs come in, a section of details elements comes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.heads.projection import read_provenance
from cosettle_cache.metrics.results import PROVENANCE
from cosettle_cache.report.elements import element
from cosettle_cache.report.runs import AnalysisRun, Runs, ScoreRun, TrainRun
from cosettle_cache.training.run_state import RunFiles


def provenance_section(runs: Runs, explored: Mapping[str, Any]) -> Element:
    """Return everything that decided the figures; `explored` is of the store in the affinity explorer."""
    documents = [(f"Scores {run.name}", _score_origin(run)) for run in runs.scored]
    documents += [
        (f"Training {run.name}, {name}", found) for run in runs.trained for name, found in _trained(run)
    ]
    documents += [(f"Trade-off {run.name}", _analysis_origin(run)) for run in runs.analyzed]
    documents += [("Affinity explorer", dict(explored))] if explored else []
    blocks = [element("details", element("summary", title), _block(found)) for title, found in documents]
    return element("section", element("h2", "Provenance"), *blocks, id="provenance")


def _block(document: Mapping[str, Any]) -> Element:
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    return element("pre", text, tabindex="0")


def _score_origin(run: ScoreRun) -> dict[str, Any]:
    """Return what the rows of a run say of themselves, each value once."""
    found: dict[str, Any] = {"folder": str(run.folder), "complete": run.complete}
    for name in PROVENANCE:
        values = list(dict.fromkeys(getattr(score, name) for score in run.scores))
        parsed = [_parsed(value) if name.endswith("_json") else value for value in values]
        found[name.removesuffix("_json") if name == "versions_json" else name] = (
            parsed[0] if len(parsed) == 1 else parsed
        )
    found["projection_sha256"] = {score.tokens: score.projection_sha256 for score in run.scores}
    found["scored_size"] = {score.video_id: score.scored_size for score in run.scores}
    found["boundary_tolerance_px"] = {score.video_id: score.boundary_tolerance_px for score in run.scores}
    return found


def _analysis_origin(run: AnalysisRun) -> dict[str, Any]:
    rows = [{key: _parsed(value) for key, value in row.items()} for row in run.provenance]
    return {"folder": str(run.folder), "rows": rows}


def _trained(run: TrainRun) -> list[tuple[str, dict[str, Any]]]:
    """Return what every finished projection of a run says of itself."""
    files = RunFiles(run.folder)
    candidates = [(member.name, _member_file(files, member.name).projection) for member in run.members]
    return [(name, _projection_origin(path)) for name, path in candidates if path.is_file()]


def _member_file(files: RunFiles, name: str) -> RunFiles:
    member = files.member(name)
    return member if member.projection.is_file() else files


def _projection_origin(path: Path) -> dict[str, Any]:
    try:
        found = read_provenance(path)
    except CosettleError as error:
        return {"file": str(path), "unreadable": error.summary}
    return {"file": str(path), **{key: _parsed(value) for key, value in found.items()}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, TypeError):
        return text
