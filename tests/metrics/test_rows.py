"""Tables of scores: one line per figure; tables with a column per figure, as older ones have, are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.tables import read_table
from cosettle_cache.metrics.rows import (
    SCHEMA,
    TABLE_VERSION,
    read_scores,
    score_table,
    summary_json,
    write_rows,
)

#: Written before the table had a version: rows of four benchmarks, and the summaries of the same rows.
TABLES = Path(__file__).parent / "tables"


def rounded(document: Any) -> Any:
    return json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 12))


@pytest.mark.parametrize("task", ["davis", "vip", "jhmdb", "tapvid"])
def test_a_table_with_a_column_per_figure_has_the_same_summary(task: str) -> None:
    rows = [row for row in read_scores(TABLES / "wide_scores.parquet") if row.task == task]
    expected = json.loads((TABLES / "wide_summaries.json").read_text())[task]
    # Since 3.12 Python sums floats more exactly: the last bit of a mean is another one.
    assert rounded(summary_json(rows)) == rounded(expected)


def test_old_and_new_tables_hold_the_same_rows(tmp_path: Path) -> None:
    rows = read_scores(TABLES / "wide_scores.parquet")
    assert len(rows) == 8 + 2 + 2 + 2
    write_rows(tmp_path / "new.parquet", rows)
    assert read_scores(tmp_path / "new.parquet") == rows
    objects = [row for row in rows if row.task == "davis"]
    assert read_scores(TABLES / "wide_scores.csv") == objects
    write_rows(tmp_path / "new.csv", objects)
    assert read_scores(tmp_path / "new.csv") == objects


def test_a_line_holds_one_figure_and_its_provenance(tmp_path: Path) -> None:
    rows = [row for row in read_scores(TABLES / "wide_scores.parquet") if row.task == "tapvid"]
    write_rows(tmp_path / "new.parquet", rows)
    lines = pq.read_table(tmp_path / "new.parquet").to_pylist()
    first = {line["name"]: line["value"] for line in lines if line["video_id"] == "a"}
    assert first == rows[0].figures and len(first) == 8
    # The second clip shows no point again: it has no such figures, and no lines.
    assert [line["name"] for line in lines if line["video_id"] == "b"] == ["oa"]
    assert {line["weights_sha256"] for line in lines} == {"w"}


@pytest.mark.parametrize("name", ["new.parquet", "new.csv"])
def test_a_row_without_any_figure_is_kept(tmp_path: Path, name: str) -> None:
    rows = [row for row in read_scores(TABLES / "wide_scores.parquet") if row.task == "tapvid"]
    empty = replace(rows[0], video_id="c", figures={})
    for written in ([empty, *rows], [empty]):
        write_rows(tmp_path / name, written)
        assert read_scores(tmp_path / name) == written
        assert len(score_table(written)[1]) == len(written) + 1
    (line,) = read_table(tmp_path / name, SCHEMA).to_pylist()
    assert not line["name"] and line["value"] is None  # CSV does not tell an empty text from none
    assert summary_json([empty])["means"][empty.tokens]["aj"] is None


def test_later_versions_and_other_tables_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "new.parquet", read_scores(TABLES / "wide_scores.parquet"))
    table = pq.read_table(tmp_path / "new.parquet")
    later = {"scores_table_version": str(TABLE_VERSION + 1)}
    pq.write_table(table.replace_schema_metadata(later), tmp_path / "later.parquet")
    with pytest.raises(InputError, match="another version"):
        read_scores(tmp_path / "later.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="not a table of scores"):
        read_scores(tmp_path / "other.parquet")
