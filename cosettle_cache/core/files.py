"""Durable files: written under a temporary name, flushed, renamed, so a name never holds half a file.

Everything that must survive a killed process or a lost power supply is written through here. So are the
checks of what is not ours: `own_folder` and `own_file` of places to write to, `inside` of names that become
paths, and `read_file` and `read_json` of files that anybody may have written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from cosettle_cache.core.errors import InputError, OutputError, UsageError
from cosettle_cache.core.system import advise, lock_alone, sync_data

Buffer = bytes | bytearray | memoryview

#: Bytes that one call writes, and buffers that it may be given (Linux takes 1024).
_GROUP_BYTES, _GROUP_BUFFERS = 8 * 2**20, 512

#: In every folder of results: which command they are of, and who wrote last.
MARK = ".cosettle-cache.json"

#: Results without a mark, of version 0.1, by command: patterns of files that only such folders hold.
_UNMARKED = {
    "propagate": "progress/run.json",
    "track": "tracks.parquet",
    "train": "checkpoint.pt",
    "projection fit": "spectrum.parquet",
    "analyze": "analysis.json",
    "probe": "answers.parquet",
    "export frames": "export.json",
    "cache": "*.shard",
}

#: Most bytes of a name between two slashes, so that a suffix fits as well (file systems take 255).
MOST_NAME_BYTES = 200

#: Most bytes of a JSON or TOML document that is read.
MOST_DOCUMENT_BYTES = 64 * 2**20

#: How a file on the Hugging Face hub is named: `hf:OWNER/NAME/FILE`.
HUB_PREFIX = "hf:"

#: What no name holds and no terminal is shown: control characters, line ends, marks that turn the direction
#: of writing, halves of surrogate pairs (Python's stand-ins for bytes that are no UTF-8).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, but: str = "") -> str:
    """Return `text` with escapes, as Python writes them, for `UNPRINTABLE` characters other than `but`."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


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


def check_local(path: Path) -> None:
    """Raise `UsageError` for a URL or a name on the hub where a path on this machine is wanted."""
    # A path has one slash where the URL has two.
    is_address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)", str(path))
    if is_address or str(path).startswith(HUB_PREFIX):
        what = "a URL" if is_address else "a name on the hub"
        raise UsageError(f"{path} is {what}", wanted="a path on this machine")


@contextmanager
def own_folder(folder: Path, command: str, *, shared: bool = False) -> Iterator[Path]:
    """Hold `folder` for a run of `command`: made if need be, marked as its results, locked until the end.

    Nothing that is not ours may be overwritten or removed. So this raises `UsageError` for a folder that
    holds anything but results of `command`, and for one that another run holds; `shared` runs hold it
    together.
    """
    check_local(folder)
    mark = make_folder(folder) / MARK
    _check_owner(folder, command)
    with output_errors(mark):
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if lock_alone(descriptor) is False and not shared:
            raise _held(folder)
        _check_owner(folder, command)  # a rival may have been faster
        with output_errors(mark):
            # Written in place, because a renamed file would have no lock.
            said: dict[str, Any] = {"command": command}
            if not shared:
                said |= {"host": socket.gethostname(), "pid": os.getpid()}
            n_bytes = os.pwrite(descriptor, (json.dumps(said) + "\n").encode(), 0)
            os.ftruncate(descriptor, n_bytes)
        yield folder
    finally:
        os.close(descriptor)


def own_file(
    path: Path, kind: str, is_ours: Callable[[Path], bool], inputs: Iterable[Path | None] = ()
) -> None:
    """Raise `UsageError` unless a command may write the file `path`, which it then replaces whole.

    It may not where it reads it (`inputs`), where a folder or a file of a run is, and where a file is that is
    not of the `kind` that the command writes: `is_ours` returns False for it or raises `InputError`.
    """
    check_local(path)
    real = os.path.realpath(path)
    if any(item is not None and os.path.realpath(item) == real for item in inputs):
        raise UsageError(f"{path} is both read and written", wanted="another name for the result")
    with output_errors(path):
        if path.is_dir():
            raise UsageError(f"{path} is a folder", wanted="a file")
        if not os.path.lexists(path):
            return
        try:
            if path.is_file() and not (path.parent / MARK).exists() and is_ours(path):
                return
        except InputError:
            pass
    raise UsageError(
        f"{path} holds something else, and is not overwritten",
        wanted=f"a new file, or {kind} outside the folder of a run",
        hint="choose another name, or remove it first",
    )


def first_bytes(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file, by which some kinds are known."""
    with path.open("rb") as file:
        return file.read(n_bytes)


def _check_owner(folder: Path, command: str) -> None:
    mark = folder / MARK
    with output_errors(folder):
        names = set(os.listdir(folder))  # noqa: PTH208 - Path.iterdir lists them all as well
    if MARK in names and (not mark.is_file() or mark.stat().st_size):
        document = read_json(mark) if mark.is_file() else None
        owner = document.get("command") if isinstance(document, dict) else None
        holds = f"results of {owner}" if isinstance(owner, str) else "a mark that is not ours"
    elif names <= {MARK} or (command in _UNMARKED and next(folder.glob(_UNMARKED[command]), None)):
        return
    else:
        owner, holds = None, f"{len(names)} files and folders, {min(names - {MARK})} among them"
    if owner != command:
        raise UsageError(
            f"{folder} holds something else, and nothing in it is overwritten",
            wanted=f"a new or empty folder, or results of {command}",
            found=holds,
            hint="choose another folder",
        )


def _held(folder: Path) -> UsageError:
    try:
        holder = read_json(folder / MARK)
        found = f"process {holder['pid']} on {holder['host']}"
    except (InputError, KeyError, TypeError):
        found = None  # it is just beginning
    hint = "wait until it has ended, or choose another folder"
    return UsageError(f"another run writes to {folder}", found=found, hint=hint)


def inside(folder: Path, name: str) -> Path:
    """Return the path in `folder` of a name from a file or an id; raise `InputError` unless it is plain.

    Plain is relative, without `.`, `..`, `//` or a slash at its end, so that two names never are one file;
    without control characters; and of at most `MOST_NAME_BYTES` bytes a part.
    """
    reason = name_fault(name)
    if reason:
        raise InputError(f"{name[:300]!r} cannot be a file's name: {reason}", wanted="a name such as cat/01")
    return folder / name


def name_fault(name: str) -> str | None:
    """Return what is wrong with a name that is to become a path (see `inside`); None where nothing is."""
    if UNPRINTABLE.search(name):
        return "it holds control characters, or bytes that are no UTF-8"
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        return "it is empty, absolute, or has parts that are empty, . or .."
    if any(len(part.encode()) > MOST_NAME_BYTES for part in parts):
        return f"a part of it has more than {MOST_NAME_BYTES} bytes"
    return None


def read_file(path: Path, most_bytes: int = MOST_DOCUMENT_BYTES) -> bytes:
    """Return the bytes of a regular file that is none of ours; raise `InputError` for anything else.

    A pipe or a device is not waited for.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError
            if status.st_size > most_bytes:
                found = f"{status.st_size} bytes"
                raise InputError(f"{path} is too large", wanted=f"{most_bytes} bytes at most", found=found)
            return file.read(most_bytes)
    except IsADirectoryError as error:
        raise InputError(f"{path} is not a file") from error
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"{path} cannot be read", found=getattr(error, "strerror", None) or error) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def our_files(pattern: str) -> dict[str, Path]:
    """Return the files that come with the package by name: `pipelines/*.toml`, `data_manifests/*.parquet`.

    An installed package holds these folders; in a checkout they lie beside it.
    """
    package = Path(__file__).parents[1]
    found = next(filter(None, (sorted(place.glob(pattern)) for place in (package, package.parent))), [])
    return {path.stem: path for path in found}


def find_file(path: Path, pattern: str) -> Path:
    """Return `path`, or where it is a bare name and no file, the file of that name of `our_files`.

    Raises `InputError`, with their names, for a bare name of nothing.
    """
    if str(path) != path.stem or path.is_file():
        return path
    ours = our_files(pattern)
    if path.name not in ours and not path.exists():
        raise InputError(f"{path} does not exist", wanted=f"a file, or {', '.join(ours)}")
    return ours.get(path.name, path)


def read_text(path: Path, most_bytes: int = MOST_DOCUMENT_BYTES) -> str:
    """Return the text of a file that is none of ours, which must be UTF-8; a byte order mark is left out."""
    try:
        return read_file(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", found=f"byte {error.start} is none") from error


def read_json(path: Path) -> Any:
    """Read one JSON document; raise `InputError` when it is missing or malformed."""
    return parse_json(read_file(path), str(path))


def parse_json(text: str | bytes, title: str) -> Any:
    """Return the JSON document in `text`; raise `InputError` that names `title` when it is malformed."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{title} is not JSON", found="brackets within brackets, too deep") from error
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise InputError(f"{title} is not JSON", found=str(error)) from error


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
            advise(file.fileno(), written, n_bytes, "DONTNEED")
            written += n_bytes
        sync_data(file.fileno())


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
