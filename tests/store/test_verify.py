"""Verification finds every damage and names what it costs; repair and extraction bring the bytes back."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from flip_harness import FAILURES, STORES, FlipTest
from store_cases import Case, folder_bytes, frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import DamagedStoreError, InputError, OutputError
from cosettle_cache.store import Damage, _local, open_store, repair_store, verify_store
from cosettle_cache.store.format import SPEC_VERSION

N_FLIPS_PER_FILE = 9
MANIFEST = "index/manifest.parquet"


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Case, Path]:
    case = pairs_case()
    return case, case.write(tmp_path / "store.zarr")


def damages_of(path: Path) -> tuple[Damage, ...]:
    return verify_store(path).damages


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("title", STORES)
def test_flipped_bytes_are_found_named_and_mended(title: str, tmp_path: Path) -> None:
    test = FlipTest(STORES[title](), tmp_path / "store.zarr")
    figures = test.check(test.some_bytes(random.Random(11), N_FLIPS_PER_FILE), repair_every=6)
    assert figures.found_by_verify == figures.flips == N_FLIPS_PER_FILE * len(test.files)
    assert figures.refused_by_reader > figures.flips // 2


@pytest.mark.slow
@pytest.mark.parametrize("title", STORES)
def test_every_byte_flipped_is_found_named_and_mended(title: str, tmp_path: Path) -> None:
    test = FlipTest(STORES[title](), tmp_path / "store.zarr")
    figures = test.check(test.every_byte(random.Random(0)), repair_every=10)
    assert figures.found_by_verify == figures.flips == sum(map(len, test.files.values()))


def test_a_clean_store_and_one_in_the_making(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0, 3], failures=FAILURES)
    report = verify_store(path)
    assert (report.damages, report.notes, report.interrupted) == ((), (), False)
    assert (report.n_slots, report.n_verified, report.n_todo) == (4, 2, 2)
    shards = sum(item.stat().st_size for item in path.glob("tokens/*/c.*"))
    assert report.n_bytes == shards


def test_damaged_encodings_are_named(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    shard = path / "tokens/2x2/c.1.0.0.0"
    data = bytearray(shard.read_bytes())
    data[256 + 10] ^= 1  # a chunk is 3 x 2 x 2 x 8 x 2 = 192 bytes, its stride 256
    shard.write_bytes(data)
    (damage,) = damages_of(path)
    (video,) = damage.encodings
    assert (damage.slot, video.video_id, video.rows) == (1, "clip2", (15, 16, 17))
    assert damage.lines() == [
        "tokens/2x2/c.1.0.0.0 (slot 1): the checksum of a chunk does not match",
        f"  clip2: frames {video.frames[0]} to {video.frames[1]} (rows 15 to 17)",
    ]


def test_the_plan_names_what_a_damaged_index_part_listed(tmp_path: Path) -> None:
    case = frames_case(n_shifted=1)
    path = case.write(tmp_path / "store.zarr")
    rows = {row["row"]: row for row in open_store(path).index.to_pylist() if row["slot"] == 1}
    (path / "index/2x3/000001.parquet").write_bytes(b"")
    (damage,) = damages_of(path)
    assert {row: video.video_id for video in damage.encodings for row in video.rows} == {
        number: row["video_id"] for number, row in rows.items()
    }


def swap_shards(path: Path) -> None:
    one, other = path / "tokens/2x2/c.0.0.0.0", path / "tokens/2x2/c.1.0.0.0"
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def copy_part(path: Path) -> None:
    shutil.copy(path / "index/2x2/000000.parquet", path / "index/2x2/000001.parquet")


def pad_shard(path: Path) -> None:
    with (path / "tokens/2x2/c.0.0.0.0").open("ab") as file:
        file.write(b"\0")


def lose_shard(path: Path) -> None:
    (path / "tokens/2x2/c.2.0.0.0").unlink()


def shard_is_a_folder(path: Path) -> None:
    lose_shard(path)
    (path / "tokens/2x2/c.2.0.0.0").mkdir()


def lose_index_folder(path: Path) -> None:
    shutil.rmtree(path / "index/2x2")


def lose_array(path: Path) -> None:
    shutil.rmtree(path / "tokens/2x2")


def lose_root(path: Path) -> None:
    (path / "zarr.json").unlink()


def newer_root(path: Path) -> None:
    change(path / "zarr.json", '"spec_version": 1', f'"spec_version": {SPEC_VERSION + 1}')


def nameless_root(path: Path) -> None:
    change(path / "zarr.json", "cosettle_cache", "cosettle_cachf")


def empty_root(path: Path) -> None:
    (path / "zarr.json").write_bytes(b"")


def white_space(path: Path) -> None:
    change(path / "tokens/zarr.json", "\n", "\t")


def array_without_codec(path: Path) -> None:
    change(path / "tokens/2x2/zarr.json", '"crc32c"', '"crc33c"')


def lose_lock_file(path: Path) -> None:
    (path / "index/zarr.json").unlink()


def lose_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def truncate_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:-100])


DAMAGES = {
    swap_shards: ["tokens/2x2/c.0.0.0.0", "tokens/2x2/c.1.0.0.0"],
    copy_part: ["index/2x2/000001.parquet"],
    pad_shard: ["tokens/2x2/c.0.0.0.0"],
    lose_shard: ["tokens/2x2/c.2.0.0.0"],
    lose_index_folder: ["index/2x2"],
    lose_array: ["tokens/2x2/zarr.json", *(f"tokens/2x2/c.{shard}.0.0.0" for shard in range(3))],
    lose_root: ["zarr.json"],
    newer_root: ["zarr.json"],
    nameless_root: ["zarr.json"],
    empty_root: ["zarr.json"],
    white_space: ["tokens/zarr.json"],
    array_without_codec: ["tokens/2x2/zarr.json"],
    lose_lock_file: ["index/zarr.json"],
    lose_manifest: [MANIFEST],
    truncate_manifest: [MANIFEST],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_mended(pairs: tuple[Case, Path], damage: Callable[[Path], None]) -> None:
    case, path = pairs
    whole = folder_bytes(path)
    damage(path)
    assert [found.file for found in damages_of(path)] == DAMAGES[damage]
    before = folder_bytes(path)
    planned = repair_store(path, dry_run=True)
    assert folder_bytes(path) == before
    assert repair_store(path) == planned
    assert {found.file for found in damages_of(path)} <= {MANIFEST}
    case.write(path)
    assert folder_bytes(path) == whole
    assert damages_of(path) == ()


def test_a_shard_of_another_slot_is_found_by_its_chunks(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    shutil.copy(path / "tokens/2x2/c.0.0.0.0", path / "tokens/2x2/c.1.0.0.0")
    (damage,) = damages_of(path)
    assert "not those that its index part commits" in damage.reason
    assert {row for video in damage.encodings for row in video.rows} == set(range(12, 24))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize(
    "name",
    ["tokens/2x2/c.1.0.0.0", "index/2x2/000001.parquet", MANIFEST, "zarr.json", "tokens/2x2/zarr.json"],
)
def test_a_repair_leaves_what_it_cannot_read(
    pairs: tuple[Case, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    number: int,
) -> None:
    _, path = pairs
    whole, open_regular = folder_bytes(path), _local._open_regular

    def refuse(file: str, flags: int) -> int:
        if str(file) == str(path / name):
            raise OSError(number, os.strerror(number), file)
        return open_regular(file, flags)

    monkeypatch.setattr(_local, "_open_regular", refuse)
    assert run_command(["store", "repair", str(path)]) == 3
    text = capsys.readouterr().err
    assert name in text
    assert os.strerror(number) in text
    assert folder_bytes(path) == whole


def test_a_repair_sets_aside_what_it_removes(
    pairs: tuple[Case, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case, path = pairs
    whole, shard = folder_bytes(path), "tokens/2x2/c.1.0.0.0"
    damaged = b"x" + whole[shard][1:]
    (path / shard).write_bytes(damaged)
    assert run_command(["store", "repair", str(path)]) == 0
    assert f"removed: {shard}, set aside" in capsys.readouterr().out
    aside = {name: data for name, data in folder_bytes(path).items() if name.endswith(".tmp")}
    assert set(aside.values()) == {damaged, whole["index/2x2/000001.parquet"]}
    assert len(verify_store(path).notes) == 2
    case.write(path)
    assert folder_bytes(path) == whole


def test_a_folder_in_place_of_a_shard(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    shard_is_a_folder(path)
    (damage,) = damages_of(path)
    assert damage.slot == 2
    repair_store(path)
    assert verify_store(path).n_todo == 1


def test_metadata_of_another_zarr_is_no_damage(pairs: tuple[Case, Path]) -> None:
    """Zarr 3.1.3 writes one more key into groups."""
    _, path = pairs
    for name in ("zarr.json", "tokens/zarr.json", "index/zarr.json"):
        document = json.loads((path / name).read_text())
        keys = list(document.items())
        document = dict([*keys[:1], ("consolidated_metadata", None), *keys[1:]])
        (path / name).write_text(json.dumps(document, indent=2))
    assert damages_of(path) == ()
    change(path / "tokens/zarr.json", "consolidated", "consolidatee")
    assert [damage.file for damage in damages_of(path)] == ["tokens/zarr.json"]


def test_foreign_files_are_notes(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    (path / "index/2x2/1.parquet").write_bytes(b"x")
    (path / "README").write_text("mine")
    (path / f"tokens/2x2/.c.0.0.0.0.{'0' * 32}.tmp").write_bytes(b"x")
    report = verify_store(path)
    assert report.damages == ()
    assert len(report.notes) == 3
    assert sum("unfinished" in note for note in report.notes) == 1


def test_a_store_without_its_root_is_no_place_for_another(pairs: tuple[Case, Path]) -> None:
    case, path = pairs
    lose_root(path)
    for look in (open_store, case.writer):
        with pytest.raises(DamagedStoreError, match=r"has lost its zarr.json") as caught:
            look(path)
        assert "store repair" in str(caught.value.hint)


def test_two_damaged_headers_cannot_be_repaired(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    empty_root(path)
    truncate_manifest(path)
    before = folder_bytes(path)
    for look in (verify_store, repair_store):
        with pytest.raises(DamagedStoreError, match="neither header") as caught:
            look(path)
        assert "backup" in str(caught.value.hint)
    assert folder_bytes(path) == before


def test_a_header_of_another_store_is_refused(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    _, path = pairs
    pairs_case(seed=1).writer(tmp_path / "other.zarr", backbone="other").close()
    shutil.copy(tmp_path / "other.zarr/zarr.json", path / "zarr.json")
    with pytest.raises(DamagedStoreError, match="different stores") as caught:
        repair_store(path)
    assert any("backbone" in line for line in caught.value.details)


def test_what_is_no_store_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for look in (verify_store, repair_store):
        for name in ("folder", "absent"):
            with pytest.raises(InputError):
                look(tmp_path / name)
    assert list((tmp_path / "folder").iterdir()) == []


def test_no_repair_while_somebody_writes(pairs: tuple[Case, Path]) -> None:
    case, path = pairs
    lose_shard(path)
    writer = case.writer(path)
    with pytest.raises(OutputError, match="being written by another process") as caught:
        repair_store(path)
    assert str(os.getpid()) in str(caught.value.found)
    assert len(repair_store(path, dry_run=True).slots) == 1
    writer.close()
    assert repair_store(path).slots == (2,)


def test_a_writer_that_starts_after_a_repair_keeps_its_lock(pairs: tuple[Case, Path]) -> None:
    """The lock file is mended in place: a lock on a file that was replaced would hold nobody off."""
    case, path = pairs
    number = (path / "index/zarr.json").stat().st_ino
    change(path / "index/zarr.json", "\n", "\t")
    repair_store(path)
    assert (path / "index/zarr.json").stat().st_ino == number
    writer = case.writer(path)
    with pytest.raises(OutputError):
        repair_store(path)
    writer.close()


def test_a_stopped_verification_says_so(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    stop = Event()
    stop.set()
    report = verify_store(path, stop=stop)
    assert report.interrupted
    assert report.n_verified < report.n_slots


def test_commands(pairs: tuple[Case, Path], capsys: pytest.CaptureFixture[str]) -> None:
    case, path = pairs
    assert run_command(["store", "verify", str(path)]) == 0
    assert "no damage; 3 of 3 slots checked" in capsys.readouterr().out
    lose_shard(path)
    assert run_command(["store", "verify", str(path), "--quiet"]) == 5
    text = capsys.readouterr().out
    assert "c.2.0.0.0 (slot 2): it is missing" in text
    assert "clip4" in text
    assert "store repair" in text
    assert run_command(["store", "verify", str(path), "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document["damages"][0]["encodings"][0]["video_id"] == "clip4"
    assert run_command(["store", "repair", str(path), "--dry-run"]) == 0
    assert "would be removed: index/2x2/000002.parquet" in capsys.readouterr().out
    assert run_command(["store", "repair", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slots"] == [2]
    assert run_command(["store", "verify", str(path)]) == 0
    assert "1 slots to do" in capsys.readouterr().out
    case.write(path, failures={"clip4": "frame 3 cannot be decoded"})
    assert run_command(["store", "info", str(path)]) == 0
    text = capsys.readouterr().out
    assert "failed: clip4: frame 3 cannot be decoded" in text
    assert "3 = 2 done, 1 failed, 0 to do" in text
