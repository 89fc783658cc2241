"""Rows of `probe` on disk and in tables: every figure with its whole provenance, every video's answer.

Outcomes come in; `scores.parquet`, `answers.parquet` and `summary.json` go out, and a table to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cosettle_cache.analysis.probe import TASKS, Figure, Outcome
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.tables import make_table, write_json, write_table
from cosettle_cache.core.types import Provenance

SCORES_FILE, ANSWERS_FILE, SUMMARY_FILE = "scores.parquet", "answers.parquet", "summary.json"

_TYPES = {"value": pa.float64(), "std": pa.float64(), "n_videos": pa.int64(), "n_classes": pa.int64()}


def _schema(names: str) -> pa.Schema:
    return pa.schema([(name, _TYPES.get(name, pa.string())) for name in names.split()])


#: A row per figure; `labels_digest` identifies the classes and splits that were used.
SCORES_SCHEMA = _schema(
    "task dataset tokens case metric value std n_videos n_classes protocol_json labels_digest"
    " manifest_digest backbone weights_sha256 projection_sha256 versions_json"
)
ANSWERS_SCHEMA = _schema("task tokens video_id class_name predicted value")
#: Fields that are reported once per summary.
_COMMON = ("dataset", "manifest_digest", "backbone", "weights_sha256")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one task found for one kind of tokens, and which labels and tokens it was asked with."""

    task: str
    tokens: str
    outcome: Outcome
    labels_digest: str
    provenance: Provenance

    @property
    def protocol_json(self) -> str:
        """How it was measured."""
        return json.dumps(dict(self.outcome.protocol), sort_keys=True)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Outcomes by task and kind of tokens; by id why videos could not be read, or took no part."""

    measured: tuple[Measured, ...]
    failures: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def warnings(self) -> list[str]:
        """Sentences about fits that did not converge."""
        return [
            f"{item.task}, {item.tokens}: {text}" for item in self.measured for text in item.outcome.warnings
        ]


def write_probe(folder: Path, report: ProbeReport) -> None:
    """Write rows, answers and the summary into `folder`; the summary comes last and vouches for the rest."""
    scores, answers = [], []
    for item in report.measured:
        names = {"task": item.task, "tokens": item.tokens}
        common = (
            names
            | asdict(item.provenance)
            | {
                "n_classes": item.outcome.n_classes,
                "protocol_json": item.protocol_json,
                "labels_digest": item.labels_digest,
            }
        )
        scores += [common | asdict(figure) for figure in item.outcome.figures]
        answers += [names | asdict(answer) for answer in item.outcome.answers]
    write_table(folder / SCORES_FILE, make_table(scores, SCORES_SCHEMA))
    write_table(folder / ANSWERS_FILE, make_table(answers, ANSWERS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(report))


def remove_probe(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed.

    The folder is made, so that one that cannot be written shows before anything is measured.
    """
    make_folder(folder)
    for name in (SUMMARY_FILE, SCORES_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)


def summary_json(report: ProbeReport) -> dict[str, Any]:
    """Return every figure by task, kind of tokens, case and metric, with protocols and provenance."""
    measured, figures = report.measured, dict[str, Any]()
    for item in measured:
        of_kind = figures.setdefault(item.task, {}).setdefault(item.tokens, {})
        for figure in item.outcome.figures:
            case = of_kind.setdefault("cases", {}).setdefault(figure.case, {}) if figure.case else of_kind
            case[figure.metric] = {"value": figure.value, "std": figure.std, "videos": figure.n_videos}
    provenance = measured[0].provenance
    return {
        "complete": not report.failures,
        "figures": figures,
        "protocols": {item.task: json.loads(item.protocol_json) for item in measured},
        "labels_digest": {item.task: item.labels_digest for item in measured},
        "projections": {item.tokens: item.provenance.projection_sha256 for item in measured},
        "provenance": {name: getattr(provenance, name) for name in _COMMON},
        "versions": json.loads(provenance.versions_json),
        "left_out": dict(report.left_out),
        "failures": dict(report.failures),
    }


def probe_tables(report: ProbeReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of one table per task, in percent, a line per tokens and case."""
    tasks = dict.fromkeys(item.task for item in report.measured)
    return [_table([item for item in report.measured if item.task == task]) for task in tasks]


def _table(measured: Sequence[Measured]) -> tuple[str, list[str], list[list[str]]]:
    first, task = measured[0].outcome, TASKS[measured[0].task]
    figures = [figure for item in measured for figure in item.outcome.figures]
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    # The mean over cases stands last, as in the tables of papers.
    cases = sorted(dict.fromkeys(figure.case for figure in figures), key=lambda name: not name)
    with_cases = any(cases)
    lines = []
    for case in cases:
        for item in measured:
            cells = {one.metric: _cell(one) for one in item.outcome.figures if one.case == case}
            if cells:
                name = [case or "mean"] if with_cases else []
                lines.append([*name, item.tokens, *(cells[metric] for metric in metrics)])
    header = [*(["case"] if with_cases else []), "tokens", *(task.metrics[name] for name in metrics)]
    title = f"{task.name}: percent, {first.figures[0].n_videos} videos, {first.n_classes} classes"
    return title, header, lines


def _cell(figure: Figure) -> str:
    spread = "" if figure.std is None else f" ± {100 * figure.std:.2f}"
    return f"{100 * figure.value:.2f}{spread}"
