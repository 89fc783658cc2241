"""Copies have the same bytes, go on where they stopped, and never hold what is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from threading import Event

import pytest
from remote_cases import BUCKET, running_server
from store_cases import Case, folder_bytes, frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.console import SilentProgress
from cosettle_cache.core.errors import (
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    UsageError,
)
from cosettle_cache.store import copy_store, plan_copy, repair_store, verify_store
from cosettle_cache.store.remote import open_storage


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Case, Path]:
    case = pairs_case()
    return case, case.write(tmp_path / "store.zarr")


def flip(path: Path, offset: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class StopAfter(SilentProgress):
    """Sets `stop` when so many slots are through."""

    def __init__(self, n_slots: int) -> None:
        self.stop, self.n_slots = Event(), n_slots

    def advance(self, n: int = 1, **figures: float) -> None:
        self.n_slots -= n
        if self.n_slots <= 0:
            self.stop.set()


@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "zstd")])
def test_a_copy_has_the_same_bytes(tmp_path: Path, dtype: str, codec: str) -> None:
    case = frames_case(n_shifted=1, dtype=dtype, codec=codec)
    path = case.write(tmp_path / "store.zarr", slots=[0, 2, 3], failures={"camel": "gone"})
    report = copy_store(path, tmp_path / "far" / "copy.zarr")
    assert (report.n_slots, report.n_copied, report.n_there, report.n_held) == (3, 3, 0, 0)
    assert folder_bytes(tmp_path / "far" / "copy.zarr") == folder_bytes(path)
    assert verify_store(tmp_path / "far" / "copy.zarr").damages == ()
    again = copy_store(path, tmp_path / "far" / "copy.zarr")
    assert (again.n_copied, again.n_there, again.n_bytes) == (0, 3, 0)


def test_released_stores_are_copied_as_they_are(tmp_path: Path) -> None:
    for path in (Path(__file__).parents[1] / "stores").glob("*/*"):
        copy = tmp_path / path.parent.name / path.name
        copy_store(path, copy)
        assert folder_bytes(copy) == folder_bytes(path)


def test_a_stopped_copy_goes_on(tmp_path: Path) -> None:
    path = pairs_case(20, slot_encodings=6).write(tmp_path / "store.zarr")
    progress = StopAfter(3)
    first = copy_store(path, tmp_path / "copy.zarr", progress=progress, stop=progress.stop)
    assert first.interrupted
    assert 3 <= first.n_copied < 20
    assert verify_store(tmp_path / "copy.zarr").damages == ()
    plan = plan_copy(path, tmp_path / "copy.zarr")
    assert (plan["n_slots"], plan["n_there"]) == (20, first.n_copied)
    second = copy_store(path, tmp_path / "copy.zarr")
    assert (second.n_copied, second.n_there) == (20 - first.n_copied, first.n_copied)
    assert folder_bytes(tmp_path / "copy.zarr") == folder_bytes(path)


def test_a_copy_follows_what_was_extracted_and_retried_since(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0, 1], failures={"camel": "gone"})
    copy_store(path, tmp_path / "copy.zarr")
    writer = case.writer(path)
    for index in writer.todo(retry_failed=True):
        case.commit(writer, index)
    writer.close()
    assert copy_store(path, tmp_path / "copy.zarr").n_copied == 3
    assert folder_bytes(tmp_path / "copy.zarr") == folder_bytes(path)


def test_a_whole_slot_is_not_given_up_for_a_failed_one(tmp_path: Path) -> None:
    case = frames_case()
    better = case.write(tmp_path / "better.zarr")
    worse = case.write(tmp_path / "worse.zarr", failures={"camel": "gone"})
    before = folder_bytes(better)
    assert copy_store(worse, better).n_there == 4
    assert folder_bytes(better) == before


def test_a_damaged_slot_is_named_and_left_out(
    pairs: tuple[Case, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, path = pairs
    whole = folder_bytes(path)
    flip(path / "tokens/2x2/c.1.0.0.0")
    flip(path / "index/2x2/000002.parquet")
    copy = tmp_path / "copy.zarr"
    report = copy_store(path, copy)
    assert report.n_copied == 1
    assert [damage.slot for damage in report.damages] == [1, 2]
    assert {video.video_id for damage in report.damages for video in damage.encodings} == {"clip2", "clip4"}
    found = verify_store(copy)
    assert (found.damages, found.n_todo) == ((), 2)
    assert run_command(["store", "copy", str(path), str(copy), "--quiet"]) == 5
    assert "2 damaged and left out" in capsys.readouterr().out
    repair_store(path)
    case.write(path)
    assert copy_store(path, copy).n_copied == 2
    assert folder_bytes(copy) == whole


def test_a_failed_slot_is_not_given_up_for_a_damaged_one(tmp_path: Path) -> None:
    case = pairs_case()
    path = case.write(tmp_path / "store.zarr")
    other = case.write(tmp_path / "other.zarr", failures={"clip0": "gone"})
    before = folder_bytes(other)
    flip(path / "tokens/2x2/c.0.0.0.0")
    assert [damage.slot for damage in copy_store(path, other).damages] == [0]
    assert folder_bytes(other) == before


def test_damaged_metadata_is_not_copied(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    _, path = pairs
    flip(path / "tokens/zarr.json")
    with pytest.raises(DamagedStoreError, match="metadata") as caught:
        copy_store(path, tmp_path / "copy.zarr")
    assert "store repair" in str(caught.value.hint)
    assert not (tmp_path / "copy.zarr").exists()


def test_places_that_will_not_do(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    case, path = pairs
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    frames_case().write(tmp_path / "other.zarr")
    for target in (path, path / "copy.zarr", tmp_path, path / "tokens" / ".." / "x"):
        with pytest.raises(UsageError, match="into itself"):
            copy_store(path, target)
    with pytest.raises(InputError, match="not a store"):
        copy_store(path, tmp_path / "full")
    with pytest.raises(FingerprintError):
        copy_store(path, tmp_path / "other.zarr")
    with pytest.raises(InputError, match="does not exist"):
        copy_store(tmp_path / "absent", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert folder_bytes(path) == folder_bytes(case.write(tmp_path / "again.zarr"))


def test_slots_that_somebody_writes_are_left_to_them(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    case, path = pairs
    writer = case.writer(tmp_path / "copy.zarr")
    assert writer.claim(1)
    report = copy_store(path, tmp_path / "copy.zarr")
    assert (report.n_copied, report.n_held) == (2, 1)
    case.commit(writer, 1)
    writer.close()
    assert folder_bytes(tmp_path / "copy.zarr") == folder_bytes(path)


def test_a_full_disk_stops_the_copy_and_loses_nothing(tmp_path: Path) -> None:
    path = pairs_case(12, n_views=1, side=4, dim=256, slot_encodings=3).write(tmp_path / "store.zarr")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with pytest.raises(OutputError, match="no space left") as caught:
            copy_store(path, disk / "copy.zarr")
        assert "run the same command again" in str(caught.value.hint)
        found = verify_store(disk / "copy.zarr")
        assert found.damages == ()
        assert 0 < found.n_verified < 12
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert copy_store(path, disk / "copy.zarr").n_there == found.n_verified
        assert folder_bytes(disk / "copy.zarr") == folder_bytes(path)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_to_an_object_store_and_back(tmp_path: Path) -> None:
    case = pairs_case()
    path = case.write(tmp_path / "store.zarr")
    whole = folder_bytes(path)
    with running_server():
        url = f"s3://{BUCKET}/copies/store.zarr"
        flip(path / "tokens/2x2/c.1.0.0.0")
        assert copy_store(path, url).n_copied == 2
        shutil.rmtree(path)
        case.write(path)
        assert copy_store(path, url).n_copied == 1
        assert copy_store(url, tmp_path / "back.zarr").n_copied == 3
        assert copy_store(url, f"s3://{BUCKET}/copies/second.zarr").n_copied == 3
        with pytest.raises(UsageError):
            copy_store(url, f"{url}/inside")
        storage = open_storage(url)
        storage.write("tokens/2x2/c.0.0.0.0", [b"half a shard"])
        assert repair_store(url).slots == (0,)
        assert copy_store(tmp_path / "back.zarr", url).n_copied == 1
        assert verify_store(url).damages == ()
        assert {name: storage.read(name) for name, _ in storage.walk()} == whole
    assert folder_bytes(tmp_path / "back.zarr") == whole


def test_commands(pairs: tuple[Case, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = pairs
    copy = tmp_path / "copy.zarr"
    assert run_command(["store", "copy", str(path), str(copy), "--dry-run"]) == 0
    assert "3 of 3 slots to copy" in capsys.readouterr().out
    assert not copy.exists()
    assert run_command(["store", "copy", str(path), str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_copied"] == 3
    assert run_command(["store", "copy", str(path), str(path / "x")]) == 2
    assert run_command(["store", "copy", str(path), str(copy), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_there"] == 3
