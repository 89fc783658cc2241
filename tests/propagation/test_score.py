"""Scoring other people's results: official figures, everything missing named first, nothing stale read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from benchmark_cases import part_map, write_davis, write_jhmdb, write_masks, write_vip
from PIL import Image

from cosettle_cache.cli import run_command
from cosettle_cache.metrics import davis_j_and_f, mean_iou, pck, strict_pck
from cosettle_cache.metrics.rows import mean_scores, read_scores, score_table, write_rows
from cosettle_cache.videos.jhmdb import write_predicted_joints
from cosettle_cache.videos.masks import read_mask, write_mask

SIZE = (24, 32)


def masks(n_frames: int, shift: int = 0) -> list[np.ndarray]:
    frames = []
    for index in range(n_frames):
        mask = np.zeros(SIZE, np.uint8)
        mask[4:12, 2 + index + shift : 10 + index + shift] = 1
        mask[14:20, 20 - index : 28 - index] = 2
        frames.append(mask)
    return frames


@pytest.fixture
def davis(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cat"):
        write_davis(tmp_path / "data/DAVIS", name, masks(5))
        write_masks(tmp_path / "results" / name, masks(5, shift=1))
    return tmp_path / "results"


def score(task, *options, out="s.parquet"):
    line = ["score", "--task", task, "--data-root", "data", "--out", out, "-q"]
    return run_command([*line, "--predictions", "results", *map(str, options)])


def test_davis(davis, capsys):
    assert score("davis") == 0
    rows = read_scores(Path("s.parquet"))
    assert [(row.video_id, row.object_id) for row in rows] == [("cat", 1), ("cat", 2), ("dog", 1), ("dog", 2)]
    expected = davis_j_and_f(np.stack(masks(5)), np.stack(masks(5, shift=1)))
    for row, item in zip(rows[:2], expected, strict=True):
        found = [row.figures[name] for name in ("j_mean", "f_recall", "f_decay")]
        assert found == [item.j_mean, item.f_recall, item.f_decay]
    assert (rows[0].tokens, rows[0].protocol, rows[0].boundary_tolerance_px) == ("results", "as given", 1)
    assert "mean over objects" in capsys.readouterr().out
    table = pq.read_table("s.parquet").to_pylist()
    found = {
        line["name"]: line["value"] for line in table if line["video_id"] == "cat" and line["object_id"] == 1
    }
    assert found == rows[0].figures and "miou" not in found


def test_json_is_one_document_and_first_and_last_masks_may_be_absent(davis, capsys):
    for name in ("00000.png", "00004.png"):
        (davis / "dog" / name).unlink()
    assert score("davis", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["complete"] is True
    assert document["means"]["results"]["n_objects"] == 4
    assert document["sequences"]["dog"] == document["sequences"]["cat"]


def test_everything_missing_or_wrong_is_listed_and_nothing_scored(davis, capsys):
    write_masks(davis.parents[0] / "results/dog", [np.zeros((12, 16), np.uint8)] * 2)
    (davis / "dog/00002.png").unlink()
    Image.new("RGB", SIZE[::-1]).save(davis / "dog/00003.png")
    for path in (davis / "cat").iterdir():
        path.unlink()
    (davis / "cat").rmdir()
    assert score("davis") == 3
    said = capsys.readouterr().err
    assert "2 of 2 videos cannot be scored" in said
    assert "cat: no folder of masks" in said
    assert "dog: lacks 1 of 3 masks: 00002.png" in said
    assert "dog: 00001.png is 12x16, not 24x32" in said
    assert "dog: 00003.png holds colours (mode RGB)" in said
    assert not Path("s.parquet").exists()


def test_every_missing_file_is_named(davis, tmp_path, capsys):
    write_davis(tmp_path / "data/DAVIS", "long", masks(12))
    write_masks(davis / "long", masks(12))
    for index in (1, 3, 4, 5, 6, 7, 8, 10):
        (davis / f"long/{index:05d}.png").unlink()
    assert score("davis") == 3
    wanted = "long: lacks 8 of 10 masks: 00001.png, 00003.png to 00008.png, 00010.png"
    assert wanted in capsys.readouterr().err


def test_masks_numbered_from_one_are_not_scored_one_frame_off(davis, capsys):
    for index in reversed(range(5)):
        (davis / f"dog/{index:05d}.png").rename(davis / f"dog/{index + 1:05d}.png")
    assert score("davis") == 3
    wanted = "dog: has 1 masks of no frame: 00005.png; frames go from 00000.png to 00004.png"
    assert wanted in capsys.readouterr().err
    assert score("davis", "--partial") == 4
    assert {row.video_id for row in read_scores(Path("s.parquet"))} == {"cat"}


def test_a_place_that_cannot_be_written_is_told_before_scoring(davis, capsys):
    Path("file").touch()
    assert score("davis", out="file/s.parquet") == 3
    assert score("davis", "--chart", "file/c.png") == 3
    assert capsys.readouterr().out == ""
    assert score("davis", "--chart", "new/c.png") == 0
    assert Image.open("new/c.png").size[0] > 500


def test_files_of_others_are_not_overwritten(davis, capsys):
    build = ["manifest", "build", "davis", "DAVIS", "--data-root", "data", "--out"]
    mask = "data/DAVIS/Annotations/480p/dog/00000.png"
    assert [run_command([*build, "m.parquet"]), run_command([*build, "m.csv"])] == [0, 0]
    for _ in range(2):  # new, then of the first time
        assert score("davis", "--chart", "c.png", out="s.csv") == 0
        assert score("davis", "--chart", "c.svg", "--manifest", "m.csv") == 0
        assert run_command([*build, "m.parquet", "--list", "m.csv"]) == 0
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    assert score("davis", out=mask) == 2
    assert score("davis", out="m.parquet") == 2
    assert score("davis", "--manifest", "m.csv", out="m.csv") == 2
    assert score("davis", "--chart", mask) == 2
    assert score("davis", "--chart", "both", out="both") == 2
    assert run_command([*build, "m.csv", "--list", "m.csv"]) == 2
    assert run_command([*build, "s.parquet"]) == 2
    assert run_command([*build, mask]) == 2
    assert run_command(["manifest", "from-list", "davis", "m.parquet"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert [("overwritten" in line, "read and written" in line) for line in said].count((True, False)) == 5
    assert [("overwritten" in line, "read and written" in line) for line in said].count((False, True)) == 4
    assert files == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_folders_of_no_video_and_advice_are_told(davis, capsys):
    write_masks(davis / "Dog", masks(5))
    truth = Path("data/DAVIS/Annotations/480p/cat/00002.png")
    write_mask(truth, np.full_like(masks(5)[2], 9))
    line = ["score", "--task", "davis", "--data-root", "data", "--out", "s.parquet"]
    assert run_command([*line, "--predictions", "results"]) == 4
    said = capsys.readouterr().err
    assert "results holds 1 folders of no video: Dog" in said
    assert "annotations of DAVIS's unsupervised task have objects that come later: take the others" in said


def test_half_of_the_sequences(davis, capsys):
    (davis / "cat/00002.png").unlink()
    assert score("davis") == 3
    assert "--partial" in capsys.readouterr().err
    assert score("davis", "--partial") == 4
    assert {row.video_id for row in read_scores(Path("s.parquet"))} == {"dog"}
    assert "1 videos were not scored" in capsys.readouterr().err


def test_a_mask_with_objects_that_are_none_is_a_named_failure(davis, capsys):
    bad = masks(5)[2]
    bad[0] = 255
    write_mask(davis / "dog/00002.png", bad)
    assert score("davis") == 4
    assert "results/dog: the predicted mask of frame 2 has objects" in capsys.readouterr().err
    assert {row.video_id for row in read_scores(Path("s.parquet"))} == {"cat"}


def test_stale_results_are_not_read(davis, capsys):
    (davis / "global_results-val.csv").write_text("J&F-Mean\n1.000\n")
    (davis / "per-sequence_results-val.csv").write_text("Sequence,J-Mean\ncat_1,1.0\n")
    line = ["score", "--task", "davis", "--data-root", "data", "--predictions", "results", "--json"]
    assert run_command(line) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["means"]["results"]["jf_mean"] < 1
    assert "they are not read" in err


def test_folders_side_by_side(davis, tmp_path, capsys):
    for name in ("dog", "cat"):
        write_masks(tmp_path / "other/results" / name, masks(5))
    assert score("davis", "--predictions", "other/results", "--json") == 0
    means = json.loads(capsys.readouterr().out)["means"]
    assert means["other/results"]["jf_mean"] == 1
    assert len(means) == 2
    assert score("davis", "--predictions", "results") == 2


def test_void_in_the_truth_gaps_and_objects_that_come_later(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gaps = [np.where(mask == 2, 5, mask).astype(np.uint8) for mask in masks(4)]
    gaps[0][0] = 255
    write_davis(tmp_path / "data/DAVIS", "gaps", gaps)
    later = masks(4)
    later[2][0] = 3
    write_davis(tmp_path / "data/DAVIS", "later", later)
    for name in ("gaps", "later"):
        write_masks(tmp_path / "results" / name, gaps if name == "gaps" else masks(4))
    assert score("davis") == 4
    assert "has objects that the first annotation lacks" in capsys.readouterr().err
    rows = read_scores(Path("s.parquet"))
    assert [(row.video_id, row.object_id, row.figures["jf_mean"]) for row in rows] == [
        ("gaps", 1, 1.0),
        ("gaps", 5, 1.0),
    ]


def test_a_video_that_cannot_be_scored_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_davis(tmp_path / "data/DAVIS", "short", masks(1))
    write_masks(tmp_path / "results/short", masks(1))
    assert score("davis") == 3
    assert "short: cannot be scored: 1 of 1 frames annotated" in capsys.readouterr().err


@pytest.fixture
def vip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("videos1", "videos2"):
        write_vip(tmp_path / "data/VIP", name)
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        for index, number in enumerate((1, 26, 50)):
            # At the network's size, three equal channels, as the released script writes them.
            large = part_map(index + (name == "videos2")).repeat(2, 0).repeat(2, 1)
            Image.fromarray(np.stack([large] * 3, axis=-1)).save(folder / f"{number:012d}_mask.png")
            Image.new("RGB", (4, 4)).save(folder / f"{number:012d}_blend.jpg")
    return tmp_path / "results"


def test_vip_is_pooled_over_clips(vip, capsys):
    assert score("vip", "--json") == 0
    document = json.loads(capsys.readouterr().out)["means"]["results"]
    truth = np.stack([part_map(index) for index in range(3)] * 2)
    shifted = np.stack([part_map(index + later) for later in (0, 1) for index in range(3)])
    expected = mean_iou(truth, shifted, 20)
    assert document["miou"] == pytest.approx(expected.miou, abs=1e-12)
    assert document["pixel_accuracy"] == pytest.approx(expected.pixel_accuracy, abs=1e-12)
    one, two = read_scores(Path("s.parquet"))
    assert one.figures["miou"] == 1 and two.figures["miou"] < 1
    assert document["clip_miou"] == pytest.approx((one.figures["miou"] + two.figures["miou"]) / 2)


def test_vip_maps_that_are_missing_coloured_or_of_no_class(vip, capsys):
    path = vip / "videos1/000000000026_mask.png"
    path.unlink()
    assert score("vip") == 3
    assert "videos1: lacks 1 of 3 maps: 000000000026_mask.png" in capsys.readouterr().err
    write_mask(path, np.full((4, 4), 20, np.uint8))
    Image.new("RGB", (4, 4), (1, 2, 3)).save(vip / "videos2/000000000001_mask.png")
    assert score("vip") == 4
    said = capsys.readouterr().err
    assert "results/videos1: the prediction has a class that does not exist" in said
    assert "does not hold classes" in said


@pytest.fixture
def jhmdb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pixels_per_cell = np.array([32, 24])[:, None, None] / 20
    truths, predictions = [], []
    (tmp_path / "results").mkdir()
    for number, name in enumerate(("run/a", "walk/b")):
        truth = write_jhmdb(tmp_path / "data/JHMDB", name, n_frames=5, seed=number) - 1
        cells = np.clip((truth + rng.normal(0, 1, truth.shape)) / pixels_per_cell, 0, 19).astype(np.float32)
        cells[:, 2, 3] = -1
        write_predicted_joints(tmp_path / f"results/{number}.dat", cells)
        truths.append(truth)
        predictions.append(cells * pixels_per_cell.astype(np.float32))
    return truths, predictions


def test_jhmdb_is_pooled_over_clips_in_both_readings(jhmdb, capsys):
    assert score("jhmdb", "--json") == 0
    document = json.loads(capsys.readouterr().out)["means"]["results"]
    inherited, strict = pck(*jhmdb), strict_pck(*jhmdb, [SIZE] * 2)
    assert document["pck_0_1"] == pytest.approx(inherited[0.1] / 100, abs=1e-9)
    assert document["strict_pck_0_5"] == pytest.approx(strict[0.5] / 100, abs=1e-9)
    assert document["visible_share"] == pytest.approx(1 - 2 / 120)


def test_jhmdb_of_another_grid_or_length(jhmdb, capsys):
    assert score("jhmdb", "--grid", "10x10") == 3
    assert "no grid of 10x10" in capsys.readouterr().err
    assert score("jhmdb", "--grid", "ten") == 2
    write_predicted_joints(Path("results/0.dat"), np.zeros((2, 15, 3), np.float32))
    Path("results/1.dat").unlink()
    assert score("jhmdb") == 3
    said = capsys.readouterr().err
    assert "run/a: 0.dat has 15 joints in 3 frames, not 15 joints in 5 frames" in said
    assert "walk/b: neither 1.dat nor walk/b.npy" in said


def test_numbers_of_more_clips_than_there_are_name_nobody(jhmdb, capsys):
    write_predicted_joints(Path("results/2.dat"), np.zeros((2, 15, 5), np.float32))
    assert score("jhmdb") == 3
    assert "run/a: 0.dat is one of 3 numbered files for 2 clips" in capsys.readouterr().err
    Path("results/2.dat").unlink()
    write_predicted_joints(Path("results/0.dat"), np.full((2, 15, 5), np.nan, np.float32))
    assert score("jhmdb") == 3
    assert "run/a: 0.dat has joints that are nowhere" in capsys.readouterr().err


def test_rows_of_every_benchmark_share_one_table(davis, tmp_path):
    assert score("davis", "--dry-run") == 0
    assert not Path("s.parquet").exists()
    assert score("davis", out="s.csv") == 0
    rows = read_scores(Path("s.csv"))
    assert len(rows) == 4
    write_rows(tmp_path / "again.parquet", rows)
    assert read_scores(tmp_path / "again.parquet") == rows
    header, lines = score_table(rows)
    assert all(len(line) == len(header) for line in lines)
    assert mean_scores(rows)[0].main == pytest.approx(np.mean([row.figures["jf_mean"] for row in rows]))


def test_where_the_data_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSETTLE_DATA", raising=False)
    (tmp_path / "data").mkdir()
    assert score("vip") == 3
    assert "holds no vip data" in capsys.readouterr().err
    assert run_command(["score", "--task", "vip", "--predictions", "results"]) == 2
    write_davis(tmp_path / "data/DAVIS", "dog", masks(3))
    assert score("davis") == 3
    assert "results is not a folder" in capsys.readouterr().err


@pytest.mark.data
def test_osvos_equals_the_official_tool(shared_data, tmp_path):
    out = tmp_path / "s.parquet"
    line = ["score", "--task", "davis", "--predictions", str(shared_data("osvos_results")), "-q"]
    # Three of the six sequences, 180 frames, two objects in one of them.
    import shutil

    root = tmp_path / "data/DAVIS"
    expected = json.loads(shared_data("osvos_results_reference.json").read_text())
    for kind in ("JPEGImages", "Annotations"):
        for name in ("bmx-trees", "car-shadow"):
            shutil.copytree(shared_data(f"DAVIS/{kind}/480p/{name}"), root / kind / "480p" / name)
    assert run_command([*line, "--data-root", str(tmp_path / "data"), "--out", str(out)]) == 0
    rows = read_scores(out)
    assert len(rows) == 3
    for row in rows:
        reference = expected[f"{row.video_id}_{row.object_id}"]
        for measure in ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay"):
            assert row.figures[measure.lower()] == pytest.approx(reference[measure], abs=1e-6)
    assert read_mask(shared_data("osvos_results/bmx-trees/00001.png")).max() == 2
