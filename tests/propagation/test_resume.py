"""Runs that stop and go on, on this process or on workers: the same bytes, and nothing done twice or lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from propagation_cases import make_squares, propagate_store, single_thread
from store_cases import folder_bytes

from cosettle_cache.cli import run_command
from cosettle_cache.core.cluster import connect
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import read_scores
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import open_store
from cosettle_cache.videos.masks import read_mask, write_mask

NAMES = ("apple", "bear", "cat", "dog")
PROTOCOL = make_protocol(size="native", top_k=1)
HEADS = [("mine", Projection(3, seed=1))]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    return root, make_squares(root / "data", names=NAMES).write(root / "squares.zarr")


@pytest.fixture
def go(squares, tmp_path):
    root, path = squares

    def propagate(out="out", **options):
        options = {"protocol": PROTOCOL, "overlays": "all", "projections": HEADS, **options}
        data = options.pop("data_root", root / "data")
        return propagate_store(open_store(path), data, out=tmp_path / out, **options)

    return propagate


@pytest.fixture(scope="module")
def whole(squares, tmp_path_factory):
    """Report and files of a run that nothing stopped."""
    root, path = squares
    out = tmp_path_factory.mktemp("whole")
    report = propagate_store(
        open_store(path), root / "data", PROTOCOL, out, overlays="all", projections=HEADS
    )
    return report, results_of(out)


def results_of(out: Path) -> dict[str, bytes]:
    """All files that a user looks at; stills stand for the films, which hold a date."""
    files = folder_bytes(out)
    return {
        name: data
        for name, data in files.items()
        if not name.startswith("progress/") and not name.endswith(".mp4")
    }


class StopAfter:
    """A progress report that asks for a stop once so many frames are done."""

    def __init__(self, stop: Event, n_frames: int) -> None:
        self.stop, self.left = stop, n_frames

    def start(self, total: int, unit: str) -> None:
        self.total = total

    def advance(self, n: int = 1, **figures: float) -> None:
        self.left -= n
        if self.left <= 0:
            self.stop.set()

    def finish(self) -> None:
        pass


def test_a_stopped_run_goes_on_with_the_videos_that_are_left(go, tmp_path, whole):
    stop = Event()
    first = go(stop=stop, progress=StopAfter(stop, 7))
    assert first.interrupted and first.n_frames == 10
    assert {row.video_id for row in first.scores} == {"apple", "bear"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/raw/bear").iterdir()}
    progress = StopAfter(Event(), 100)
    second = go(progress=progress)
    assert (second.n_videos_before, second.n_frames, progress.total) == (2, 10, 10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/raw/bear").iterdir()} == before
    assert second.scores == whole[0].scores
    assert results_of(tmp_path / "out") == whole[1]
    third = go()
    assert (third.n_videos_before, third.n_frames, third.interrupted) == (4, 0, False)
    assert third.scores == whole[0].scores


def test_what_was_half_done_counts_for_nothing(go, tmp_path, whole):
    go()
    (tmp_path / "out/progress/videos/cat.json").unlink()
    shutil.rmtree(tmp_path / "out/raw/cat")
    (tmp_path / "out/mine/dog/00002.png").unlink()
    shutil.rmtree(tmp_path / "out/overlays/apple")
    (tmp_path / "out/progress/videos/.bear.json.0.tmp").write_text("{")
    (tmp_path / "out/progress/videos/bear.json").write_text("{}")
    report = go()
    assert (report.n_videos_before, report.n_frames) == (1, 15)
    (tmp_path / "out/progress/videos/.bear.json.0.tmp").unlink()
    assert results_of(tmp_path / "out") == whole[1]


def test_a_first_mask_drawn_anew_is_a_video_to_do(go, squares, tmp_path):
    shutil.copytree(squares[0] / "data", tmp_path / "data")
    go(data_root=tmp_path / "data", overlays="none")
    again = go(data_root=tmp_path / "data", overlays="none")
    path = tmp_path / "data/DAVIS/Annotations/480p/bear/00000.png"
    mask = read_mask(path)
    mask[:16] = 0
    os.utime(path, ns=(0, 0))
    write_mask(path, mask)
    report = go(data_root=tmp_path / "data", overlays="none")
    assert (again.n_frames, report.n_frames) == (0, 5)


def test_other_settings_are_listed_and_nothing_is_touched(go, tmp_path):
    report = go()
    before = results_of(tmp_path / "out")
    for options, key in (
        ({"protocol": make_protocol(size="native", top_k=2)}, "protocol.top_k: wanted 2, found 1"),
        ({"projections": []}, "projections.mine: wanted (absent)"),
        ({"projections": [("mine", Projection(3, seed=2))]}, "projections.mine: wanted "),
    ):
        with pytest.raises(FingerprintError, match="results of other settings") as caught:
            go(**options)
        assert any(line.startswith(key) for line in caught.value.details)
    assert results_of(tmp_path / "out") == before
    (tmp_path / "out/notes.txt").write_text("the user's own")
    anew = go(projections=[], restart=True)
    assert anew.n_videos_before == 0
    assert [row.tokens for row in anew.scores] == ["raw"] * 8
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "notes.txt",
        "overlays",
        "progress",
        "raw",
    ]
    assert anew.scores == tuple(row for row in report.scores if row.tokens == "raw")


def test_workers_give_the_same_bytes_and_go_on_where_another_run_stopped(go, tmp_path, whole, squares):
    stop = Event()
    go(stop=stop, progress=StopAfter(stop, 1))
    with connect(workers=2, threads=1) as cluster:
        progress = StopAfter(Event(), 100)
        report = go(runner=cluster.run, device=None, progress=progress)
        assert (report.n_videos_before, report.n_frames, progress.left) == (1, 15, 85)
        assert (report.scores, report.failures) == (whole[0].scores, {})
        assert results_of(tmp_path / "out") == whole[1]
        # A folder that the workers do not see is an error, not a video without annotations.
        absent = go(out="other", runner=cluster.run, device=None, data_root=tmp_path / "absent")
        assert isinstance(absent.error, InputError)
        assert "is not a folder on" in absent.error.message


def test_neighbours_are_kept_and_serve_other_labels_and_temperatures(go, tmp_path, monkeypatch):
    lists = tmp_path / "lists"
    first = go(neighbors=lists, overlays="none")
    warm = make_protocol(size="native", top_k=1, temperature=0.2)
    fresh = go(out="fresh", protocol=warm, overlays="none")
    again = go(out="again", protocol=warm, overlays="none", neighbors=lists)
    assert (first.n_reused, fresh.n_reused, again.n_reused) == (0, 0, 8)
    assert again.scores == fresh.scores
    assert results_of(tmp_path / "again") == results_of(tmp_path / "fresh")
    wider = go(
        out="wider",
        protocol=make_protocol(size="native", top_k=2),
        overlays="none",
        neighbors=lists,
        projections=[],
    )
    assert wider.n_reused == 0 and wider.failures == {}
    assert len(list(lists.iterdir())) == 3
    damaged = sorted(lists.rglob("apple.parquet"))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    mended = go(out="mended", protocol=warm, overlays="none", neighbors=lists)
    assert (mended.n_reused, mended.scores) == (6, fresh.scores)


def test_a_memory_limit_changes_nothing_but_memory(go, whole):
    report = go(search="torch", memory_limit=200_000, overlays="none")
    assert report.scores == whole[0].scores


@pytest.fixture
def line(squares, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, path = squares
    rules = ["--set", "size=native", "--set", "top_k=1", "--overlays", "none"]
    where = ["--features", str(path), "--data-root", str(root / "data"), "--out", "o"]
    return ["propagate", "--task", "davis", *where, *rules]


def test_an_interrupt_finishes_the_video_and_the_next_run_the_rest(line, monkeypatch, capsys):
    class InterruptsOnce(StopAfter):
        def advance(self, n: int = 1, **figures: float) -> None:
            if self.left == 100:
                os.kill(os.getpid(), signal.SIGINT)
            super().advance(n)

    with monkeypatch.context() as patch:
        patch.setattr(Talk, "progress", lambda self, label: InterruptsOnce(Event(), 100))
        assert run_command(line) == 130
    assert "finishing the videos in hand" in capsys.readouterr().err
    assert json.loads(Path("o/summary.json").read_text())["complete"] is False
    assert {row.video_id for row in read_scores(Path("o/scores.parquet"))} == {"apple"}
    assert run_command(line) == 0
    talk = capsys.readouterr()
    assert "o: 1 of 4 videos are finished already" in talk.err
    assert len(read_scores(Path("o/scores.parquet"))) == 8
    assert run_command([*line, "--set", "top_k=2"]) == 3
    assert "start this one anew with --restart" in capsys.readouterr().err
    assert len(read_scores(Path("o/scores.parquet"))) == 8


def test_a_killed_run_goes_on(line, squares, tmp_path):
    words = [sys.executable, "-m", "cosettle_cache.cli", *line]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    marks = tmp_path / "o/progress/videos"
    while process.poll() is None and not (marks.is_dir() and any(marks.iterdir())):
        pass
    process.kill()
    process.wait()
    assert run_command([*line, "--quiet"]) == 0
    assert len(read_scores(Path("o/scores.parquet"))) == 8
    assert len(list(Path("o/raw").rglob("*.png"))) == 20
