"""Units of work for the tests of clusters; apart from them, so that a worker imports nothing heavy."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from cosettle_cache.core.errors import InputError


def square(number: int) -> int:
    return number * number


def process(number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def die_at(wanted: int, number: int) -> int:
    if number == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(mark: Path, number: int) -> int:
    """Kill the first process that comes here."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.02)
        return number
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse(number: int) -> int:
    raise InputError("nothing here", wanted="something", found=number)


def environment(names: tuple[str, ...], number: int) -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in names)
