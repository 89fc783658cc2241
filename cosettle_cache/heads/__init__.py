"""Trained projections: what they compute, their files, and the kinds of tokens (raw, projected) asked for."""

from cosettle_cache.heads.table import HEADS, check_trainable

__all__ = ["HEADS", "check_trainable"]
