"""The store: patch tokens of a frozen encoder, kept once as a Zarr v3 group with a Parquet index beside them.

`StoreWriter` commits slots, `open_store` reads what is committed, `store_summary` says what a store holds.
`docs/store.md` is the format.
"""

from cosettle_cache.store.info import ArraySummary, StoreSummary, store_summary
from cosettle_cache.store.layout import SPEC_VERSION, SlotState, spec_version
from cosettle_cache.store.reader import FeatureStore, open_store
from cosettle_cache.store.writer import Shard, StoreWriter

__all__ = [
    "SPEC_VERSION",
    "ArraySummary",
    "FeatureStore",
    "Shard",
    "SlotState",
    "StoreSummary",
    "StoreWriter",
    "open_store",
    "spec_version",
    "store_summary",
]
