"""Heads, their start, their files and their digests."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.errors import CheckpointError, InputError, UsageError
from cosettle_cache.encoders.checkpoints import read_checkpoint
from cosettle_cache.heads import HEADS, check_trainable
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import (
    INITS,
    METADATA_KEY,
    Projection,
    describe_projection,
    export_projection,
    exported_tensors,
    load_projection,
    projection_sha256,
    read_provenance,
    released_init,
    save_projection,
)

PROJECTION_ONLY = ("blip", "dino", "ibot", "ijepa", "mocov3")
WITH_ENCODER = ("clip", "dinov2", "mae")


def test_linear_head_is_linear_tanh_layernorm() -> None:
    projection = Projection(6, init="pytorch", seed=1)
    tokens = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    linear = projection.linears[0]
    inner = torch.tanh(tokens @ linear.weight.T + linear.bias)
    centred = inner - inner.mean(-1, keepdim=True)
    wanted = centred / (inner.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(projection(tokens), wanted, atol=1e-5)


def test_affine_head_has_no_tanh() -> None:
    projection = Projection(6, "affine", init="pytorch", seed=1)
    tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(projection(tokens), projection.norm(projection.linears[0](tokens)))


@pytest.mark.parametrize("head", HEADS)
def test_one_vector_and_many_give_the_same(head: str) -> None:
    projection = Projection(5, head)
    tokens = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(projection(tokens)[1, 2, 3], projection(tokens[1, 2, 3]), atol=1e-6)


@pytest.mark.parametrize("init", [name for name in INITS if name != "identity"])
def test_weights_come_from_the_seed_alone(init: str) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (Projection(16, "mlp2", init=init, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert projection_sha256(first) == projection_sha256(again) != projection_sha256(other)


def test_an_affine_head_may_start_as_layernorm_alone() -> None:
    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Projection(8, "affine", init="identity")(tokens), F.layer_norm(tokens, (8,)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_blend_interpolates_cosines(tmp_path: Path, head: str, share: float) -> None:
    path = tmp_path / "projection.safetensors"
    projection = Projection(8, head, seed=3)
    torch.nn.init.normal_(projection.linears[0].weight, generator=torch.Generator().manual_seed(1))
    save_projection(path, projection, {"weights_sha256": "abc"})
    blend, whole = load_projection(f"{path}:{share}"), load_projection(f"{path}:1")
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    raw, projected, blended = (
        F.normalize(found, dim=-1) @ F.normalize(found, dim=-1).mT
        for found in (tokens, projection(tokens), blend(tokens))
    )
    assert torch.allclose(blended, (1 - share) * raw + share * projected, atol=1e-5)
    assert (whole.width, blend.width) == (8, 16)
    assert projection_sha256(whole) == projection_sha256(projection) != projection_sha256(blend)
    assert read_provenance(Path(f"{path}:{share}")) == {"weights_sha256": "abc"}
    _, kind = make_kinds([("half", blend)], 8)
    again = pickle.loads(pickle.dumps(kind.saved(tmp_path / "saved")))
    assert torch.equal(again.apply(tokens), kind.apply(tokens)) and again.width(8) == 16
    for whole_only in (describe_projection, exported_tensors, partial(load_projection, blended=False)):
        with pytest.raises(UsageError, match="wider"):
            whole_only(f"{path}:{share}")


@pytest.mark.parametrize("share", ["0", "1.5", "-0.5", "1.2.3", "-", "nan", "25%", "1/4", ""])
def test_shares_that_are_none(tmp_path: Path, share: str) -> None:
    save_projection(tmp_path / "projection.safetensors", Projection(4), {})
    with pytest.raises(UsageError, match="share"):
        load_projection(f"{tmp_path / 'projection.safetensors'}:{share}")


def test_init_rules_have_their_spread() -> None:
    spread = {name: Projection(256, init=name).linears[0].weight.std().item() for name in INITS}
    assert spread["trunc_normal"] == pytest.approx(0.02, rel=0.02)
    assert spread["xavier_uniform"] == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert spread["pytorch"] == pytest.approx((1 / 3 / 256) ** 0.5, rel=0.02)
    assert Projection(256, init="pytorch").linears[0].bias.abs().max() > 0
    assert Projection(256, init="trunc_normal").linears[0].bias.abs().max() == 0


def test_released_init_by_backbone() -> None:
    assert released_init("mae_b") == released_init("mae") == released_init("mocov3_b") == "xavier_uniform"
    assert released_init("clip_b") == "pytorch"
    assert released_init("dinov2_b") == released_init("timm/vit_tiny_patch16_224") == "trunc_normal"


@pytest.mark.parametrize("head", HEADS)
def test_file_round_trip(tmp_path: Path, head: str) -> None:
    projection = Projection(8, head, seed=5)
    path = tmp_path / "projection.safetensors"
    save_projection(path, projection, {"backbone": "mae_b", "settings": '{"seed": 5}'})
    loaded = load_projection(path)
    assert (loaded.head, loaded.dim) == (head, 8)
    assert projection_sha256(loaded) == projection_sha256(projection)
    assert read_provenance(path) == {"backbone": "mae_b", "settings": '{"seed": 5}'}
    first = path.read_bytes()
    save_projection(path, loaded, read_provenance(path))
    assert path.read_bytes() == first


def test_digest_names_head_and_values() -> None:
    linear, affine = Projection(4, "linear"), Projection(4, "affine")
    assert projection_sha256(linear) != projection_sha256(affine)
    before = projection_sha256(linear)
    with torch.no_grad():
        linear.norm.bias[0] += 1e-6
    assert projection_sha256(linear) != before


def test_another_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_projection(path, Projection(8), {})
    with pytest.raises(CheckpointError) as raised:
        load_projection(path, dim=12)
    assert (raised.value.wanted, raised.value.found) == ("12", "8")


def test_missing_file_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_projection(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="unknown head"):
        Projection(4, "conv")
    with pytest.raises(UsageError, match="unknown init"):
        Projection(4, init="zeros")


@pytest.mark.parametrize("family", PROJECTION_ONLY)
def test_authors_file_projects_as_released(golden: Callable[[str], Path], family: str) -> None:
    check_authors_file(golden, family, "ours_projection_only.pth")


@pytest.mark.parametrize("family", WITH_ENCODER)
def test_authors_file_with_encoder_projects_as_released(golden: Callable[[str], Path], family: str) -> None:
    check_authors_file(golden, family, "ours.pth")


def check_authors_file(golden: Callable[[str], Path], family: str, name: str) -> None:
    projection = load_projection(golden(f"backbones/{family}/{name}"), dim=128)
    expected = load_file(golden(f"backbones/{family}/expected.safetensors"))
    assert projection.head == "linear"
    found = projection(expected["tokens_224"])
    assert (found - expected["projected_224"]).abs().max() < 1e-4


def test_authors_mlp_is_recognised(tmp_path: Path) -> None:
    tensors = {f"adapter.adapter.adapter_linear{k}.weight": torch.eye(4) * k for k in (1, 2)}
    tensors |= {f"adapter.adapter.adapter_linear{k}.bias": torch.zeros(4) for k in (1, 2)}
    tensors |= {f"adapter.adapter.adapter_layer_norm1.{leaf}": torch.ones(4) for leaf in ("weight", "bias")}
    torch.save({"model": tensors}, tmp_path / "ours.pth")
    save_file(tensors, tmp_path / "ours.safetensors")
    for name in ("ours.pth", "ours.safetensors"):
        projection = load_projection(tmp_path / name)
        assert projection.head == "mlp2"
        assert torch.equal(projection.linears[1].weight, torch.eye(4) * 2)


def test_a_projection_with_a_missing_bias_is_refused(tmp_path: Path) -> None:
    tensors = {"adapter.adapter.adapter_linear.weight": torch.eye(4)}
    tensors |= {f"adapter.adapter.adapter_layer_norm1.{leaf}": torch.ones(4) for leaf in ("weight", "bias")}
    torch.save({"model": tensors}, tmp_path / "ours.pth")
    with pytest.raises(CheckpointError, match="does not fit the linear head"):
        load_projection(tmp_path / "ours.pth")


def test_the_spectral_head_is_one_matrix_that_starts_as_the_identity() -> None:
    projection = Projection(5, "spectral")
    tokens = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projection(tokens), tokens)
    assert [name for name, _ in projection.named_parameters()] == ["linears.0.weight"]


def test_a_computed_head_is_not_trained() -> None:
    check_trainable("linear")
    with pytest.raises(UsageError, match="computed, not trained") as raised:
        check_trainable("spectral")
    assert raised.value.wanted == "linear or affine or mlp2 or mlp3"


@pytest.mark.parametrize("head", ["linear", "mlp2", "mlp3"])
@pytest.mark.parametrize("backbone", ["mae_b", "clip_b"])
def test_export_to_the_authors_layout_and_back(tmp_path: Path, head: str, backbone: str) -> None:
    projection = Projection(6, head, init="pytorch", seed=3)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    save_projection(ours, projection, {"backbone": backbone})
    export_projection(ours, theirs)
    document = torch.load(theirs, weights_only=True)
    prefix = "visual." if backbone == "clip_b" else ""
    assert list(document) == ["model"]
    assert f"{prefix}adapter.adapter.adapter_layer_norm1.weight" in document["model"]
    number = "" if head == "linear" else "1"
    assert torch.equal(
        document["model"][f"{prefix}adapter.adapter.adapter_linear{number}.weight"],
        projection.linears[0].weight,
    )
    assert projection_sha256(load_projection(theirs)) == projection_sha256(projection)
    export_projection(theirs, tmp_path / "again.pth")
    assert projection_sha256(load_projection(tmp_path / "again.pth")) == projection_sha256(projection)


def test_exported_names_are_those_of_the_authors_file(golden: Callable[[str], Path], tmp_path: Path) -> None:
    released = golden("backbones/mae/ours.pth")
    export_projection(released, tmp_path / "p.pth")
    wanted = read_checkpoint(released)
    found = torch.load(tmp_path / "p.pth", weights_only=True)["model"]
    assert found.keys() == {name for name in wanted if "adapter" in name}
    assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in found.items())


@pytest.mark.parametrize("head", ["affine", "spectral"])
def test_heads_without_a_name_in_the_authors_layout_are_refused(tmp_path: Path, head: str) -> None:
    save_projection(tmp_path / "p.safetensors", Projection(4, head), {})
    with pytest.raises(CheckpointError, match=f"holds the head {head}") as raised:
        export_projection(tmp_path / "p.safetensors", tmp_path / "p.pth")
    assert raised.value.wanted == "linear or mlp2 or mlp3"
    assert not (tmp_path / "p.pth").exists()
    with pytest.raises(UsageError, match="no layout 'onnx'"):
        export_projection(tmp_path / "p.safetensors", tmp_path / "p.pth", "onnx")


def test_description_of_a_file(tmp_path: Path) -> None:
    projection = Projection(4, "spectral")
    with torch.no_grad():
        projection.linears[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))
    save_projection(tmp_path / "p.safetensors", projection, {"backbone": "dino_b"})
    info = describe_projection(tmp_path / "p.safetensors")
    assert (info.layout, info.head, info.dim, info.n_parameters) == ("cosettle-cache", "spectral", 4, 16)
    assert info.sha256 == projection_sha256(projection)
    values = info.singular_values[0]
    assert (values.largest, values.smallest, values.rank) == (3.0, 0.0, 3)
    assert info.provenance == {"backbone": "dino_b"}


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5, 5), (0, 5)])
def test_a_linear_map_as_a_convolution(shape: tuple[int, ...]) -> None:
    head = Projection(5, "affine", init="pytorch")
    tokens = torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    linear = F.linear(tokens, head.linears[0].weight, head.linears[0].bias)
    wanted = F.layer_norm(linear, (5,))
    assert torch.allclose(head(tokens), wanted, atol=1e-6)
    wanted_inputs = torch.autograd.grad(wanted.square().sum(), tokens)[0]
    assert torch.allclose(
        torch.autograd.grad(head(tokens).square().sum(), tokens)[0], wanted_inputs, atol=1e-5
    )


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "p.safetensors", Projection(4).state_dict()
    description = {METADATA_KEY: json.dumps({"head": "linear", "provenance": {}})}
    bad = {
        "dense floating": {name: tensor.to(torch.int64) for name, tensor in whole.items()},
        "not finite": whole | {"linears.0.bias": torch.tensor([0.0, torch.nan, torch.inf, 0.0])},
        "does not fit": {name: tensor for name, tensor in whole.items() if name != "norm.bias"},
    }
    for said, tensors in bad.items():
        save_file(tensors, path, description)
        with pytest.raises(CheckpointError) as raised:
            load_projection(path)
        assert said in " ".join(raised.value.lines())
    for text in (
        "7",
        "{}",
        '{"head": ["linear"], "provenance": {}}',
        '{"head": "linear", "provenance": {"a": 1}}',
        "[" * 100_000,
        "{",
    ):
        save_file(whole, path, {METADATA_KEY: text})
        with pytest.raises(InputError, match=r"p\.safetensors"):
            load_projection(path)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_checkpoints_of_odd_tensors_are_refused(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    tensors = {f"adapter.adapter.{name}": item for name, item in _authors_tensors().items()}
    torch.save({"model": tensors | {name: make(item) for name, item in tensors.items()}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"c\.pth"):
        load_projection(tmp_path / "c.pth")


def _authors_tensors() -> dict[str, Tensor]:
    names = {"linears.0": "adapter_linear", "norm": "adapter_layer_norm1"}
    state = Projection(4).state_dict().items()
    return {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": item for name, item in state}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\x1b[2J"])
def test_names_of_kinds_are_one_part_of_a_path(name: str) -> None:
    with pytest.raises((InputError, UsageError), match="name"):
        make_kinds([(name, Projection(4))], 4)
