"""Tasks in forked children, which must neither fail nor hang."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest

#: Far more than a child needs, far less than a hang.
PATIENCE_S = 300


def forked(task: Callable[[], None]) -> int:
    """Run `task` in a forked child; return its exit code, and fail when it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = _guarded(task)
        os._exit(code)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


def _guarded(task: Callable[[], None]) -> int:
    try:
        task()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        return 1
    return 0
