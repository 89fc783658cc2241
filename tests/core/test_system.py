"""Where a system lacks a call the plain way does the same: bytes, locks, the path from a store to labels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS
from system_cases import walk

from cosettle_cache.core.system import hold_byte, lock, lock_alone, read_into

#: What macOS or an older system has not, and what nobody has without `fcntl`.
HIDE = """
import os, sys
absent = ["posix_fadvise", "preadv", "sendfile", "sched_getaffinity", "fdatasync"]
for name in [*absent, *(name for name in dir(os) if name.startswith("RWF_"))]:
    vars(os).pop(name, None)
sys.modules["fcntl"] = None
from pathlib import Path
import numpy as np
from system_cases import walk
np.savez(sys.argv[2], **walk(Path(sys.argv[1])))
"""


def test_without_calls_of_linux_the_work_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "hidden").mkdir()
    wanted, made = walk(tmp_path / "all"), tmp_path / "made.npz"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)])}
    subprocess.run(
        [sys.executable, "-c", HIDE, str(tmp_path / "hidden"), str(made)], env=environment, check=True
    )
    with np.load(made) as found:
        assert found.keys() == wanted.keys()
        for name in ("tokens", "piece"):
            assert (found[name] == wanted[name]).all()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("preadv", [True, False])
def test_buffers_are_filled_in_order_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preadv: bool
) -> None:
    if not preadv:
        monkeypatch.delattr(os, "preadv")
    (tmp_path / "file").write_bytes(bytes(range(10)))
    parts = [bytearray(length) for length in (3, 0, 4, 5)]
    with (tmp_path / "file").open("rb") as file:
        assert read_into(file.fileno(), list(map(memoryview, parts)), 1) == 9
    assert [list(part) for part in parts] == [[1, 2, 3], [], [4, 5, 6, 7], [8, 9, 0, 0, 0]]


HOLD = """
import os, sys
from cosettle_cache.core import system
system.sys.platform = sys.argv[2]
file = os.open(sys.argv[1], os.O_RDWR)
system.lock(file, shared=True)
print(system.hold_byte(file, 3, held=True), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_locks_keep_other_processes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    """Bytes are held in the way of Linux, and in the way of every Unix."""
    monkeypatch.setattr(sys, "platform", platform)
    path = tmp_path / "file"
    path.touch()
    command = [sys.executable, "-c", HOLD, str(path), platform]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    pipe = subprocess.PIPE
    other = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert other.stdout and other.stdout.readline() == "True\n"
    with path.open("r+b") as file:
        descriptor = file.fileno()
        assert lock_alone(descriptor) is False
        assert [hold_byte(descriptor, number, held=True) for number in (3, 4)] == [False, True]
        assert hold_byte(descriptor, 4, held=False)
        other.communicate()
        lock(descriptor, shared=False)
        assert hold_byte(descriptor, 3, held=True)


def test_without_locks_nobody_is_known_to_hold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosettle_cache.core.system.fcntl", None)
    with (tmp_path / "file").open("wb") as file:
        assert lock_alone(file.fileno()) is None
        lock(file.fileno(), shared=False)
        assert hold_byte(file.fileno(), 0, held=True)
