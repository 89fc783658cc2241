"""The summary of a store: plan, arrays, slots, bytes and failures, for people and for `--json`.

In comes an open store; out goes a `StoreSummary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from cosettle_cache.core.types import Fingerprint, PlanKind
from cosettle_cache.store.reader import FeatureStore


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """One array: planned and present encodings, slots and their size."""

    grid: str
    n_channels: int
    dtype: str
    codec: str
    n_encodings: int
    n_present: int
    n_slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What `store info` shows; encodings count as planned = present + failed + still to do."""

    path: str
    plan_kind: PlanKind
    fingerprint: Fingerprint
    encoder: Mapping[str, Any]
    arrays: tuple[ArraySummary, ...]
    n_videos: int
    n_slots: int
    n_todo: int
    n_done: int
    n_failed: int
    n_encodings: int
    n_present: int
    n_failed_encodings: int
    n_bytes: int
    failures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def store_summary(store: FeatureStore) -> StoreSummary:
    """Return the summary of a store; `n_bytes` counts every file in its folder."""
    states = store.slot_states()
    arrays = _array_summaries(store)
    n_present = sum(array.n_present for array in arrays)
    return StoreSummary(
        path=store.path,
        plan_kind=store.plan_kind,
        fingerprint=store.fingerprint,
        encoder=store.encoder,
        arrays=arrays,
        n_videos=len(store.manifest),
        n_slots=store.n_slots,
        n_todo=states["todo"],
        n_done=states["done"],
        n_failed=states["failed"],
        n_encodings=sum(array.n_encodings for array in arrays),
        n_present=n_present,
        n_failed_encodings=store.index.num_rows - n_present,
        n_bytes=store.n_bytes,
        failures=store.failures,
    )


def _array_summaries(store: FeatureStore) -> tuple[ArraySummary, ...]:
    index = store.index
    counts = pc.value_counts(index["array"].filter(pc.is_null(index["error"]))).to_pylist()
    present = {count["values"]: count["counts"] for count in counts}
    return tuple(
        ArraySummary(
            grid=str(layout.grid),
            n_channels=layout.n_channels,
            dtype=layout.dtype,
            codec=layout.codec,
            n_encodings=layout.n_encodings,
            n_present=present.get(str(layout.grid), 0),
            n_slots=layout.n_slots,
            slot_bytes=layout.slot_encodings * layout.encoding_bytes,
        )
        for layout in store.arrays
    )
