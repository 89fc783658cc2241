"""The store: patch tokens of a frozen encoder, kept once as a Zarr v3 group with a Parquet index beside them.

`StoreWriter` commits slots, `open_store` reads what is committed, `store_summary` says what a store holds;
`verify_store`, `repair_store` and `copy_store` look after its bytes.
`docs/store.md` is the format.
"""

from cosettle_cache.store.check import VerifyReport, verify_store
from cosettle_cache.store.format import SPEC_VERSION, SlotState, spec_version
from cosettle_cache.store.index import Damage
from cosettle_cache.store.reader import FeatureStore, open_store
from cosettle_cache.store.remote import check_writable
from cosettle_cache.store.upkeep import (
    CopyReport,
    RepairReport,
    copy_store,
    plan_copy,
    repair_store,
    store_summary,
)
from cosettle_cache.store.writer import Shard, StoreWriter

__all__ = [
    "SPEC_VERSION",
    "CopyReport",
    "Damage",
    "FeatureStore",
    "RepairReport",
    "Shard",
    "SlotState",
    "StoreWriter",
    "VerifyReport",
    "check_writable",
    "copy_store",
    "open_store",
    "plan_copy",
    "repair_store",
    "spec_version",
    "store_summary",
    "verify_store",
]
