"""Encoders of the eight families: rows of the registry, and files of a family at any size.

A name and where its weights are come in; a `Backbone` goes out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cosettle_cache.core.errors import UsageError
from cosettle_cache.encoders.body import VitBody
from cosettle_cache.encoders.checkpoints import read_checkpoint
from cosettle_cache.encoders.convert import (
    EncoderFile,
    check_positions,
    check_tensors,
    file_grid,
    infer_architecture,
    sort_tensors,
)
from cosettle_cache.encoders.encoder import SHIFT_RULE, Backbone
from cosettle_cache.encoders.families import Family
from cosettle_cache.encoders.hub import fetch
from cosettle_cache.encoders.registry import BACKBONES, RANDOM, Architecture, family_of, make_info, sizeless
from cosettle_cache.encoders.weights import Weights, file_weights, random_weights, seeded


def load_published(
    name: str, weights: str | Path | None, device: torch.device, precision: str, seed: int, heads: int | None
) -> Backbone:
    """Return an encoder of the registry, or of a family with its sizes from the file."""
    family = family_of(name)
    if str(weights) == RANDOM:
        architecture, vit, record = _random(name, family, seed)
    else:
        path = _fetched(name) if weights is None else Path(weights)
        file = sort_tensors(str(path), family, read_checkpoint(path))
        architecture = _architecture(name, file, heads)
        vit = vit_from_file(file, architecture)
        record = file_weights(path, str(BACKBONES[name].source) if weights is None else None)
    body = VitBody(vit.eval().requires_grad_(False).to(device), family.resize, family.final_norm)
    return Backbone(
        make_info(name, family, architecture),
        body,
        record,
        token_rule=f"{family.token_rule}; {architecture.heads} heads",
        position_rule=_position_rule(family),
        device=device,
        precision=precision,
    )


def make_vit(family: Family, architecture: Architecture) -> VisionTransformer:
    """Return a timm VisionTransformer of these sizes; the position of CLS is folded into the CLS token."""
    size = architecture
    return VisionTransformer(
        img_size=(size.grid.rows * size.patch, size.grid.cols * size.patch),
        patch_size=size.patch,
        num_classes=0,
        global_pool="",
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.hidden / size.width,
        init_values=1e-5 if size.layer_scale else None,
        class_token=family.class_token,
        no_embed_class=True,
        reg_tokens=size.registers,
        pre_norm=family.pre_norm,
        norm_layer=partial(nn.LayerNorm, eps=family.norm_eps),
        act_layer=family.activation,
        dynamic_img_size=True,
    )


def vit_from_file(file: EncoderFile, architecture: Architecture) -> VisionTransformer:
    """Return the encoder with the file's weights in float32, after every tensor was accounted for."""
    with torch.device("meta"):
        vit = make_vit(file.family, architecture)
    shapes = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    in_file = file_grid(file) if "pos_embed" in file.tensors else architecture.grid
    expected = in_file if file.family.file_pixels else architecture.grid
    n_positions = expected.n_tokens + int(file.family.class_token)
    check_tensors(file, shapes | {"pos_embed": (1, n_positions, architecture.width)})
    check_positions(file)
    state = {name: file.tensors[name].to(torch.float32, copy=True) for name in shapes}
    state |= _folded(file, state, architecture)
    vit.load_state_dict({name: state[name].reshape(shape) for name, shape in shapes.items()}, assign=True)
    return vit


def _folded(file: EncoderFile, state: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return the CLS token with its position added, and the patch positions at the encoder's grid.

    A family with a fixed image size gets its positions resized here, bicubic without antialias as its loader
    does (BLIP: 24x24 to 14x14).
    """
    positions = state["pos_embed"].reshape(-1, architecture.width)
    folded: dict[str, Tensor] = {}
    if file.family.class_token:
        folded["cls_token"] = state["cls_token"].reshape(1, 1, -1) + positions[0]
        positions = positions[1:]
    own, grid = file_grid(file), architecture.grid
    if own != grid:
        planes = positions.T.reshape(1, architecture.width, own.rows, own.cols)
        resized = F.interpolate(planes, size=(grid.rows, grid.cols), mode="bicubic", align_corners=False)
        positions = resized[0].flatten(1).T
    return folded | {"pos_embed": positions.contiguous()}


def _random(name: str, family: Family, seed: int) -> tuple[Architecture, VisionTransformer, Weights]:
    if name not in BACKBONES:
        raise sizeless(name)
    architecture = BACKBONES[name].architecture
    vit = seeded(seed, partial(make_vit, family, architecture))
    return architecture, vit, random_weights(name, seed, vit)


def _position_rule(family: Family) -> str:
    at_load = f"the file's brought to {family.file_pixels} px; " if family.file_pixels else ""
    return f"{at_load}{family.resize}; {SHIFT_RULE}"


def _fetched(name: str) -> Path:
    if name not in BACKBONES:
        raise sizeless(name)
    return fetch(name, BACKBONES[name].source)


def _architecture(name: str, file: EncoderFile, heads: int | None) -> Architecture:
    if name not in BACKBONES:
        return infer_architecture(file, heads)
    if heads not in {None, BACKBONES[name].architecture.heads}:
        raise UsageError(
            f"{name} has its own number of heads",
            wanted=BACKBONES[name].architecture.heads,
            found=heads,
            hint=f"--backbone {BACKBONES[name].family.name} takes the sizes from the file",
        )
    return BACKBONES[name].architecture
