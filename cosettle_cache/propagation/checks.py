"""What must fit before anything is propagated: store, protocol, labels, memory."""

from __future__ import annotations

from cosettle_cache.core.console import human_bytes
from cosettle_cache.core.errors import FingerprintError, UsageError
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.context import check_candidates
from cosettle_cache.propagation.presets import check_protocol
from cosettle_cache.propagation.protocols import image_std
from cosettle_cache.propagation.tasks import Task
from cosettle_cache.search.masked import Ranker, SearchSize
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import resolve_size

_FLOAT_BYTES = 4


def check_store(store: FeatureStore, protocol: EvalProtocol) -> None:
    """Raise `FingerprintError` unless `store` holds every frame of its videos as the protocol has them."""
    check_protocol(protocol)
    if unlike := store.unlike_every_frame():
        raise _wrong_store(store, *unlike, protocol)
    found = tuple(store.encoder.get("std", ()))
    if found and image_std(protocol, found) != found:
        raise FingerprintError(
            f"the images of {store.path} were normalised otherwise than in the protocol {protocol.name}",
            wanted=f"red_std {protocol.red_std:g}",
            found=f"red_std {found[0]:g}",
            hint=f"cosettle-cache extract --red-std {protocol.red_std:g}, or keep to the store with "
            f"--set red_std={found[0]:g}; the protocol's name then says so",
        )
    size = str(store.fingerprint.plan["size"])
    for video in store.manifest:
        at = [resolve_size(rule, video.height, video.width) for rule in (protocol.size, size)]
        if at[0] != at[1]:
            wanted, found_at = (f"{video.video_id} at {height}x{width}" for height, width in at)
            raise _wrong_store(store, wanted, found_at, protocol)
    for layout in store.arrays:
        check_candidates(layout.grid, protocol)


def check_labels(store: FeatureStore, task: Task) -> None:
    """Raise `UsageError` when the videos of a store are annotated otherwise than a task needs."""
    others = {
        str(video.label_kind) for video in store.manifest if video.label_kind not in (None, task.labels)
    }
    if others:
        raise UsageError(
            f"the videos of {store.path} are annotated otherwise than the task {task.name} needs",
            wanted=str(task.labels),
            found=", ".join(sorted(others)),
        )


def check_memory(
    store: FeatureStore, protocol: EvalProtocol, limit: int | None, *, n_kinds: int, ranker: Ranker
) -> None:
    """Raise `UsageError` when the search of `n_kinds` kinds of tokens side by side exceeds `limit` bytes."""
    if limit is None:
        return
    most_classes = 1 + max((video.n_objects for video in store.manifest), default=0)
    for layout in store.arrays:
        labels = _FLOAT_BYTES * (1 + protocol.n_context) * layout.grid.n_tokens * most_classes
        size = SearchSize(
            layout.grid, layout.n_channels, protocol, ranker.n_parallel, labels, rough=ranker.rough
        )
        needed = n_kinds * size.needed_bytes(1)
        if needed > limit:
            raise UsageError(
                f"the search among {layout.grid} tokens needs more memory for {n_kinds} kinds of tokens",
                wanted=f"at least {human_bytes(needed)}",
                found=human_bytes(limit),
                hint="a larger --memory-limit, fewer projections at a time, or a smaller n_context",
            )


def _wrong_store(store: FeatureStore, wanted: str, found: str, protocol: EvalProtocol) -> FingerprintError:
    return FingerprintError(
        f"{store.path} does not fit the protocol {protocol.name}",
        wanted=wanted,
        found=found,
        hint=f"cosettle-cache extract --plan frames --size {protocol.size}",
    )
