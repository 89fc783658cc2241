"""Shared fixtures: where golden values and real data lie, and what skips when they are absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from pretend_cuda import Device

# A busy machine is no failure; and the gate tries the same examples every time.
settings.register_profile("gate", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("gate")

# As the command line does, and for the same reason: tests share their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent
SHARED = Path(os.environ.get("COSETTLE_SHARED", TESTS.parent.parent / "shared"))


def golden_path(relative: str) -> Path:
    """Return a golden file, committed or beside the checkout; skip when it is in neither place."""
    for root in (TESTS / "golden", SHARED / "golden"):
        if (root / relative).exists():
            return root / relative
    pytest.skip(f"golden file {relative} is neither in tests/golden nor in the shared folder")


@pytest.fixture
def cuda() -> Iterator[Device]:
    """A pretended CUDA device that counts waits and refuses mixed devices: tests/support/pretend_cuda.py."""
    from pretend_cuda import pretend_cuda

    with pretend_cuda() as device:
        yield device


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    return golden_path


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    return lambda relative: json.loads(golden_path(relative).read_text())


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a path of the shared real data; skip when the folder is absent."""

    def find(relative: str) -> Path:
        path = SHARED / "data" / relative
        if not path.exists():
            pytest.skip(f"shared data {relative} is absent")
        return path

    return find
