"""What lies in the folders of a report: scores, journals of training, the figures of an analysis.

Folders come in, what their files hold comes out; a folder that holds none of it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosettle_cache.analysis.run import ANALYSIS_FILE, ANALYSIS_SCHEMA, PROVENANCE
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import name_fault, parse_json, read_json
from cosettle_cache.core.tables import read_rows
from cosettle_cache.core.types import Score
from cosettle_cache.metrics.rows import (
    NO_SCORES,
    SCORES_FILE,
    SUMMARY_FILE,
    mean_scores,
    read_scores,
    sequence_means,
)
from cosettle_cache.pictures.charts import Columns
from cosettle_cache.training.log import RunFiles, figure_columns, read_figures, read_validation
from cosettle_cache.videos.frames import natural_key

#: Entries of a folder that an error lists.
_LISTED = 6
#: What a report shows of the table of `analyze`: where its figures come from, and the figures.
TRADE_OFF_ORIGIN = ("tokens", "definition", *PROVENANCE)
TRADE_OFF_FIGURES = ("d_inter_100", "d_intra_100", "margin_100", "cycle_accuracy", "effective_rank")


@dataclass(frozen=True, slots=True)
class ScoreRun:
    """A folder of `propagate`: its score rows, whether every video had its turn, and why videos failed."""

    name: str
    folder: Path
    scores: tuple[Score, ...]
    complete: bool
    failures: Mapping[str, Any]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The kinds of tokens, raw first as the run has them."""
        return tuple(dict.fromkeys(score.tokens for score in self.scores))

    def masks(self, kind: str, video_id: str) -> list[Path]:
        """Return the masks of a video in frame order; none of names that lead out of the folder."""
        if name_fault(f"{kind}/{video_id}"):
            return []
        found = (path for path in (self.folder / kind / video_id).glob("*.png") if path.is_file())
        return sorted(found, key=lambda path: natural_key(path.name))


@dataclass(frozen=True, slots=True)
class TrainRun:
    """A folder of `train`: figures of every projection by name, and its own report, empty while it goes."""

    name: str
    folder: Path
    steps: Mapping[str, Columns]
    epochs: Mapping[str, Columns]
    report: Mapping[str, Any]

    @property
    def n_steps(self) -> dict[str, int]:
        """How many steps each projection has taken."""
        return {name: len(figures.get("step", ())) for name, figures in self.steps.items()}


@dataclass(frozen=True, slots=True)
class AnalysisRun:
    """A folder of `analyze`: origin, clips, `TRADE_OFF_FIGURES` and `gamma` of each of its rows."""

    name: str
    folder: Path
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Runs:
    """Everything that was found, in the order of the folders."""

    scored: tuple[ScoreRun, ...]
    trained: tuple[TrainRun, ...]
    analyzed: tuple[AnalysisRun, ...]


def read_runs(folders: Mapping[str, Path]) -> Runs:
    """Return what the folders hold, by name; raise `InputError` for one without a run or unreadable files."""
    scored, trained, analyzed = [], [], []
    for name, folder in folders.items():
        try:
            _check_run(folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be read", wanted="the folder of a run", found=error) from error
        if (folder / SCORES_FILE).is_file():
            summary = _document(folder / SUMMARY_FILE)
            failures = summary.get("failures")
            failures, complete = failures if isinstance(failures, dict) else {}, summary.get("complete", True)
            scores = _scores(folder / SCORES_FILE)
            scored.append(ScoreRun(name, folder, scores, bool(complete), failures))
        if found := _member_folders(folder):
            journals = {name if item == folder else item.name: RunFiles(item) for item in found}
            steps = {member: _columns(files.metrics, read_figures) for member, files in journals.items()}
            epochs = {
                member: _columns(files.validation, read_validation) for member, files in journals.items()
            }
            trained.append(TrainRun(name, folder, steps, epochs, _document(RunFiles(folder).report)))
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


def _scores(path: Path) -> tuple[Score, ...]:
    """Return the rows of a table of scores whose means can be made."""
    scores = read_scores(path)
    try:
        mean_scores(scores), sequence_means(scores)
    except NO_SCORES as error:
        raise InputError(f"{path} is not a table of scores", found=repr(error)) from error
    return tuple(scores)


def _document(path: Path) -> Mapping[str, Any]:
    """Return the fields of a JSON document, none where there is no such file."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no fields", wanted="a JSON object", found=type(found).__name__)
    return found


def _columns(path: Path, read: Callable[[Path], Sequence[Any]]) -> Columns:
    try:
        return figure_columns(read(path))
    except OverflowError as error:  # an integer that no float can be
        raise InputError(f"{path} is not a journal of training", found=str(error)) from error


def _analysis_run(name: str, folder: Path) -> AnalysisRun:
    path, rows = folder / ANALYSIS_FILE, []
    try:
        for row in read_rows(path, ANALYSIS_SCHEMA)[0]:
            gamma = float(parse_json(row["definition_json"], "definition_json")["gamma"])
            figures = {key: float(row[key]) for key in TRADE_OFF_FIGURES} | {"gamma": gamma}
            origin = {key: row[key] or "" for key in TRADE_OFF_ORIGIN}
            rows.append({**origin, "n_videos": row["n_videos"], **figures})
    except KeyError as error:
        raise InputError(f"{path} is not a table of analyze", found=f"no {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not a table of analyze", found=error) from error
    return AnalysisRun(name, folder, tuple(rows))
