"""Rows of `probe` on disk and in tables: every figure with its whole provenance, every video's answer.

Rows come in; `scores.parquet`, `answers.parquet` and `summary.json` go out, and the table that people read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa

from cosettle_cache.core.files import make_folder
from cosettle_cache.core.tables import make_table, read_table, write_json, write_table
from cosettle_cache.core.types import ProbeAnswer, ProbeScore

SCORES_FILE, ANSWERS_FILE, SUMMARY_FILE = "scores.parquet", "answers.parquet", "summary.json"

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), float | None: pa.float64()}

#: Fields that are reported once per summary.
_PROVENANCE = ("dataset", "manifest_digest", "backbone", "weights_sha256")

#: How figures are headed in a table.
_HEADINGS = {
    "map": "mAP",
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "accuracy": "accuracy",
    "class_accuracy": "by class",
    "foreground_accuracy": "foreground",
    "edit": "edit",
    "f1_10": "F1@10",
    "f1_25": "F1@25",
    "f1_50": "F1@50",
}


def _schema(row: type) -> pa.Schema:
    return pa.schema([(name, _ARROW[kind]) for name, kind in get_type_hints(row).items()])


SCORES_SCHEMA, ANSWERS_SCHEMA = _schema(ProbeScore), _schema(ProbeAnswer)


def write_probe(
    folder: Path,
    scores: Sequence[ProbeScore],
    answers: Sequence[ProbeAnswer],
    left_out: Mapping[str, str],
    failures: Mapping[str, str],
) -> None:
    """Write rows, answers and the summary into `folder`; the summary comes last and vouches for the rest."""
    write_table(folder / SCORES_FILE, make_table([asdict(row) for row in scores], SCORES_SCHEMA))
    answer_rows = [asdict(row) for row in answers]
    write_table(folder / ANSWERS_FILE, make_table(answer_rows, ANSWERS_SCHEMA))
    write_json(folder / SUMMARY_FILE, summary_json(scores, left_out, failures))


def remove_probe(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed.

    The folder is made, so that one that cannot be written shows before anything is measured.
    """
    make_folder(folder)
    for name in (SUMMARY_FILE, SCORES_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)


def read_probe_scores(path: Path) -> list[ProbeScore]:
    """Read the rows of a `scores.parquet`."""
    return [ProbeScore(**row) for row in read_table(path, SCORES_SCHEMA).to_pylist()]


def summary_json(
    scores: Sequence[ProbeScore], left_out: Mapping[str, str], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Return every figure by task, kind of tokens, case and metric, with protocols and provenance."""
    figures: dict[str, Any] = {}
    for row in scores:
        of_kind = figures.setdefault(row.task, {}).setdefault(row.tokens, {})
        of_case = of_kind.setdefault("cases", {}).setdefault(row.case, {}) if row.case else of_kind
        of_case[row.metric] = {"value": row.value, "std": row.std, "videos": row.n_videos}
    return {
        "complete": not failures,
        "figures": figures,
        "protocols": {row.task: json.loads(row.protocol_json) for row in scores},
        "labels_digest": {row.task: row.labels_digest for row in scores},
        "projections": {row.tokens: row.projection_sha256 for row in scores},
        "provenance": {name: getattr(scores[0], name) for name in _PROVENANCE} if scores else {},
        "versions": json.loads(scores[0].versions_json) if scores else {},
        "left_out": dict(left_out),
        "failures": dict(failures),
    }


def probe_tables(scores: Sequence[ProbeScore]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of one table per task, in percent, a line per tokens and case."""
    return [_table(task, [row for row in scores if row.task == task]) for task in _order(scores, "task")]


def _table(task: str, rows: Sequence[ProbeScore]) -> tuple[str, list[str], list[list[str]]]:
    metrics = _order(rows, "metric")
    with_cases = any(row.case for row in rows)
    lines = []
    # The mean over cases stands last, as in the tables of papers.
    for case in sorted(_order(rows, "case"), key=lambda name: not name):
        for kind in _order(rows, "tokens"):
            cells = {row.metric: _cell(row) for row in rows if (row.case, row.tokens) == (case, kind)}
            if cells:
                lines.append(
                    [*([case or "mean"] if with_cases else []), kind, *map(cells.__getitem__, metrics)]
                )
    header = [*(["case"] if with_cases else []), "tokens", *(_HEADINGS[name] for name in metrics)]
    title = f"{task}: percent, {rows[0].n_videos} videos, {rows[0].n_classes} classes"
    return title, header, lines


def _cell(row: ProbeScore) -> str:
    spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
    return f"{100 * row.value:.2f}{spread}"


def _order(rows: Sequence[ProbeScore], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, name) for row in rows))
