"""Knowing whether other writers live: advisory locks that the kernel drops when their process dies.

Writers share a lock; whoever gets it alone may remove what dead writers left behind.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

#: What `files.temporary_name` makes.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


class WriterLock:
    """A shared lock on a file or folder, held until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        # Locks of network file systems need a descriptor that can write; folders cannot have one.
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        self.alone = self._try_alone()

    def share(self) -> None:
        """Let other writers in; call it once the work that needs to be alone is done."""
        if self.alone:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            self.alone = False

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _try_alone(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            return False
        except OSError:
            return False  # a file system without locks: nobody is ever known to be alone
        return True


def is_temporary(path: Path) -> bool:
    """Say whether `path` has a name that only unfinished writes have."""
    return TEMPORARY.fullmatch(path.name) is not None
