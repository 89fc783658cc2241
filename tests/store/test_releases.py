"""Stores of every released spec version stay readable: these were written once and are never made again."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from store_cases import folder_bytes, frames_case

from cosettle_cache.store import StoreWriter, open_store, verify_store

STORES = Path(__file__).parents[1] / "stores"
V1, V2 = STORES / "v1", STORES / "v2"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_v1_pairs() -> None:
    store = open_store(V1 / "pairs")
    assert store.sample_ids.tolist() == [0, 2]
    assert store.failures == {"clip1": "frame 3 cannot be decoded"}
    assert store.slot_states() == {"todo": 0, "done": 1, "failed": 1}
    found = sha256(store.samples(store.sample_ids).tobytes())
    assert found == "3cb35ed9f1723c2041e6ceb45f328c68980b8f3af068f3d4ce84c5b8d5d533b9"
    row = store.index.to_pylist()[2]
    assert (row["video_id"], row["frame"], row["role"], row["shift_col"]) == ("clip0", 5, "shifted", 8)
    assert (row["crop_left"], row["crop_width"], row["flip"], row["error"]) == (3, 28, False, None)


def test_v1_frames() -> None:
    store = open_store(V1 / "frames")
    assert {name: sha256(store.tokens(name).tobytes()) for name in store.video_ids} == {
        "bear": "e1074914f43599c388f1cb7df9c5848df93b0b77260a7ee3b04860b1fea3e43d",
        "dog": "d5eca37b5adcbd86ef90cd740d9c142908041019928294b5be5c0dd7494fbb52",
    }
    assert store.slot_states() == {"todo": 1, "done": 3, "failed": 0}
    assert [str(layout.grid) for layout in store.arrays] == ["1x3", "2x2"]
    assert store.fingerprint.backbone == "tiny"


def test_v2_pairs() -> None:
    """Grouped int8, compressed."""
    store = open_store(V2 / "pairs")
    assert [(layout.dtype, layout.codec) for layout in store.arrays] == [("int8", "zstd")]
    assert store.fingerprint.spec_version == 2
    assert store.failures == {"clip1": "frame 3 cannot be decoded"}
    found = store.samples(store.sample_ids)
    assert (found.dtype, found.shape) == (np.float16, (2, 3, 2, 2, 66))
    assert sha256(found.tobytes()) == "741c02c1b1cd66d92e709ab6caf482ac07b02dd9b1c27186aa387bca37b96e33"


def test_v2_frames() -> None:
    """Grouped int8, read directly."""
    store = open_store(V2 / "frames")
    assert {name: sha256(store.tokens(name).tobytes()) for name in store.video_ids} == {
        "bear": "eb2fd2f6b34d8a4e611ceb653fe7782b8aeebc58709b19341bcca27ac5dfafc7",
        "dog": "b7e15e402b9cbd05c59710acdd3f1b0adc75f8eafb6385b32c489b3f26ae777d",
    }
    assert store.slot_states() == {"todo": 1, "done": 3, "failed": 0}


@pytest.mark.parametrize(
    "path", sorted(STORES.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_released_stores_are_clean(path: Path) -> None:
    assert verify_store(path).damages == ()


def test_v2_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    shutil.copytree(V2 / "frames", path)
    before = folder_bytes(path)
    videos = (("bear", 3, 2, 2), ("camel", 2, 2, 2), ("dog", 1, 1, 3))
    frames_case(videos, dim=66, slot_encodings=4, n_shifted=1, seed=21, dtype="int8").write(path)
    assert folder_bytes(path).items() >= before.items()
    assert open_store(path).video_ids == ("bear", "camel", "dog")


def test_v1_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    shutil.copytree(V1 / "frames", path)
    before = folder_bytes(path)
    old = open_store(path)
    writer = StoreWriter.create_or_resume(path, old.arrays, old.fingerprint, old.manifest, {})
    assert writer.todo() == [2]
    videos = (("bear", 3, 2, 2), ("camel", 2, 2, 2), ("dog", 1, 1, 3))
    frames_case(videos, dim=4, slot_encodings=4, n_shifted=1, seed=12).commit(writer, 2)
    assert folder_bytes(path).items() >= before.items()
    assert open_store(path).video_ids == ("bear", "camel", "dog")
