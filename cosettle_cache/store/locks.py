"""Knowing whether other writers live and which slots they hold: locks that die with their process.

Writers share a lock; whoever gets it alone may remove what dead writers left behind. A slot in work is a
locked byte of a file: byte `i` for slot `i`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from cosettle_cache.core.errors import OutputError
from cosettle_cache.core.files import output_errors

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


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep writers out, which lock the file `path`; raise `OutputError` at once when one is there.

    Without the file there is no writer, and on a file system without locks nobody knows.
    """
    if not path.is_file():
        yield
        return
    with output_errors(path):
        descriptor = os.open(path, os.O_RDWR)
    try:
        _lock_alone(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock_alone(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holders = ", ".join(map(str, _lock_holders(descriptor)))
        raise OutputError(
            f"{path.parents[1]} is being written by another process",
            found=f"process {holders}" if holders else None,
            hint="wait until it has ended, or end it; what it has committed stays",
        ) from error
    except OSError:
        return


def _lock_holders(descriptor: int) -> list[int]:
    """Return the processes of this machine with a lock on an open file, where the system lists them."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    return sorted({int(row[4]) for row in rows if device in row and "FLOCK" in row and int(row[4]) > 0})


class SlotClaims:
    """Slots held by one writer through locked bytes of `path`; every writer has a descriptor of its own.

    Locks belong to the open file, so two writers of one process exclude each other as well. On a file system
    without locks every claim succeeds.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDWR)
        self._held: set[int] = set()
        self._lock = Lock()

    def take(self, slot: int) -> bool:
        """Hold `slot` if nobody does, at once; say whether it is held now and was not before."""
        with self._lock:
            if slot in self._held or not self._set(fcntl.F_WRLCK, slot):
                return False
            self._held.add(slot)
            return True

    def release(self, slot: int) -> None:
        """Give `slot` back, if it is held."""
        with self._lock:
            if slot in self._held:
                self._held.discard(slot)
                self._set(fcntl.F_UNLCK, slot)

    def close(self) -> None:
        """Give everything back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _set(self, kind: int, slot: int) -> bool:
        request = struct.pack(_FLOCK, kind, os.SEEK_SET, slot, 1, 0)
        try:
            fcntl.fcntl(self._descriptor, _SET_LOCK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True


#: The kernel's `struct flock`: type, whence, start, length, process.
_FLOCK = "hhqqi4x"

#: Locks of the open file; where there are none (outside Linux), locks of the process.
_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)


def is_temporary(path: Path) -> bool:
    """Say whether `path` has a name that only unfinished writes have."""
    return TEMPORARY.fullmatch(path.name) is not None
