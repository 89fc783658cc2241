"""Calls on open files that not every system has, each with the plain way where it is absent.

macOS lacks `posix_fadvise`, `fdatasync` and locks of an open file's bytes; older ones lack `preadv`. Without
locks nobody is ever known to hold one, as on a file system that has none.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

#: Linux's `struct flock`: type, whence, start, length, process.
_FLOCK = "hhqqi4x"

#: Waits until the content of a file is on its device; of its properties the size, where the rest can wait.
sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def advise(descriptor: int, offset: int, n_bytes: int, advice: Literal["WILLNEED", "DONTNEED"]) -> None:
    """Tell the page cache what comes of some bytes, where it can be told; 0 bytes: all from `offset` on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, n_bytes, getattr(os, "POSIX_FADV_" + advice))


def is_cached(descriptor: int, offset: int) -> bool:
    """Say whether the byte at `offset` is known to be in the page cache."""
    if hasattr(os, "RWF_NOWAIT"):
        with suppress(OSError):  # it is not, or the file system does not know the flag
            os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
            return True
    return False


def read_into(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill `buffers` one after the other from `offset` on; return the bytes read, which may be fewer."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, offset)
    n_read = 0
    for buffer in buffers:
        data = os.pread(descriptor, len(buffer), offset + n_read)
        buffer[: len(data)] = data
        n_read += len(data)
        if len(data) < len(buffer):
            break
    return n_read


def lock_alone(descriptor: int) -> bool | None:
    """Lock a file or folder for this process alone, at once; it ends with the descriptor.

    Returns False when others have a lock, None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock(descriptor: int, *, shared: bool) -> None:
    """Wait for a lock on a file or folder, alone or with others; it ends with the descriptor."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def hold_byte(descriptor: int, number: int, *, held: bool) -> bool:
    """Hold byte `number` of a file, at once, or give it back; False when somebody else holds it.

    On Linux the lock is the open file's. Elsewhere it is the process's: it ends when the process closes the
    file through any descriptor, and does not keep out another descriptor of the same process.
    """
    if fcntl is None:
        return True
    try:
        if sys.platform == "linux":
            request = struct.pack(_FLOCK, fcntl.F_WRLCK if held else fcntl.F_UNLCK, os.SEEK_SET, number, 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if held else fcntl.LOCK_UN, 1, number)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True
