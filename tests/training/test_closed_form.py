"""Heads without training against numpy: components, whitening, and position taken out of real tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from store_cases import frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import FingerprintError
from cosettle_cache.core.settings import LinearSettings
from cosettle_cache.encoders import load_backbone
from cosettle_cache.heads.projection import load_projection, read_provenance
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.training.closed_form import fit_linear

CASES = {
    "pairs": lambda: pairs_case(9, n_views=2, side=4, slot_encodings=12),
    "frames": lambda: frames_case([("ant", 6, 2, 3), ("bee", 5, 2, 3), ("eel", 1, 2, 3)], slot_encodings=4),
}


@pytest.fixture(scope="module", params=CASES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("stores") / f"{request.param}.zarr"
    return open_store(CASES[request.param]().write(path))


def plain_tokens(store: FeatureStore) -> np.ndarray:
    if store.plan_kind == "pairs":
        tokens = [store.samples(store.sample_ids)[:, :2]]
    else:
        tokens = [store.tokens(name) for name in store.video_ids]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in tokens]).astype(np.float64)


@pytest.mark.parametrize(("head", "count"), [("pca", 3), ("pca", None), ("whiten", 3), ("whiten", None)])
def test_components_equal_numpys(store: FeatureStore, head: str, count: int | None, tmp_path: Path) -> None:
    report = fit_linear(store, LinearSettings(head, count), tmp_path / "run")
    tokens = plain_tokens(store)
    centred = tokens - tokens.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(tokens))
    kept, variance = vectors[:, ::-1][:, :count], values[::-1][:count]
    scale = np.ones_like(variance) if head == "pca" else variance**-0.5
    wanted = centred @ (kept * scale) @ kept.T
    found = load_projection(tmp_path / "run/projection.safetensors")(torch.from_numpy(tokens).float())
    assert np.allclose(found.detach().numpy(), wanted, atol=2e-3)
    assert (report.n_tokens, report.n_components) == (len(tokens), count or tokens.shape[1])
    assert report.share == pytest.approx(variance.sum() / values.sum())
    if head == "whiten":
        assert np.allclose(np.cov(wanted.T, bias=True), kept @ kept.T, atol=1e-6)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Return a store that says that a real encoder made it, with two grids."""
    encoder = load_backbone("timm/test_vit", weights="random")
    case = frames_case([("ant", 3, 2, 3), ("bee", 2, 3, 2)], dim=encoder.dim)
    path = tmp_path_factory.mktemp("stores") / "real.zarr"
    writer = case.writer(path, backbone=encoder.name, weights_sha256=encoder.weights_sha256)
    for index in writer.todo():
        case.commit(writer, index)
    writer.close()
    return open_store(path)


def test_position_is_what_a_black_image_shows(real: FeatureStore, tmp_path: Path) -> None:
    encoder = load_backbone("timm/test_vit", weights="random")
    centred = []
    for grid in (layout.grid for layout in real.arrays):
        image = torch.zeros(1, 3, 16 * grid.rows, 16 * grid.cols)
        mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
        tokens = encoder.encode((image - mean) / std).flatten(0, 2).double()
        tokens = tokens / tokens.norm(dim=1, keepdim=True)
        centred.append(tokens - tokens.mean(0))
    _, values, vectors = np.linalg.svd(torch.cat(centred).numpy(), full_matrices=False)
    report = fit_linear(real, LinearSettings("debias", 4, weights="random"), tmp_path / "run")
    path = tmp_path / "run/projection.safetensors"
    matrix = load_projection(path).linears[0].weight.detach().numpy()
    assert np.allclose(matrix, np.eye(encoder.dim) - vectors[:4].T @ vectors[:4], atol=1e-4)
    assert report.share == pytest.approx((values[:4] ** 2).sum() / (values**2).sum(), rel=1e-4)
    assert json.loads(read_provenance(path)["debias"])["n_components"] == 4
    again = fit_linear(real, LinearSettings("debias", 4, weights="random"), tmp_path / "run")
    assert again.projection_sha256 == report.projection_sha256


def test_weights_of_another_encoder_are_refused(real: FeatureStore, tmp_path: Path) -> None:
    torch.save(
        load_backbone("timm/test_vit", weights="random", seed=1)._body.vit.state_dict(), tmp_path / "w.pth"
    )
    with pytest.raises(FingerprintError, match="not the weights"):
        fit_linear(real, LinearSettings("debias", weights=str(tmp_path / "w.pth")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--head debias --components 65", "more components than channels"),
        ("--head pca --components 0", "components"),
        ("--head pca --gamma 0.5", "no setting of the spectral one"),
        ("--head pcx", "head"),
    ],
)
def test_lines_that_mean_nothing(
    real: FeatureStore, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["projection", "fit", "--features", real.path, *words.split()]) == 2
    assert said in capsys.readouterr().err
