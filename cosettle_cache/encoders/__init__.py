"""Frozen encoders: normalised images in, dense patch tokens out.

A registry table (no torch) names the published encoders; small converters bring every checkpoint layout to
one class. Importing the package costs nothing: torch and timm come in when an encoder is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_cache.core import lazy_names
from cosettle_cache.encoders.describe import describe_backbone
from cosettle_cache.encoders.registry import BACKBONES, FAMILIES, BackboneInfo, Family, NamedBackbone

if TYPE_CHECKING:
    from cosettle_cache.encoders.load import load_backbone
    from cosettle_cache.encoders.vit import Backbone

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

__getattr__, __dir__ = lazy_names(__name__, {"Backbone": "vit", "load_backbone": "load"})
