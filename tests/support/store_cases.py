"""Tiny real stores for the store's tests: plans by the real planner, tokens from a seeded generator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np

from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import Fingerprint, Manifest, MediaKind, Slot, Video
from cosettle_cache.store import StoreWriter, spec_version
from cosettle_cache.store._int8 import dequantize, quantize
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos.manifest import manifest_digest

PATCH = 16

Where = TypeVar("Where", Path, str)


@dataclass(frozen=True)
class Case:
    """A manifest, its plan and the tokens that belong to it."""

    manifest: Manifest
    plan: Plan
    seed: int = 0
    encoder: Mapping[str, object] = field(default_factory=lambda: {"patch": PATCH})

    def fingerprint(self, **changes: object) -> Fingerprint:
        values = {
            "spec_version": spec_version(self.dtype, self.codec),
            "backbone": "tiny",
            "weights_sha256": "0" * 64,
            "token_rule": "final norm, patch tokens",
            "position_rule": "none",
            "preprocessing": "none",
            "plan": self.plan.to_json(),
            "dtype": self.dtype,
            "precision": "float32",
            "manifest_digest": manifest_digest(self.manifest),
            "versions": {"numpy": "2"},
        }
        return Fingerprint(**{**values, **changes})

    @property
    def dtype(self) -> str:
        return self.plan.arrays[0].dtype

    @property
    def codec(self) -> str:
        return self.plan.arrays[0].codec

    def writer(self, path: Path | str, **changes: object) -> StoreWriter:
        fingerprint = self.fingerprint(**changes)
        return StoreWriter.create_or_resume(path, self.plan.arrays, fingerprint, self.manifest, self.encoder)

    def slot_tokens(self, slot: Slot) -> np.ndarray:
        layout = next(layout for layout in self.plan.arrays if layout.grid == slot.grid)
        shape = (len(slot.encodings), slot.grid.rows, slot.grid.cols, layout.n_channels)
        numbers = np.random.default_rng([self.seed, slot.index]).standard_normal(shape)
        return numbers.astype(np.float16)

    def commit(self, writer: StoreWriter, index: int, failures: Mapping[str, str] | None = None) -> None:
        slot = self.plan.slot(index)
        shard = writer.new_shard(slot)
        shard.tokens[:] = self.slot_tokens(slot)
        writer.commit(slot, shard, failures or {})

    def write(
        self, path: Where, slots: Iterable[int] | None = None, failures: Mapping[str, str] | None = None
    ) -> Where:
        writer = self.writer(path)
        for index in writer.todo() if slots is None else slots:
            self.commit(writer, index, failures)
        writer.close()
        return path

    def kept_tokens(self, slot: Slot) -> np.ndarray:
        """Return what a reader must give for the tokens of a slot."""
        tokens = self.slot_tokens(slot)
        if self.dtype == "int8":
            dequantize(quantize(tokens), tokens)
        return tokens

    def array(self, grid: object) -> np.ndarray:
        """Return all tokens of one array, as a reader must give them."""
        slots = (self.plan.slot(index) for index in range(self.plan.n_slots))
        return np.concatenate([self.kept_tokens(slot) for slot in slots if slot.grid == grid])


def make_manifest(videos: Iterable[tuple[str, int, int, int]]) -> Manifest:
    """Return a manifest of (video id, frames, rows, columns)."""
    return Manifest(
        tuple(
            Video(name, f"media/{name}", MediaKind.FRAMES, n_frames, rows * PATCH, cols * PATCH)
            for name, n_frames, rows, cols in videos
        ),
        {"builder": "tests"},
    )


def frames_case(
    videos: Iterable[tuple[str, int, int, int]] = (
        ("bear", 5, 2, 3),
        ("camel", 4, 2, 3),
        ("dog", 3, 3, 2),
        ("eel", 1, 2, 3),
    ),
    *,
    dim: int = 8,
    slot_encodings: int = 4,
    n_shifted: int = 0,
    every: int = 1,
    seed: int = 0,
    dtype: str = "float16",
    codec: str = "none",
) -> Case:
    manifest = make_manifest(videos)
    settings = FramesSettings(size="native", n_shifted=n_shifted, every=every)
    plan = make_plan(
        manifest, settings, patch=PATCH, dim=dim, slot_encodings=slot_encodings, dtype=dtype, codec=codec
    )
    return Case(manifest, plan, seed)


def pairs_case(
    n_videos: int = 5,
    *,
    n_views: int = 2,
    side: int = 2,
    dim: int = 8,
    slot_encodings: int = 12,
    seed: int = 0,
    dtype: str = "float16",
    codec: str = "none",
) -> Case:
    manifest = make_manifest((f"clip{number}", 8 + number, 4, 4) for number in range(n_videos))
    settings = PairsSettings(n_views=n_views, size=side * PATCH)
    plan = make_plan(
        manifest, settings, patch=PATCH, dim=dim, slot_encodings=slot_encodings, dtype=dtype, codec=codec
    )
    return Case(manifest, plan, seed)


def folder_bytes(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by relative name."""
    files = (item for item in path.rglob("*") if item.is_file())
    return {str(item.relative_to(path)): item.read_bytes() for item in files}


def crash_case() -> Case:
    return pairs_case(8, n_views=1, side=4, dim=64, slot_encodings=3)


def write_and_die(path: Path, started: Connection) -> None:
    """Write a whole store in a process that somebody kills."""
    case = crash_case()
    started.send(True)
    case.write(path)
