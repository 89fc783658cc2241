"""Files from strangers: every layout that is read, every kind of bad file and what is said about it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cosettle_cache.core.errors import CheckpointError, InputError
from cosettle_cache.encoders import FAMILIES, describe_backbone, load_backbone
from cosettle_cache.encoders.checkpoints import adapter_tensors, read_checkpoint
from cosettle_cache.encoders.convert import looks_like

WIDTH, DEPTH, PATCH = 64, 2, 16

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


def plain_vit(side=2, class_token=True, width=WIDTH):
    """Return a state dict in the layout of MAE, DINO and iBOT (I-JEPA without CLS)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    state = {
        "pos_embed": draw(1, side * side + class_token, width),
        "patch_embed.proj.weight": draw(width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    if class_token:
        state["cls_token"] = draw(1, 1, width)
    for block in range(DEPTH):
        for norm in ("norm1", "norm2"):
            state |= {
                f"blocks.{block}.{norm}.weight": 1 + draw(width),
                f"blocks.{block}.{norm}.bias": draw(width),
            }
        for name, rows, cols in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            state |= {
                f"blocks.{block}.{name}.weight": draw(rows, cols),
                f"blocks.{block}.{name}.bias": draw(rows),
            }
    return state


def sine_vit(**sizes):
    """Return a plain ViT whose positions are pairs of sine and cosine (MAE, MoCo v3, I-JEPA)."""
    state = plain_vit(**sizes)
    angles = torch.linspace(0, 9, state["pos_embed"].shape[1] * WIDTH // 2).view(1, -1, WIDTH // 2)
    return state | {"pos_embed": torch.cat([angles.sin(), angles.cos()], -1)}


def clip_tower():
    """Return a CLIP state dict: visual tower, and a stump of the text tower."""
    bare = plain_vit()
    bare.pop("patch_embed.proj.bias")
    bare |= {f"norm_pre.{leaf}": bare[f"norm.{leaf}"] + 0.1 for leaf in ("weight", "bias")}
    bare |= {"cls_token": bare["cls_token"][0, 0], "pos_embed": bare["pos_embed"][0]}
    state = {}
    for name, tensor in bare.items():
        for published, timm_name in FAMILIES["clip"].renames:
            name = name.replace(timm_name, published)  # noqa: PLW2901
        state[f"visual.{name}"] = tensor
    text = {"positional_embedding": torch.zeros(8, 8), "text_projection": torch.zeros(8, 8)}
    return state | text | {"visual.proj": torch.zeros(WIDTH, 8), "logit_scale": torch.zeros(())}


def layouts():
    """Return (family, document) for the layouts in which the families were published."""
    bare, sines, nothing = plain_vit(), sine_vit(), torch.zeros(1)
    scales = {
        f"blocks.{block}.{name}.gamma": torch.ones(WIDTH) for block in (0, 1) for name in ("ls1", "ls2")
    }
    registers = bare | scales | {"register_tokens": torch.zeros(1, 4, WIDTH), "mask_token": nothing}
    chunked = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in registers.items()}
    adapter = {"adapter.adapter.adapter_linear.weight": torch.zeros(WIDTH, WIDTH)}
    moco = prefixed("momentum_encoder.", sines | {"head.0.weight": nothing})
    moco |= prefixed("base_encoder.", sines)
    teacher = prefixed("backbone.", bare) | {"head.mlp.0.bias": nothing}
    return {
        "mae": ("mae", {"model": sines}),
        "mae pretraining": ("mae", {"model": sines | {"mask_token": nothing, "decoder_norm.bias": nothing}}),
        "mae of the authors, data parallel": ("mae", {"model": prefixed("module.", sines | adapter)}),
        "ijepa": ("ijepa", {"encoder": prefixed("module.", sine_vit(class_token=False)), "epoch": 800}),
        "clip": ("clip", clip_tower()),
        "blip": ("blip", {"model": prefixed("visual_encoder.", plain_vit(24)) | {"temp": nothing}}),
        "blip of the authors": ("blip", {"model": plain_vit(14) | adapter}),
        "mocov3": ("mocov3", {"state_dict": prefixed("module.", moco | {"predictor.0.weight": nothing})}),
        "dino": ("dino", bare),
        "dino training": ("dino", {"teacher": prefixed("module.", teacher), "student": {}}),
        "ibot": ("ibot", {"state_dict": bare, "args": argparse.Namespace(arch="vit_base")}),
        "dinov2": ("dinov2", {"teacher": prefixed("backbone.", registers) | {"dino_head.b": nothing}}),
        "dinov2 in chunks": ("dinov2", {"teacher": prefixed("backbone.", chunked)}),
        "dinov2 without registers": ("dinov2", bare | scales),
    }


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def encode(backbone):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    return backbone.encode(images)


def scripted(state):
    """Return a scripted module whose state dict has these names (nothing else of CLIP's code is needed)."""

    class Node(nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        node.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    return torch.jit.script(root)


@pytest.mark.parametrize("layout", layouts())
def test_every_published_layout_loads(tmp_path, layout):
    family, document = layouts()[layout]
    torch.save(document, tmp_path / "file.pth")
    backbone = load_backbone(family, weights=tmp_path / "file.pth")
    assert (backbone.dim, backbone.patch, backbone.family) == (WIDTH, PATCH, family)
    assert encode(backbone).isfinite().all()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_the_same_tensors_give_the_same_tokens_in_every_format(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(plain_vit(), path)
    else:
        torch.save(plain_vit(), path, _use_new_zipfile_serialization=suffix == ".pth")
    torch.save({"model": plain_vit()}, tmp_path / "wrapped.pth")
    tokens = encode(load_backbone("dino", weights=path))
    assert torch.equal(tokens, encode(load_backbone("ibot", weights=tmp_path / "wrapped.pth")))


@pytest.mark.parametrize(("family", "file"), [("mae", "dino"), ("dino", "mae"), ("ibot", "mocov3")])
def test_equal_layouts_are_told_apart_by_their_positions(tmp_path, family, file):
    vit = plain_vit() if file == "dino" else sine_vit()
    torch.save({"model": {name: tensor.half() for name, tensor in vit.items()}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"is not a checkpoint of the {family} family") as caught:
        load_backbone(family, weights=tmp_path / "file.pth")
    assert file in caught.value.found


def test_a_torchscript_archive_gives_its_state_dict_without_running(tmp_path):
    state = clip_tower() | {"visual.ln_post.bias": torch.arange(WIDTH).half()}
    scripted(state).save(str(tmp_path / "clip.pt"))
    found = read_checkpoint(tmp_path / "clip.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    torch.save(state, tmp_path / "clip.pth")
    first, second = (load_backbone("clip", weights=tmp_path / name) for name in ("clip.pt", "clip.pth"))
    assert torch.equal(encode(first), encode(second))


def test_clips_layout_in_a_torchscript_archive_gives_the_released_tokens(golden, tmp_path):
    path = golden("backbones/clip/base.pth")
    scripted(read_checkpoint(path)).save(str(tmp_path / "clip.pt"))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = [load_backbone("clip", weights=file).encode(images) for file in (path, tmp_path / "clip.pt")]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("prefix", ["", "module.", "visual.", "module.visual."])
def test_the_authors_projection_gets_canonical_names(tmp_path, prefix):
    tensors = {
        f"{prefix}adapter.adapter.adapter_linear1.weight": torch.ones(2, 2).half(),
        f"{prefix}adapter.adapter.adapter_layer_norm1.bias": torch.ones(2),
        "cls_token": torch.zeros(1),
    }
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1.0)}, tmp_path / "ours.pth")
    found = adapter_tensors(tmp_path / "ours.pth")
    assert found.keys() == {"adapter_linear1.weight", "adapter_layer_norm1.bias"}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_file_without_a_projection(tmp_path):
    torch.save(plain_vit(), tmp_path / "base.pth")
    with pytest.raises(CheckpointError, match="no projection"):
        adapter_tensors(tmp_path / "base.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
def test_a_pickled_object_is_refused_and_never_run(tmp_path, write):
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    document = {"model": plain_vit(), "extra": Evil(mark)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(document, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was executed"):
        read_checkpoint(path)
    assert not mark.exists()


def test_a_pickled_model_is_refused_by_its_class(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "model.pth")
    assert caught.value.found == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 60, 0.5, 0.999])
def test_truncated_files(tmp_path, suffix, kept):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(plain_vit(), whole)
    elif suffix == ".pt":
        scripted(plain_vit()).save(str(whole))
    else:
        torch.save(plain_vit(), whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError):
        read_checkpoint(cut)


def test_a_damaged_file_in_the_cache_of_the_hub_is_to_be_removed(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob, name = tmp_path / "blobs" / "0123abcd", tmp_path / "model.safetensors"
    blob.write_bytes(b"\x10")
    name.symlink_to(blob)
    with pytest.raises(CheckpointError) as raised:  # as long as it is there, it is not fetched again
        read_checkpoint(name)
    assert raised.value.hint == f"remove {blob}"


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html>\n<html>", "version https://git-lfs.github.com/spec/v1\noid", "é" * 400]
)
@pytest.mark.parametrize("name", ["page.pth", "page.safetensors"])
def test_a_text_file_named_like_a_checkpoint(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="text file"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("document", [[1, 2], {"epoch": 3}, {}, torch.zeros(2)])
def test_files_that_hold_no_state_dict(tmp_path, document):
    torch.save(document, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_checkpoint(tmp_path / "other.pth")


NO_WEIGHTS = {
    "int8": lambda tensor: tensor.to(torch.int8),
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "sparse": torch.Tensor.to_sparse,
    "more numbers than the file holds": lambda tensor: tensor.to("meta"),
    "NaN": lambda tensor: tensor * torch.nan,
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("backbone", ["dino", "timm/test_vit"])
def test_tensors_that_are_no_weights_are_named(tmp_path, kind, backbone):
    state = timm.create_model("test_vit", num_classes=0).state_dict() if "timm" in backbone else plain_vit()
    name = "blocks.1.mlp.fc1.weight"
    torch.save({"model": state | {name: NO_WEIGHTS[kind](state[name])}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"the tensor {name} of .* holds no weights: .*{kind}"):
        load_backbone(backbone, weights=tmp_path / "file.pth")


def test_a_projection_of_integers_is_refused(tmp_path):
    tensors = {"adapter.adapter.adapter_linear.weight": torch.ones(4, 4, dtype=torch.int32)}
    torch.save({"model": tensors}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"adapter_linear\.weight of .* is int32"):
        adapter_tensors(tmp_path / "file.pth")


def test_positions_that_claim_more_than_the_file_holds(tmp_path):
    endless = torch.zeros(1, 1, 1).expand(1, 10**12 + 1, WIDTH)
    torch.save({"model": plain_vit() | {"pos_embed": endless}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed of .* more numbers than the file holds"):
        load_backbone("dino", weights=tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"])
@pytest.mark.parametrize("shape", [(), (WIDTH,), (0, 3, PATCH, PATCH), (1, 1, 2, 2, 2)])
def test_sizes_of_other_axes_are_named(tmp_path, name, shape):
    torch.save(plain_vit() | {name: torch.zeros(shape)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_backbone("dino", weights=tmp_path / "file.pth")
    assert f"another shape: {name}: wanted" in caught.value.details[0]


def test_a_block_with_an_endless_number_is_left_over(tmp_path):
    torch.save(plain_vit() | {"blocks.99999999999.norm1.weight": torch.zeros(WIDTH)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_backbone("dino", weights=tmp_path / "file.pth")


def test_averaged_weights_are_named_and_can_be_chosen(tmp_path):
    plain, average = plain_vit(), prefixed("module.", plain_vit())
    average["module.norm.bias"] = average["module.norm.bias"] + 1
    path = tmp_path / "file.pth.tar"
    torch.save({"state_dict": plain, "state_dict_ema": average, "optimizer": {"state": {}}}, path)
    first, second = (load_backbone("dino", weights=f"{path}{key}") for key in ("", "#state_dict_ema"))
    assert (first.weights_passed_over, second.weights_passed_over) == (("state_dict_ema",), ())
    assert (first.weights_source, second.weights_source) == (path.name, f"{path.name}#state_dict_ema")
    assert first.weights_sha256 != second.weights_sha256
    torch.testing.assert_close(encode(second), encode(first) + 1)
    assert describe_backbone("dino", weights=f"{path}#state_dict_ema").dim == WIDTH
    with pytest.raises(CheckpointError, match="no named tensors under nothing"):
        load_backbone("dino", weights=f"{path}#nothing")
    path.rename(tmp_path / "file#1.pth")  # a file that is called so
    assert load_backbone("dino", weights=tmp_path / "file#1.pth").weights_source == "file#1.pth"


def test_shards_are_read_by_their_index(tmp_path):
    state = plain_vit()
    names = list(state)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    table = {name: file for file, part in halves.items() for name in part}
    index.write_text(json.dumps({"weight_map": table}))
    save_file(state, tmp_path / "whole.safetensors")
    sharded, whole = (load_backbone("dino", weights=path) for path in (index, tmp_path / "whole.safetensors"))
    assert torch.equal(encode(sharded), encode(whole))
    save_file({name: state[name] + 1 for name in halves["two.safetensors"]}, tmp_path / "two.safetensors")
    assert load_backbone("dino", weights=index).weights_sha256 != sharded.weights_sha256
    for wrong, message in (
        ({"weight_map": table | {"more": "two.safetensors"}}, "do not hold all.*listed|do not hold all"),
        ({"weight_map": table | {"more": "three.safetensors"}}, "three.safetensors is not a file"),
        ({"weight_map": {"more": "../two.safetensors"}}, "cannot be a file's name"),
        ({"weight_map": [1]}, "lists no shards"),
        ([], "lists no shards"),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            load_backbone("dino", weights=index)


def wrapped():
    state = plain_vit()
    inner = {name.replace("attn.", "_fsdp_wrapped_module.attn."): tensor for name, tensor in state.items()}
    return {
        "compiled": prefixed("_orig_mod.", state),
        "compiled, data parallel": prefixed("module._orig_mod.", state),
        "fsdp": prefixed("_fsdp_wrapped_module.", inner),
        "lightning": {"state_dict": prefixed("model.", state), "hyper_parameters": {"lr": 1e-3}},
        "within a larger module": {"state_dict": prefixed("net.encoder.", state)},
        "of a family, in a larger module": {
            "model": prefixed("net.backbone.", state) | {"net.head.weight": state["norm.bias"]}
        },
        "under another key": {"net": state, "epoch": 3},
        "with a number and a path": {"model": state, "best": np.float64(71.2), "folder": Path("/x")},
    }


@pytest.mark.parametrize("kind", wrapped())
def test_what_training_loops_put_around_weights(tmp_path, kind):
    torch.save(plain_vit(), tmp_path / "bare.pth")
    torch.save(wrapped()[kind], tmp_path / "file.pth")
    first, second = (load_backbone("dino", weights=tmp_path / name) for name in ("bare.pth", "file.pth"))
    assert torch.equal(encode(first), encode(second))


def test_averages_with_a_state_of_their_own_are_named_too(tmp_path):
    state, average = plain_vit(), {name: tensor + 0.01 for name, tensor in plain_vit().items()}
    own = {"module": prefixed("net.", average), "updates": 7}
    torch.save({"model": state, "ema": own, "optimizer": {"state": {0: state}}}, tmp_path / "file.pth")
    torch.save({"ema": own, "epoch": 3}, tmp_path / "alone.pth")
    torch.save(average, tmp_path / "average.pth")
    assert load_backbone("dino", weights=tmp_path / "file.pth").weights_passed_over == ("ema.module",)
    wanted = encode(load_backbone("dino", weights=tmp_path / "average.pth"))
    for chosen in ("file.pth#ema", "file.pth#ema.module", "alone.pth"):
        assert torch.equal(encode(load_backbone("dino", weights=f"{tmp_path / chosen}")), wanted), chosen


def test_timm_takes_the_stems_of_families_for_prefixes(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save(prefixed("backbone.", state), tmp_path / "file.pth")
    torch.save(state, tmp_path / "bare.pth")
    files = [tmp_path / name for name in ("file.pth", "bare.pth")]
    first, second = (load_backbone("timm/test_vit", weights=path) for path in files)
    assert torch.equal(encode(first), encode(second))


def test_one_of_two_encoders_is_chosen_by_the_first_part_of_its_names(tmp_path):
    state, average = plain_vit(), {name: tensor + 0.01 for name, tensor in plain_vit().items()}
    torch.save(
        {"state_dict": prefixed("student.", state) | prefixed("ema.net.", average)}, tmp_path / "file.pth"
    )
    torch.save(average, tmp_path / "average.pth")
    files = (f"{tmp_path / 'file.pth'}#ema", tmp_path / "average.pth")
    first, second = (load_backbone("dino", weights=weights) for weights in files)
    assert torch.equal(encode(first), encode(second))
    with pytest.raises(CheckpointError, match=r"does not fit|is not a checkpoint"):
        load_backbone("dino", weights=tmp_path / "file.pth")


TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.": "encoder.layer.",
    ".attn.qkv.": ".attention.attention.{}.",
    ".attn.proj.": ".attention.output.dense.",
    "norm.": "layernorm.",
}
VIT = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
DINOV2 = {".ls1.gamma": ".layer_scale1.lambda1", ".ls2.gamma": ".layer_scale2.lambda1"}


def as_transformers(state, prefix, names):
    """Return tensors of timm's names under those of transformers, query, key and value apart."""
    renamed = {}
    for name, tensor in state.items():
        for timm_name, other in names.items():
            if not (timm_name == "norm." and not name.startswith("norm.")):
                name = name.replace(timm_name, other)  # noqa: PLW2901
        if "{}" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {prefix + name.format(part): third.clone() for part, third in parts}
        else:
            renamed[prefix + name] = tensor
    return renamed


@pytest.mark.parametrize("family", ["dino", "mae", "dinov2"])
def test_transformers_layouts_give_the_same_tokens(tmp_path, family):
    scales = {
        f"blocks.{block}.{name}.gamma": torch.rand(WIDTH) for block in (0, 1) for name in ("ls1", "ls2")
    }
    dinov2 = plain_vit() | scales | {"reg_token": torch.ones(1, 4, WIDTH)}
    state, prefix, names = {
        "dino": (plain_vit(), "", TRANSFORMERS | VIT),
        "mae": (sine_vit(), "vit.", TRANSFORMERS | VIT),
        "dinov2": (dinov2, "dinov2.", TRANSFORMERS | DINOV2),
    }[family]
    beside = {"decoder.decoder_norm.weight": torch.ones(3), "classifier.bias": torch.ones(3)}
    save_file(as_transformers(state, prefix, names) | beside, tmp_path / "theirs.safetensors")
    save_file(state, tmp_path / "ours.safetensors")
    first, second = (
        load_backbone(family, weights=tmp_path / f"{name}.safetensors") for name in ("ours", "theirs")
    )
    assert torch.equal(encode(first), encode(second))


def dinov3(gated):
    """Return a small DINOv3 of timm, its tensors under Meta's names and under those of transformers."""
    torch.manual_seed(3)
    sizes = {"depth": 2, "embed_dim": WIDTH, "num_heads": 1}
    vit = timm.create_model(f"vit_small_{'plus_' * gated}patch16_dinov3_qkvb", num_classes=0, **sizes).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    meta, theirs, mlp = {}, {}, {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3" if gated else "fc2"}
    for name, tensor in vit.state_dict().items():
        if name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            value = vit.get_parameter(name.replace("q_bias", "v_bias")).detach()
            meta[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.ones(WIDTH), value])
            continue
        other = name.replace("reg_token", "storage_tokens")
        for index in (1, 2):
            other = other.replace(f"gamma_{index}", f"ls{index}.gamma")
        for ours, metas in mlp.items():
            other = other.replace(f".{ours}.", f".{metas}.")
        meta[other] = tensor
    meta |= {"rope_embed.periods": vit.rope.periods.bfloat16(), "mask_token": torch.zeros(1, WIDTH)}
    parts = (
        {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
        if gated
        else {"fc1": "up_proj", "fc2": "down_proj"}
    )
    for name, tensor in meta.items():
        other = re.sub(r"^blocks\.", "layer.", name).replace(
            "patch_embed.proj", "embeddings.patch_embeddings"
        )
        other = re.sub(r"^(cls_token|mask_token)$", r"embeddings.\1", other).replace(
            "storage_tokens", "embeddings.register_tokens"
        )
        other = re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", other).replace(
            "attn.proj", "attention.o_proj"
        )
        other = re.sub(r"mlp\.(\w+)\.", lambda found: f"mlp.{parts[found[1]]}.", other)
        if "attn.qkv" in other:
            leaf = other.rsplit(".", 1)[1]
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                if (letter, leaf) != ("k", "bias"):
                    theirs[other.replace("attn.qkv", f"attention.{letter}_proj")] = third.clone()
        elif not other.startswith("rope"):
            theirs[other] = tensor
    return vit, meta, theirs


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_meta_and_of_transformers(tmp_path, gated):
    vit, meta, theirs = dinov3(gated)
    save_file(vit.state_dict(), tmp_path / "timm.safetensors")
    torch.save(
        {"teacher": prefixed("backbone.", meta) | {"dino_head.x": torch.zeros(1)}}, tmp_path / "meta.pth"
    )
    save_file(theirs, tmp_path / "theirs.safetensors")
    vit.rope.periods.copy_(vit.rope.periods.bfloat16())
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        wanted = vit.forward_features(images)[:, 5:]
    for file in ("timm.safetensors", "meta.pth", "theirs.safetensors"):
        backbone = load_backbone("dinov3", weights=tmp_path / file)
        assert describe_backbone("dinov3", weights=tmp_path / file).dim == backbone.dim == WIDTH
        torch.testing.assert_close(backbone.encode(images).flatten(1, 2), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="it looks like dinov3") as caught:
        load_backbone("dinov2", weights=tmp_path / "theirs.safetensors")
    assert "--backbone dinov3 " in caught.value.hint


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(CheckpointError, match="not a file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("family", "layout", "looks"),
    [
        ("mae", "clip", "clip"),
        ("mae", "blip", "blip"),
        ("clip", "mae", "plain ViT"),
        ("ijepa", "mae", "plain ViT"),
        ("mae", "ijepa", "ijepa"),
        ("dino", "mocov3", "mocov3"),
        ("mae", "dinov2", "dinov2"),
        ("dinov2", "mae", "plain ViT"),
    ],
)
def test_another_family_is_recognised(tmp_path, family, layout, looks):
    torch.save(layouts()[layout][1], tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"looks like.*{looks}"):
        load_backbone(family, weights=tmp_path / "file.pth")


def test_what_else_files_look_like():
    assert (
        looks_like(["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]) == "a language model"
    )
    assert looks_like(["conv1.weight", "layer1.0.conv1.weight"]) == "a convolutional network"
    assert "transformers" in looks_like(["vit.encoder.layer.0.attention.attention.query.weight"])
    assert "projection alone" in looks_like(["adapter.adapter.adapter_linear.weight"])
    assert looks_like(["a", "b"]) == "no known encoder"


def test_a_language_model(tmp_path):
    save_file(
        {"model.embed_tokens.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)},
        tmp_path / "lm.safetensors",
    )
    for name in ("mae", "mae_b", "timm/test_vit"):
        with pytest.raises(CheckpointError, match="language model"):
            load_backbone(name, weights=tmp_path / "lm.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("blocks.1.attn.proj.bias"), "missing: blocks.1.attn.proj.bias"),
        (lambda state: state.pop("pos_embed"), "missing: pos_embed"),
        (lambda state: state.update({"blocks.0.surprise": torch.zeros(1)}), "left over: blocks.0.surprise"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), "norm.bias: wanted 64, found 3"),
        (
            lambda state: state.update({"pos_embed": torch.zeros(1, 7, WIDTH)}),
            "pos_embed: wanted a square number",
        ),
    ],
)
def test_misfits_are_named(tmp_path, change, named):
    state = plain_vit()
    change(state)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone("dino", weights=tmp_path / "file.pth")
    assert any(named in line for line in caught.value.details), caught.value.lines()


def test_missing_tensors_are_named_as_the_file_would(tmp_path):
    state = clip_tower()
    del state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone("clip", weights=tmp_path / "clip.pth")
    assert caught.value.details == ("missing: visual.transformer.resblocks.1.attn.in_proj_weight",)


def test_a_small_file_under_a_published_name(tmp_path):
    torch.save({"model": plain_vit()}, tmp_path / "small.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone("mae_b", weights=tmp_path / "small.pth")
    assert caught.value.hint == "--backbone mae takes the sizes from the file"


def test_heads_of_odd_widths(tmp_path):
    torch.save(plain_vit(width=96), tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone("dino", weights=tmp_path / "odd.pth")
    assert "--heads" in caught.value.hint
    assert load_backbone("dino", weights=tmp_path / "odd.pth", heads=3).dim == 96
    with pytest.raises(InputError):
        load_backbone("dino", weights=tmp_path / "odd.pth", heads=5)


def test_timm_files_are_strict(tmp_path):
    import timm

    state = timm.create_model("test_vit").state_dict()
    for change in (lambda s: s.pop("norm.bias"), lambda s: s.update({"extra": torch.zeros(1)})):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "file.pth")
        with pytest.raises(CheckpointError) as caught:
            load_backbone("timm/test_vit", weights=tmp_path / "file.pth")
        assert caught.value.details
