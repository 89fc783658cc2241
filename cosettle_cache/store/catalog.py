"""The catalog: what a store's index says about videos and samples, derived from its outline once.

In comes the outline of the committed slots; out go failures, rows of plain encodings, and samples.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from cosettle_cache.core.types import ArrayLayout
from cosettle_cache.store.lazy import cached_property


class Catalog:
    """Views of the index's outline; each is computed when first asked for."""

    def __init__(self, outline: pa.Table, arrays: tuple[ArrayLayout, ...]) -> None:
        self._outline = outline
        self._arrays = {str(layout.grid): number for number, layout in enumerate(arrays)}
        self._chunk_encodings = arrays[0].chunk_encodings if arrays else 1

    @cached_property
    def failures(self) -> dict[str, str]:
        """Reason by video id; the first one where encodings of a video give several."""
        failed = self._failed.select(["video_id", "error"]).to_pydict()
        pairs = list(zip(failed["video_id"], failed["error"], strict=True))
        return dict(reversed(pairs)) if pairs else {}

    @cached_property
    def failed_slots(self) -> frozenset[int]:
        """Slots that list failed encodings."""
        return frozenset(pc.unique(self._failed["slot"]).to_pylist())

    @cached_property
    def n_present(self) -> dict[str, int]:
        """Number of samples, or of plain encodings in a frames plan, by video id."""
        counts = self._present.group_by("video_id").aggregate([([], "count_all")])
        return dict(zip(counts["video_id"].to_pylist(), counts["count_all"].to_pylist(), strict=True))

    @cached_property
    def plain_rows(self) -> dict[str, tuple[int, Int64[np.ndarray, " frame"]]]:
        """Array number and rows, in frame order, of each video's plain encodings."""
        table = self._present.sort_by([("video_id", "ascending"), ("frame", "ascending")])
        rows = table["row"].to_numpy()
        videos, starts = np.unique(table["video_id"].to_numpy(), return_index=True)
        arrays = [self._arrays[table["array"][int(start)].as_py()] for start in starts]
        pieces = zip(arrays, np.split(rows, starts[1:]), strict=True)
        return dict(zip(map(str, videos), pieces, strict=True))

    @cached_property
    def sample_ids(self) -> Int64[np.ndarray, " n"]:
        """Ids of the samples that exist, ascending."""
        return np.asarray(self.sample_table["sample"], np.int64)

    @cached_property
    def sample_table(self) -> pa.Table:
        """Columns `sample`, `video_id`, `view`, one row per sample that exists."""
        samples = pc.divide(self._present["row"], self._chunk_encodings)
        columns = {"sample": samples, "video_id": self._present["video_id"], "view": self._present["view"]}
        return pa.table(columns).combine_chunks()

    @cached_property
    def _failed(self) -> pa.Table:
        return self._outline.filter(pc.is_valid(self._outline["error"]))

    @cached_property
    def _present(self) -> pa.Table:
        return self._outline.filter(pc.is_null(self._outline["error"]))
