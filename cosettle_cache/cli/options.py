"""Options that several commands share, so that a word means the same thing everywhere."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path, PurePosixPath
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import DATA_ROOT_VARIABLE

if TYPE_CHECKING:
    from cosettle_cache.core.handing import Run
    from cosettle_cache.store import FeatureStore

DataRoot = Annotated[
    Path | None,
    typer.Option(
        envvar=DATA_ROOT_VARIABLE, help="Folder that media paths are relative to.", show_envvar=True
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="Checkpoint file, or 'random'; default: the published weights.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: cuda where there is one.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Folder for copies of a remote store's shards; docs/remote.md.")
]
CacheSize = Annotated[str, typer.Option(metavar="SIZE", help="Most bytes of these copies.")]
FramesStore = Annotated[str, typer.Option(help="A frames store, local or at a URL.")]
FramesStoreOrNone = Annotated[
    str | None, typer.Option(help="A frames store, local or at a URL; default: made on the way.")
]
Projections = Annotated[list[Path] | None, typer.Option(help="Projection beside the raw tokens; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes here; 0: this one.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A dask scheduler whose workers do it, as tcp://host:8786.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]


class Drawn(StrEnum):
    """Which videos get pictures."""

    NONE = "none"
    FIRST = "first"
    ALL = "all"


DEFAULT_CACHE_SIZE = "20GB"

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as 500MB or 1.5T means; units count in thousands."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", wanted="a number and kB, MB, GB or TB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def open_features(features: str, cache_dir: Path | None, cache_size: str) -> FeatureStore:
    """Open the store that `--features` names, local or at a URL."""
    from cosettle_cache.store import open_store

    return open_store(features, cache_dir=cache_dir, cache_bytes=parse_bytes(cache_size))


def store_title(path: str) -> str:
    """Return what folders of results are called after a store, local or at a URL."""
    return PurePosixPath(path.rstrip("/")).stem


def pick_device(device: str | None) -> str:
    """Return the device asked for, or the best one at hand; raise `UsageError` for one that is not there."""
    import torch

    has_cuda = torch.cuda.is_available()
    if device is None:
        return "cuda" if has_cuda else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"there is no device {device!r}", wanted="cpu, cuda or cuda:NUMBER", found=device)
    if kind == "cuda" and (not has_cuda or int(number or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"{device} is not there", wanted="a CUDA device", found=f"{torch.cuda.device_count()} of them"
        )
    return device


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Return folders by name; those of one name by their parent's too."""
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.absolute().parts[-2:]) for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError("two folders have one name", wanted="different names", found=", ".join(names))
    return dict(zip(names, folders, strict=True))


@contextmanager
def hand_out(workers: int, scheduler: str | None, talk: Talk) -> Iterator[Run | None]:
    """Yield what hands units of work to workers; None where this process does all."""
    if not workers and scheduler is None:
        yield None
        return
    from cosettle_cache.core.cluster import connect

    with connect(workers=workers, scheduler=scheduler, note=talk.note) as cluster:
        yield cluster.run


@contextmanager
def interruptible(talk: Talk, unit: str) -> Iterator[Event]:
    """Yield an event that the first Ctrl-C sets; the second one interrupts at once."""
    stop = Event()

    def handle(number: int, frame: FrameType | None) -> Any:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        talk.warn(f"finishing the {unit} in hand; Ctrl-C again stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
