"""Pickles from strangers: arrays and plain containers are read, everything else is refused unexecuted."""

from __future__ import annotations

import pickle
from typing import Any

#: What a pickled NumPy array is made of, in any version of NumPy and of the pickle format.
_ARRAY_PARTS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Loads arrays, plain numbers, texts, bytes, lists, tuples, dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse what is no part of an array."""
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of an array")
        return super().find_class(module, name)
