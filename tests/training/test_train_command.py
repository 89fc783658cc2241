"""`cosettle-cache train` as typed: a sweep, held-out clips, several stores, and lines that mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from store_cases import frames_case
from test_train import make_store
from torch import Tensor

from cosettle_cache.cli import run_command
from cosettle_cache.heads import HEADS
from cosettle_cache.heads.projection import load_projection
from cosettle_cache.training.log import read_figures, read_validation
from cosettle_cache.training.losses import REGULARIZERS, Originals

SMALL = ["--epochs", "2", "--batch", "3", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Two stores of pairs and one of frames without shifted views."""
    folder = tmp_path_factory.mktemp("stores")
    first, second = (make_store(folder, 9, seed, f"{seed}.zarr").path for seed in (0, 1))
    return str(first), str(second), str(frames_case().write(folder / "f.zarr"))


def test_a_sweep_as_typed(
    stores: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = ["--features", stores[0], "--features", stores[1], "--out", str(tmp_path / "run")]
    sweep = ["--sweep", "separability-weight=1,auto", "--validation", "0.4", *SMALL]
    assert run_command(["train", *features, *sweep]) == 0
    said = capsys.readouterr().out
    assert "separability_weight=auto" in said and "held-out margin" in said and "waiting for data" in said
    assert run_command(["train", *features, *sweep, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [member["name"] for member in document["members"]] == [
        "separability_weight=1",
        "separability_weight=auto",
    ]
    assert all(member["last_validation"]["margin"] for member in document["members"])


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--sweep temprature=1,2", 2, "did you mean temperature?"),
        ("--sweep batch_size=1,2", 2, "cannot be swept"),
        ("--separability-weight much", 2, "a number or auto"),
        ("--window 3", 2, "does not divide the grid"),
        ("--palindrome 3", 2, "too few for longer walks"),
        ("--order backwards", 2, "samples or shards"),
        ("--precision int4", 2, "float32 or tf32 or bf16 or fp16"),
        ("--head spectral --sweep window=1,2", 2, "without training"),
        ("--head spectral --window 4 --epochs 3", 2, "1 stores, 0 axes, window, epochs"),
        ("--batch 4096", 2, "larger than an epoch"),
        ("--head spectrl", 2, "unknown head"),
        ("--regularizer l1", 2, "kl or mse or cosine"),
    ],
)
def test_lines_that_mean_nothing(
    line: str, code: int, said: str, stores: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", "--features", stores[0], "--dry-run", *line.split()]) == code
    assert said in capsys.readouterr().err


def test_a_regulariser_of_ones_own_trains(
    stores: tuple[str, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def l1(projected: Tensor, originals: Originals, reduction: str) -> Tensor:
        return (projected - originals.unit).abs().sum() / len(projected)

    words = ["train", "--features", stores[0], "--out", str(tmp_path), *SMALL, "--validation", "0.3"]
    words += ["--sweep", "regularizer=l1,kl"]
    assert run_command(words) == 2
    assert "unknown regulariser" in capsys.readouterr().err
    monkeypatch.setitem(REGULARIZERS, "l1", l1)
    assert run_command(words) == 0
    mine, kl = (read_figures(tmp_path / f"regularizer={name}" / "metrics.jsonl") for name in ("l1", "kl"))
    assert mine[0].cycle == kl[0].cycle and mine[0].separability != kl[0].separability
    assert mine[-1].total != mine[0].total
    assert len(read_validation(tmp_path / "regularizer=l1" / "validation.jsonl")) == 2


def test_every_head_of_the_table_is_offered_and_trained_or_computed(
    stores: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", "--help"]) == 0
    assert ", ".join(HEADS) in " ".join(capsys.readouterr().out.split())
    for name, row in HEADS.items():
        if name == "debias":  # needs the store's encoder: test_closed_form
            continue
        options = ["--quiet", "--device", "cpu"] if row.closed_form else SMALL
        out = tmp_path / name
        assert (
            run_command(["train", "--features", stores[0], "--head", name, "--out", str(out), *options]) == 0
        )
        projection = load_projection(str(out / "projection.safetensors"))
        assert (projection.head, len(projection.linears)) == (name, row.n_linears)


def test_stores_that_cannot_train(stores: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "--features", stores[2], "--dry-run"]) == 3
    assert "shifted view" in capsys.readouterr().err
    assert run_command(["train", "--features", stores[0], "--features", "none.zarr", "--dry-run"]) == 3
    assert "none.zarr does not exist" in capsys.readouterr().err


def test_the_spectral_head_is_computed(
    stores: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--features", stores[0], "--head", "spectral", "--out", str(tmp_path), "--quiet"]
    assert run_command([*words, "--device", "cpu", "--correspondence", "position"]) == 0
    assert (tmp_path / "projection.safetensors").exists()
    assert "D_intra" in capsys.readouterr().out
