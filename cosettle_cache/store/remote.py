"""Object stores (S3 and what speaks it, Google Cloud, Azure) as a storage, through obstore.

A put is atomic, so nothing needs a temporary name. Credentials and endpoints come from the usual environment
variables of each service. An object store cannot be used across a fork: processes are spawned.

Repositories of the Hugging Face hub (`hf://`) are read the same way, at the commit that they had when they
were opened: files by HTTP, listings by the hub's client.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store, from_url

from cosettle_cache.core.errors import CosettleError, OutputError, RemoteError, UsageError, first_line
from cosettle_cache.core.files import HUB_PREFIX, Buffer, check_local, is_url, temporary_name
from cosettle_cache.core.hub import HubFolder, find_folder
from cosettle_cache.store._local import LocalFile, LocalStorage
from cosettle_cache.store.format import INDEX_GROUP, ROOT_METADATA


def _retries(n: int, *, within_s: int, pause_s: int) -> dict[str, Any]:
    pauses = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=pause_s), "base": 2}
    return {"max_retries": n, "retry_timeout": timedelta(seconds=within_s), "backoff": pauses}


#: Until a store has answered once, its address or network may be wrong: say so within seconds.
_HASTY = _retries(5, within_s=10, pause_s=3)

#: Afterwards a failure is an outage or a store that is too busy, and is waited out for about two minutes.
_PATIENT = _retries(60, within_s=120, pause_s=5)

_SERVICES = (S3Store, GCSStore, AzureStore)
_REFUSALS = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
_WANTED_URL = "a folder, or a URL such as s3://bucket/store.zarr, gs://... or az://..."
_CREDENTIALS_HINT = "check the service's environment variables (S3: AWS_REGION, AWS_ACCESS_KEY_ID, ...)"
_HUB = "hf://"
_HUB_HINT = "check HF_TOKEN and HF_ENDPOINT"
_ENDPOINT_HINT = "check the network, and the address if it is your own (S3: AWS_ENDPOINT_URL)"


class StaleObjectError(OSError):
    """An object is not in the state that was asked for."""


class ObjectStorage:
    """The objects below one URL; absent ones raise `FileNotFoundError`. See `LocalStorage` for the numbers.

    Pickling keeps the URL, never the connection.
    """

    local = None
    #: Requests in flight; a request takes tens of milliseconds and moves a few tens of MB/s.
    n_readers = 16
    #: Enough that a request is mostly transfer, few enough to spread.
    stretch_bytes = 4 * 2**20
    room = 0

    #: The process whose threads carry the requests: a forked child has none of them and would wait for ever.
    _process: ClassVar[int | None] = None

    def __init__(self, url: str) -> None:
        self._hub = find_folder(url) if url.startswith(_HUB) else None
        self.path = self._hub.url if self._hub else url.rstrip("/")
        self._answered = False
        self._clients: dict[bool, Any] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return (ObjectStorage, (self.path,))

    def read(self, name: str) -> bytes:
        """Return a whole object."""
        with self._asking(name):
            return bytes(obstore.get(self._client, name).bytes())

    def read_range(self, name: str, span: Any, tag: str | None = None) -> memoryview:
        """Return bytes of an object, fewer or none where it ends; with `tag` only of the state it names.

        `span` is (start, stop), or {"suffix": length} where the service can do that. Raises
        `StaleObjectError` when the object is in another state.
        """
        # Of a commit on the hub there is one state only, and its tags are those of whoever keeps the bytes.
        options: Any = {"range": span} | ({"if_match": tag} if tag and not self._hub else {})
        with self._asking(name):
            try:
                found = obstore.get(self._client, name, options=options)
                data = memoryview(found.bytes())
            except (exceptions.NotSupportedError, exceptions.GenericError) as error:
                line = _line(error)
                is_whole, is_unable = "non-partial" in line, isinstance(error, exceptions.NotSupportedError)
                if not (is_unable or is_whole or " 416 " in line):
                    raise
                if is_whole and self.state(name)[0]:
                    raise self._unlike(name, "the whole object, where a part was asked for") from error
                return memoryview(b"")
        if len(data) != found.range[1] - found.range[0]:
            raise self._unlike(name, f"{len(data)} bytes of {found.range[0]} to {found.range[1]}")
        return data

    def _unlike(self, name: str, what: str) -> RemoteError:
        hint = "check the server, and any proxy before it"
        return RemoteError(f"{self.path}/{name} cannot be read: the answer is {what}", hint=hint)

    def open(self, name: str) -> ObjectFile:
        """Return an object, nothing of it asked for yet."""
        return ObjectFile(self, name)

    def state(self, name: str) -> tuple[int, str]:
        """Return the bytes of an object, and the tag that changes with its content."""
        with self._asking(name):
            head = obstore.head(self._client, name)
            return int(head["size"]), str(head["e_tag"] or (self._hub and self._hub.commit))

    def exists(self, name: str) -> bool:
        """Say whether there is an object of that name."""
        try:
            self.state(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly below `folder`; none where there are none."""
        with self._asking(folder):
            if self._hub:
                return [name.rpartition("/")[2] for name, _ in self._hub.files(folder)]
            listed = obstore.list_with_delimiter(self._client, folder)
            return [str(item["path"]).rpartition("/")[2] for item in listed["objects"]]

    def walk(self) -> Iterator[tuple[str, int]]:
        """Yield name and bytes of every object below the URL."""
        with self._asking(""):
            if self._hub:
                yield from self._hub.files(below=True)
                return
            for batch in obstore.list(self._client):
                yield from ((str(item["path"]), int(item["size"])) for item in batch)

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Put one object, whole or not at all; raise `OutputError` when that is impossible."""
        with self._asking(name, to_write=True):
            obstore.put(self._client, name, b"".join(pieces))

    def create(self, name: str, data: bytes) -> None:
        """Put an object unless there is one of that name, where the service can do that."""
        with self._asking(name, to_write=True):
            try:
                obstore.put(self._client, name, data, mode="create")
            except exceptions.AlreadyExistsError:
                return
            except exceptions.NotSupportedError:
                obstore.put(self._client, name, data)

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._asking(name, to_write=True), suppress(FileNotFoundError):
            obstore.delete(self._client, name)

    def set_aside(self, name: str) -> None:
        """Give an object a name in the index that no reader looks at; the next writer removes it."""
        with self._asking(name, to_write=True):
            aside = temporary_name(Path(name.replace("/", "-"))).name
            obstore.rename(self._client, name, f"{INDEX_GROUP}/{aside}")

    def forget(self, name: str) -> None:
        """Drop what is kept of an object whose bytes turned out wrong."""

    @contextmanager
    def _asking(self, name: str, *, to_write: bool = False) -> Iterator[None]:
        """Turn what the service says into our errors; an absent object to read stays `FileNotFoundError`."""
        url = f"{self.path}/{name}".rstrip("/")
        if to_write:
            check_writable(self.path)
        try:
            yield
        except exceptions.PreconditionError as error:
            raise StaleObjectError(f"{url} has changed") from error
        except (exceptions.BaseError, OSError) as error:
            if to_write:
                raise self._error(OutputError, f"{url} cannot be written", error) from error
            if isinstance(error, FileNotFoundError):
                self._answered = True
                raise
            raise self._error(RemoteError, f"{url} cannot be read", error) from error
        self._answered = True

    def _error(self, kind: type[CosettleError], what: str, error: BaseException) -> CosettleError:
        line = _line(error)
        if " 404 " in line:
            return kind(f"{what}: there is no such bucket", hint="create it first, or mend the URL")
        if isinstance(error, _REFUSALS):
            return kind(f"{what}: access is refused", found=line, hint=self._hint or _CREDENTIALS_HINT)
        if "HTTP error" in line:
            reason = "the object store does not answer" + (" any more" if self._answered else "")
            return kind(f"{what}: {reason}", found=line, hint=self._hint or _ENDPOINT_HINT)
        return kind(what, found=line, hint=self._hint or _CREDENTIALS_HINT)

    @property
    def _hint(self) -> str | None:
        return _HUB_HINT if self._hub else None

    @property
    def _client(self) -> Any:
        if ObjectStorage._process is None:
            ObjectStorage._process = os.getpid()
        if os.getpid() != ObjectStorage._process:
            raise UsageError(
                f"{self.path} cannot be read or written in this process: it was forked from one that uses "
                "object stores",
                wanted="processes that are spawned",
                hint="multiprocessing.get_context('spawn'); a DataLoader takes it as multiprocessing_context",
            )
        answered = self._answered
        if answered not in self._clients:
            retries = _PATIENT if answered else _HASTY
            self._clients[answered] = (
                _connect_hub(self._hub, retries) if self._hub else _connect(self.path, retries)
            )
        return self._clients[answered]


def _connect(url: str, retries: dict[str, Any]) -> Any:
    """Return the client of a URL; whatever stands after the scheme is taken as it is, spaces and all."""
    scheme, _, rest = url.partition("://")
    literal = url if scheme.startswith("http") else f"{scheme}://{quote(rest, safe='/@:')}"
    try:
        client = from_url(literal, retry_config=retries)  # type: ignore[call-overload]
    except (exceptions.BaseError, ValueError) as error:
        raise UsageError(f"{url} cannot hold a store", wanted=_WANTED_URL, found=_line(error)) from error
    if not isinstance(client, _SERVICES):
        found = f"{scheme}://, which is no object store that can list what it holds"
        raise UsageError(f"{url} cannot hold a store", wanted=_WANTED_URL, found=found)
    return client


def _connect_hub(folder: HubFolder, retries: dict[str, Any]) -> Any:
    """Return the client of a folder on the hub; the token goes to the hub only, not where it redirects to."""
    options: Any = {"default_headers": folder.headers, "allow_http": True}
    return HTTPStore.from_url(folder.address, client_options=options, retry_config=retries)  # type: ignore[arg-type]


def _line(error: BaseException) -> str:
    """Return the first line of a message of obstore, without the service's XML."""
    return first_line(error).partition(": <?xml")[0].removeprefix("Generic ")[:240]


class ObjectFile:
    """An object read at any offset, by any number of threads; every call is a request."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage, self._name = storage, name

    def size(self) -> int:
        """Return the bytes of the object."""
        return self._storage.state(self._name)[0]

    def read_tail(self, length: int) -> bytes:
        """Return the last `length` bytes, or all where there are fewer."""
        if data := self._storage.read_range(self._name, {"suffix": length}):
            return bytes(data)
        # Azure has no ranges from the end, and an empty object has no range at all.
        size = self.size()
        return bytes(self._storage.read_range(self._name, (max(0, size - length), size))) if size else b""

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` one after the other from `offset` on; return the bytes read, fewer at the end."""
        data = self._storage.read_range(self._name, (offset, offset + sum(map(len, buffers))))
        rest = data
        for buffer in buffers:
            n_bytes = min(len(buffer), len(rest))
            buffer[:n_bytes] = rest[:n_bytes]
            rest = rest[n_bytes:]
        return len(data)

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Do nothing: what is not asked for is not kept."""


Storage = LocalStorage | ObjectStorage
RangeFile = LocalFile | ObjectFile


def open_storage(path: str | Path) -> Storage:
    """Return the place called `path`, a local path or a URL such as `s3://bucket/store.zarr`."""
    if is_url(path):
        return ObjectStorage(str(path))
    check_local(Path(path))
    return LocalStorage(Path(path))


def check_writable(path: str | Path) -> None:
    """Raise `UsageError` for a place that can only be read."""
    if str(path).startswith(HUB_PREFIX):
        raise UsageError(
            f"{path} can only be read",
            wanted="a folder, or the URL of an object store",
            hint="write it to a folder, then: hf upload-large-folder OWNER/NAME FOLDER --repo-type dataset",
        )


def is_store(storage: Storage) -> bool:
    """Say whether the place holds a Zarr v3 node of any kind."""
    return storage.exists(ROOT_METADATA)
