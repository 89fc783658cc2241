"""`cosettle-cache doctor`: what this machine has for the work, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cosettle_cache import __version__
from cosettle_cache.cli.options import Json
from cosettle_cache.core.console import Talk, human_bytes
from cosettle_cache.core.errors import CosettleError, InputError, UncleanError
from cosettle_cache.core.files import output_errors
from cosettle_cache.core.parallel import share_of_cores
from cosettle_cache.core.settings import package_versions
from cosettle_cache.core.system import advise

#: Video decoders that common data sets need, and still formats beside PNG, by Pillow's names for them.
_VIDEOS = ("h264", "hevc", "mpeg4", "vp8", "vp9", "av1")
_STILLS = ("jpg", "webp", "avif", "libtiff")
#: Bytes of the file that measures the disk.
_TRIAL_BYTES = 256 * 2**20


def doctor(
    folder: Annotated[Path, typer.Option(help="Where the disk is measured, with 256 MiB.")] = Path(),
    as_json: Json = False,
) -> None:
    """Print versions, devices, decoders and disk rates, and what is wrong with them (exit code 4).

    Example: cosettle-cache doctor --folder /data
    """
    facts = {"cosettle-cache": __version__, "python": platform.python_version()}
    facts["system"] = platform.platform()
    facts["cores"] = f"{share_of_cores(1)} of {os.cpu_count()}"
    facts["memory"] = human_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    facts |= package_versions()
    wrong: list[CosettleError] = []
    for part in (_devices, _faiss, _decoders, lambda: _disk(folder)):
        try:
            for name, value in part():
                facts[name] = value
        except CosettleError as error:
            wrong.append(error)
    talk = Talk()
    if as_json:
        talk.json({"facts": facts, "wrong": [{"what": e.summary, "hint": e.hint} for e in wrong]})
    else:
        talk.table("this machine", ["what", "found"], [[name, value] for name, value in facts.items()])
    if wrong:
        details = [error.reason for error in wrong]
        raise UncleanError(f"{len(wrong)} things are wrong", details=details)


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "CUDA of torch", torch.version.cuda or "none"
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(n_devices):
        found = torch.cuda.get_device_properties(number)
        bf16 = "with" if found.major >= 8 else "without"
        words = f"{found.name}, {human_bytes(found.total_memory)}, {found.major}.{found.minor}, {bf16} bf16"
        yield f"cuda:{number}", words
    if not n_devices and Path("/dev/nvidiactl").exists():
        hint = "install the build of torch for CUDA" if torch.version.cuda is None else "update the driver"
        raise InputError("there is a GPU that torch does not see", hint=hint)


def _faiss() -> Iterator[tuple[str, str]]:
    from cosettle_cache.search.masked import describe_faiss

    yield from describe_faiss().items()


def _decoders() -> Iterator[tuple[str, str]]:
    import av
    from PIL import features

    has = {name: name in av.codecs_available or f"lib{name}" in av.codecs_available for name in _VIDEOS}
    has |= {name: bool(features.check(name)) for name in _STILLS}
    yield "decoders", ", ".join(name for name, there in has.items() if there)
    if missing := [name for name, there in has.items() if not there]:
        yield "without", ", ".join(missing)
    if not has["h264"] or not has["jpg"]:
        raise InputError("h264 or jpg cannot be decoded", hint="pip install --force-reinstall av pillow")


def _disk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the rates of one file: written to the disk, read from the page cache, read from the disk."""
    block = os.urandom(2**20)
    with output_errors(folder), tempfile.TemporaryFile(dir=folder) as file:

        def rate(work: Iterator[object]) -> str:
            began = time.perf_counter()
            for _ in work:
                pass
            return human_bytes(_TRIAL_BYTES / (time.perf_counter() - began)) + "/s"

        def write() -> Iterator[object]:
            for _ in range(_TRIAL_BYTES // len(block)):
                yield file.write(block)
            file.flush()
            os.fsync(file.fileno())

        def read() -> Iterator[object]:
            file.seek(0)
            while file.read(len(block)):
                yield None

        yield "disk, write", rate(write())
        yield "page cache, read", rate(read())
        advise(file.fileno(), 0, 0, "DONTNEED")
        yield "disk, read", rate(read())
