"""A bounded local copy of a remote store's shards: each is fetched whole once and read from disk after that.

In come an object storage and a folder; out goes a storage whose shards are local files. Several processes may
share the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosettle_cache.files import make_folder, output_errors, write_durably
from cosettle_cache.store.objects import ObjectStorage
from cosettle_cache.store.storage import LocalFile, RangeFile

#: Bytes of shards kept when the caller does not say.
DEFAULT_CACHE_BYTES = 20 * 2**30

_SUFFIX = ".shard"
_PIECE_BYTES = 8 * 2**20


class CachedStorage:
    """An object storage for reading, its shards through at most `limit` bytes of files in `folder`.

    A file's name says which object in which state it copies, so a shard written again is fetched again.
    The shards unused for longest are removed first; one shard always fits.
    """

    local = None

    def __init__(self, remote: ObjectStorage, folder: Path, limit: int = DEFAULT_CACHE_BYTES) -> None:
        self.remote = remote
        self.folder = make_folder(folder)
        self.limit = limit
        self.path = remote.path
        self.n_readers = remote.n_readers

    def read(self, name: str) -> bytes:
        """Return a whole file, from the object store."""
        return self.remote.read(name)

    def open(self, name: str) -> RangeFile:
        """Open the local copy of a shard, fetched first if it is not here."""
        path = self.folder / self._copy_name(name)
        try:
            os.utime(path)
            return LocalFile(path)
        except FileNotFoundError:
            return self._fetch(name, path)

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
        """Return a Zarr store over the object store."""
        return self.remote.zarr_store()

    def _copy_name(self, name: str) -> str:
        state = f"{self.path}\0{name}\0{self.remote.tag(name)}"
        return hashlib.sha256(state.encode()).hexdigest()[:40] + _SUFFIX

    def _fetch(self, name: str, path: Path) -> RangeFile:
        remote = self.remote.open(name)
        self._make_room(remote.size)
        write_durably(path, _pieces(remote))
        return LocalFile(path)

    def _make_room(self, n_bytes: int) -> None:
        """Remove the copies unused for longest until `n_bytes` fit; others may do so at the same time."""
        with output_errors(self.folder):
            copies = sorted(_copies(self.folder))
            excess = sum(size for _, size, _ in copies) + n_bytes - self.limit
            for _, size, path in copies:
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                excess -= size


def _copies(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield the time of last use, size and path of every copy."""
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield status.st_mtime, status.st_size, path


def _pieces(file: RangeFile) -> Iterator[bytes]:
    for start in range(0, file.size, _PIECE_BYTES):
        piece = bytearray(min(_PIECE_BYTES, file.size - start))
        file.read([memoryview(piece)], start)
        yield bytes(piece)
