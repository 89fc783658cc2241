"""A bounded local copy of a remote store's shards: each is fetched whole once, then read from disk.

Several processes and several stores may share the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from cosettle_cache.core.errors import OutputError
from cosettle_cache.core.files import output_errors, own_folder, write_durably
from cosettle_cache.core.parallel import map_ahead
from cosettle_cache.core.system import lock
from cosettle_cache.store._local import LocalFile, is_temporary
from cosettle_cache.store.remote import ObjectFile, ObjectStorage

#: Bytes of shards kept when the caller does not say.
DEFAULT_CACHE_BYTES = 20 * 10**9

_SUFFIX = ".shard"

#: The names of copies, and of unfinished ones; whatever else is in the folder is not ours.
_OURS = re.compile(r"[0-9a-f]{40}\.shard|\.[0-9a-f]{40}\.shard\.[0-9a-f]{32}\.tmp")

#: How a shard is fetched: so many bytes per request, so many requests in flight.
_PIECE_BYTES = 4 * 2**20
_PIECES_AHEAD = 4

#: A half-written copy that nothing was added to for so long belongs to a process that died.
_ABANDONED_S = 900


class CachedStorage(ObjectStorage):
    """An object storage for reading, its shards through at most `limit` bytes of files in `folder`.

    A file's name says which object in which state it copies, so a shard written again is fetched again.
    The shards unused for longest are removed first; one shard always fits. Other files in the folder stay and
    do not count. Files are not kept open: what one process removes, another fetches again.
    """

    #: Each of them may be fetching a shard.
    n_readers = 4
    stretch_bytes = 0

    def __init__(self, url: str, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__(url)
        with own_folder(folder.absolute(), "cache", shared=True) as self.folder:
            pass  # marked as ours from here on
        self.limit = self.room = limit

    def __reduce__(self) -> tuple[object, ...]:
        return (CachedStorage, (self.path, self.folder, self.limit))

    def open(self, name: str) -> ObjectFile:
        """Return the local copy of a shard, fetched first if it is not here; one request if it is."""
        file = _CachedFile(self, name)
        file.open()
        return file

    def forget(self, name: str) -> None:
        """Remove the copy of a shard, whose bytes turned out wrong."""
        with suppress(FileNotFoundError):
            _CachedFile(self, name).path.unlink()

    def make_room(self, n_bytes: int) -> None:
        """Remove the copies unused for longest until `n_bytes` fit; others may do so at the same time."""
        files = []
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) + n_bytes - self.limit
        for used, size, path in sorted(files):
            if excess <= 0:
                return
            if not is_temporary(path) or used < time.time() - _ABANDONED_S:
                path.unlink(missing_ok=True)
                excess -= size


class _CachedFile(ObjectFile):
    """The local copy `path` of a shard in its present state, opened for each read: it may go at any time."""

    _storage: CachedStorage

    def __init__(self, storage: CachedStorage, name: str) -> None:
        super().__init__(storage, name)
        self._size, self._tag = storage.state(name)
        state = f"{storage.path}\0{name}\0{self._size}\0{self._tag}"
        self.path = storage.folder / (hashlib.sha256(state.encode()).hexdigest()[:40] + _SUFFIX)

    def size(self) -> int:
        """Return the bytes of the shard."""
        return self._size

    def read_tail(self, length: int) -> bytes:
        """Return the last `length` bytes, or all where there are fewer."""
        return self.open().read_tail(length)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` one after the other from `offset` on; return the bytes read, fewer at the end."""
        return self.open().read(buffers, offset)

    def open(self) -> LocalFile:
        """Open the copy, fetched if it is not here (any more)."""
        while True:
            try:
                os.utime(self.path)
                return LocalFile(self.path)
            except FileNotFoundError:
                self._fetch()  # and look again: another process may need the room at once

    def _fetch(self) -> None:
        lock_path = self.path.parent / f".{self.path.name[:2]}.lock"
        try:
            # Other threads and processes wait for the lock; it dies with its holder.
            with output_errors(self.path), lock_path.open("w") as file:
                # On a file system without locks the copy is fetched twice, nothing worse.
                with suppress(OSError):
                    lock(file.fileno(), shared=False)
                if not self.path.exists():
                    self._storage.make_room(self._size)
                    starts = range(0, self._size, _PIECE_BYTES)
                    with closing(map_ahead(self._piece, starts, _PIECES_AHEAD)) as pieces:
                        write_durably(self.path, pieces)
        except OutputError as error:
            hint = "choose another folder with --cache-dir, or a smaller --cache-size"
            raise OutputError(f"the shard cache cannot be used: {error.message}", hint=hint) from error

    def _piece(self, start: int) -> memoryview:
        return self._storage.read_range(self._name, (start, start + _PIECE_BYTES), self._tag)
