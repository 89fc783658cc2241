"""A bounded local copy of a remote store's shards: each is fetched whole once, then read from disk.

In come an object storage and a folder; out goes a storage whose shards are local files. Several processes and
several stores may share the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import OutputError
from cosettle_cache.core.files import make_folder, output_errors, write_durably
from cosettle_cache.store._local import LocalFile, RangeFile, is_temporary
from cosettle_cache.store.remote import ObjectStorage

#: Bytes of shards kept when the caller does not say.
DEFAULT_CACHE_BYTES = 20 * 10**9

_SUFFIX = ".shard"

#: How a shard is fetched: so many bytes per request, so many requests in flight.
_PIECE_BYTES = 4 * 2**20
_PIECES_AHEAD = 4

#: Readers, each of which may be fetching a shard.
_N_READERS = 4

#: A half-written copy that nothing was added to for so long belongs to a process that died.
_ABANDONED_S = 900


@dataclass(frozen=True, slots=True)
class _Copy:
    """An object in one state: what a file in the folder is a copy of."""

    name: str
    size: int
    tag: str
    path: Path


class CachedStorage:
    """An object storage for reading, its shards through at most `limit` bytes of files in `folder`.

    A file's name says which object in which state it copies, so a shard written again is fetched again.
    The shards unused for longest are removed first; one shard always fits. Files are not kept open: what one
    process removes is gone from the disk, whoever reads it fetches it again.
    """

    local = None
    n_readers = _N_READERS
    stretch_bytes = 0

    def __init__(self, remote: ObjectStorage, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.remote = remote
        self.folder = make_folder(folder.absolute())
        self.limit = self.room = limit
        self.path = remote.path

    def read(self, name: str) -> bytes:
        """Return a whole file, from the object store."""
        return self.remote.read(name)

    def open(self, name: str) -> RangeFile:
        """Return the local copy of a shard, fetched first if it is not here; one request if it is."""
        copy = self._copy(name)
        self.open_copy(copy)
        return CachedFile(self, copy)

    def open_copy(self, copy: _Copy) -> LocalFile:
        """Open a copy, fetched if it is not here (any more)."""
        while True:
            try:
                os.utime(copy.path)
                return LocalFile(copy.path)
            except FileNotFoundError:
                self._fetch(copy)  # and look again: another process may need the room at once

    def forget(self, name: str) -> None:
        """Remove the copy of a shard, whose bytes turned out wrong."""
        with suppress(FileNotFoundError):
            self._copy(name).path.unlink()

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self.remote.size(name)

    def exists(self, name: str) -> bool:
        """Say whether there is a file of that name."""
        return self.remote.exists(name)

    def names(self, folder: str) -> list[str]:
        """Return the names directly in `folder`."""
        return self.remote.names(folder)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of every file of the store."""
        return self.remote.walk()

    def zarr_store(self) -> Any:
        """Return a Zarr store over the object store, its shards from the copies."""
        return self.remote.zarr_view(self)

    def _copy(self, name: str) -> _Copy:
        size, tag = self.remote.state(name)
        state = f"{self.path}\0{name}\0{size}\0{tag}"
        file = hashlib.sha256(state.encode()).hexdigest()[:40] + _SUFFIX
        return _Copy(name, size, tag, self.folder / file)

    def _fetch(self, copy: _Copy) -> None:
        with _errors(copy.path), _alone(copy.path):
            # Another thread or process may have fetched it while this one waited.
            if not copy.path.exists():
                self._make_room(copy.size)
                write_durably(copy.path, self._pieces(copy))

    def _pieces(self, copy: _Copy) -> Iterator[memoryview]:
        """Yield the object's bytes in order, the next pieces on their way."""
        pending: deque[Future[memoryview]] = deque()
        with ThreadPoolExecutor(_PIECES_AHEAD, "fetch") as pool:
            for start in range(0, copy.size, _PIECE_BYTES):
                pending.append(pool.submit(self.remote.read_range, copy.name, start, _PIECE_BYTES, copy.tag))
                if len(pending) > _PIECES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _make_room(self, n_bytes: int) -> None:
        """Remove the copies unused for longest until `n_bytes` fit; others may do so at the same time."""
        files = sorted(_files(self.folder))
        excess = sum(file.size for file in files) + n_bytes - self.limit
        for file in files:
            if excess <= 0:
                return
            if not is_temporary(file.path) or file.used < time.time() - _ABANDONED_S:
                file.path.unlink(missing_ok=True)
                excess -= file.size


class CachedFile:
    """The local copy of a shard, opened for each read, so that it may be removed at any moment."""

    def __init__(self, storage: CachedStorage, copy: _Copy) -> None:
        self._storage, self._copy = storage, copy

    def size(self) -> int:
        """Return the bytes of the shard."""
        return self._copy.size

    def read_tail(self, length: int) -> bytes:
        """Return the last bytes."""
        return self._file.read_tail(length)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on."""
        return self._file.read(buffers, offset)

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Leave everything to `read`, so that the copy is opened once."""

    @property
    def _file(self) -> LocalFile:
        return self._storage.open_copy(self._copy)


@dataclass(frozen=True, slots=True, order=True)
class _File:
    """A file of the folder: time of last use, bytes, path."""

    used: float
    size: int
    path: Path


def _files(folder: Path) -> Iterator[_File]:
    """Yield the copies in the folder, those in the making too."""
    for path in folder.iterdir():
        if path.suffix == _SUFFIX or is_temporary(path):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield _File(status.st_mtime, status.st_size, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other threads and processes from fetching the same copy; the lock dies with its holder."""
    with (path.parent / f".{path.name[:2]}.lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: the copy is fetched twice, nothing worse
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        with output_errors(path):
            yield
    except OutputError as error:
        hint = "choose another folder with --cache-dir, or a smaller --cache-size"
        raise OutputError(f"the shard cache cannot be used: {error.message}", hint=hint) from error
