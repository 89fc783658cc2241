"""The command line as a new user meets it: help, exit codes, the three lines as typed, bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from cosettle_cache.cli import app, run_command
from cosettle_cache.cli.reference import command_reference
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.metrics.rows import read_scores
from cosettle_cache.store import open_store
from cosettle_cache.videos.masks import write_mask

RANDOM = ["--backbone", "timm/test_vit", "--weights", "random"]
HEAVY = {"distributed", "torch", "timm", "zarr", "faiss", "pyarrow", "cv2", "av", "matplotlib", "scipy"}


def run(*arguments: object) -> int:
    return run_command([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def in_own_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test works in an empty folder, without a data root; the sprites clips are drawn once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSETTLE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a DAVIS folder of two sequences, six frames, one moving square each."""
    root = tmp_path_factory.mktemp("data")
    texture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for name in ("one", "two"):
        frames, masks = (root / "DAVIS" / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(6):
            image, mask = texture.copy(), np.zeros((64, 96), np.uint8)
            box = np.s_[16:48, 16 + 4 * index : 48 + 4 * index]
            image[box], mask[box] = (200, 60, 20), 1
            Image.fromarray(image).save(frames / f"{index:05d}.jpg")
            write_mask(masks / f"{index:05d}.png", mask)
    return root


@pytest.fixture
def own_davis(davis: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(davis, tmp_path / "data"))


@pytest.fixture(scope="module")
def davis_store(davis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    assert (
        run("manifest", "build", "davis", "DAVIS", "--data-root", davis, "--out", folder / "d.parquet") == 0
    )
    assert run("extract", *RANDOM, *frames_options(folder, davis, folder / "d.zarr")) == 0
    return folder / "d.zarr"


def frames_options(folder: Path, root: Path, out: Path) -> list[object]:
    where = ["--manifest", folder / "d.parquet", "--data-root", root, "--out", out]
    return ["--plan", "frames", "--size", "64x96", "--quiet", *where]


def propagate_options(store: Path, root: Path) -> list[object]:
    return ["--task", "davis", "--features", store, "--data-root", root, "--set", "size=64x96", "--quiet"]


def test_the_command_line_answers_without_heavy_imports() -> None:
    code = f"import sys, cosettle_cache.cli; sys.exit(bool({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_store_at_hand_needs_no_encoder(davis: Path, davis_store: Path, tmp_path: Path) -> None:
    """Timm and torchvision cost seconds and 200 MB; every run with `--features` would feel them."""
    command = ["propagate", *map(str, propagate_options(davis_store, davis)), "--out", str(tmp_path / "out")]
    code = f"""
import sys
from cosettle_cache.cli import app
app({command!r}, standalone_mode=False)
import cosettle_cache.propagation.track, cosettle_cache.training.run, cosettle_cache.training.closed_form
sys.exit(", ".join({{"timm", "torchvision"}} & set(sys.modules)) or "torch" not in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "scores.parquet").is_file()


def all_commands() -> list[list[str]]:
    root = typer.main.get_command(app)
    found = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", None)
        found += [[name, child] for child in children] if children else [[name]]
    return found


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_help_is_one_screen_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert f"Example: cosettle-cache {' '.join(command)}" in " ".join(text.split())
    assert len(text.splitlines()) <= 60


def test_the_reference_is_true() -> None:
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "cli.md").read_text() == command_reference()


def test_the_page_of_python_names_is_true() -> None:
    # In a process of its own: the tests' type checks change what functions look like.
    docs = Path(__file__).parents[2] / "docs"
    code = "from cosettle_cache.cli.reference import name_reference; print(name_reference(), end='')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (docs / "api.md").read_text() == made.stdout


def test_the_three_lines_work_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("extract", *RANDOM, "--views", 2) == 0
    assert "built-in sprites clips" in capsys.readouterr().err
    assert run("train", "--features", "store.zarr", "--epochs", 2) == 0
    assert Path("runs/store/projection.safetensors").is_file()
    assert Path("runs/store/curves.png").stat().st_size > 10_000
    assert run("propagate", "--task", "davis") == 0
    talk = capsys.readouterr()
    assert "encoder of store.zarr" in talk.err
    assert "mean over objects" in talk.out
    scores = read_scores(next(Path("runs").glob("davis-*/scores.parquet")))
    assert {score.tokens for score in scores} == {"raw", "store"}
    assert all(score.provenance.weights_sha256 and score.provenance.manifest_digest for score in scores)
    assert all(score.provenance.projection_sha256 for score in scores if score.tokens == "store")
    assert list(Path("runs").glob("davis-*/overlays/*/*"))


def test_scores_as_json_are_one_document(
    davis: Path, davis_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("propagate", *propagate_options(davis_store, davis), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["means"]["raw"]["n_objects"] == 2
    assert document["means"]["raw"]["jf_mean"] > 0.5
    assert document["provenance"]["protocol"] == "cosettle size=64x96"


def test_dry_runs_write_nothing(davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["manifest", "build", "davis", "DAVIS", "--data-root", davis]
    assert run(*build, "--out", "d.parquet", "--dry-run") == 0
    assert run(*build, "--out", "d.parquet") == 0
    capsys.readouterr()
    assert (
        run("extract", *RANDOM, *frames_options(tmp_path, davis, Path("d.zarr")), "--dry-run", "--json") == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert (summary["videos"], summary["encodings"], summary["bytes"]) == (2, 12, 12 * 24 * 64 * 2)
    assert [path.name for path in Path().iterdir()] == ["d.parquet"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("extract", 2, "--backbone"),
        ("fly", 2, "fly"),
        ("extract --backbone mae_x", 2, "mae_"),
        ("extract --backbone timm/test_vit --weights random --size 60", 3, "multiple of the patch"),
        ("extract --backbone timm/test_vit --weights random --size 4x8", 2, "square"),
        ("extract --backbone timm/test_vit --weights none.pth", 3, "none.pth"),
        ("extract --backbone timm/test_vit --manifest none.parquet", 3, "none.parquet does not exist"),
        ("train --features none.zarr", 3, "none.zarr does not exist"),
        ("store info none.zarr", 3, "none.zarr does not exist"),
        ("propagate --task flying", 2, "flying"),
        ("propagate --task davis --protocol cosetle", 2, "did you mean cosettle"),
        ("propagate --task davis --set top_k=many", 2, "top_k cannot be 'many'"),
        ("propagate --task davis --set topk=3", 2, "did you mean top_k"),
        ("propagate --task davis --features none.zarr", 3, "none.zarr does not exist"),
        ("run none.toml", 3, "none.toml does not exist"),
    ],
)
def test_wrong_lines_end_with_a_sentence(
    line: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*line.split()) == code
    assert said in capsys.readouterr().err


def drop_frame(root: Path) -> None:
    (root / "DAVIS/JPEGImages/480p/two/00003.jpg").write_bytes(b"\xff\xd8\xff")


def drop_annotation(root: Path) -> None:
    (root / "DAVIS/Annotations/480p/two/00003.png").unlink()


def add_object(root: Path) -> None:
    path = root / "DAVIS/Annotations/480p/two/00003.png"
    mask = np.array(Image.open(path))
    mask[:4, :4] = 3
    write_mask(path, mask)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(drop_annotation, "lacks 1 of 6 annotations: 00003.png"), (add_object, "00003.png has objects")],
)
def test_bad_annotations_cost_only_their_video(
    own_davis: Path,
    davis_store: Path,
    damage: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(own_davis)
    assert run("propagate", *propagate_options(davis_store, own_davis), "--out", "o") == 4
    assert said in capsys.readouterr().err
    assert {score.video_id for score in read_scores(Path("o/scores.parquet"))} == {"one"}


def test_a_bad_frame_costs_only_its_video(
    own_davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["manifest", "build", "davis", "DAVIS", "--data-root", own_davis, "--out", "d.parquet"]
    assert run(*build) == 0
    drop_frame(own_davis)
    options = frames_options(tmp_path, own_davis, Path("d.zarr"))
    assert run("extract", *RANDOM, *options) == 4
    assert "failed: two: " in capsys.readouterr().out
    assert run("propagate", *propagate_options(Path("d.zarr"), own_davis), "--out", "o") == 4
    assert "two" in capsys.readouterr().err
    assert {score.video_id for score in read_scores(Path("o/scores.parquet"))} == {"one"}
    assert run("manifest", "check", "d.parquet", "--data-root", own_davis, "--decode") == 4
    assert run("extract", *RANDOM, *options) == 4
    frames = own_davis / "DAVIS/JPEGImages/480p"
    shutil.copy(frames / "one/00003.jpg", frames / "two/00003.jpg")
    assert run("extract", *RANDOM, *options) == 4
    assert run("extract", *RANDOM, *options, "--retry-failed") == 0
    assert run("extract", *RANDOM, *options) == 0


def test_a_projection_of_another_encoder_is_refused(
    davis: Path, davis_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_projection(Path("p.safetensors"), Projection(64), {"weights_sha256": "0" * 64, "backbone": "other"})
    options = propagate_options(davis_store, davis)
    assert run("propagate", *options, "--projection", "p.safetensors") == 3
    assert "trained on tokens of another encoder" in capsys.readouterr().err


def test_first_masks_alone_give_masks_and_say_so(
    own_davis: Path, davis_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (own_davis / "DAVIS/Annotations").rglob("*.png"):
        if path.name != "00000.png":
            path.unlink()
    assert run("propagate", *propagate_options(davis_store, own_davis), "--out", "o", "--json") == 0
    assert json.loads(capsys.readouterr().out)["means"] == {}
    assert len(list(Path("o/raw").rglob("*.png"))) == 12


@pytest.mark.parametrize(
    "command", ["extract --backbone timm/test_vit --weights random", "train --features s"]
)
def test_devices_that_are_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("gpu", "cuda:99", "mps"):
        run("extract", *RANDOM, "--views", 1, "--out", "s", "--quiet")
        assert run(*command.split(), "--device", device) == 2
        assert device in capsys.readouterr().err


def test_the_first_interrupt_finishes_the_slot(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cosettle_cache.cli", "extract", *RANDOM, "--views", "20"]
    process = subprocess.Popen(
        [*words, "--slot-encodings", "60", "--batch", "1", "--out", "s.zarr"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "images to do" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[1]
    assert process.returncode == 130
    assert "finishing the slot in hand" in rest
    assert open_store("s.zarr").slot_states()["done"] >= 1


def test_other_settings_are_listed(
    davis: Path, davis_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = davis_store.parent
    options = frames_options(folder, davis, davis_store)
    assert run("extract", *RANDOM, *options, "--every", 2) == 3
    assert "plan.every" in capsys.readouterr().err


class Bomb:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_strange_checkpoints_are_refused(davis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Bomb()}, "bomb.pth")
    Path("text.pth").write_text("weights")
    with Path("pickle.pth").open("wb") as file:
        pickle.dump(Bomb(), file)
    torch.save({"model": {"embedding.weight": torch.zeros(4, 4)}}, "words.pth")
    for name in ("bomb.pth", "text.pth", "pickle.pth", "words.pth"):
        assert run("extract", "--backbone", "mae", "--weights", name, "--data-root", davis) == 3
        error = capsys.readouterr().err
        assert name in error
        assert "Traceback" not in error
    assert not Path("exploded").exists()


def test_a_store_of_another_size_is_refused(
    davis: Path, davis_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "davis", "--features", davis_store, "--data-root", davis]
    assert run("propagate", *options) == 3
    assert "480x880" in capsys.readouterr().err


def test_training_needs_pairs(davis_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--features", davis_store) == 3
    assert "shifted view" in capsys.readouterr().err


def test_a_recipe_runs_its_steps(davis: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("r.toml")
    recipe.write_text(
        """
title = "tiny"
[[step]]
command = "manifest build"
arguments = ["davis", "DAVIS"]
out = "d.parquet"
[[step]]
command = "manifest show"
arguments = ["d.parquet"]
"""
    )
    assert run("run", recipe, "--data-root", davis, "--dry-run") == 0
    assert not Path("d.parquet").exists()
    assert run("run", recipe, "--data-root", davis) == 0
    assert "cosettle-cache manifest show d.parquet" in capsys.readouterr().err
    assert Path("d.parquet").exists()


@pytest.mark.parametrize("family", ["mae", "ijepa", "clip", "blip", "mocov3", "dino", "ibot", "dinov2"])
def test_every_family_extracts_from_its_published_file(
    family: str, davis: Path, davis_store: Path, golden: Callable[[str], Path]
) -> None:
    weights = golden(f"backbones/{family}/base.pth")
    where = [
        "--manifest",
        davis_store.parent / "d.parquet",
        "--data-root",
        davis,
        "--out",
        "s.zarr",
        "--quiet",
    ]
    assert run("extract", "--backbone", family, "--weights", weights, "--views", 1, *where) == 0
    store = open_store("s.zarr")
    samples = store.samples(store.sample_ids)
    assert samples.shape == (2, 3, 14, 14, 128)
    assert np.isfinite(samples).all()
    assert np.abs(samples[:, 0].astype(np.float32) - samples[:, 2]).mean() > 1e-3


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("s3://AKIA:se/cr+et@bucket/a.zarr is not there", "s3://***@bucket/a.zarr is not there"),
        ("http://user:pw@host:9000/b", "http://***@host:9000/b"),
        ("https://a.net/c?sv=20&sig=ab%2F&se=1", "https://a.net/c?sv=20&sig=***&se=1"),
        ('{"a":"s3://bucket/x","b":"c:d@e"}', '{"a":"s3://bucket/x","b":"c:d@e"}'),
        ("s3://bucket/a@b on tcp://127.0.0.1:8786", "s3://bucket/a@b on tcp://127.0.0.1:8786"),
    ],
)
def test_credentials_in_addresses_are_masked(
    said: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InputError(said, wanted=said, found=said, hint=said, details=[said])
    assert {error.message, error.wanted, error.found, error.hint, *error.details, str(error)} == {shown}
    Talk().result(said)
    Talk().note(said)
    assert capsys.readouterr() == (f"{shown}\n", f"{shown}\n")
