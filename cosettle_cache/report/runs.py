"""What lies in the folders of a report: scores, journals of training, the figures of an analysis.

Folders come in, what their files hold comes out; a folder that holds none of it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosettle_cache.analysis.run import ANALYSIS_FILE, PROVENANCE
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import read_json
from cosettle_cache.core.tables import read_table
from cosettle_cache.core.types import Score
from cosettle_cache.metrics.rows import SCORES_FILE, SUMMARY_FILE, read_scores
from cosettle_cache.training.log import RunFiles, figure_columns, read_figures, read_validation
from cosettle_cache.videos.frames import natural_key

#: Entries of a folder that an error lists.
_LISTED = 6


@dataclass(frozen=True, slots=True)
class ScoreRun:
    """A folder of `propagate`: its score rows, and whether every video had its turn."""

    name: str
    folder: Path
    scores: tuple[Score, ...]
    complete: bool

    @property
    def tokens(self) -> tuple[str, ...]:
        """The kinds of tokens, raw first as the run has them."""
        return tuple(dict.fromkeys(score.tokens for score in self.scores))


@dataclass(frozen=True, slots=True)
class Curves:
    """The figures of one projection in training by name, step by step and epoch by epoch."""

    name: str
    steps: Mapping[str, Sequence[float]]
    epochs: Mapping[str, Sequence[float]]

    @property
    def n_steps(self) -> int:
        """How many steps were taken."""
        return len(self.steps.get("step", ()))


@dataclass(frozen=True, slots=True)
class TrainRun:
    """A folder of `train`: the curves of its projections, and its own report, empty while it goes."""

    name: str
    folder: Path
    members: tuple[Curves, ...]
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TradeOffRow:
    """One line of an analysis: a kind of tokens of one encoder under one definition (docs/analysis.md).

    Distances are in diameters that cover all tokens, `margin` is D = `d_inter` - `gamma` * `d_intra`.
    """

    dataset: str
    backbone: str
    tokens: str
    definition: str
    gamma: float
    n_videos: int
    d_inter: float
    d_intra: float
    margin: float
    cycle_accuracy: float
    effective_rank: float


@dataclass(frozen=True, slots=True)
class AnalysisRun:
    """A folder of `analyze`: its figures, and what they are of."""

    name: str
    folder: Path
    rows: tuple[TradeOffRow, ...]
    provenance: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Runs:
    """Everything that was found, in the order of the folders."""

    scored: tuple[ScoreRun, ...]
    trained: tuple[TrainRun, ...]
    analyzed: tuple[AnalysisRun, ...]


def read_runs(folders: Mapping[str, Path]) -> Runs:
    """Return what the folders hold, by the names they go by.

    Raises `InputError` for a folder that is missing or holds no run, and for files that cannot be read.
    """
    scored, trained, analyzed = [], [], []
    for name, folder in folders.items():
        _check_run(folder)
        if (folder / SCORES_FILE).is_file():
            path = folder / SUMMARY_FILE
            summary = read_json(path) if path.is_file() else None
            complete = bool(summary.get("complete", True)) if isinstance(summary, dict) else True
            scored.append(ScoreRun(name, folder, tuple(read_scores(folder / SCORES_FILE)), complete))
        if found := _member_folders(folder):
            members = tuple(_curves(name if item == folder else item.name, RunFiles(item)) for item in found)
            report = RunFiles(folder).report
            trained.append(TrainRun(name, folder, members, read_json(report) if report.is_file() else {}))
        if (folder / ANALYSIS_FILE).is_file():
            analyzed.append(_analysis_run(name, folder))
    return Runs(tuple(scored), tuple(trained), tuple(analyzed))


def _check_run(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="the folder of a run")
    if holds_run(folder):
        return
    deeper = [item for deep in ("*", "*/*") for item in folder.glob(deep)]
    inside = sorted(item for item in deeper if item.is_dir() and holds_run(item))[:_LISTED]
    hint = f"cosettle-cache report {' '.join(map(str, inside))}" if inside else None
    if (folder / "progress").is_dir():
        hint = "propagate has not finished here: run it again, it goes on where it was"
    if (folder / "projection.safetensors").is_file():
        hint = f"--projection {folder / 'projection.safetensors'} shows it in the affinity explorer"
    raise InputError(
        f"{folder} holds no run",
        wanted=f"{SCORES_FILE} of propagate, metrics.jsonl of train or {ANALYSIS_FILE} of analyze",
        found=", ".join(item.name for item in _entries(folder)[:_LISTED]) or "an empty folder",
        hint=hint,
    )


def holds_run(folder: Path) -> bool:
    """Say whether a report has anything to show of `folder`."""
    tables = (folder / SCORES_FILE, folder / ANALYSIS_FILE)
    return any(path.is_file() for path in tables) or bool(_member_folders(folder))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda item: natural_key(item.name))


def _member_folders(folder: Path) -> list[Path]:
    """Return the folders with a journal: the run's own, or those of a sweep's members."""
    files = RunFiles(folder)
    if files.metrics.is_file():
        return [folder]
    if not any(path.is_file() for path in (files.checkpoint, files.table, files.comparison)):
        return []
    return [item for item in _entries(folder) if RunFiles(item).metrics.is_file()]


def _curves(name: str, files: RunFiles) -> Curves:
    path = files.metrics
    try:
        steps = figure_columns(read_figures(path))
        path = files.validation
        return Curves(name, steps, figure_columns(read_validation(path)))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise InputError(f"{path} is not a journal of training", found=str(error)) from error


def _analysis_run(name: str, folder: Path) -> AnalysisRun:
    path = folder / ANALYSIS_FILE
    plain = ("dataset", "backbone", "tokens", "definition", "n_videos", "cycle_accuracy", "effective_rank")
    rows, provenance = [], []
    try:
        for row in read_table(path).to_pylist():
            figures = {key: row[key] for key in plain}
            figures |= {key: row[f"{key}_100"] for key in ("d_inter", "d_intra", "margin")}
            rows.append(TradeOffRow(**figures, gamma=float(json.loads(row["definition_json"])["gamma"])))
            provenance.append({key: row[key] for key in ("tokens", "definition", *PROVENANCE)})
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a table of analyze", found=f"no {error}") from error
    return AnalysisRun(name, folder, tuple(rows), tuple(provenance))
