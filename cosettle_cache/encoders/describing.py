"""What is known of an encoder before its weights are loaded; nothing is downloaded.

Names of the table need no torch, files of a family no timm, so that planning and `--dry-run` answer at once.
"""

from __future__ import annotations

from pathlib import Path

from cosettle_cache.core.errors import UsageError
from cosettle_cache.encoders.registry import (
    BACKBONES,
    RANDOM,
    TIMM_PREFIX,
    BackboneInfo,
    family_of,
    make_info,
    sizeless,
)


def describe_backbone(
    name: str, *, weights: str | Path | None = None, heads: int | None = None
) -> BackboneInfo:
    """Return the sizes and the normalisation of an encoder.

    The table or timm knows them; for a family's name they come from the shapes in the weights file.
    """
    if name.startswith(TIMM_PREFIX):
        check_no_heads(name, heads)
        return _describe_timm(name)
    family = family_of(name)
    if name in BACKBONES:
        return make_info(name, family, BACKBONES[name].architecture)
    if weights is None or str(weights) == RANDOM:
        raise sizeless(name)
    return _describe_file(name, weights, heads)


def check_no_heads(name: str, heads: int | None) -> None:
    """Raise `UsageError` when heads are given for an encoder that has its own."""
    if heads is not None:
        raise UsageError(f"{name} has its own number of heads", wanted="no --heads", found=heads)


def _describe_timm(name: str) -> BackboneInfo:
    from cosettle_cache.encoders.timm_models import describe

    return describe(name)


def _describe_file(name: str, weights: str | Path, heads: int | None) -> BackboneInfo:
    from cosettle_cache.encoders.checkpoints import read_checkpoint
    from cosettle_cache.encoders.convert import infer_architecture, sort_tensors

    family = family_of(name)
    file = sort_tensors(str(weights), family, read_checkpoint(weights))
    return make_info(name, family, infer_architecture(file, heads))
