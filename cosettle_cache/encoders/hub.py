"""Published weights: from the hub client's cache, the hub or the publisher's address; fails within seconds.

A source of the registry comes in, the path of a file goes out. `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and
the proxy variables are respected.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import CheckpointError
from cosettle_cache.core.files import output_errors, sha256_file, write_durably
from cosettle_cache.core.settings import cache_folder
from cosettle_cache.encoders.registry import Source

#: Seconds to wait for the first answer of a server; the hub client alone would retry for half a minute.
PROBE_TIMEOUT_S = 4.0
#: Seconds without a byte after which a download is given up.
STALL_TIMEOUT_S = 60.0


def fetch(name: str, source: Source) -> Path:
    """Return the local file of a published encoder, downloading it where it is not cached yet."""
    if source.hub_id:
        return _from_hub(name, source)
    if not source.url:
        raise _unreachable(name, source, "no public address is known for it")
    path = _from_url(name, source)
    if source.sha256 and sha256_file(path) != source.sha256:
        raise CheckpointError(
            f"{path} is not the published file",
            wanted=f"sha256 {source.sha256}",
            found=f"sha256 {sha256_file(path)}",
            hint=f"remove it and try again, or download {source.url} by hand",
        )
    return path


def _from_hub(name: str, source: Source) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(source.hub_id, source.file)
    if isinstance(cached, str):
        return Path(cached)
    _check_online(name, source, constants.ENDPOINT)
    try:
        return Path(huggingface_hub.hf_hub_download(source.hub_id, source.file))
    except Exception as error:
        # The client's own, its transport's and the system's errors all mean that the file is not here.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _unreachable(name, source, reason) from error


def _from_url(name: str, source: Source) -> Path:
    path = cache_folder() / "weights" / name / source.file
    if path.is_file():
        return path
    _check_online(name, source, source.url)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(source.url, timeout=STALL_TIMEOUT_S) as response:  # noqa: S310
            write_durably(path, _body(response))
    except (OSError, EOFError) as error:
        raise _unreachable(name, source, str(error)) from error
    return path


def _body(response: Any) -> Iterator[bytes]:
    """Yield the body of a response; a connection that ends early is an error, not a short file."""
    expected, received = response.headers.get("Content-Length"), 0
    while chunk := response.read(1 << 20):
        received += len(chunk)
        yield chunk
    if expected is not None and received != int(expected):
        raise EOFError(f"the connection ended after {received:,} of {int(expected):,} bytes")


def _check_online(name: str, source: Source, address: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(name, source, "HF_HUB_OFFLINE is set and the file is not in the cache")
    request: Any = urllib.request.Request(address, method="HEAD")  # noqa: S310  (addresses of our table)
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        pass  # an answer, if not a friendly one: the server is there
    except (OSError, ValueError) as error:
        raise _unreachable(name, source, f"{address} cannot be reached ({error})") from error


def _unreachable(name: str, source: Source, reason: str) -> CheckpointError:
    where = f"download {_address(source)} by hand, then " if source.hub_id or source.url else ""
    return CheckpointError(
        f"the published weights of {name} cannot be fetched: {reason}",
        wanted=str(source),
        hint=f"{where}--weights FILE | --weights random",
    )


def _address(source: Source) -> str:
    if not source.hub_id:
        return source.url
    import huggingface_hub

    return huggingface_hub.hf_hub_url(source.hub_id, source.file)
