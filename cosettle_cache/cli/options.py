"""Options that several commands share, so that a word means the same thing everywhere."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated, Any

import typer

from cosettle_cache.config import DATA_ROOT_VARIABLE
from cosettle_cache.console import Talk

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
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]


def pick_device(device: str | None) -> str:
    """Return the device asked for, or the best one at hand."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def interruptible(talk: Talk, unit: str) -> Iterator[Event]:
    """Yield an event that the first Ctrl-C sets; the second one interrupts at once."""
    stop = Event()

    def handle(number: int, frame: FrameType | None) -> Any:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        talk.note(f"finishing the {unit} in hand; Ctrl-C again stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
