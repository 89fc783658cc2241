"""From the names that other libraries give an encoder's tensors to timm's names.

Wrappers (torch.compile, FSDP, checkpointing, Lightning) put parts into names; transformers has names of its
own and keeps query, key and value apart; Meta's DINOv3 has a bias for keys that is always zero. What comes
out is named as timm's VisionTransformer, or for DINOv3 as timm's Eva, and is the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from posixpath import commonpath

import torch
from torch import Tensor

from cosettle_cache.core.errors import CheckpointError

#: Parts of names that wrappers of a module add, at any depth.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: The first layer of an encoder, by which its names are found under a prefix.
_ANCHOR = re.compile(
    r"(?:^|(?<=\.))(?:(?:visual|visual_encoder|momentum_encoder|backbone|vit|dinov2|vision_model)\.)?"
    r"((?:patch_embed\.proj|embeddings\.patch_embedding\w*(?:\.projection)?|conv1)\.weight)$"
)
_TRANSFORMERS = re.compile(r"(?:^|\.)embeddings\.(?:cls_token|class_embedding)$")
#: transformers' names, in order: ViT, ViTMAE, DINOv2, DINOv3 and CLIP's vision tower.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|vision_model|model)\.", ""),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(encoder\.layers?|layer)\.", "blocks."),
    (r"\.(attention\.attention|self_attn|attention)\.(?:query|q_proj)\.", ".attn.q."),
    (r"\.(attention\.attention|self_attn|attention)\.(?:key|k_proj)\.", ".attn.k."),
    (r"\.(attention\.attention|self_attn|attention)\.(?:value|v_proj)\.", ".attn.v."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
#: Of transformers' files: classifiers, MAE's decoder, CLIP's text tower and joint space, index buffers.
_OUTSIDE = re.compile(
    r"^(classifier|pooler|decoder|text_model|text_projection|visual_projection|logit_scale)\b"
    r"|^embeddings\.position_ids$"
)
#: Meta's names of DINOv3 and timm's; `w1`, `w2` and `w3` are the gated MLP's.
_DINOV3 = (
    ("storage_tokens", "reg_token"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
)


def bare_name(name: str) -> str:
    """Return a tensor's name without what wrappers of the module put into it."""
    return _WRAPPERS.sub("", _WRAPPERS.sub("", name).removeprefix("module."))


def _without_prefix(tensors: Mapping[str, Tensor], has_stem: bool) -> dict[str, Tensor]:
    """Return the tensors without wrappers' parts and without the one prefix that all names share.

    A prefix is taken off only up to the encoder's first layer, with `has_stem` up to the stems of published
    files. Raises `CheckpointError` when two names become one.
    """
    names = {name: bare_name(name) for name in tensors}
    found = [match for name in names.values() if (match := _ANCHOR.search(name))]
    anchors = [match.start(0 if has_stem else 1) for match in found]
    shared = commonpath([name.replace(".", "/") for name in names.values()]) if names else ""
    length = min(len(shared) + 1 if shared else 0, min(anchors, default=0))
    short = {name[length:]: tensors[original] for original, name in names.items()}
    if len(short) < len(names):
        raise CheckpointError(
            "two tensors have one name without their wrappers", found=", ".join(names)[:200]
        )
    return short


def timm_names(tensors: Mapping[str, Tensor], *, has_stem: bool = True) -> dict[str, Tensor]:
    """Return the tensors of an encoder under timm's names, without prefixes; other layouts as they are.

    A family's published files may have a stem before all names of the encoder (`has_stem`), timm's have none.
    """
    tensors = _without_prefix(tensors, has_stem)
    if is_transformers(tensors):
        tensors = _from_transformers(tensors)
    if any(name.endswith(("storage_tokens", ".gamma_1")) for name in tensors):
        return _from_dinov3(tensors)
    return dict(tensors)


def is_transformers(names: Iterable[str]) -> bool:
    """Say whether names are those of a vision encoder of transformers."""
    return any(_TRANSFORMERS.search(name) for name in names)


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if not _OUTSIDE.search(name):
            renamed[name] = tensor
    if any(".mlp.up_proj." in name for name in renamed):
        up = ".mlp.fc1_x." if any(".mlp.fc1_g." in name for name in renamed) else ".mlp.fc1."
        renamed = _renamed({name.replace(".mlp.up_proj.", up): renamed[name] for name in renamed})
    return _joined(renamed)


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with query, key and value in one, as timm has them; keys may have no bias."""
    joined = dict(tensors)
    for name in tensors:
        if not name.endswith(".attn.q.weight"):
            continue
        stem = name.removesuffix("q.weight")
        for leaf in ("weight", "bias"):
            three = [joined.pop(f"{stem}{part}.{leaf}", None) for part in "qkv"]
            found = [part for part in three if part is not None]
            if len(found) == len(three):
                joined[f"{stem}qkv.{leaf}"] = torch.cat(found)
            else:
                short = zip("qkv", three, strict=True)
                joined |= {f"{stem}{part}_{leaf}": tensor for part, tensor in short if tensor is not None}
    return joined


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for original, tensor in tensors.items():
        name = original.removeprefix("backbone.")
        for published, timm_name in _DINOV3:
            name = name.replace(published, timm_name)
        renamed[name] = tensor
    return renamed


def _from_dinov3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = _renamed(tensors)
    for name in [name for name in named if name.endswith(".attn.qkv.bias")]:
        # The keys' third is masked to zero in Meta's forward, and timm has none.
        bias, stem = named.pop(name), name.removesuffix("qkv.bias")
        if bias.ndim == 1 and len(bias) % 3 == 0:
            named[f"{stem}q_bias"], _, named[f"{stem}v_bias"] = bias.chunk(3)
        else:
            named[name] = bias
    return named
