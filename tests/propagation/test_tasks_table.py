"""The table of tasks: every row is whole, imports nothing heavy, and a row is all that a new task needs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from propagation_cases import make_squares, propagate_store, single_thread

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import EvalProtocol, LabelKind
from cosettle_cache.propagation.protocols import list_presets, make_protocol
from cosettle_cache.propagation.tasks import TASKS, find_task, load
from cosettle_cache.propagation.tasks.masks import open_masks
from cosettle_cache.store import open_store
from cosettle_cache.videos import DATASETS
from cosettle_cache.videos.masks import read_mask


@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_whole(name):
    row = find_task(name)
    assert row.name == name and row.labels in LabelKind and row.folder in DATASETS
    assert callable(load(row.open)) and callable(load(row.draw))
    assert {preset.task for preset in list_presets(name)} == {name}
    assert all(isinstance(item.protocol, EvalProtocol) and item.source for item in list_presets(name))
    if row.score is None:
        assert row.check is None
    else:
        assert row.check is not None and callable(load(row.check)) and callable(load(row.score))


def test_reading_the_table_imports_nothing_heavy():
    code = """
import sys
from cosettle_cache.propagation.tasks import TASKS
sys.exit(bool({"torch", "cv2", "pyarrow", "zarr", "av"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_is_no_other_task():
    with pytest.raises(UsageError, match="there is no task flying") as caught:
        find_task("flying")
    assert caught.value.wanted == ", ".join(TASKS)


def open_mirrored(video, data_root, setting):
    """A made-up task: the objects of the first mask, left and right exchanged."""
    subject = open_masks(video, data_root, setting)
    return replace(subject, label_map=subject.label_map.flip(1))


@pytest.fixture
def mirrored(monkeypatch):
    row = replace(TASKS["sprites"], name="mirrored", folder="davis", open=open_mirrored)
    monkeypatch.setitem(TASKS, "mirrored", row)
    return row


def test_a_row_added_at_run_time_propagates(mirrored, tmp_path, monkeypatch, capsys):
    case = make_squares(tmp_path / "data")
    path = case.write(tmp_path / "squares.zarr")
    protocol = make_protocol(task="mirrored", top_k=1)
    assert protocol.size == "native"
    arguments = (open_store(path), tmp_path / "data", protocol, tmp_path / "out")
    with single_thread():
        report = propagate_store(*arguments, task="mirrored", overlays="first")
        assert report.failures == {} and {row.task for row in report.scores} == {"mirrored"}
        plain = propagate_store(*arguments[:3], tmp_path / "plain", overlays="first")
    first = [read_mask(tmp_path / folder / "raw/left/00000.png") for folder in ("out", "plain")]
    assert np.array_equal(first[0], first[1][:, ::-1]) and not np.array_equal(*first)
    assert plain.failures == {} and (tmp_path / "out/overlays/left/raw.mp4").is_file()
    monkeypatch.chdir(tmp_path)
    line = ["propagate", "--task", "mirrored", "--features", str(path), "--data-root", "data"]
    assert run_command([*line, "--set", "top_k=1", "--out", "out", "--overlays", "none", "-q"]) == 0
    assert run_command(["protocols", "--task", "mirrored"]) == 0
    assert "cosettle" in capsys.readouterr().out


def test_rows_have_no_field_that_nobody_fills():
    for item in fields(TASKS["davis"]):
        assert any(getattr(row, item.name) for row in TASKS.values()), item.name
