"""Trackers: absent ones are refused, broken ones do not end a run, a resumed run repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from forking import forked
from test_train import SMALL, After, make_store

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import UsageError
from cosettle_cache.training.log import FiguresLog, StepFigures
from cosettle_cache.training.plan import Axis
from cosettle_cache.training.run import train
from cosettle_cache.training.trackers import TRACKERS, find_tracker


def test_an_absent_tracker_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [name for name in TRACKERS if find_spec(name) is None]
    if not absent:
        pytest.skip("all trackers are installed")
    for name in absent:  # folders as runs leave them; no packages
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "here")
    store = make_store(tmp_path)
    line = ["train", "--features", store.path, "--out", str(tmp_path / "run"), "--device", "cpu"]
    for name in absent:
        for options in ([], ["--dry-run"]):
            assert run_command([*line, "--tracker", name, *options]) == 2
            said = capsys.readouterr().err
            assert f"needs the package {name}" in said and f"pip install 'cosettle-cache[{name}]'" in said
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_and_heads_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="unknown tracker") as error:
        find_tracker("mlflow")
    assert error.value.wanted == "auto or tensorboard or wandb or trackio or none"
    assert find_tracker("none") is None
    features = ["--features", make_store(tmp_path).path]
    assert run_command(["train", *features, "--head", "spectral", "--tracker", "wandb"]) == 2
    assert "tracker" in capsys.readouterr().err


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    store, axes = make_store(tmp_path), [Axis("temperature", (0.03, 0.1))]
    train(store, SMALL, tmp_path / "run", sweep=axes, tracker="none")
    for folder in (tmp_path / "run").glob("temperature=*"):
        (folder / "tensorboard").write_text("in the way")
    report = train(store, SMALL, tmp_path / "run", sweep=axes, tracker="tensorboard", resume=False)
    assert all(member.projection_sha256 for member in report.members)
    assert capsys.readouterr().err.count("tensorboard failed and gets no more figures") == 1


def test_lines_that_come_again_are_counted(tmp_path: Path) -> None:
    figures = StepFigures(0, 0, *[0.5] * 9)
    log = FiguresLog(tmp_path / "m.jsonl", 0)
    for _ in range(3):
        log.append(figures)
    kept = log.sync() // 3
    log.close()
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "epo')  # a kill
    log = FiguresLog(tmp_path / "m.jsonl", kept)
    assert log.n_again == 2
    for left in (1, 0, 0):
        log.append(figures)
        assert log.n_again == left
    assert log.sync() == 4 * kept
    log.close()


def killed_run(tmp_path: Path, tracker: str) -> None:
    """Train two members in a process that is killed after a checkpoint, then go on to the end."""
    store, axes = make_store(tmp_path), [Axis("temperature", (0.03, 0.1))]

    def killed() -> None:
        def kill() -> None:
            threading.Event().wait(2)  # services write a little later
            os.kill(os.getpid(), signal.SIGKILL)

        train(store, SMALL, tmp_path / "run", sweep=axes, tracker=tracker, progress=After(5, kill))

    assert forked(killed) == -signal.SIGKILL
    assert train(store, SMALL, tmp_path / "run", sweep=axes, tracker=tracker).steps_before < 5


def figures_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_trackio_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio.sqlite_storage
    import trackio.utils

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "db"))
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db", raising=False)
    killed_run(tmp_path, "trackio")
    found: dict[str, list[int]] = {}
    with sqlite3.connect(tmp_path / "db" / "cosettle-cache.db") as database:
        rows: Any = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        for name, step, metrics in rows:
            assert "train/total" in json.loads(metrics)
            found.setdefault(name, []).append(step)
    assert len(found) == 2
    steps = figures_of(tmp_path / "run" / "temperature=0.1" / "metrics.jsonl")
    assert list(found.values()) == [steps, steps]
    assert all(name.startswith("run-temperature=") for name in found)


def test_wandb_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    store, axes = make_store(tmp_path), [Axis("temperature", (0.03, 0.1))]
    train(store, SMALL, tmp_path / "run", sweep=axes, tracker="wandb")
    train(store, SMALL, tmp_path / "run", sweep=axes, tracker="wandb")  # done already: opens no run
    for folder in (tmp_path / "run").glob("temperature=*"):
        identity = json.loads((folder / "tracker.json").read_text())["id"]
        (file,) = (folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
        assert b"train/cycle_accuracy" in file.read_bytes()
