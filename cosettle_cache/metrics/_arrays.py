"""What every metric takes: numpy arrays, or torch tensors on any device."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from cosettle_cache.core.errors import InputError


def to_numpy(array: Any) -> np.ndarray:
    """Return a numpy array, or a tensor, as a numpy array; nothing is copied where it need not be."""
    return array.numpy(force=True) if hasattr(array, "numpy") else np.asarray(array)


def check_lengths(truth: Sized, prediction: Sized) -> None:
    """Raise `InputError` unless both clips have as many frames."""
    if len(truth) != len(prediction):
        raise InputError(
            "truth and prediction differ in length",
            wanted=f"{len(truth)} frames",
            found=f"{len(prediction)} frames",
        )


def size_text(shape: Sequence[int]) -> str:
    """Return a shape as people write it."""
    return "x".join(map(str, shape))
