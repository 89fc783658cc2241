"""Writers that die, folders that fill up or refuse, early readers: nothing committed is lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from crash_harness import PROCESSES, Clips, kill_until, make_reference
from store_cases import Case, crash_case, folder_bytes, frames_case, pairs_case, write_and_die

from cosettle_cache.core.errors import DamagedStoreError, InputError, OutputError
from cosettle_cache.store import open_store, repair_store, verify_store

N_KILLS = 8
#: Kills of real extractions in the gate, and in the long run, by processes at work on one store.
GATE_KILLS = {1: 6, 3: 6}
MANY_KILLS = {1: 120, 3: 120}


def start_writer(path: Path) -> BaseProcess:
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=write_and_die, args=(path, there))
    process.start()
    assert here.recv()
    return process


def check_committed(case: Case, path: Path) -> int:
    """Check that every sample the store shows is right; return how many it shows."""
    try:
        store = open_store(path)
    except InputError:
        return 0
    layout = case.plan.arrays[0]
    wanted = case.array(layout.grid).reshape(-1, 3, 4, 4, 64)
    assert np.array_equal(store.samples(store.sample_ids), wanted[store.sample_ids])
    return len(store.sample_ids)


def test_killed_at_random_moments_and_resumed_is_the_same_store(tmp_path: Path) -> None:
    case, dice = crash_case(), random.Random(3)
    started = time.perf_counter()
    wanted = folder_bytes(case.write(tmp_path / "whole.zarr"))
    duration = time.perf_counter() - started
    shown = []
    for number in range(N_KILLS):
        path = tmp_path / str(number) / "store.zarr"
        process = start_writer(path)
        time.sleep(dice.uniform(0, duration))
        process.kill()
        process.join()
        if path.exists():
            open_store(path)
        shown.append(check_committed(case, path))
        case.write(path)
        assert folder_bytes(path) == wanted
        assert [item.name for item in path.parent.iterdir()] == ["store.zarr"]
    assert len(set(shown)) > 1, "the kills all came at the same moment"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    return make_reference(tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize("n_writers", GATE_KILLS)
def test_killed_extractions_lose_nothing(clips: Clips, tmp_path: Path, n_writers: int) -> None:
    figures = kill_until(clips, tmp_path, GATE_KILLS[n_writers], n_writers, random.Random(n_writers))
    assert figures.n_stores > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_writers", MANY_KILLS)
def test_many_killed_extractions_lose_nothing(clips: Clips, tmp_path: Path, n_writers: int) -> None:
    figures = kill_until(clips, tmp_path, MANY_KILLS[n_writers], n_writers, random.Random(0))
    assert len(figures.hits) > 3, "the kills all came at the same moment"


def test_kill_between_shard_and_commit_mark(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0, 1])
    wanted = folder_bytes(case.write(tmp_path / "whole.zarr"))
    shutil.copy(tmp_path / "whole.zarr/tokens/2x3/c.2.0.0.0", path / "tokens/2x3/c.2.0.0.0")
    assert open_store(path).slot_states() == {"todo": 2, "done": 2, "failed": 0}
    assert case.writer(path).todo() == [2, 3]
    assert folder_bytes(case.write(path)) == wanted


def test_leftovers_go_when_no_other_writer_lives(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0])
    mine = path / "tokens" / "2x3" / f".c.1.0.0.0.{'0' * 32}.tmp"
    foreign = path / "index" / "notes.tmp"
    mine.write_bytes(b"half a shard")
    foreign.write_bytes(b"not ours")
    open_store(path)
    assert mine.exists()
    first = case.writer(path)
    assert not mine.exists()
    assert foreign.exists()
    mine.write_bytes(b"in the making")
    second = case.writer(path)
    assert mine.exists(), "the first writer may be writing it"
    first.close()
    second.close()
    case.writer(path).close()
    assert not mine.exists()


def test_two_writers_share_the_slots(tmp_path: Path) -> None:
    case = frames_case()
    first, second = case.writer(tmp_path / "store.zarr"), case.writer(tmp_path / "store.zarr")
    for index in first.todo():
        case.commit((first, second)[index % 2], index)
    assert first.todo() == second.todo() == []
    assert folder_bytes(tmp_path / "store.zarr") == folder_bytes(case.write(tmp_path / "whole.zarr"))


def test_rivals_create_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    processes = [start_writer(path) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert folder_bytes(path) == folder_bytes(crash_case().write(tmp_path / "whole.zarr"))


def test_a_reader_sees_committed_slots_only(tmp_path: Path) -> None:
    case, stop = crash_case(), Event()
    path = tmp_path / "store.zarr"
    counts: list[int] = []
    faults: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                counts.append(check_committed(case, path))
        except BaseException as error:
            faults.append(error)

    thread = Thread(target=look)
    thread.start()
    case.write(path)
    stop.set()
    thread.join()
    assert not faults
    assert counts == sorted(counts)
    assert check_committed(case, path) == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB: full in the middle of a shard, as a quota is."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_space_left(small_disk: Path) -> None:
    case = pairs_case(12, n_views=1, side=4, dim=256, slot_encodings=3)
    path = small_disk / "store.zarr"
    with pytest.raises(OutputError, match="no space left") as caught:
        case.write(path)
    assert "run the same command again" in str(caught.value.hint)
    store = open_store(path)
    committed = store.sample_ids
    assert 0 < len(committed) < 12
    wanted = case.array(case.plan.arrays[0].grid).reshape(-1, 3, 4, 4, 256)
    assert np.array_equal(store.samples(committed), wanted[committed])
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert case.writer(path).todo() == [index for index in range(12) if index not in committed]
    assert np.array_equal(open_store(case.write(path)).samples(range(12)), wanted)


def test_no_space_for_a_retry_leaves_the_slot_to_do(small_disk: Path) -> None:
    case = frames_case(dim=512)
    path = case.write(small_disk / "store.zarr", failures={"camel": "gone"})
    writer = case.writer(path)
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
        file.write(bytes(2**20))
    with pytest.raises(OutputError, match="no space left"):
        case.commit(writer, 1)
    filler.unlink()
    assert writer.todo() == [1]
    assert open_store(case.write(path)).video_ids == ("bear", "dog", "eel")


def test_no_space_for_the_metadata(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(252 * 1024))
    with pytest.raises(OutputError, match="no space left"):
        frames_case().writer(small_disk / "store.zarr")
    assert list(small_disk.iterdir()) == [filler]
    filler.unlink()
    assert frames_case().writer(small_disk / "store.zarr").n_slots == 4


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, while the tests act as one without rights."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root ignores permissions, so give them up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_folder(open_folder: Path, request: pytest.FixtureRequest) -> None:
    case = frames_case()
    path = case.write(open_folder / "store.zarr", slots=[0])
    before = folder_bytes(path)
    for item in [open_folder, path, *path.rglob("*")]:
        item.chmod(0o555 if item.is_dir() else 0o444)
    request.getfixturevalue("nobody")
    for name in ("new.zarr", "store.zarr"):
        with pytest.raises(OutputError, match="not writable"):
            case.writer(open_folder / name)
    with pytest.raises(OutputError, match="not writable"):
        repair_store(path)
    assert open_store(path).slot_states()["done"] == 1
    assert verify_store(path).damages == ()
    assert folder_bytes(path) == before


@pytest.fixture
def read_only_disk(small_disk: Path) -> Callable[[str], None]:
    """Makes the small file system read-only, or writable again."""

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode},size=2m", str(small_disk)], check=True)

    return remount


def test_a_file_system_turns_read_only(small_disk: Path, read_only_disk: Callable[[str], None]) -> None:
    case = frames_case()
    path = case.write(small_disk / "store.zarr", slots=[0])
    before = folder_bytes(path)
    read_only_disk("ro")
    for act in (lambda: case.writer(path), lambda: repair_store(path)):
        with pytest.raises(OutputError, match="file system is read-only"):
            act()
    assert verify_store(path).damages == ()
    assert folder_bytes(path) == before
    read_only_disk("rw")
    assert folder_bytes(case.write(path)) == folder_bytes(case.write(small_disk / "whole.zarr"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 1 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_limit_of_file_size_in_the_middle_of_a_shard(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case = frames_case(dim=64)
    path = case.write(tmp_path / "store.zarr", slots=[0])
    before = folder_bytes(path)
    writer = case.writer(path)
    request.getfixturevalue("small_files")
    with pytest.raises(OutputError, match=r"c\.1\.0\.0\.0 cannot be written: the file would be larger"):
        case.commit(writer, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    assert folder_bytes(path) == before
    assert writer.todo() == [1, 2, 3]
    writer.close()
    assert folder_bytes(case.write(path)) == folder_bytes(case.write(tmp_path / "whole.zarr"))


@pytest.mark.parametrize("gone", ["", "tokens", "tokens/2x3", "index", "index/2x3"])
def test_a_folder_vanishes_while_writing(tmp_path: Path, gone: str) -> None:
    case = frames_case()
    whole = folder_bytes(case.write(tmp_path / "whole.zarr"))
    path = tmp_path / "store.zarr"
    writer = case.writer(path)
    case.commit(writer, 0)
    shutil.rmtree(path / gone)
    with pytest.raises(OutputError, match="does not exist") as caught:
        case.commit(writer, 1)
    assert str(path) in caught.value.message
    writer.close()
    if gone:
        repair_store(path)
    assert folder_bytes(case.write(path)) == whole


@pytest.mark.parametrize("gone", ["", "tokens", "tokens/2x2"])
def test_a_folder_vanishes_while_reading(tmp_path: Path, gone: str) -> None:
    case = pairs_case()
    path = case.write(tmp_path / "store.zarr")
    store = open_store(path)
    wanted = store.samples([0])  # this slot's shard is open and stays readable
    shutil.rmtree(path / gone)
    assert np.array_equal(store.samples([0]), wanted)
    with pytest.raises(DamagedStoreError, match=r"slot 1 ") as caught:
        store.samples([5])
    assert str(path) in "".join(caught.value.lines())


def test_the_device_fails_while_reading(tmp_path: Path) -> None:
    """A folder in a shard's place: the open works, every read fails."""
    path = pairs_case().write(tmp_path / "store.zarr")
    shard = path / "tokens/2x2/c.1.0.0.0"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DamagedStoreError, match="slot 1 ") as caught:
        open_store(path).samples([0, 5])
    assert caught.value.details


def test_interrupted_creation_is_no_store(tmp_path: Path) -> None:
    case = frames_case()
    dead = tmp_path / f".store.zarr.{'0' * 32}.tmp"
    case.write(dead)
    (tmp_path / f".other.zarr.{'0' * 32}.tmp").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        open_store(tmp_path / "store.zarr")
    case.writer(tmp_path / "store.zarr")
    assert not dead.exists()
    assert len(list(tmp_path.iterdir())) == 2
