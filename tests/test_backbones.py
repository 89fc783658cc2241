"""Tokens of the families against released values, of timm models against timm; sizes, shifts, random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosettle_cache.backbones import BACKBONES, describe_backbone, load_backbone
from cosettle_cache.backbones.families import PositionResize
from cosettle_cache.backbones.positions import Positions, enlarged_length
from cosettle_cache.errors import InputError, UsageError
from cosettle_cache.types import Grid, PositionShift

TINY = "timm/test_vit"


def normalised(backbone, images):
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    return (images.float() / 255 - mean) / std


def oracle_shift(embedding, grid, shift):
    planes = embedding.permute(2, 0, 1)[None]
    size = [int((1 + shift.ratio) * length) for length in (grid.rows, grid.cols)]
    large = F.interpolate(planes, size=size, mode="bicubic")[0].permute(1, 2, 0)
    return large[shift.row : shift.row + grid.rows, shift.col : shift.col + grid.cols].flatten(0, 1)


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(TINY, weights="random")


@pytest.mark.parametrize("family", ["mae"])
@pytest.mark.parametrize("file", ["base.pth", "ours.pth"])
def test_tokens_equal_the_released_ones(golden, golden_json, family, file):
    backbone = load_backbone(family, weights=golden(f"backbones/{family}/{file}"))
    expected = load_file(golden(f"backbones/{family}/expected.safetensors"))
    row, col = golden_json(f"backbones/{family}/expected.json")["pea_offset_hw"]
    square, wide = (normalised(backbone, expected[f"image_{size}"]) for size in ("224", "176x272"))
    for tokens, key in (
        (backbone.encode(square), "tokens_224"),
        (backbone.encode(square, PositionShift(10.0, row, col)), "tokens_224_pea"),
        (backbone.encode(wide), "tokens_176x272"),
    ):
        assert (tokens.flatten(1, 2) - expected[key]).abs().max() <= 2e-4, key


def test_real_vit_tiny_equals_timm(shared_data):
    import timm

    path = shared_data("weights/vit_tiny_patch16_224_in1k.safetensors")
    backbone = load_backbone("timm/vit_tiny_patch16_224", weights=path)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    weights = {name: value for name, value in load_file(path).items() if not name.startswith("head.")}
    model.load_state_dict(weights)
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    for size in ((224, 224), (112, 240)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            reference = model.eval().forward_features(images)[:, 1:]
        assert torch.equal(backbone.encode(images).flatten(1, 2), reference)


def test_tokens_can_be_trained_on(tiny):
    tokens = tiny.encode(torch.zeros(1, 3, 32, 32))
    assert tokens.shape == (1, 2, 2, tiny.dim)
    assert tokens.dtype == torch.float32
    assert not tokens.is_inference()
    assert tokens.is_contiguous()


def test_each_image_gets_its_own_shift(tiny):
    images = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    shifts = [None, PositionShift(10.0, 3, 17), PositionShift(2.0, 0, 5), None]
    together = tiny.encode(images, shifts)
    for index, shift in enumerate(shifts):
        alone = tiny.encode(images[index : index + 1], shift)[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[1], tiny.encode(images)[1], atol=1e-3)


def test_views_of_one_image_share_its_patches(tiny):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    views = [(0, None), (1, None), (0, PositionShift(10.0, 1, 2))]
    tokens = tiny.encode_views(images, views)
    expected = tiny.encode(images[[0, 1, 0]], [shift for _, shift in views])
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    native=st.integers(2, 9),
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    ratio=st.sampled_from([0.0, 0.5, 2.0, 10.0]),
    data=st.data(),
)
def test_shifted_positions_are_crops_of_the_enlarged_ones(native, rows, cols, ratio, data):
    embedding = torch.randn(native, native, 3, generator=torch.Generator().manual_seed(native))
    grid = Grid(rows, cols)
    row, col = (data.draw(st.integers(0, enlarged_length(length, ratio) - length)) for length in (rows, cols))
    shift = PositionShift(ratio, row, col)
    found = Positions(embedding, PositionResize.ANTIALIAS).shifted(grid, [shift, shift])
    torch.testing.assert_close(found[1], oracle_shift(embedding, grid, shift), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shift", [PositionShift(10.0, 21, 0), PositionShift(10.0, 0, -1), PositionShift(-0.5)]
)
def test_a_shift_outside_the_enlarged_grid_is_refused(tiny, shift):
    with pytest.raises(InputError):
        tiny.encode(torch.zeros(1, 3, 32, 32), shift)


def test_number_of_shifts(tiny):
    with pytest.raises(UsageError):
        tiny.encode(torch.zeros(2, 3, 32, 32), [None])


def test_size_that_is_no_multiple_of_the_patch(tiny):
    with pytest.raises(InputError) as caught:
        tiny.grid(100, 64)
    assert caught.value.found == "100x64"
    assert "96x64" in caught.value.hint
    assert "112x64" in caught.value.hint
    with pytest.raises(InputError):
        tiny.encode(torch.zeros(1, 3, 100, 64))


def test_random_weights_repeat_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (load_backbone(TINY, weights="random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(first.encode(images), again.encode(images))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.weights_source == "random:3"


def test_a_file_in_timms_layout(tiny, tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    backbone = load_backbone(TINY, weights=tmp_path / "own.pth")
    images = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        reference = model.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(backbone.encode(images).flatten(1, 2), reference, atol=1e-5, rtol=1e-5)
    assert backbone.weights_source == "own.pth"
    assert backbone.weights_sha256 != tiny.weights_sha256


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_close(tiny, precision):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    lower = load_backbone(TINY, weights="random", precision=precision).encode(images).float()
    similarity = F.cosine_similarity(lower, tiny.encode(images), dim=-1)
    assert similarity.min() > 0.99
    assert not torch.equal(lower, tiny.encode(images))


def test_description_comes_without_weights(golden):
    assert describe_backbone("mae_b").image_size == (224, 224)
    named = describe_backbone("mae_h")
    assert (named.dim, named.patch, named.grid) == (1280, 14, Grid(16, 16))
    small = describe_backbone("mae", weights=golden("backbones/mae/base.pth"))
    assert (small.dim, small.patch, small.grid) == (128, 16, Grid(14, 14))
    tiny = describe_backbone(TINY)
    assert (tiny.dim, tiny.patch, tiny.grid, tiny.family) == (64, 16, Grid(10, 10), "timm")


@pytest.mark.parametrize("name", ["mae", "mae_x", "timm/resnet18", "timm/vit_tiny_patch16_225"])
def test_names_that_mean_nothing(name):
    with pytest.raises(UsageError):
        load_backbone(name, weights="random")


def test_precision_and_device_are_checked():
    with pytest.raises(UsageError):
        load_backbone(TINY, weights="random", precision="fp8")
    with pytest.raises(UsageError):
        load_backbone(TINY, weights="random", device="abacus")


def test_parameter_counts_are_those_of_the_models():
    from cosettle_cache.backbones.published import make_vit

    for row in (BACKBONES[name] for name in ("mae_b", "ijepa_b", "clip_b", "dinov2_b")):
        with torch.device("meta"):
            vit = make_vit(row.family, row.architecture)
        assert sum(parameter.numel() for parameter in vit.parameters()) == row.n_parameters, row.name


def test_the_table_needs_no_torch():
    code = "import sys, cosettle_cache.backbones; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
