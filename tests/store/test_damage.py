"""Damage is found and named, never read as tokens: flipped bytes anywhere, missing and truncated files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flip_harness import read_everything
from store_cases import Case, frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import CosettleError, DamagedStoreError, ExitCode
from cosettle_cache.store import open_store
from cosettle_cache.store.format import BytesError
from cosettle_cache.store.index import unseal


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Case, Path]:
    case = pairs_case()
    return case, case.write(tmp_path / "store.zarr")


def shard_of(path: Path, shard: int = 0, grid: str = "2x2") -> Path:
    return path / "tokens" / grid / f"c.{shard}.0.0.0"


def test_flipped_token_names_the_sample(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    flip(shard_of(path, 1), 256 + 10)  # a chunk is 3 x 2 x 2 x 8 x 2 = 192 bytes, its stride 256
    store = open_store(path)
    assert store.samples([4]).shape == (1, 3, 2, 2, 8)
    with pytest.raises(DamagedStoreError) as caught:
        store.samples([4, 5])
    assert caught.value.exit_code is ExitCode.DAMAGED
    assert "slot 1 " in caught.value.message
    assert "checksum" in caught.value.message
    (line,) = caught.value.details
    assert line.startswith("clip2: frames")
    assert line.endswith("(rows 15 to 17)")


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_index(path: Path) -> None:
    flip(path, path.stat().st_size - 20)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip_index, make_folder])
def test_lost_shard_names_all_its_videos(pairs: tuple[Case, Path], damage: Callable[[Path], None]) -> None:
    _, path = pairs
    damage(shard_of(path, 1))
    store = open_store(path)
    with pytest.raises(DamagedStoreError) as caught:
        store.samples([3, 4])
    assert [line.split(":")[0] for line in caught.value.details] == ["clip2", "clip3"]
    assert "slot 1 " in caught.value.message
    assert store.samples([0, 8]).shape == (2, 3, 2, 2, 8)


def test_following_the_hint_mends_it(pairs: tuple[Case, Path]) -> None:
    case, path = pairs
    before = read_everything(open_store(path))
    flip(shard_of(path), 0)
    with pytest.raises(DamagedStoreError, match="slot 0") as caught:
        open_store(path).samples([0])
    command = str(caught.value.hint).partition(",")[0].split()
    assert command[:3] == ["cosettle-cache", "store", "repair"]
    assert run_command(command[1:]) == 0
    case.write(path)
    assert read_everything(open_store(path)) == before


def test_chunk_left_out_against_the_index(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    case, path = pairs
    other = case.write(tmp_path / "other.zarr", failures={"clip0": "gone"})
    shutil.copy(shard_of(other), shard_of(path))
    with pytest.raises(DamagedStoreError, match="missing") as caught:
        open_store(path).samples([1])
    assert caught.value.details[0].startswith("clip0")


def test_damaged_part_names_the_rows(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    flip(path / "index" / "2x2" / "000001.parquet", 100)
    with pytest.raises(DamagedStoreError, match="index part of slot 1") as caught:
        open_store(path).sample_ids  # noqa: B018
    assert "rows 12 to 23" in caught.value.details[0]


def test_missing_index_folder(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    shutil.rmtree(path / "index" / "2x2")
    with pytest.raises(DamagedStoreError, match="index folder"):
        open_store(path)


def test_any_flipped_byte_of_a_sealed_table_is_found(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    data = (path / "index" / "2x2" / "000002.parquet").read_bytes()
    assert unseal(data).num_rows == 6
    for offset in range(len(data)):
        changed = data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]
        with pytest.raises(BytesError):
            unseal(changed)


@pytest.mark.parametrize("make_case", [pairs_case, frames_case])
def test_a_flipped_bit_anywhere_never_changes_what_is_read(
    make_case: Callable[[], Case], tmp_path: Path
) -> None:
    path = make_case().write(tmp_path / "store.zarr", failures={"dog": "gone"})
    wanted = read_everything(open_store(path))
    dice = random.Random(7)
    found = 0
    files = sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        original = file.read_bytes()
        for _ in range(8):
            flip(file, dice.randrange(len(original)), dice.randrange(8))
            try:
                assert read_everything(open_store(path)) == wanted
            except CosettleError:
                found += 1
            file.write_bytes(original)
    assert found > 4 * len(files)


def test_bytes_of_a_shard_are_checked_or_padding(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr")
    shard = shard_of(path, 0, "2x3")
    for offset in range(0, 4 * 96, 7):  # the first chunk's 96 bytes at stride 128
        flip(shard, offset)
        store = open_store(path)
        in_gap = offset % 128 >= 100
        if in_gap:
            assert np.isfinite(store.tokens("bear").astype(np.float32)).all()
        else:
            with pytest.raises(DamagedStoreError):
                store.tokens("bear")
        flip(shard, offset)
