"""What slots are committed to: one store, or the stores of several layers of an encoder side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cosettle_cache.core.types import Manifest, Slot
from cosettle_cache.store import Shard, StoreWriter


class LayerWriters:
    """The stores of several layers, filled side by side: a slot is to do while one of them lacks it."""

    def __init__(self, writers: Sequence[StoreWriter]) -> None:
        self._writers = writers
        self._held: dict[int, list[int]] = {}

    def todo(self, *, retry_failed: bool = False) -> list[int]:
        """Return the slots that one of the stores lacks."""
        return sorted({index for one in self._writers for index in one.todo(retry_failed=retry_failed)})

    def claim(self, index: int, *, retry_failed: bool = False) -> bool:
        """Hold a slot in the stores that lack it; say whether there are any."""
        claimed = [one.claim(index, retry_failed=retry_failed) for one in self._writers]
        self._held[index] = [number for number, is_ours in enumerate(claimed) if is_ours]
        return any(claimed)

    def release(self, index: int) -> None:
        """Give a slot back."""
        for number in self._held.pop(index, ()):
            self._writers[number].release(index)

    def commit(self, slot: Slot, shard: Shard, failures: Mapping[str, str]) -> None:
        """Commit a slot to the stores that lack it; layers lie side by side in the channels."""
        layers = np.split(shard.tokens, len(self._writers), axis=-1)
        for number in self._held.get(slot.index, ()):
            self._writers[number].commit(slot, Shard(np.ascontiguousarray(layers[number])), failures)

    def replace_manifest(self, manifest: Manifest) -> None:
        """Write another manifest into all stores."""
        for one in self._writers:
            one.replace_manifest(manifest)

    def close(self) -> None:
        """Close all stores."""
        for one in self._writers:
            one.close()


SlotWriter = StoreWriter | LayerWriters
