"""Chunks that are not raw bytes, read by zarr-python: it undoes the codec and checks the checksum.

In come a storage, an array layout and rows; out go the rows as they are stored. Whether a chunk exists is
never asked of Zarr, which reads what is missing as the fill value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Shaped

from cosettle_cache.core.types import ArrayLayout, Grid
from cosettle_cache.store.format import BytesError, array_folder
from cosettle_cache.store.storage import ReadStorage


class ZarrArrays:
    """The arrays of one store, opened when first read; not to be used across a fork."""

    def __init__(self, storage: ReadStorage) -> None:
        self._storage = storage
        self._arrays: dict[Grid, Any] = {}

    def read(self, layout: ArrayLayout, rows: slice) -> Shaped[np.ndarray, "encoding row col channel"]:
        """Return rows of an array; raise `BytesError` when Zarr cannot decode them."""
        array = self._arrays.get(layout.grid)
        if array is None:
            array = self._arrays[layout.grid] = self._open(layout.grid)
        try:
            return np.asarray(array[rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise BytesError(f"a chunk cannot be decoded ({error})") from error

    def _open(self, grid: Grid) -> Any:
        import zarr

        try:
            return zarr.open_array(self._storage.zarr_store(), path=array_folder(grid), mode="r")
        except Exception as error:  # on damaged metadata Zarr fails in any way
            raise BytesError(f"Zarr cannot open its array ({error})") from error
