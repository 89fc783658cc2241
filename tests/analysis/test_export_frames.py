"""Exported frame vectors: the numbers, the layouts that temporal models read, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_cases import DIM, labelled_case
from store_cases import frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.files import MARK, make_folder
from cosettle_cache.core.tables import read_table
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.store import open_store


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def export(*options: object) -> int:
    return run_command(["export", "frames", "--features", "s.zarr", "--out", "out", "-q", *map(str, options)])


def expected(video_id: str, projection: Projection | None = None) -> np.ndarray:
    tokens = torch.from_numpy(open_store("s.zarr").tokens(video_id)).float()
    with torch.inference_mode():
        return (projection(tokens) if projection else tokens).mean((1, 2)).numpy()


def test_npy_files_as_breakfast_has_them() -> None:
    frames_case([("P03/cam01/P03_tea", 5, 2, 3), ("P03/stereo/P03_tea_ch0", 4, 2, 2)]).write(Path("s.zarr"))
    assert export() == 0
    files = {path.name for path in Path("out").iterdir()}
    assert files == {"P03_cam01_P03_tea.npy", "P03_stereo01_P03_tea.npy", "export.json", MARK}
    features = np.load("out/P03_cam01_P03_tea.npy")
    assert (features.shape, features.dtype) == ((DIM, 5), np.float32)
    np.testing.assert_allclose(features.T, expected("P03/cam01/P03_tea"), atol=1e-6)
    assert export("--axes", "frame-dim") == 0
    assert np.load("out/P03_stereo01_P03_tea.npy").shape == (4, DIM)
    document = json.loads(Path("out/export.json").read_text())
    assert document["axes"] == "frame-dim" and document["vectors"]["P03/cam01/P03_tea"] == 5
    assert document["tokens"] == "raw" and len(document["manifest_digest"]) == 64


def test_a_projection_in_a_table() -> None:
    labelled_case({"a": 2, "b": 2}, every=2).write(Path("s.zarr"))
    projection = Projection(DIM, "linear", seed=1)
    save_projection(Path("mine.safetensors"), projection, {})
    assert export("--format", "parquet", "--projection", "mine.safetensors") == 0
    rows = read_table(Path("out/frames.parquet")).to_pylist()
    assert [(row["video_id"], row["frame"]) for row in rows[:4]] == [
        ("a/0", 0),
        ("a/0", 2),
        ("a/0", 4),
        ("a/1", 0),
    ]
    np.testing.assert_allclose([row["vector"] for row in rows[:3]], expected("a/0", projection), atol=1e-6)


def test_hdf5_holds_the_same() -> None:
    h5py = pytest.importorskip("h5py")
    labelled_case({"a": 2, "b": 2}).write(Path("s.zarr"))
    assert export("--format", "hdf5") == 0
    with h5py.File("out/frames.h5") as file:
        assert set(file) == {"a_0", "a_1", "b_0", "b_1"}
        assert file.attrs["axes"] == "dim-frame" and file["b_1"].attrs["video_id"] == "b/1"
        np.testing.assert_allclose(file["b_1"][:].T, expected("b/1"), atol=1e-6)
    assert {path.name for path in Path("out").iterdir()} == {"frames.h5", "export.json", MARK}


def test_vectors_stand_for_the_frames_that_the_store_skips(capsys: pytest.CaptureFixture[str]) -> None:
    labelled_case({"a": 2}, n_frames=7, every=3).write(Path("s.zarr"))
    assert run_command(["export", "frames", "--features", "s.zarr", "--out", "out"]) == 0
    assert "one frame in 3" in capsys.readouterr().err
    assert np.load("out/a_0.npy").shape == (DIM, 3)
    assert export("--repeat", "--json") == 0
    assert json.loads(capsys.readouterr().out)["vectors"] == 14
    repeated = np.load("out/a_0.npy").T
    np.testing.assert_array_equal(repeated, expected("a/0")[[0, 0, 0, 1, 1, 1, 2]])


def test_what_cannot_be_read_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    case = labelled_case({"a": 2, "b": 2})
    case.write(Path("s.zarr"), slots=range(1, case.plan.n_slots))
    assert export() == 4
    assert "a/0: not extracted yet" in capsys.readouterr().err
    assert not Path("out/a_0.npy").exists() and Path("out/b_1.npy").exists()
    assert list(json.loads(Path("out/export.json").read_text())["failures"]) == ["a/0"]


def test_what_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    frames_case([("a/b", 2, 2, 2), ("a_b", 2, 2, 2)]).write(Path("s.zarr"))
    assert export("--dry-run") == 3
    assert "would be called a_b" in capsys.readouterr().err
    pairs_case().write(Path("p.zarr"))
    assert run_command(["export", "frames", "--features", "p.zarr"]) == 3
    frames_case().write(Path("f.zarr"))
    Path("file").touch()
    assert run_command(["export", "frames", "--features", "f.zarr", "--out", "file/x", "-q"]) == 3
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else find(name))
    assert run_command(["export", "frames", "--features", "f.zarr", "--format", "hdf5"]) == 2
    assert "cosettle-cache[hdf5]" in capsys.readouterr().err
    assert run_command(["export", "frames", "--features", "f.zarr", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"] == "dim-frame"
    assert not Path("runs").exists()


def test_export_writes_to_folders_of_its_own_only(capsys: pytest.CaptureFixture[str]) -> None:
    frames_case([("one", 5, 2, 3)]).write(Path("s.zarr"))
    make_folder(Path("out"))
    Path("out/one.npy").write_text("mine")
    assert export() == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["one.npy"]
    assert Path("out/one.npy").read_text() == "mine"
    assert export("--out", "s3://bucket/out") == 2
    assert "is a URL" in capsys.readouterr().err
    assert not Path("s3:").exists()
