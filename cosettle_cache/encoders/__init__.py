"""Frozen encoders: normalised images in, dense patch tokens out.

A registry table (no torch) names the published encoders; small converters bring every checkpoint layout to
one class. Importing the package costs nothing: torch and timm come in when an encoder is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cosettle_cache.encoders.families import FAMILIES, Family
from cosettle_cache.encoders.registry import BACKBONES, BackboneInfo, NamedBackbone

if TYPE_CHECKING:
    from cosettle_cache.encoders.describing import describe_backbone
    from cosettle_cache.encoders.encoder import Backbone
    from cosettle_cache.encoders.loading import load_backbone

_HOMES = {"Backbone": "encoder", "describe_backbone": "describing", "load_backbone": "loading"}

__all__ = [
    "BACKBONES",
    "FAMILIES",
    "Backbone",
    "BackboneInfo",
    "Family",
    "NamedBackbone",
    "describe_backbone",
    "load_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
