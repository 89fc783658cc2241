"""Object stores (S3, Google Cloud, Azure, HTTP-compatible ones) as a storage, through obstore.

A put is atomic, so nothing needs a temporary name. Credentials, endpoints and retries come from the usual
environment variables of each service. An object store cannot be used across a fork: processes are spawned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import from_url

from cosettle_cache.errors import InputError, OutputError, UsageError
from cosettle_cache.files import Buffer
from cosettle_cache.store.storage import RangeFile

#: Requests in flight; a request takes tens of milliseconds and moves a few tens of MB/s.
_PARALLEL_REQUESTS = 16


class ObjectStorage:
    """The objects below one URL; pickling keeps the URL, never the connection."""

    local = None
    n_readers = _PARALLEL_REQUESTS

    def __init__(self, url: str) -> None:
        self.path = url.rstrip("/")
        self._process = os.getpid()

    def __reduce__(self) -> tuple[object, ...]:
        return (ObjectStorage, (self.path,))

    def read(self, name: str) -> bytes:
        """Return a whole object."""
        with _input_errors(self.path, name):
            return bytes(obstore.get(self._client, name).bytes())

    def open(self, name: str) -> RangeFile:
        """Ask for the object's size; every read is one request."""
        return ObjectFile(self.size(name), self._reader(name))

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        with _input_errors(self.path, name):
            return int(obstore.head(self._client, name)["size"])

    def tag(self, name: str) -> str:
        """Return what changes with the object's content: its entity tag, and its size."""
        with _input_errors(self.path, name):
            head = obstore.head(self._client, name)
        return f"{head['e_tag']}-{head['size']}"

    def exists(self, name: str) -> bool:
        """Say whether there is an object of that name."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly below `folder`; none where there are none."""
        with _input_errors(self.path, folder):
            listed = obstore.list_with_delimiter(self._client, folder)
        return [str(item["path"]).rpartition("/")[2] for item in listed["objects"]]

    def walk(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of every object below the URL."""
        with _input_errors(self.path, ""):
            for batch in obstore.list(self._client):
                yield from ((str(item["path"]), int(item["size"])) for item in batch)

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Put one object, whole or not at all."""
        with _output_errors(self.path, name):
            obstore.put(self._client, name, b"".join(pieces))

    def create(self, name: str, data: bytes) -> bool:
        """Put an object unless there is one of that name; say whether it was put."""
        with _output_errors(self.path, name):
            try:
                obstore.put(self._client, name, data, mode="create")
            except exceptions.AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        with _output_errors(self.path, name):
            try:
                obstore.delete(self._client, name)
            except FileNotFoundError:
                return

    def zarr_store(self) -> Any:
        """Return a Zarr store over the same objects."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._client, read_only=True)

    def _reader(self, name: str) -> Callable[[int, int], Buffer]:
        def read(start: int, length: int) -> Buffer:
            with _input_errors(self.path, name):
                return memoryview(obstore.get_range(self._client, name, start=start, length=length))

        return read

    @property
    def _client(self) -> Any:
        if os.getpid() != self._process:
            raise UsageError(
                f"{self.path} was opened before this process was forked",
                wanted="processes that are spawned",
                hint="multiprocessing.get_context('spawn'), or open the store in the new process",
            )
        return self._connection

    @cached_property
    def _connection(self) -> Any:
        try:
            return from_url(self.path)
        except (exceptions.BaseError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a URL that can hold a store",
                wanted="s3://, gs:// or az:// and a path",
                found=_first_line(error),
            ) from error


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """An object of known size; nothing of it is kept, so every read is a request."""

    size: int
    fetch: Callable[[int, int], Buffer]

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on with one request."""
        wanted = min(sum(map(len, buffers)), self.size - offset)
        data = memoryview(self.fetch(offset, wanted)) if wanted > 0 else memoryview(b"")
        rest = data
        for buffer in buffers:
            buffer[: len(rest)] = rest[: len(buffer)]
            rest = rest[len(buffer) :]
        return len(data)

    def read_cached(self, buffers: Sequence[memoryview], offset: int) -> bool:
        """Nothing is at hand without a request."""
        return False


@contextmanager
def _input_errors(url: str, name: str) -> Iterator[None]:
    """Turn refusals of the service into an `InputError`; an absent object stays `FileNotFoundError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (exceptions.BaseError, PermissionError, OSError) as error:
        raise InputError(
            f"{url}/{name} cannot be read", found=_first_line(error), hint=_credentials_hint()
        ) from error


@contextmanager
def _output_errors(url: str, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        message = f"{url} cannot be written: there is no such bucket"
        raise OutputError(message, hint="create it first") from error
    except (exceptions.BaseError, PermissionError, OSError) as error:
        raise OutputError(
            f"{url}/{name} cannot be written", found=_first_line(error), hint=_credentials_hint()
        ) from error


def _credentials_hint() -> str:
    return "check the environment variables (S3: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...)"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
