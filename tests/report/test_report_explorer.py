"""What the affinity explorer embeds: exact neighbours, small tokens as good as the page says; bad input."""

from __future__ import annotations

import base64
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from propagation_cases import single_thread
from report_cases import EVIL, Made, Page, make_runs
from store_cases import frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.types import Grid
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.report.explorer import (
    COSINE_STEPS,
    MAX_FRAMES,
    STEP,
    TOP_K,
    affordable_frames,
    chosen_frames,
    explore,
    shrink,
)
from cosettle_cache.store import open_store


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_runs(tmp_path_factory.mktemp("report"), overlays="none")


def test_neighbours_are_the_exact_ones_of_the_whole_frame(tmp_path: Path) -> None:
    store = open_store(frames_case([("bear", 5, 4, 6), ("dog", 1, 4, 6)]).write(tmp_path / "s.zarr"))
    head = Projection(8, seed=2)
    found = explore(store, "bear", make_kinds([("mine", head)], 8), 4)
    assert found.frames == (0, 1, 2, 4)
    for kind, project in zip(found.kinds, (lambda tokens: tokens, head), strict=True):
        tokens = project(torch.from_numpy(store.tokens("bear")).float()).detach().flatten(1, 2)
        unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
        for number, frame in enumerate(found.frames[1:]):
            cosines = unit[0] @ unit[frame].T
            positions = torch.from_numpy(kind.position[number].astype(np.int64))
            wanted = cosines.topk(TOP_K).values
            assert torch.allclose(cosines.gather(1, positions), wanted, atol=1e-6)
            listed = torch.from_numpy(kind.cosine[number]) / COSINE_STEPS
            assert torch.allclose(listed.double(), wanted, atol=1e-4)
        assert kind.error < 0.03
    alone = explore(store, "dog", make_kinds([], 8), 4)
    assert alone.frames == (0,) and alone.kinds[0].position.shape == (0, 24, TOP_K)


def test_the_error_that_the_page_states_is_the_error_it_makes() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, 50, 20, generator=generator) @ torch.randn(20, 96, generator=generator)
    for tokens in (few, few + 3 * torch.randn(3, 50, 96, generator=generator), few[..., :3]):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        small, error = shrink(unit)
        values = torch.from_numpy(small).transpose(1, 2) * STEP
        differences = unit[0] @ unit.transpose(1, 2) - values[0] @ values.transpose(1, 2)
        assert error == pytest.approx(float(differences.abs().max()), abs=1e-5)
        assert error < 0.03
        assert float(differences.abs().mean()) < 0.006


def test_large_frames_are_fewer() -> None:
    assert affordable_frames(Grid(15, 27), 192, 9) > MAX_FRAMES
    assert affordable_frames(Grid(30, 55), 192, 9) == 3
    assert affordable_frames(Grid(30, 55), 192, 2) > MAX_FRAMES
    assert affordable_frames(Grid(60, 110), 768, 40) == 3


def test_frames_are_ever_farther_apart_and_none_is_there_twice() -> None:
    assert chosen_frames(1, 9) == [0]
    assert chosen_frames(2, 9) == [0, 1]
    assert chosen_frames(100, 7) == [0, 1, 3, 6, 16, 39, 99]
    for n_frames in range(3, 40):
        frames = chosen_frames(n_frames, 5)
        assert frames[:2] == [0, 1] and frames[-1] == n_frames - 1 and len(frames) <= 5


def explorer(made: Made, out: Path, *arguments: object) -> Page:
    where = ["--features", made.store, "--data-root", made.data_root, "--out", out, "--quiet"]
    assert run_command(list(map(str, ["report", made.scored, *where, *arguments]))) == 0
    return Page(out.read_text())


def test_the_page_holds_raw_and_projected_side_by_side(made: Made, tmp_path: Path) -> None:
    page = explorer(made, tmp_path / "r.html", "--projection", made.projection)
    assert "explorer" in page.headings
    document = page.documents["data-explorer-0"]
    assert document["names"] == [f"frame {frame}" for frame in (1, 2, 3, 5)]
    raw, mine = document["kinds"]
    assert len(raw["tokens"]) == len(document["pictures"]) == 5
    assert len(zlib.decompress(base64.b64decode(mine["position"][0]))) == 2 * TOP_K * 24
    assert document["start"] in (0, 6, 12), "amid object 1, which fills the upper half of the first column"
    assert "mine: 0.0" in page.text and f"Later frame of {EVIL}" in str(page.attributes)


def test_another_projection_under_a_scored_name_is_named(made: Made, tmp_path: Path) -> None:
    said = "Not the projection that was scored under this name: mine."
    assert said not in explorer(made, tmp_path / "r.html", "--projection", made.projection).text
    other = tmp_path / "mine.safetensors"
    save_projection(other, Projection(3, seed=2), {"backbone": "tiny", "weights_sha256": "0" * 64})
    assert said in explorer(made, tmp_path / "r.html", "--projection", other).text


def test_a_video_without_frames_is_named_and_the_rest_is_there(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(made.data_root, tmp_path / "data"))
    shutil.rmtree(root / "DAVIS/JPEGImages/480p" / EVIL)
    where = ["--features", made.store, "--data-root", root, "--out", tmp_path / "r.html"]
    assert run_command(list(map(str, ["report", made.scored, *where]))) == 4
    assert EVIL in capsys.readouterr().err
    page = Page((tmp_path / "r.html").read_text())
    assert f"{EVIL}: " in page.text and "does not exist" in page.text
    assert "data-explorer-0" not in page.documents and "data-explorer-1" in page.documents


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--projection P", 2, "--features"),
        ("--features PAIRS --data-root .", 3, "a frames plan"),
        ("--features STORE --data-root . --projection WIDE", 3, "another width"),
        ("--features STORE --data-root . --projection P --projection P", 2, "names of their own"),
        ("--features STORE --data-root nowhere", 3, "is not a folder"),
        ("--features STORE", 2, "--data-root FOLDER"),
        ("--out .", 2, "is a folder"),
        ("--features nowhere.zarr", 3, "nowhere.zarr"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, said: str
) -> None:
    pairs = pairs_case(2).write(tmp_path / "pairs.zarr")
    save_projection(tmp_path / "wide.safetensors", Projection(4), {})
    places = {
        "P": made.projection,
        "PAIRS": pairs,
        "STORE": made.store,
        "WIDE": tmp_path / "wide.safetensors",
    }
    arguments = [str(places.get(word, word)) for word in line.split()]
    assert run_command(["report", str(made.scored), "--out", str(tmp_path / "r.html"), *arguments]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
