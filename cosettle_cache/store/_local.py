"""A store's files in a local folder, and the locks of its writers, which die with their process.

Writers share a lock; whoever gets it alone may remove what dead writers left behind. A slot in work is a
locked byte of a file: byte `i` for slot `i`.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from cosettle_cache.core.errors import OutputError
from cosettle_cache.core.files import (
    Buffer,
    output_errors,
    sync,
    temporary_name,
    unfilled,
    write_durably,
)
from cosettle_cache.core.parallel import share_of_cores
from cosettle_cache.core.system import advise, hold_byte, is_cached, lock, lock_alone, read_into

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property(functools.cached_property):  # noqa: N801
        """As in the standard library, without the lock that Python 3.11 holds while it computes.

        A child forked at that moment would wait for it for ever. Two threads may compute a value twice.
        """

        def __get__(self, instance, owner=None):
            """Return the value, computed unless it is there."""
            if instance is None:
                return self
            if self.attrname not in instance.__dict__:
                instance.__dict__[self.attrname] = self.func(instance)
            return instance.__dict__[self.attrname]


__all__ = ["cached_property"]

#: What `files.temporary_name` makes.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def is_temporary(path: Path) -> bool:
    """Say whether `path` has a name that only unfinished writes have."""
    return TEMPORARY.fullmatch(path.name) is not None


class LocalStorage:
    """A folder that holds a store's files by name; absent ones raise `FileNotFoundError`.

    Every storage says how many reads at once are worth while, how many neighbouring bytes are worth one read
    (0 where a read costs nothing of its own), and how many bytes of what was read stay at hand (`room`).
    """

    #: A local disk serves four readers at once without getting slower. What lies in memory comes faster with
    #: more, as checksums take a core each: all but four, which are left to whoever wants the tokens.
    n_readers = max(min(4, share_of_cores(1)), share_of_cores(1) - 4)
    stretch_bytes = 0
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4

    def __init__(self, root: Path) -> None:
        self.local = root
        self.path = str(root)

    def __reduce__(self) -> tuple[object, ...]:
        return (LocalStorage, (self.local.absolute(),))

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        with open(self.local / name, "rb", opener=_open_regular) as file:
            return file.read()

    def open(self, name: str) -> LocalFile:
        """Open a file for reads at any offset."""
        return LocalFile(self.local / name)

    def exists(self, name: str) -> bool:
        """Say whether there is a file of that name; False, not an error, where looking is forbidden."""
        return os.path.isfile(self.local / name)  # noqa: PTH113

    def names(self, folder: str) -> list[str]:
        """Return the names in `folder`, which must exist."""
        # Thrice as fast as Path.iterdir on 100,000 parts.
        return os.listdir(self.local / folder)  # noqa: PTH208

    def walk(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of every file below the folder."""
        for item in sorted(self.local.rglob("*")):
            with suppress(OSError):  # it has gone meanwhile
                status = item.stat()
                if stat.S_ISREG(status.st_mode):
                    yield item.relative_to(self.local).as_posix(), status.st_size

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Write a file durably, whole or not at all; raise `OutputError` when that is impossible."""
        write_durably(self.local / name, pieces)

    def delete(self, name: str) -> None:
        """Remove a file for good, if it is there."""
        path = self.local / name
        with output_errors(path):
            if path.exists():
                path.unlink(missing_ok=True)
                sync(path.parent)

    def set_aside(self, name: str) -> None:
        """Give a file a name that only unfinished writes have: the next writer that is alone removes it."""
        path = self.local / name
        with output_errors(path):
            path.rename(temporary_name(path))
            sync(path.parent)

    def forget(self, name: str) -> None:
        """Do nothing: no copies are kept."""


def _open_regular(path: str, flags: int) -> int:
    """Open a file at once; raise `OSError` for a pipe, a device or a folder of that name."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, os.strerror(number) if number == errno.EISDIR else "it is no file", path)


class _OpenFile:
    """A file that is closed by `close`, or when it is collected."""

    _descriptor = -1

    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, flags)

    def close(self) -> None:
        """Close the file, which gives its locks back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class LocalFile(_OpenFile):
    """A file read at any offset, by any number of threads, straight into the caller's memory."""

    def __init__(self, path: Path) -> None:
        self._descriptor = _open_regular(str(path), os.O_RDONLY)

    def size(self) -> int:
        """Return the bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def read_tail(self, length: int) -> bytes:
        """Return the last `length` bytes, or all where there are fewer."""
        length = min(length, self.size())
        return os.pread(self._descriptor, length, self.size() - length)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` one after the other from `offset` on; return the bytes read, fewer at the end."""
        wanted = sum(map(len, buffers))
        n_read = read_into(self._descriptor, buffers, offset)
        if 0 < n_read < wanted:
            return n_read + self.read(unfilled(buffers, n_read), offset + n_read)
        return n_read

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Let the kernel fetch bytes into the page cache that will be read soon; 0: all from `offset` on."""
        # The hint looks every page up; for what is there already that costs a fifth of reading it.
        if not n_bytes or not is_cached(self._descriptor, offset):
            advise(self._descriptor, offset, n_bytes, "WILLNEED")


class WriterLock(_OpenFile):
    """A shared lock on a file or folder, held until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        # Locks of network file systems need a descriptor that can write; folders cannot have one.
        super().__init__(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        found = lock_alone(self._descriptor)
        self.alone = found is True  # on a file system without locks nobody is ever known to be alone
        if found is False:
            lock(self._descriptor, shared=True)

    def share(self) -> None:
        """Let other writers in; call it once the work that needs to be alone is done."""
        if self.alone:
            lock(self._descriptor, shared=True)
            self.alone = False


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep writers out, which lock the file `path`; raise `OutputError` at once when one is there.

    Without the file there is no writer, and on a file system without locks nobody knows.
    """
    if not path.is_file():
        yield
        return
    with output_errors(path):
        file = path.open("r+b")
    with file:
        if lock_alone(file.fileno()) is False:
            holders = ", ".join(map(str, _lock_holders(file.fileno())))
            raise OutputError(
                f"{path.parents[1]} is being written by another process",
                found=f"process {holders}" if holders else None,
                hint="wait until it has ended, or end it; what it has committed stays",
            )
        yield


def _lock_holders(descriptor: int) -> list[int]:
    """Return the processes of this machine with a lock on an open file, where the system lists them."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    return sorted({int(row[4]) for row in rows if device in row and "FLOCK" in row and int(row[4]) > 0})


class SlotClaims(_OpenFile):
    """Slots held by one writer through locked bytes of `path`; every writer has a descriptor of its own.

    Two writers of one process exclude each other where locks belong to the open file. Without locks all
    claims hold.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_RDWR)
        self._held: set[int] = set()
        self._lock = Lock()

    def take(self, slot: int) -> bool:
        """Hold `slot` if nobody does, at once; say whether it is held now and was not before."""
        with self._lock:
            if slot in self._held or not hold_byte(self._descriptor, slot, held=True):
                return False
            self._held.add(slot)
            return True

    def release(self, slot: int) -> None:
        """Give `slot` back, if it is held."""
        with self._lock:
            if slot in self._held:
                self._held.discard(slot)
                hold_byte(self._descriptor, slot, held=False)
