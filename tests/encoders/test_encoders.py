"""Tokens of the families against released values, of timm models against timm; sizes, shifts, randomness."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.models.eva import Eva

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import pick_device
from cosettle_cache.core.types import Grid, PositionShift
from cosettle_cache.encoders import BACKBONES, FAMILIES, describe_backbone, load_backbone
from cosettle_cache.encoders.checkpoints import read_checkpoint
from cosettle_cache.encoders.convert import infer_architecture, sort_tensors
from cosettle_cache.encoders.load import make_vit, vit_from_file
from cosettle_cache.encoders.registry import TIMM_FAMILIES, Architecture, PositionResize, make_info
from cosettle_cache.encoders.vit import PRECISIONS, Backbone, Positions, VitBody, Weights, enlarged_length
from cosettle_cache.heads.projection import load_projection
from cosettle_cache.training.losses import transfer_loss

TINY = "timm/test_vit"


def normalised(backbone, images):
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.mean, backbone.std))
    return (images.float() / 255 - mean) / std


def oracle_shift(embedding, grid, shift):
    planes = embedding.permute(2, 0, 1)[None]
    size = [int((1 + shift.ratio) * length) for length in (grid.rows, grid.cols)]
    large = F.interpolate(planes, size=size, mode="bicubic")[0].permute(1, 2, 0)
    return large[shift.row : shift.row + grid.rows, shift.col : shift.col + grid.cols].flatten(0, 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: on a busy machine threads wait for each other ten times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    return load_backbone(TINY, weights="random")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_released_ones(golden, golden_json, family):
    backbone = load_backbone(family, weights=golden(f"backbones/{family}/base.pth"))
    expected = load_file(golden(f"backbones/{family}/expected.safetensors"))
    row, col = golden_json(f"backbones/{family}/expected.json")["pea_offset_hw"]
    square, wide = (normalised(backbone, expected[f"image_{size}"]) for size in ("224", "176x272"))
    for tokens, key in (
        (backbone.encode(square), "tokens_224"),
        (backbone.encode(square, PositionShift(10.0, row, col)), "tokens_224_pea"),
        (backbone.encode(wide), "tokens_176x272"),
    ):
        assert (tokens.flatten(1, 2) - expected[key]).abs().max() <= 2e-4, key


@pytest.mark.parametrize("family", ["clip", "ijepa", "dinov2"])
def test_some_tokens_equal_the_released_ones(golden, golden_json, family):
    """The part of the released values that is small enough to be committed."""
    backbone = load_backbone(family, weights=golden(f"backbones/{family}/base.pth"))
    expected = load_file(golden(f"backbones/{family}/expected_part.safetensors"))
    shift = PositionShift(10.0, *golden_json(f"backbones/{family}/expected.json")["pea_offset_hw"])
    for key in ("tokens_224", "tokens_224_pea", "tokens_176x272"):
        if key in expected:
            images = normalised(backbone, expected[f"image_{key.split('_')[1]}"])
            tokens = backbone.encode(images, shift if key.endswith("pea") else None).flatten(1, 2)
            at = expected["at"][: expected[key].shape[1]]
            assert (tokens[:, at] - expected[key]).abs().max() <= 2e-4, key


@pytest.mark.parametrize("family", FAMILIES)
def test_objective_on_two_samples_equals_the_released_one(golden, golden_json, family):
    """Encoder and projection from the authors' files, tokens, loss and gradients of the projection."""
    facts = golden_json(f"backbones/{family}/expected.json")
    expected = load_file(golden(f"backbones/{family}/expected.safetensors"))
    whole = family in {"mae", "clip", "dinov2"}
    authors = golden(f"backbones/{family}/{'ours' if whole else 'ours_projection_only'}.pth")
    backbone = load_backbone(family, weights=authors if whole else golden(f"backbones/{family}/base.pth"))
    projection = load_projection(authors, dim=backbone.dim)
    images = normalised(backbone, expected["image_224"])
    plain = backbone.encode(images)
    shifted = backbone.encode(images, PositionShift(10.0, *facts["loss_pea_offset_hw"]))
    projected = projection(plain).flatten(1, 2)
    assert (projected - expected["projected_224"]).abs().max() <= 2e-4
    terms = transfer_loss(projection, torch.stack([plain, plain.flip(0), shifted], 1))
    assert terms.total.item() == pytest.approx(facts["loss"], rel=1e-4)
    assert terms.cycle_accuracy.item() == pytest.approx(facts["cycle_accuracy"], abs=1e-6)
    assert terms.identity_cosine.item() == pytest.approx(facts["identity_cosine"], rel=1e-4)
    terms.total.backward()
    for name, parameter in zip(
        ("linear", "layer_norm1"), (projection.linears[0], projection.norm), strict=True
    ):
        for leaf in ("weight", "bias"):
            found, released = getattr(parameter, leaf).grad, expected[f"grad.adapter.adapter_{name}.{leaf}"]
            assert (found - released).norm() <= 1e-3 * released.norm(), (name, leaf)


def test_blips_positions_are_brought_to_224_pixels(golden):
    path = golden("backbones/blip/base.pth")
    positions = read_checkpoint(path)["visual_encoder.pos_embed"].float()
    planes = positions[0, 1:].T.reshape(1, -1, 24, 24)
    wanted = F.interpolate(planes, size=(14, 14), mode="bicubic")[0].permute(1, 2, 0)
    vit = vit_from_file(*_sorted(path, "blip"))
    torch.testing.assert_close(vit.pos_embed[0].unflatten(0, (14, 14)), wanted)


def _sorted(path, family):
    file = sort_tensors(str(path), FAMILIES[family], read_checkpoint(path))
    return file, infer_architecture(file)


def test_wide_models_keep_their_published_heads():
    state = {
        "patch_embed.proj.weight": torch.empty(1280, 3, 14, 14, device="meta"),
        "pos_embed": torch.empty(1, 257, 1280, device="meta"),
        **{f"blocks.{n}.mlp.fc1.weight": torch.empty(5120, 1280, device="meta") for n in range(32)},
    }
    architecture = infer_architecture(sort_tensors("h.pth", FAMILIES["mae"], state))
    assert architecture == BACKBONES["mae_h"].architecture


def test_real_vit_tiny_equals_timm(shared_data):
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


def test_published_weights_come_by_name_from_the_hub_cache(shared_data, tmp_path, monkeypatch):
    path = shared_data("weights/vit_tiny_patch16_224_in1k.safetensors")
    repository = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc/model.safetensors").symlink_to(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    named, from_file = (
        load_backbone("timm/vit_tiny_patch16_224", weights=weights) for weights in (None, path)
    )
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert torch.equal(named.encode(images), from_file.encode(images))
    assert named.weights_sha256 == from_file.weights_sha256
    assert named.weights_source == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/model.safetensors"


@pytest.mark.slow
def test_compiled_blocks_give_the_same_tokens(tiny):
    compiled = load_backbone(TINY, weights="random", compiled=True)
    images, shifts = torch.rand(2, 3, 64, 64), [None, PositionShift(10.0, 1, 2)]
    assert compiled.precision == "fp32 compiled"
    torch.testing.assert_close(
        compiled.encode(images, shifts), tiny.encode(images, shifts), atol=1e-5, rtol=1e-5
    )


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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_who_shares_the_batch(family, precision):
    sizes = Architecture(64, 2, 1, 16, Grid(2, 2), 128)
    exact, backbone = (_small_random(FAMILIES[family], sizes, name) for name in ("fp32", precision))
    images = torch.randn(4, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    moved = [PositionShift(10.0, 3, 17), PositionShift(2.0, 0, 5), PositionShift(10.0, 1, 1), None]
    for shifts in ([None] * 4, [*moved[:3], moved[0]], moved):
        together = backbone.encode(images, shifts)
        alone = torch.cat([backbone.encode(images[i : i + 1], shift) for i, shift in enumerate(shifts)])
        largest = alone.abs().max()
        # Products of other shapes may add in another order: a rounding or two of the precision.
        rounding = torch.finfo(PRECISIONS[precision] or torch.float32).eps
        assert (together - alone).abs().max() <= 2 * rounding * largest
        assert (together - exact.encode(images, shifts)).abs().max() <= 0.02 * largest


def _small_random(family, sizes, precision):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = make_vit(family, sizes).eval().requires_grad_(False)
    body, info = VitBody(vit, family.resize, family.norm_plain), make_info(family.name, family, sizes)
    rules = {"token_rule": "", "position_rule": ""}
    return Backbone(info, body, Weights("random", ""), precision=precision, **rules)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_rounded_once_give_the_tokens_of_autocast(precision):
    views = [(0, None), (1, PositionShift(10.0, 1, 2))]
    for name in (TINY, "timm/eva02_tiny_patch14_224"):
        exact, rounded = (load_backbone(name, weights="random", precision=p) for p in ("fp32", precision))
        images = torch.rand(2, 3, 2 * exact.patch, 2 * exact.patch)
        with torch.inference_mode():
            found, wanted = (
                backbone._body.tokens(images, views, Grid(2, 2), PRECISIONS[precision])
                for backbone in (rounded, exact)
            )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("api", ["old", "new", "whole", "autocast"])
def test_float32_is_exact_whatever_the_process_set_and_its_flags_stay(tiny, api):
    backends = torch.backends
    if api in {"new", "whole"} and not hasattr(backends, "fp32_precision"):
        pytest.skip("torch before 2.9")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    wanted = tiny.encode(images)
    operators = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    owners = (backends, backends.cudnn, *operators)

    def read():
        return [getattr(owner, "fp32_precision", None) for owner in owners]

    before = read()
    try:
        if api == "old":
            torch.set_float32_matmul_precision("medium")
        elif api == "new":
            backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "tf32"
        elif api == "whole":
            backends.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16, enabled=api == "autocast"):
            found, inside = read(), []
            tiny._body.vit.norm.register_forward_hook(lambda *_: inside.append(read()))
            assert torch.equal(tiny.encode(images), wanted)
        assert read() == found
        assert set(inside[0][2:]) <= {"ieee", None}
        if api == "whole":  # what followed the whole follows it again
            backends.fp32_precision = "none"
            assert read() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for owner, value in zip(owners, before, strict=True):
            if value is not None:
                owner.fp32_precision = value
        tiny._body.vit.norm._forward_hooks.clear()


def test_devices_that_cannot_be_used_are_refused_in_a_sentence(monkeypatch):
    with pytest.raises(UsageError, match="Apple's GPUs are not supported"):
        load_backbone(TINY, weights="random", device="mps")
    for device in ("cuda:\u00b2", "gpu", "cuda:", "cpu:x"):
        with pytest.raises(UsageError, match="there is no device"):
            load_backbone(TINY, weights="random", device=device)
    _pretend_cards(monkeypatch, 2)
    with pytest.raises(UsageError, match="Tesla T4 has no bfloat16"):
        load_backbone(TINY, weights="random", device="cuda:1", precision="bf16")
    with pytest.raises(UsageError, match="cuda:2 is not there"):
        load_backbone(TINY, weights="random", device="cuda:2")


def test_a_card_with_a_number_is_the_only_one_of_its_process(monkeypatch):
    current = []
    _pretend_cards(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [pick_device(device) for device in (None, "cpu", "cuda", "cuda:1")][-1] == "cuda:1"
    assert current == ["cuda:1"]


def _pretend_cards(monkeypatch, count):
    answers = {"is_available": True, "device_count": count, "get_device_capability": (7, 5)}
    for name, answer in {**answers, "get_device_name": "Tesla T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


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


def test_images_are_torch_or_numpy(tiny):
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    assert torch.equal(tiny.encode(images.numpy()), tiny.encode(images))


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


def small_eva(**options):
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
    return Eva(**sizes, dynamic_img_size=True, use_rot_pos_emb=True, **options).eval()


OTHER_KINDS = {
    "dinov3": lambda: small_eva(
        rope_type="dinov3", use_abs_pos_emb=False, num_reg_tokens=4, rope_rotate_half=True
    ),
    "eva02": lambda: small_eva(rope_type="cat", ref_feat_shape=(4, 4)),
    "rope": lambda: small_eva(rope_type="cat", use_abs_pos_emb=False),
    "mixed": lambda: small_eva(rope_type="mixed", use_abs_pos_emb=True),
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224",
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
    ).eval(),
    "registers_patch_14": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        embed_dim=64,
        depth=2,
        num_heads=2,
        init_values=1.0,
        dynamic_img_size=True,
    ).eval(),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_timm_models_of_other_kinds(kind):
    """Rotary positions (fixed, normalised, learned), registers, 14-pixel patches, a second prefix token."""
    vit = OTHER_KINDS[kind]()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    body, patch = VitBody(vit, PositionResize.ANTIALIAS), vit.patch_embed.patch_size[0]
    grid, n_prefix = Grid(4, 6), vit.num_prefix_tokens
    images = torch.rand(2, 3, 4 * patch, 6 * patch, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = vit.forward_features(images)
        plain = body.tokens(images, [(0, None), (1, None)], grid)
        mixed = body.tokens(images, [(0, None), (1, PositionShift(10.0, 3, 4))], grid)
    assert torch.equal(plain, reference)
    torch.testing.assert_close(mixed[0], plain[0], atol=1e-5, rtol=1e-4)
    assert (mixed[1] - plain[1])[n_prefix:].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rope", "mixed", "eva02"])
def test_rotary_shifts_refine_the_coordinates(kind):
    """With ratio 1 every second position of the refined grid is a position of the grid."""
    rotary, grid = VitBody(OTHER_KINDS[kind](), PositionResize.ANTIALIAS).rotary, Grid(4, 6)
    plain, shifted = (
        rotary.tables(grid, [shift])[-1].reshape(-1, 4, 6, 64) for shift in (None, PositionShift(1.0, 2, 4))
    )
    torch.testing.assert_close(shifted[:, ::2, ::2], plain[:, 1:3, 2:5])


def test_a_rotary_model_by_name():
    backbone = load_backbone("timm/vit_tiny_patch16_dinov3_qkvb", weights="random")
    assert "rotary" in backbone.position_rule
    assert backbone.encode(torch.zeros(1, 3, 32, 48)).shape == (1, 2, 3, backbone.dim)


def test_a_file_in_timms_layout(tiny, tmp_path):
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
    for row in (BACKBONES[name] for name in ("mae_b", "ijepa_b", "clip_b", "dinov2_b")):
        with torch.device("meta"):
            vit = make_vit(row.family, row.architecture)
        assert sum(parameter.numel() for parameter in vit.parameters()) == row.n_parameters, row.name


LATER = [row for row in BACKBONES.values() if row.model_id]


def test_rows_of_later_encoders_are_what_timm_has():
    for row in LATER:
        described, known = describe_backbone(row.name), describe_backbone(f"timm/{row.model_id}")
        assert dataclasses.replace(known, name=row.name, family=row.family.name) == described
        if row.family.name != "dinov2_giant":
            continue
        with torch.device("meta"):
            vit = timm.create_model(row.model_id, num_classes=0)
        assert sum(parameter.numel() for parameter in vit.parameters()) == row.n_parameters


@pytest.mark.parametrize(
    "name",
    ["dinov3_s", "dinov3_7b", "eupe_t", "radio_v3_b", "tipsv2_b", "pe_spatial_t", "siglip2_b", "aimv2_l"],
)
def test_tokens_of_later_encoders_equal_timm(name):
    row = BACKBONES[name]
    sizes = {"depth": 1, "embed_dim": 128, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(row.model_id, num_classes=0, dynamic_img_size=True, **sizes).eval()
    images = torch.rand(1, 3, 4 * row.architecture.patch, 6 * row.architecture.patch)
    with torch.inference_mode():
        reference = vit.forward_features(images)[:, -24:]
        tokens = VitBody(vit, PositionResize.ANTIALIAS).tokens(images, [(0, None)], Grid(4, 6))
    torch.testing.assert_close(tokens[:, -24:], reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["mae_b", "dinov3_7b", "radio_v3_b", "tipsv2_b", "pe_spatial_t", "siglip2_b", "aimv2_l"]
)
@pytest.mark.parametrize("norm", ["last", "each", "none"])
def test_inner_layers_equal_timms(name, norm):
    row = BACKBONES[name]
    model_id = row.model_id or "vit_base_patch16_224"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"depth": 3, "embed_dim": 128, "num_heads": 2}
        vit = timm.create_model(model_id, num_classes=0, dynamic_img_size=True, **sizes).eval()
        for parameter in vit.norm.parameters():
            torch.nn.init.normal_(parameter)
    patch = row.architecture.patch
    images = torch.rand(2, 3, 4 * patch, 6 * patch, generator=torch.Generator().manual_seed(2))
    info = make_info(name, row.family, dataclasses.replace(row.architecture, width=128))
    body = VitBody(vit, PositionResize.ANTIALIAS)
    backbone = Backbone(info, body, Weights("random:0", ""), token_rule="", position_rule="")
    backbone.take_layers([0, 2], norm)
    options = {"norm": norm == "each", "intermediates_only": True, "output_fmt": "NLC"}
    with torch.inference_mode():
        first, last = vit.forward_intermediates(images, indices=[0, 2], **options)
        last = vit.norm(last) if norm == "last" else last
    wanted = torch.cat([first, last], -1)
    torch.testing.assert_close(backbone.encode(images).flatten(1, 2), wanted, atol=1e-5, rtol=1e-5)
    alone = backbone.one_layer(2)
    torch.testing.assert_close(alone.encode(images).flatten(1, 2), last, atol=1e-5, rtol=1e-5)
    assert alone.name == f"{name}@2" + ("" if norm == "last" else f":{norm}")


def test_layers_are_named(tiny):
    named = load_backbone(f"{TINY}@1,3", weights="random")
    assert (named.name, named.dim, named.info.dim) == (f"{TINY}@1,3", 2 * tiny.dim, tiny.dim)
    assert "behind block 1, 3 of 0 to" in named.token_rule and "final norm on last" in named.token_rule
    assert named.weights_sha256 == tiny.weights_sha256
    assert describe_backbone("mae_b@3:none").dim == 768
    images = torch.rand(1, 3, 32, 32)
    last = load_backbone(f"{TINY}@{len(tiny._body.vit.blocks) - 1}", weights="random")
    assert torch.equal(last.encode(images), tiny.encode(images))
    for wrong in ("@", "@x", "@3,1", "@1,1", "@1:most", "@-1", "@1:", "@99"):
        with pytest.raises(UsageError):
            load_backbone(f"{TINY}{wrong}", weights="random")


def test_dinov3_has_metas_periods_and_timms_names_have_timms():
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    rounded, plain = (
        load_backbone(name, weights="random") for name in ("dinov3_s", "timm/vit_small_patch16_dinov3_qkvb")
    )
    assert "periods in bfloat16" in rounded.position_rule
    assert "bfloat16" not in plain.position_rule
    assert 0 < (rounded.encode(images) - plain.encode(images)).abs().max() < 0.1


def test_the_documentation_has_every_encoder_and_every_quirk():
    text = (Path(__file__).parents[2] / "docs/encoders.md").read_text()
    for row in BACKBONES.values():
        assert f"| `{row.name}` | {row.n_parameters / 1e6:.1f} M |" in text
        assert str(row.source) in text
    for family in (*FAMILIES.values(), *TIMM_FAMILIES.values()):
        assert not [line for line in (family.token_rule, *family.quirks) if line not in text]


def test_the_table_needs_no_torch():
    code = """
import sys
from cosettle_cache.encoders import BACKBONES, describe_backbone
assert describe_backbone("dino_s8").dim == BACKBONES["dino_s8"].architecture.width
assert not {"torch", "timm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
