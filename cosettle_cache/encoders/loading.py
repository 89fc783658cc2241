"""The door to loaded encoders: a name, and where its weights are, to a frozen encoder on its device."""

from __future__ import annotations

from pathlib import Path

import torch

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.encoders.describing import check_no_heads
from cosettle_cache.encoders.encoder import PRECISIONS, Backbone
from cosettle_cache.encoders.published import load_published
from cosettle_cache.encoders.registry import TIMM_PREFIX
from cosettle_cache.encoders.timm_models import load_timm
from cosettle_cache.propagation.protocols import replace_red_std


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    seed: int = 0,
    heads: int | None = None,
    compiled: bool = False,
    red_std: float | None = None,
) -> Backbone:
    """Return a frozen encoder.

    `name` is a row of the table, a family with a weights file of any size, or `timm/<model id>`. `weights`:
    None for the published ones (cached), "random" for random ones from `seed`, or a file. `heads` is for
    files of a family whose width does not give the number of heads. `compiled` puts the blocks through
    torch.compile. `red_std` replaces ImageNet's red deviation, which some protocols have otherwise, where the
    encoder normalises with that.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", wanted=", ".join(PRECISIONS), found=precision)
    where = _device(device)
    if name.startswith(TIMM_PREFIX):
        check_no_heads(name, heads)
        backbone = load_timm(name, weights, where, precision, seed)
    else:
        backbone = load_published(name, weights, where, precision, seed, heads)
    if red_std is not None:
        backbone.std = replace_red_std(backbone.std, red_std)
    if compiled:
        backbone.compile_blocks()
    return backbone


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("unknown device", wanted="cpu, cuda or cuda:N", found=name) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", wanted=name, found="cpu only", hint="--device cpu")
    return device
