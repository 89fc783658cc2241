"""Whatever bytes lie in the folder of a run: a report reads them, or says in a sentence what is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fuzz_readers import Change, changes, check_reader, cuts, damaged
from hypothesis import HealthCheck, given, settings
from report_cases import SCORE, write_analysis_table, write_journal

from cosettle_cache.metrics.rows import J_AND_F_FIGURES, write_scores
from cosettle_cache.report.page import chart
from cosettle_cache.report.runs import read_runs

#: Inputs of each kind of file in the gate, and in the long run.
FEW, MANY = 25, int(os.environ.get("FUZZ_EXAMPLES", "20000"))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><g style="fill: red"><path id="a" d="M0 0"/></g></svg>'
FILES = (
    "scores.parquet",
    "summary.json",
    "analysis.parquet",
    "metrics.jsonl",
    "validation.jsonl",
    "scores.svg",
)


def read(path: Path) -> Any:
    if path.suffix == ".svg":
        return chart(path, lambda _: None, "chart", "a chart")
    return read_runs({"run": path.parent})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_journal(folder, 12)
    write_analysis_table(folder)
    write_scores(folder, [replace(SCORE, figures=dict.fromkeys(J_AND_F_FIGURES, 0.5))])
    (folder / "scores.svg").write_bytes(SVG)
    return folder


@pytest.mark.parametrize("n_examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_run(run: Path, name: str, n_examples: int) -> None:
    path = run / name
    valid = path.read_bytes()

    @settings(max_examples=n_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes, cuts)
    def ask(found: list[Change], cut: float | None) -> None:
        check_reader(path, damaged(valid, found, cut), read)

    try:
        ask()
    finally:
        path.write_bytes(valid)
