"""Durable files: written under a temporary name, flushed, renamed, so a name never holds half a file.

Everything that must survive a killed process or a lost power supply is written through here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from uuid import uuid4

from cosettle_cache.core.errors import InputError, OutputError, UsageError

Buffer = bytes | bytearray | memoryview

#: Bytes that one call writes, and buffers that it may be given (Linux takes 1024).
_GROUP_BYTES, _GROUP_BUFFERS = 8 * 2**20, 512

#: A document that is read whole is never longer: journals of a day's training have 30 MB.
MAX_DOCUMENT_BYTES = 512 * 2**20

_OUTPUT_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exhausted",
    errno.EFBIG: "the file would be larger than this process or file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.ENOENT: "the folder does not exist (any more)",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "there is a folder of that name",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EIO: "the device reports an input/output error",
}

_MAKE_ROOM = "free some space and run the same command again; finished slots are kept"
_OUTPUT_HINTS = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "raise the limit (ulimit -f), or choose another output folder",
    errno.ENOENT: "bring the folder back, or choose another one",
    errno.EIO: "check the device; what was finished before is kept",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn operating-system errors of writing `path` into an `OutputError` that names it."""
    try:
        yield
    except OSError as error:
        reason = _OUTPUT_REASONS.get(error.errno or 0)
        if reason is None:
            raise
        hint = _OUTPUT_HINTS.get(error.errno or 0, "choose another output folder or change its permissions")
        raise OutputError(f"{path} cannot be written: {reason}", hint=hint) from error


def make_folder(path: Path) -> Path:
    """Create `path` and its parents; raise `OutputError` when that is impossible."""
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def store_title(path: str) -> str:
    """Return what folders of results are called after a store, local or at a URL."""
    return PurePosixPath(path.rstrip("/")).stem


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders by name; those of one name by their parent's too."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.absolute().parts[-2:]) for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError("two folders have one name", wanted="different names", found=", ".join(names))
    return dict(zip(names, folders, strict=True))


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no reader looks at and that clean-up recognises."""
    if path.name in ("", ".."):
        raise IsADirectoryError(errno.EISDIR, "not a file's name", str(path))
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write under; at the end that file takes the place of `path`, after an error it is gone.

    Whoever writes flushes the file's content to the device; the renaming is flushed here.
    """
    with output_errors(path):
        temporary = temporary_name(path)
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_durably(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write `chunks` to `path` so that the name holds either the whole new file or what it held before."""
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        written = 0
        for group in _groups(chunks):
            n_bytes = sum(map(len, group))
            _write_all(file.fileno(), group)
            # On Linux this starts writing dirty pages and drops none of them, so that the device works while
            # the next chunks are made; there is no call for just that.
            os.posix_fadvise(file.fileno(), written, n_bytes, os.POSIX_FADV_DONTNEED)
            written += n_bytes
        os.fdatasync(file.fileno())


def overwrite_durably(path: Path, data: bytes) -> None:
    """Replace what the file at `path` holds and keep the file itself, with the locks on it.

    A death meanwhile leaves a mixture, so this is only for files that can be made again.
    """
    with output_errors(path), path.open("r+b", buffering=0) as file:
        _write_all(file.fileno(), [memoryview(data)])
        file.truncate()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder (the names in it) to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of the bytes of `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, wanted: str) -> int:
    """Return the size of a file that anybody may have put there, in bytes.

    Raises `InputError` for what is missing or no plain file: a pipe would be waited for.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} does not exist", wanted=wanted) from error
    except (OSError, ValueError) as error:  # `ValueError`: a NUL in the name
        raise InputError(f"{path} cannot be read", wanted=wanted, found=error) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a plain file", wanted=wanted)
    return found.st_size


def read_document(path: Path, wanted: str) -> bytes:
    """Return the bytes of a file that anybody may have put there, of `MAX_DOCUMENT_BYTES` at most.

    Raises `InputError` for what is missing, too long, unreadable or no plain file.
    """
    if (size := check_file(path, wanted)) > MAX_DOCUMENT_BYTES:
        limit = f"{MAX_DOCUMENT_BYTES} bytes at most"
        raise InputError(f"{path} is too long for {wanted}", wanted=limit, found=size)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read", wanted=wanted, found=error) from error


def unfilled(buffers: Sequence[memoryview], n_done: int) -> list[memoryview]:
    """Return what is left of `buffers` after the first `n_done` bytes."""
    rest = []
    for buffer in buffers:
        done = min(n_done, len(buffer))
        n_done -= done
        if done < len(buffer):
            rest.append(buffer[done:])
    return rest


def _groups(chunks: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    # What a single call writes lies in the page cache in larger pieces, and is a fifth faster to read there.
    group, n_bytes = list[memoryview](), 0
    for chunk in chunks:
        group.append(memoryview(chunk).cast("B"))
        n_bytes += len(group[-1])
        if n_bytes >= _GROUP_BYTES or len(group) == _GROUP_BUFFERS:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _write_all(descriptor: int, buffers: Sequence[memoryview]) -> None:
    while buffers:
        buffers = unfilled(buffers, os.writev(descriptor, buffers))


def is_url(path: str | Path) -> bool:
    """Say whether `path` is the URL of an object store."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)) is not None
