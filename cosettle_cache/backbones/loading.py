"""The door of the room: a name, and where its weights are, to an encoder or to what is known of it."""

from __future__ import annotations

from pathlib import Path

import torch

from cosettle_cache.backbones import published, timm_models
from cosettle_cache.backbones.encoder import PRECISIONS, Backbone
from cosettle_cache.backbones.registry import TIMM_PREFIX, BackboneInfo
from cosettle_cache.errors import InputError, UsageError


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    seed: int = 0,
    heads: int | None = None,
) -> Backbone:
    """Return a frozen encoder.

    `name` is a row of the table, a family with a weights file of any size, or `timm/<model id>`.
    `weights`: None for the published ones (cached), "random" for random ones from `seed`, or a file.
    `heads` is for files of a family whose width does not give the number of heads.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", wanted=", ".join(PRECISIONS), found=precision)
    where = _device(device)
    if name.startswith(TIMM_PREFIX):
        _check_no_heads(name, heads)
        return timm_models.load(name, weights, where, precision, seed)
    return published.load(name, weights, where, precision, seed, heads)


def describe_backbone(
    name: str, *, weights: str | Path | None = None, heads: int | None = None
) -> BackboneInfo:
    """Return the sizes and the normalisation of an encoder; nothing is downloaded.

    The registry or timm knows them; for a family name they come from the shapes in the weights file.
    """
    if name.startswith(TIMM_PREFIX):
        _check_no_heads(name, heads)
        return timm_models.describe(name)
    return published.describe(name, weights, heads)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("unknown device", wanted="cpu, cuda or cuda:N", found=name) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", wanted=name, found="cpu only", hint="--device cpu")
    return device


def _check_no_heads(name: str, heads: int | None) -> None:
    if heads is not None:
        raise UsageError(f"{name} has its own number of heads", wanted="no --heads", found=heads)
