"""What is known of an encoder before its weights are loaded: sizes, normalisation; nothing is downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cosettle_cache.encoders.registry import (
    BACKBONES,
    DINOV3,
    RANDOM,
    TIMM_PREFIX,
    BackboneInfo,
    check_no_heads,
    family_of,
    make_info,
    sizeless,
    split_name,
    weights_file,
)


def describe_backbone(
    name: str, *, weights: str | Path | None = None, heads: int | None = None
) -> BackboneInfo:
    """Return the sizes and the normalisation of an encoder; of files at most a family's `hf:` one is fetched.

    Of `NAME@LAYER` they are those of one layer. The table or timm knows them; for a family's name they come
    from the shapes in the weights file. Names of the table need no torch, files of a family no timm.
    """
    base, layers, _ = split_name(name)
    if layers:
        return replace(describe_backbone(base, weights=weights, heads=heads), name=name)
    if name.startswith(TIMM_PREFIX):
        from cosettle_cache.encoders.load import describe_timm

        check_no_heads(name, heads)
        return describe_timm(name)
    family = family_of(name)
    if name in BACKBONES:
        if BACKBONES[name].model_id:
            check_no_heads(name, heads)
        return make_info(name, family, BACKBONES[name].architecture)
    if weights is None or str(weights) == RANDOM:
        raise sizeless(name)
    from cosettle_cache.encoders.checkpoints import read_checkpoint
    from cosettle_cache.encoders.convert import dinov3_architecture, infer_architecture, sort_tensors
    from cosettle_cache.encoders.layouts import timm_names

    path, key = weights_file(weights)
    tensors = read_checkpoint(path, key)
    if family is DINOV3:
        sizes = dinov3_architecture(str(weights), timm_names(tensors), heads)
    else:
        sizes = infer_architecture(sort_tensors(str(weights), family, tensors), heads)
    return make_info(name, family, sizes)
