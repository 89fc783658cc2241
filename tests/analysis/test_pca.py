"""Tokens as colours: components against a plain eigendecomposition, and what the command leaves on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from propagation_cases import make_squares
from store_cases import Case

from cosettle_cache.analysis.pca import Histogram, align_signs, fit_painter
from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.store.plan import make_plan


def random_frames(n_frames: int = 4, dim: int = 12, seed: int = 0) -> torch.Tensor:
    """Tokens with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.5, 3.0, 0.8, 2.0, *[0.2] * (dim - 4)])
    return torch.randn(n_frames, 5, 7, dim, generator=generator) * weights + 0.5


def test_components_are_those_of_the_covariance_of_unit_tokens() -> None:
    tokens = random_frames()
    painter = fit_painter(lambda: iter(tokens))
    unit = (tokens / tokens.norm(dim=-1, keepdim=True)).double().reshape(-1, 12).numpy()
    values, vectors = np.linalg.eigh(np.cov(unit.T, bias=True))
    for number, vector in enumerate(vectors.T[::-1][:3]):
        signed = vector * np.sign(vector[np.abs(vector).argmax()])
        np.testing.assert_allclose(painter.components.basis[:, number].numpy(), signed, atol=1e-6)
    np.testing.assert_allclose(painter.components.shares, values[::-1][:3] / values.sum(), rtol=1e-6)
    scores = (unit - unit.mean(0)) @ painter.components.basis.numpy() / np.sqrt(values[::-1][:3])
    low, high = np.percentile(scores, [1, 99], axis=0)
    # Percentiles of 140 tokens: one token aside, or the width of a bin.
    ordered = np.sort(scores, axis=0)
    assert (np.abs(painter.low - low) < ordered[3] - ordered[0] + 0.01).all()
    assert (np.abs(painter.high - high) < ordered[-1] - ordered[-4] + 0.01).all()
    colours = painter.colours(tokens[2]).numpy()
    wanted = np.clip((scores.reshape(4, 5, 7, 3)[2] - painter.low) / (painter.high - painter.low), 0, 1)
    assert np.abs(colours - 255 * wanted).max() < 1


def test_a_colour_keeps_its_meaning_whatever_the_order_and_grouping_of_frames() -> None:
    tokens = random_frames()
    first, second = fit_painter(lambda: iter(tokens)), fit_painter(lambda: iter(tokens.flip(0)))
    for frame in tokens:
        assert np.abs(first.colours(frame).numpy().astype(int) - second.colours(frame).numpy()).max() <= 1
    np.testing.assert_array_equal(
        first.colours(tokens[1]).numpy(), fit_painter(lambda: iter(tokens)).colours(tokens[1]).numpy()
    )


def test_percentiles_and_splits_are_read_from_counts() -> None:
    histogram = Histogram()
    values = torch.cat([torch.full((70, 3), -1.0), torch.full((30, 3), 2.0)]).double()
    histogram.add(values)
    for found, wanted in zip(histogram.percentiles(50.0, 90.0, 70.0), (-1, 2, -1), strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.01)
    assert -1 < histogram.split() < 2
    histogram.add(torch.tensor([[1e9, -1e9, 0.0]]).double())
    assert histogram.counts.sum() == 303


def scene(n_frames: int = 3) -> torch.Tensor:
    """A square in the middle whose tokens lie elsewhere than those around it, each with a little noise."""
    generator = torch.Generator().manual_seed(1)
    tokens = 0.1 * torch.randn(n_frames, 8, 8, 6, generator=generator)
    tokens[..., 0] += 1
    tokens[:, 2:6, 3:6] += torch.tensor([-2.0, 1.0, 0, 0, 0, 0])
    return tokens


def test_the_foreground_is_what_lies_in_the_middle() -> None:
    tokens = scene()
    inside = np.zeros((8, 8), bool)
    inside[2:6, 3:6] = True
    painter = fit_painter(lambda: iter(tokens), foreground="auto")
    np.testing.assert_array_equal(painter.colours(tokens[0]).numpy().any(-1), inside)
    sides = [
        fit_painter(lambda: iter(tokens), foreground=side).colours(tokens[0]).numpy()
        for side in ("high", "low")
    ]
    # A token of the foreground may be black by its own colours, hardly ever though.
    assert sorted((side.any(-1) & inside).sum() for side in sides) == [0, inside.sum()]


def test_signs_of_one_kind_follow_another() -> None:
    tokens = random_frames()
    mirror = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0]
    turned = tokens @ mirror
    reference, painter = fit_painter(lambda: iter(tokens)), fit_painter(lambda: iter(turned))
    aligned = align_signs(painter, reference, zip(tokens, turned, strict=True))
    for one, other in zip(tokens, turned, strict=True):
        assert np.abs(aligned.colours(other).numpy().astype(int) - reference.colours(one).numpy()).max() <= 3


def test_too_few_channels_and_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="too few channels"):
        fit_painter(lambda: iter(torch.randn(2, 3, 3, 2)))
    with pytest.raises(InputError, match="no tokens"):
        fit_painter(lambda: iter(()))


def test_tokens_that_are_all_alike_have_one_colour() -> None:
    tokens = torch.ones(2, 3, 4, 5)
    colours = fit_painter(lambda: iter(tokens)).colours(tokens[0]).numpy()
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 1


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data root and the store of two videos of 64x96 pixels on a 4x6 grid."""
    root = tmp_path_factory.mktemp("pca")
    case = make_squares(root)
    return root, case.write(root / "store.zarr")


def pca(squares: tuple[Path, Path], out: Path, *more: object) -> int:
    root, store = squares
    options = ("--features", store, "--data-root", root, "--out", out, *more)
    return run_command(["pca", *map(str, options)])


def test_the_command_draws_stills_and_a_film(
    squares: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_projection(tmp_path / "mine.safetensors", Projection(3), {})
    assert pca(squares, tmp_path / "out", "--projection", tmp_path / "mine.safetensors", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [(item["video_id"], item["tokens"]) for item in document["components"]] == [
        ("left", "raw"),
        ("left", "mine"),
        ("right", "raw"),
        ("right", "mine"),
    ]
    for kind in ("raw", "mine"):
        assert len(list((tmp_path / "out/left" / kind).glob("*.png"))) == 5
    with Image.open(tmp_path / "out/left/raw/00003.png") as still:
        picture = np.asarray(still)
    assert picture.shape == (64, 96, 3)
    # Object 1 fills one cell of the upper half: one colour, unlike its neighbours.
    cells = picture[8::16, 8::16].reshape(4, 6, 3).astype(int)
    assert (picture == picture[8::16, 8::16].repeat(16, 0).repeat(16, 1)).all()
    assert (cells[0, 3] != cells[0, 2]).any()
    assert (cells[0, 0] == cells[0, 2]).all()
    with av.open(str(tmp_path / "out/left.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape[1] == 3 * 96 + 2 * 4


def test_one_basis_for_the_store_gives_equal_patches_equal_colours(
    squares: tuple[Path, Path], tmp_path: Path
) -> None:
    assert pca(squares, tmp_path, "--per", "store", "--film", "webp") == 0
    stills = [np.asarray(Image.open(tmp_path / name / "raw/00001.png")) for name in ("left", "right")]
    np.testing.assert_array_equal(*stills)
    with Image.open(tmp_path / "left.webp") as film:
        assert film.n_frames == 5
        assert film.info["loop"] == 0


def test_bad_requests_have_one_sentence_and_write_nothing(
    squares: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for arguments, code, words in (
        (["--video", "none"], 3, "has no video none"),
        (["--film", "none", "--no-stills"], 2, "nothing would be drawn"),
        (["--projection", tmp_path / "none.safetensors"], 3, "does not exist"),
    ):
        assert pca(squares, out, *arguments) == code
        assert words in capsys.readouterr().err
    assert pca(squares, out, "--dry-run", "--video", "right") == 0
    assert json.loads(capsys.readouterr().out)["videos"] == ["right"]
    assert not out.exists()


def test_a_pairs_store_is_refused(
    squares: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_squares(tmp_path).manifest
    case = Case(manifest, make_plan(manifest, PairsSettings(n_views=1, size=32), patch=16, dim=4))
    store = case.write(tmp_path / "pairs.zarr")
    assert pca((tmp_path, store), tmp_path / "out") == 3
    assert "a frames plan" in capsys.readouterr().err


def test_a_video_whose_frames_are_gone_is_named_and_the_others_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_squares(tmp_path)
    store = case.write(tmp_path / "store.zarr")
    (tmp_path / "DAVIS/JPEGImages/480p/left/00002.jpg").write_bytes(b"no image")
    assert pca((tmp_path, store), tmp_path / "out") == 4
    assert "left: " in capsys.readouterr().err
    assert not (tmp_path / "out/left.mp4").exists()
    assert (tmp_path / "out/right.mp4").exists()


def test_every_second_frame_is_drawn_from_a_store_of_every_second(tmp_path: Path) -> None:
    case = make_squares(tmp_path)
    case = replace(
        case, plan=make_plan(case.manifest, FramesSettings(size="native", every=2), patch=16, dim=3)
    )
    assert pca((tmp_path, case.write(tmp_path / "store.zarr")), tmp_path / "out", "--film", "none") == 0
    stills = sorted(path.stem for path in (tmp_path / "out/left/raw").iterdir())
    assert stills == ["00000", "00002", "00004"]


def test_videos_are_not_replaced_by_films(
    squares: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(squares[0], tmp_path / "data", ignore=shutil.ignore_patterns("*.zarr"))
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert pca((data, squares[1]), data) == 2
    assert "holds something else" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert pca(squares, Path("s3://bucket/out")) == 2
    assert "is a URL" in capsys.readouterr().err
    assert (
        pca(squares, tmp_path / "out", "--film", "none")
        == 0
        == pca(squares, tmp_path / "out", "--film", "none")
    )
