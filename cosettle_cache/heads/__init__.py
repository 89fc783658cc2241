"""Trained projections: what they compute, their files, and the kinds of tokens (raw, projected) asked for."""

from cosettle_cache.core.lazy import lazy_names
from cosettle_cache.heads.table import HEADS, Head, check_trainable, find_head

_HOMES = {
    "Projection": "projection",
    "describe_projection": "projection",
    "export_projection": "projection",
    "load_projection": "projection",
    "projection_sha256": "projection",
    "read_provenance": "projection",
    "save_projection": "projection",
    "RAW": "kinds",
    "TokenKind": "kinds",
    "load_heads": "kinds",
    "make_kinds": "kinds",
}

__all__ = ["HEADS", "Head", "check_trainable", "find_head", *_HOMES]  # noqa: PLE0604

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
