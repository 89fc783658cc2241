"""The table of data sets: every row builds, is found and is offered; a new one is a row and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cosettle_cache.cli import run_command
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import LabelKind, Manifest, MediaKind, Video
from cosettle_cache.videos import DATASETS, DataSet, build_manifest, find
from cosettle_cache.videos.find import benchmark_data, evaluation_data, training_data
from cosettle_cache.videos.folders import build_folder
from cosettle_cache.videos.lists import list_manifest
from cosettle_cache.videos.masks import write_mask


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_row_is_whole(name):
    row = DATASETS[name]
    assert row.help
    assert callable(row.builder())
    assert not row.mark or row.folders
    assert not row.labels or (row.media and row.label_kind)
    for place in filter(None, (row.media, row.labels)):
        assert "{name}" in place


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_row_is_found_below_a_data_root(name, tmp_path):
    row = DATASETS[name]
    assert row.find(tmp_path) is None
    for folder in row.folders:
        (tmp_path / folder / row.mark).mkdir(parents=True, exist_ok=True)
    assert row.find(tmp_path) == (tmp_path / row.folders[0] if row.folders else None)


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.media])
def test_every_row_with_places_makes_a_manifest_of_a_list(name, tmp_path):
    (tmp_path / "l.txt").write_text("a\n")
    (video,) = list_manifest(name, tmp_path / "l.txt", folder="X", split=None, source="")
    assert video.media == f"X/{DATASETS[name].media.format(name='a')}"
    assert (video.dataset, video.label_kind) == (name, DATASETS[name].label_kind)


def test_the_command_offers_every_row(capsys):
    assert run_command(["manifest", "build", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}:" in said for name in DATASETS)


def test_the_table_is_light():
    code = "import sys, cosettle_cache.videos; print({'cv2', 'av', 'pyarrow', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def write_clip(root, name, *, masks=True):
    for folder in ("frames", "objects") if masks else ("frames",):
        (root / folder / name).mkdir(parents=True)
    for index in range(3):
        Image.fromarray(np.full((8, 12, 3), index, np.uint8)).save(root / f"frames/{name}/{index}.jpg")
        if masks:
            write_mask(root / f"objects/{name}/{index}.png", np.eye(8, 12, dtype=np.uint8) * 2)


def test_a_mask_data_set_is_a_row(tmp_path, monkeypatch):
    row = DataSet(
        "objects of my own",
        label_kind=LabelKind.MASKS,
        folders=("Mine",),
        mark="frames",
        media="frames/{name}",
        labels="objects/{name}",
    )
    monkeypatch.setitem(DATASETS, "mine", row)
    write_clip(tmp_path / "Mine", "a")
    write_clip(tmp_path / "Mine", "b", masks=False)
    a, b = build_manifest("mine", str(tmp_path / "Mine"), str(tmp_path)).manifest
    assert (a.media, a.labels) == ("Mine/frames/a", "Mine/objects/a")
    assert (a.dataset, a.label_kind, a.n_objects, a.labelled_frames) == ("mine", LabelKind.MASKS, 2, 3)
    assert (b.labels, b.label_kind) == (None, None)
    assert benchmark_data("mine", tmp_path).manifest.videos == (a, b)
    assert evaluation_data("mine", tmp_path, Talk(quiet=True)).manifest.videos == (a, b)
    (tmp_path / "l.txt").write_text("b\n")
    (listed,) = list_manifest("mine", tmp_path / "l.txt", folder=None, split=None, source="")
    assert (listed.media, listed.labels) == ("Mine/frames/b", "Mine/objects/b")
    out = tmp_path / "m.parquet"
    build = ["manifest", "build", "mine", "Mine", "--data-root", str(tmp_path), "--out", str(out)]
    assert run_command(build) == 0
    assert run_command(["manifest", "check", str(out), "--data-root", str(tmp_path), "--decode"]) == 0


def test_a_data_root_counts_whatever_a_manifest_calls_its_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "ensure_sprites", lambda: tmp_path / "built-in")
    write_clip(tmp_path / "Mine", "a", masks=False)
    (video,) = build_manifest("folder", tmp_path / "Mine", tmp_path).manifest
    manifest = Manifest((replace(video, dataset="sprites"),))
    assert find.media_root(manifest, tmp_path) == tmp_path
    assert (
        find.media_root(manifest, tmp_path / "Mine")
        == find.media_root(manifest, None)
        == tmp_path / "built-in"
    )


def test_a_video_of_one_frame_is_no_pair(tmp_path, capsys):
    manifest = Manifest(
        tuple(Video(name, name, MediaKind.FRAMES, n, 8, 8) for name, n in (("still", 1), ("clip", 2)))
    )
    data = find.without_stills(find.Data(manifest, tmp_path, ""), Talk())
    assert [video.video_id for video in data.manifest] == ["clip"]
    assert data.failures == {"still": "one frame is no pair"}
    assert "left out still: one frame is no pair" in capsys.readouterr().err
    with pytest.raises(InputError, match="no video has two frames"):
        find.without_stills(find.Data(Manifest(manifest.videos[:1]), tmp_path, ""), Talk())


def test_a_row_may_bring_its_own_builder(tmp_path, monkeypatch):
    def build_mine(root, data_root, split, names=()):
        return build_folder(root, data_root, split, names)

    monkeypatch.setitem(DATASETS, "mine", DataSet("clips", build_mine, split="all", folders=("Mine/frames",)))
    write_clip(tmp_path / "Mine", "a", masks=False)
    (video,) = training_data(tmp_path, Talk(quiet=True)).manifest
    assert (video.video_id, video.split) == ("a", "all")
