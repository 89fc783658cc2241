"""`projection info` and `projection export` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_cases import pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.heads.projection import Projection, load_projection, projection_sha256, save_projection


def run(*arguments: object) -> int:
    return run_command(["projection", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    save_projection(path, Projection(4, "mlp2", init="pytorch"), {"backbone": "dino_b"})
    return path


def test_info_in_words_and_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", file) == 0
    text = capsys.readouterr().out
    assert "head: mlp2" in text
    assert "parameters: 48" in text
    assert "linear 2: singular values" in text
    assert "backbone: dino_b" in text
    assert run("info", file, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sha256"] == projection_sha256(load_projection(file))
    assert len(document["singular_values"]) == 2


def test_export_and_its_dry_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checkpoint.pth"
    assert run("export", file, out, "--format", "cosettle", "--dry-run") == 0
    assert "adapter.adapter.adapter_linear2.weight 4x4" in capsys.readouterr().out
    assert not out.exists()
    assert run("export", file, out) == 0
    assert projection_sha256(load_projection(out)) == projection_sha256(load_projection(file))


def test_an_export_replaces_nothing_but_itself(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "checkpoint.pth"
    assert [run("export", file, trained), run("export", file, trained)] == [0, 0]
    before = file.read_bytes(), trained.read_bytes()
    save_projection(tmp_path / "other.safetensors", Projection(4, "linear"), {})
    assert run("export", file, file) == 2
    assert "is both read and written" in capsys.readouterr().err
    assert run("export", tmp_path / "other.safetensors", trained) == 2
    assert "holds something else, and is not overwritten" in capsys.readouterr().err
    assert (file.read_bytes(), trained.read_bytes()) == before


def test_what_cannot_be_exported_ends_with_a_sentence(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("info", tmp_path / "none.pth") == 3
    assert "none.pth does not exist" in capsys.readouterr().err
    assert run("export", file, tmp_path / "p.onnx", "--format", "onnx") == 2
    assert "no layout 'onnx'" in capsys.readouterr().err
    save_projection(file, Projection(4, "affine"), {})
    assert run("export", file, tmp_path / "p.pth") == 3
    assert "holds the head affine" in capsys.readouterr().err


def test_fit_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = pairs_case(8).write(tmp_path / "s.zarr"), tmp_path / "out"
    assert run("fit", "--features", store, "--out", out, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["held_out"] == 2
    assert not out.exists()
    assert run("fit", "--features", store, "--out", out, "--json", "--quiet") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["projection_sha256"] == projection_sha256(load_projection(out / "projection.safetensors"))
    assert run("fit", "--features", store, "--out", out, "--correspondence", "position") == 0
    assert "margin" in capsys.readouterr().out
    assert run("fit", "--features", store, "--out", out, "--spectral-lambda", 1e-9) == 2
    assert "removes all directions" in capsys.readouterr().err
