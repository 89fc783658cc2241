"""`doctor` says what the machine has, and what is wrong with a hint."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cosettle_cache.cli import doctor, run_command
from cosettle_cache.core.errors import InputError
from cosettle_cache.search.choose import make_ranker

VERSION = metadata.version


@pytest.fixture(autouse=True)
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TRIAL_BYTES", 2**20)


def test_a_machine_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["wrong"] == []
    facts = document["facts"]
    assert facts["torch"] == VERSION("torch") and "h264" in facts["decoders"]
    assert facts["disk, read"].endswith("B/s") and facts["CUDA of torch"] == (torch.version.cuda or "none")
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_has_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}
    monkeypatch.setattr(metadata, "version", lambda name: both.get(name) or VERSION(name))
    assert run_command(["doctor", "--folder", str(tmp_path / "none")]) == 4
    out, err = capsys.readouterr()
    assert "decoders" in out and err.startswith("error: 2 things are wrong\n  several packages of FAISS")
    assert "pip uninstall faiss-cpu faiss-gpu" in err and f"{tmp_path / 'none'} cannot be written" in err
    with pytest.raises(InputError, match="several packages of FAISS"):
        make_ranker("faiss", torch.device("cpu"))
