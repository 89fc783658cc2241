"""Published lists: every way of writing one, manifests without data, and what is checked against them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_cases import write_frames, write_vip
from conftest import SHARED

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import LabelKind
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.lists import list_manifest, read_list
from cosettle_cache.videos.manifest import manifest_digest, read_manifest, write_manifest

COMMITTED = Path(__file__).parents[2] / "data_manifests"
#: File, data set, its list, videos, frames, objects.
LISTS = [
    ("davis2017_val", "davis", "davis2017_val.csv", 30, 1999, 61),
    ("vip_val", "vip", "vip_val.txt", 50, 0, 0),
    ("jhmdb_split1_test", "jhmdb", "jhmdb_split1_test.txt", 268, 0, 0),
    ("k400_val_1000", "kinetics", "k400_val_1000.txt", 1000, 0, 0),
]


@pytest.mark.parametrize(("name", "dataset", "file", "n_videos", "n_frames", "n_objects"), LISTS)
def test_committed_manifests_are_the_published_lists(name, dataset, file, n_videos, n_frames, n_objects):
    manifest = read_manifest(COMMITTED / f"{name}.parquet", listed=True)
    assert len(manifest) == n_videos
    assert sum(video.n_frames for video in manifest) == n_frames
    assert sum(video.n_objects for video in manifest) == n_objects
    assert {"source", "list_sha256", "date"} <= manifest.provenance.keys()
    if not (SHARED / "lists" / file).is_file():
        pytest.skip("the published lists are absent")
    again = list_manifest(dataset, SHARED / "lists" / file, folder=None, split=None, source="")
    assert manifest_digest(again) == manifest_digest(manifest)
    assert again.provenance["list_sha256"] == manifest.provenance["list_sha256"]


def test_sizes_of_davis_are_known():
    manifest = read_manifest(COMMITTED / "davis2017_val.parquet")
    sizes = {video.video_id: (video.height, video.width) for video in manifest}
    assert sizes["shooting"] == (480, 1152) and sizes["bike-packing"] == (480, 910)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "a/b\nc\n\n"),
        ("l.txt", "/x/Images/a/b /x/Annotations/Category_ids/a/b\n/x/Images/c Category_ids/c"),
        ("l.txt", "j/joint_positions/a/b/joint_positions.mat j/Rename_Images/a/b\nc\n"),
        ("l.csv", "sequence,frames\na/b,3\nc,4\n"),
        ("l.csv", "video_id\na/b\nc\n"),
        ("l.csv", "frames,name\n3,a/b\n4,c\n"),
        ("l.txt", "\ufeffa/b\r\nc\r\n"),
    ],
)
def test_every_way_of_writing_a_list(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [item.name for item in read_list(tmp_path / name)] == ["a/b", "c"]


def test_names_of_a_table_are_texts(tmp_path):
    (tmp_path / "l.csv").write_text("name,frames\n0001,3\n1979-05-27,4\n")
    assert [item.name for item in read_list(tmp_path / "l.csv")] == ["0001", "1979-05-27"]
    times = pa.array([1, None], pa.timestamp("ns"))  # which Python has no name for
    pq.write_table(pa.table({"name": ["a", "b"], "made": times}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match=r"l\.parquet is not a readable table"):
        read_list(tmp_path / "l.parquet")


def test_names_with_spaces_and_their_clips(tmp_path):
    write_frames(tmp_path / "my clip", ["0.jpg"])
    (tmp_path / "l.txt").write_text("my clip\n")
    assert [item.name for item in read_list(tmp_path / "l.txt")] == ["my clip"]
    built = build_manifest("folder", tmp_path, tmp_path, names=["my clip"])
    assert [video.media for video in built.manifest] == ["my clip"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.txt", "\n", "lists no videos"),
        ("l.txt", "Images/a Annotations/a b\n", "not a list of videos"),
        ("l.csv", "clip\na\n", "names no videos"),
        ("l.csv", "video_id,frames\na,many\n", "no number"),
    ],
)
def test_bad_lists_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_list(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_list(tmp_path / "none.txt")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_unknown_sizes_survive_and_no_job_takes_them(tmp_path, suffix):
    (tmp_path / "l.txt").write_text("videos1\nvideos2\n")
    manifest = list_manifest("vip", tmp_path / "l.txt", folder="V", split=None, source="a test")
    path = tmp_path / f"l.{suffix}"
    write_manifest(path, manifest)
    again = read_manifest(path, listed=True)
    assert again.videos == manifest.videos
    video = again.videos[0]
    assert (video.n_frames, video.label_kind, video.media) == (0, LabelKind.PARTS, "V/Images/videos1")
    with pytest.raises(InputError, match="does not say how long") as caught:
        read_manifest(path)
    assert f"--list {path}" in caught.value.hint


def test_a_list_of_another_data_set_is_refused(tmp_path):
    (tmp_path / "l.txt").write_text("a\n")
    with pytest.raises(UsageError, match="no list makes a manifest of ytvos"):
        list_manifest("ytvos", tmp_path / "l.txt", folder=None, split=None, source="")


def test_from_a_list_to_what_is_missing_and_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_vip(tmp_path / "data/VIP", "videos2")
    write_vip(tmp_path / "data/VIP", "videos3")
    Path("l.txt").write_text("videos3\nvideos1\n")
    assert run_command(["manifest", "from-list", "vip", "l.txt", "--source", "a test"]) == 0
    assert run_command(["manifest", "check", "l.parquet", "--data-root", "data"]) == 4
    assert "videos1: data/VIP/Images/videos1 does not exist" in capsys.readouterr().err
    build = ["manifest", "build", "vip", "VIP", "--data-root", "data", "--list", "l.parquet"]
    assert run_command(build) == 4
    (video,) = read_manifest(Path("vip.parquet"))
    assert (video.video_id, video.n_frames) == ("videos3", 3)
    assert run_command(["manifest", "check", "vip.parquet", "--data-root", "data", "--decode"]) == 0
    (tmp_path / "data/VIP/Annotations/Category_ids/videos3/000000000026.png").unlink()
    assert run_command(["manifest", "check", "vip.parquet", "--data-root", "data"]) == 4
    capsys.readouterr()
    assert run_command(["manifest", "show", "l.parquet"]) == 0
    assert "source: a test" in capsys.readouterr().out
