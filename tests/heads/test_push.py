"""A projection goes to a hub with its card and comes back by the printed name; other repositories stay."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hub_cases import TOKEN, Hub, run_cli, run_python, serving
from report_cases import SCORE

from cosettle_cache.core.errors import CheckpointError, InputError
from cosettle_cache.core.settings import SpectralSettings, TrainSettings
from cosettle_cache.core.types import Provenance
from cosettle_cache.heads.card import make_card
from cosettle_cache.heads.projection import Projection, projection_sha256, save_projection
from cosettle_cache.metrics.rows import write_scores

PROJECTION = Projection(4, "mlp2", init="pytorch")
ORIGIN = {
    "backbone": "mae_b",
    "weights_sha256": "w" * 64,
    "manifest_digest": "m1 m2",
    "store_digest": "s1 s2",
    "settings": json.dumps(asdict(TrainSettings(head="mlp2", epochs=7, batch_size=31, base_lr=0.01))),
    "versions": json.dumps({"cosettle-cache": "0.2.0"}),
}


@pytest.fixture
def hub():
    with serving() as server:
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    save_projection(path, PROJECTION, ORIGIN)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of `propagate` with raw tokens, this projection's and another's."""
    (tmp_path / "davis").mkdir()
    figures = {"jf_mean": 0.5, "j_mean": 0.4, "j_recall": 0.6, "j_decay": 0.1}
    figures |= {"f_mean": 0.6, "f_recall": 0.8, "f_decay": 0.2}
    raw = replace(SCORE, figures=figures)
    ours = Provenance("davis", "m", "mae_b", "w", projection_sha256(PROJECTION), "{}")
    better = replace(raw, tokens="mine", figures=figures | {"jf_mean": 0.625}, provenance=ours)
    other = replace(better, tokens="strange", provenance=replace(ours, projection_sha256="x"))
    write_scores(tmp_path / "davis", [raw, better, other])
    return tmp_path / "davis"


def push(hub: Hub, *arguments: object, home: Path, **environment: str) -> tuple[int, str, str]:
    where = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, **environment}
    done = run_cli("projection", "push", *arguments, home=home, **where)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip(), done.stderr


def test_the_card_says_origin_scores_and_commands(file: Path, run: Path) -> None:
    card = make_card(file, "me/mae-k400", [run])
    assert card.startswith("---\nbase_model: timm/vit_base_patch16_224.mae\nlibrary_name: cosettle-cache\n")
    name = "hf:me/mae-k400/projection.safetensors"
    assert f"cosettle-cache propagate --task davis --backbone mae_b --projection {name}" in card
    options = "--features STORE --features STORE --head mlp2 --epochs 7 --batch 31 --base-lr 0.01"
    assert f"cosettle-cache train {options}\n" in card
    assert "| mine | 1 | 62.50 | 40.00 | 60.00 |" in card
    assert "| raw | 1 | 50.00 | 40.00 | 60.00 |" in card
    assert "strange" not in card
    assert projection_sha256(PROJECTION) in card
    assert "w" * 64 in card
    assert "None were given." in make_card(file, "me/mae-k400")


def test_the_card_of_a_computed_head(tmp_path: Path) -> None:
    settings = json.dumps(asdict(SpectralSettings(spectral_lambda=0.5)))
    save_projection(tmp_path / "s.st", Projection(4, "spectral"), {**ORIGIN, "settings": settings})
    card = make_card(tmp_path / "s.st", "me/s")
    line = "projection fit --features STORE --features STORE --head spectral --spectral-lambda 0.5\n"
    assert line in card


def test_what_has_no_card(file: Path, run: Path, tmp_path: Path) -> None:
    save_projection(tmp_path / "bare.st", PROJECTION, {})
    with pytest.raises(CheckpointError, match="does not say where it comes from"):
        make_card(tmp_path / "bare.st", "me/x")
    save_projection(tmp_path / "odd.st", PROJECTION, ORIGIN | {"settings": "[]"})
    with pytest.raises(CheckpointError, match="does not say where it comes from"):
        make_card(tmp_path / "odd.st", "me/x")
    save_projection(tmp_path / "other.st", Projection(4, "linear"), ORIGIN)
    with pytest.raises(InputError, match="has no scores of this projection"):
        make_card(tmp_path / "other.st", "me/x", [run])


def test_a_projection_goes_there_and_comes_back(hub: Hub, file: Path, run: Path, tmp_path: Path) -> None:
    code, name, said = push(hub, file, "hf:me/mae-k400", "--scores", run, home=tmp_path)
    assert code == 0, said
    repository = hub.repositories["me/mae-k400"]
    assert name == f"hf:me/mae-k400/projection.safetensors@{repository.head}"
    files = repository.commits[repository.head]
    assert files["projection.safetensors"] == file.read_bytes()
    assert files["README.md"].decode() == make_card(file, "me/mae-k400", [run])
    script = """
import sys
from pathlib import Path
from cosettle_cache.heads.kinds import _head_name
from cosettle_cache.heads.projection import load_projection, projection_sha256, read_provenance
name = Path(sys.argv[1])
print(projection_sha256(load_projection(name)), read_provenance(name)["backbone"], _head_name(name))
"""
    done = run_python(script, name, home=tmp_path, HF_ENDPOINT=hub.address)
    assert done.stdout.split() == [projection_sha256(PROJECTION), "mae_b", "mae-k400"], done.stderr
    # Once more, from the hub itself: ours, so it may be written again.
    code, again, said = push(hub, name, "me/mae-k400", home=tmp_path)
    assert (code, len(repository.commits)) == (0, 3), said
    assert b"None were given" in repository.commits[repository.head]["README.md"]
    assert again.endswith(repository.head)


def test_a_new_repository_can_be_private(hub: Hub, file: Path, tmp_path: Path) -> None:
    assert push(hub, file, "me/hidden", "--private", home=tmp_path)[0] == 0
    assert hub.repositories["me/hidden"].access == "private"
    assert push(hub, file, "me/hidden", "--private", home=tmp_path)[0] == 0
    assert push(hub, file, "me/shown", home=tmp_path)[0] == 0
    code, _, said = push(hub, file, "me/shown", "--private", home=tmp_path)
    assert code == 2 and "hf:me/shown is there already, and public" in said
    assert len(hub.repositories["me/shown"].commits) == 2


@pytest.mark.parametrize(
    ("repository", "environment", "code", "said"),
    [
        ("me/mine", {}, 2, "hf:me/mine holds something else, and nothing in it is overwritten"),
        ("me/carded", {}, 2, "hf:me/carded holds something else, and nothing in it is overwritten"),
        ("me/gated", {}, 3, "hf:me/gated cannot be written: the repository is gated"),
        ("me/new", {"HF_TOKEN": ""}, 3, "hf:me/new cannot be written: there is no token"),
        ("me/new", {"HF_TOKEN": "hf_wrong"}, 3, "hf:me/new cannot be written: "),
        ("me/new", {"HF_HUB_OFFLINE": "1"}, 3, "hf:me/new cannot be written: HF_HUB_OFFLINE is set"),
        ("me/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 3, "hf:me/new cannot be written: "),
        ("new", {}, 2, "new names no repository on the hub"),
        ("me/new/x", {"HF_TOKEN": ""}, 2, "me/new/x names no repository on the hub"),
    ],
)
def test_what_is_not_pushed_is_one_sentence(
    hub: Hub, file: Path, tmp_path: Path, repository: str, environment: dict[str, str], code: int, said: str
) -> None:
    hub.add("me/mine", {"model.safetensors": b"mine"})
    hub.add("me/carded", {"README.md": b"my own words", ".gitattributes": b""})
    hub.add("me/gated", {"README.md": b""}, "gated")
    before = {name: len(item.commits) for name, item in hub.repositories.items()}
    found, out, err = push(hub, file, repository, home=tmp_path, **environment)
    assert found == code, err
    assert said in err.splitlines()[0] if found else err
    assert not out
    assert {name: len(item.commits) for name, item in hub.repositories.items()} == before


def test_a_dry_run_prints_the_card_without_a_hub(file: Path, tmp_path: Path) -> None:
    done = run_cli("projection", "push", file, "me/x", "--dry-run", home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == make_card(file, "me/x").strip()
