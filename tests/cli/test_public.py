"""The public names: there, lazily, whatever was imported before; with str or Path, numpy or torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from store_cases import frames_case, pairs_case

import cosettle_cache
from cosettle_cache import (
    PositionShift,
    Projection,
    davis_j_and_f,
    load_backbone,
    load_projection,
    make_protocol,
    mean_iou,
    open_store,
    pck,
    propagate,
    trade_off,
    transfer_loss,
)
from cosettle_cache.heads.projection import save_projection
from cosettle_cache.videos.masks import read_mask, write_mask


def test_every_public_name_resolves() -> None:
    for name in cosettle_cache.__all__:
        assert getattr(cosettle_cache, name) is not None
    assert set(cosettle_cache.__all__) <= set(dir(cosettle_cache))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cosettle_cache; sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_types_are_published() -> None:
    assert resources.files("cosettle_cache").joinpath("py.typed").is_file()


def test_propagate_is_a_function_even_when_its_room_was_imported() -> None:
    importlib.import_module("cosettle_cache.propagation")
    tokens, labels = torch.randn(3, 4, 5, 8), torch.rand(4, 5, 2)
    maps = cosettle_cache.propagate(tokens, labels, cosettle_cache.make_protocol("cosettle"))
    assert maps.shape == (3, 4, 5, 2)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_text_or_path(tmp_path: Path, kind: type) -> None:
    frames_case().write(tmp_path / "frames")
    assert open_store(kind(tmp_path / "frames")).video_ids
    save_projection(tmp_path / "head.safetensors", Projection(8, seed=1), {})
    assert load_projection(kind(tmp_path / "head.safetensors")).dim == 8
    write_mask(tmp_path / "mask.png", np.eye(4, dtype=np.uint8))
    assert read_mask(kind(tmp_path / "mask.png")).sum() == 4


@pytest.mark.parametrize("kind", [str, Path])
def test_weights_are_text_or_path(golden, kind: type) -> None:
    path = golden("backbones/mae/base.pth")
    backbone = load_backbone("mae", weights=kind(path), device="cpu")
    assert backbone.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 2, 128)


def test_arrays_are_numpy_or_torch(golden) -> None:
    rng = np.random.default_rng(0)
    tokens, labels = rng.standard_normal((4, 3, 5, 8), np.float32), rng.random((3, 5, 2), np.float32)
    protocol = make_protocol("cosettle")
    wanted = propagate(torch.from_numpy(tokens), torch.from_numpy(labels), protocol)
    for first in (tokens, torch.from_numpy(tokens)):
        for second in (labels, torch.from_numpy(labels)):
            np.testing.assert_array_equal(np.asarray(propagate(first, second, protocol)), wanted.numpy())

    masks, found = rng.integers(0, 3, (2, 5, 12, 16)).astype(np.uint8)
    for convert in (np.asarray, torch.from_numpy):
        objects = davis_j_and_f(convert(masks), convert(found))
        assert [item.object_id for item in objects] == [1, 2]
        assert 0 < mean_iou(convert(masks), convert(found), 3).miou < 1
    for one, other in zip(
        davis_j_and_f(masks, found),
        davis_j_and_f(torch.from_numpy(masks), torch.from_numpy(found)),
        strict=True,
    ):
        assert (one.object_id, one.j_mean, one.f_mean) == (other.object_id, other.j_mean, other.f_mean)
        np.testing.assert_array_equal(one.j, other.j)

    points = rng.random((2, 15, 6)) * 100
    shares = [pck([kind(points)], [kind(points + 1)], [0.1]) for kind in (np.asarray, torch.from_numpy)]
    assert shares[0] == shares[1]

    clips = rng.standard_normal((3, 8, 2, 2, 4), np.float32)
    assert trade_off(clips) == trade_off(torch.from_numpy(clips))

    samples = rng.standard_normal((2, 3, 4, 4, 8), np.float32)
    head = Projection(8, seed=3)
    terms = [transfer_loss(head, kind(samples)) for kind in (np.asarray, torch.from_numpy)]
    assert terms[0].total.item() == terms[1].total.item()

    backbone = load_backbone("mae", weights=golden("backbones/mae/base.pth"))
    images = rng.standard_normal((1, 3, 32, 32), np.float32)
    shift = PositionShift(ratio=10.0, row=3, col=4)
    for given in (None, shift):
        torch.testing.assert_close(
            torch.as_tensor(backbone.encode(images, given)), backbone.encode(torch.from_numpy(images), given)
        )


def test_a_store_hands_out_samples_and_tokens(tmp_path: Path) -> None:
    store = open_store(pairs_case(3).write(tmp_path / "pairs"))
    assert store.samples(store.sample_ids[:2]).shape[:2] == (2, 3)
    assert open_store(frames_case().write(tmp_path / "frames")).tokens("bear").dtype == np.float16
