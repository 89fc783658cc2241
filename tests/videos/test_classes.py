"""Class folders and the two benchmarks with official lists: classes, splits, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_folders import make_file, make_frames

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.videos import build_manifest


def rows(name: str, root: Path, **options: object) -> list[tuple[str, str | None, str]]:
    result = build_manifest(name, root, root, **options)
    assert not result.failures
    return [(video.video_id, video.class_name, video.split) for video in result.manifest]


def test_classes_at_any_depth(tmp_path: Path) -> None:
    make_file(tmp_path / "set" / "run" / "1.mp4")
    make_frames(tmp_path / "set" / "run" / "2")
    make_frames(tmp_path / "sit" / "1")
    make_file(tmp_path / "stray.mp4")
    result = build_manifest("classes", tmp_path, tmp_path, split="mine")
    assert [(v.video_id, v.class_name, v.split) for v in result.manifest] == [
        ("set/run/1", "run", "mine"),
        ("set/run/2", "run", "mine"),
        ("sit/1", "sit", "mine"),
    ]
    assert "lies in no class folder" in result.failures["stray.mp4"]
    names = ["sit/1", "set/run/1"]
    assert [v.video_id for v in build_manifest("classes", tmp_path, tmp_path, names=names).manifest] == names


def write_ucf(root: Path) -> None:
    for name in (
        "Archery/v_Archery_g01_c01",
        "Archery/v_Archery_g08_c01",
        "HandstandPushups/v_HandStandPushups_g01_c01",
    ):
        make_file(root / "UCF-101" / f"{name}.avi")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\n")
    # The official lists and folders do not agree on capitals.
    (lists / "testlist01.txt").write_text(
        "Archery/v_Archery_g01_c01.avi\nHandstandPushups/v_HandstandPushups_g01_c01.avi\n"
    )
    (lists / "trainlist02.txt").write_text(
        "Archery/v_Archery_g01_c01.avi 1\nArchery/v_Archery_g99_c01.avi 1\n"
    )
    (lists / "testlist02.txt").write_text("Archery/v_Archery_g08_c01.avi\n")


def test_ucf101(tmp_path: Path) -> None:
    write_ucf(tmp_path)
    expected = [
        ("Archery/v_Archery_g01_c01", "Archery", "test"),
        ("Archery/v_Archery_g08_c01", "Archery", "train"),
        ("HandstandPushups/v_HandStandPushups_g01_c01", "HandstandPushups", "test"),
    ]
    assert rows("ucf101", tmp_path) == expected
    result = build_manifest("ucf101", tmp_path / "UCF-101", tmp_path, split="1")
    assert [(v.video_id, v.class_name, v.split) for v in result.manifest] == expected
    assert result.manifest.provenance["split"] == "split1"
    assert result.manifest.videos[0].media == "UCF-101/Archery/v_Archery_g01_c01.avi"
    second = build_manifest("ucf101", tmp_path, tmp_path, split="02")
    assert [v.split for v in second.manifest] == ["train", "test", ""]
    (missing,) = second.failures
    assert missing == "UCF-101/Archery/v_Archery_g99_c01.avi"


def test_hmdb51(tmp_path: Path) -> None:
    for name in ("A_#1_run.avi", "B_run.avi", "C_run.avi"):
        make_file(tmp_path / "run" / name)
    make_frames(tmp_path / "sit" / "D_sit")
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "run_test_split1.txt").write_text("A_#1_run.avi 1 \nB_run.avi 2 \nC_run.avi 0 \n")
    (lists / "sit_test_split1.txt").write_text("D_sit.avi 1 \n")
    assert rows("hmdb51", tmp_path) == [
        ("run/A_#1_run", "run", "train"),
        ("run/B_run", "run", "test"),
        ("run/C_run", "run", ""),
        ("sit/D_sit", "sit", "train"),
    ]
    with pytest.raises(InputError, match="no hmdb51 lists"):
        build_manifest("hmdb51", tmp_path, tmp_path, split="3")
    with pytest.raises(UsageError, match="no official split"):
        build_manifest("hmdb51", tmp_path, tmp_path, split="4")
    (lists / "sit_test_split1.txt").write_text("D_sit.avi train\n")
    with pytest.raises(InputError, match="not a list of HMDB51"):
        build_manifest("hmdb51", tmp_path, tmp_path)


def test_without_lists_nobody_has_a_part(tmp_path: Path) -> None:
    make_file(tmp_path / "run" / "a.avi")
    assert rows("ucf101", tmp_path) == [("run/a", "run", "")]


@pytest.mark.data
def test_real_class_folders(shared_data) -> None:
    root = shared_data("clips/labelled")
    result = build_manifest("classes", root, root.parent)
    assert (len(result.manifest), len(result.failures)) == (100, 0)
    assert len({video.class_name for video in result.manifest}) == 10
