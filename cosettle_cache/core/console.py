"""What people see: progress on stderr, tables on stdout, known errors in their fixed shape.

On a terminal progress is a bar; elsewhere it is one plain line at the start, every 30 seconds and at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, Protocol, TextIO, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from cosettle_cache.core.errors import CosettleError, masked
from cosettle_cache.core.files import printable

PLAIN_INTERVAL_S = 30.0


class PatientStream:
    """A standard stream that the work survives: after the first error the rest is lost, and `lost` says so.

    A reader that has gone, a full disk and a descriptor that was closed before are such errors; what an old
    locale cannot write is spelled out.
    """

    def __init__(self, stream: TextIO | None, number: int) -> None:
        self.lost = stream is None
        self._number = number
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if isinstance(self._stream, TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or lose it."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what was written, or lose it."""
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.lost = True
            # Not the stream is replaced but what is behind it, so that Python can empty its buffers.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._number)
            os.close(nowhere)


def guard_streams() -> Callable[[], str | None]:
    """Make stdout and stderr survive their readers; return a function that says in the end what was lost.

    Descriptors 0 to 2 that are closed are opened on nothing, or a file of ours would get their numbers, and
    what a library prints with it.
    """
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    streams = {"stdout": PatientStream(sys.stdout, 1), "stderr": PatientStream(sys.stderr, 2)}
    sys.stdout, sys.stderr = streams.values()

    def lost() -> str | None:
        for stream in streams.values():
            stream.flush()
        return " and ".join(name for name, stream in streams.items() if stream.lost) or None

    return lost


@runtime_checkable
class Progress(Protocol):
    """What a room tells the outside while it works."""

    def start(self, total: int, unit: str) -> None:
        """Announce `total` units of work."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Report `n` more units and current figures by name."""

    def finish(self) -> None:
        """End the report."""


class SilentProgress:
    """Says nothing."""

    def start(self, total: int, unit: str) -> None:
        """Do nothing."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


SILENT: Progress = SilentProgress()


@contextmanager
def counting(progress: Progress, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Announce `total` units of work; yield `progress.advance`, and end the report whatever happens."""
    progress.start(total, unit)
    try:
        yield progress.advance
    finally:
        progress.finish()


class BarProgress:
    """A bar with rate, remaining time and the current figures, for terminals."""

    def __init__(self, label: str, console: Console) -> None:
        self._label = escape(shown(label))  # rich reads markup in it
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )

    def start(self, total: int, unit: str) -> None:
        """Show the bar."""
        self._unit = unit
        self._started = time.perf_counter()
        self._task = self._bar.add_task(self._label, total=total, rate="", figures="")
        self._bar.start()

    def advance(self, n: int = 1, **figures: float) -> None:
        """Move the bar."""
        seconds = time.perf_counter() - self._started
        done = self._bar.tasks[self._task].completed + n
        rate = f"{done / seconds:.1f} {self._unit}/s"
        self._bar.update(self._task, advance=n, rate=rate, figures=_figures(figures))

    def finish(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


class PlainProgress:
    """One line at the start, every 30 seconds and at the end, for logs."""

    def __init__(self, label: str, console: Console) -> None:
        self._label, self._console = label, console

    def start(self, total: int, unit: str) -> None:
        """Print the first line."""
        self._total, self._unit, self._done, self._figures = total, unit, 0, ""
        self._started = self._printed = time.perf_counter()
        self._line(f"{total} {unit} to do")

    def advance(self, n: int = 1, **figures: float) -> None:
        """Count, and print when 30 seconds have passed since the last line."""
        self._done += n
        self._figures = _figures(figures)
        if time.perf_counter() - self._printed >= PLAIN_INTERVAL_S:
            self._report()

    def finish(self) -> None:
        """Print the last line."""
        self._report()

    def _report(self) -> None:
        self._printed = time.perf_counter()
        rate = self._done / max(self._printed - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        figures = f", {self._figures}" if self._figures else ""
        self._line(f"{self._done}/{self._total} {self._unit}, {rate:.1f}/s, {left:.0f} s left{figures}")

    def _line(self, text: str) -> None:
        self._console.print(shown(f"{self._label}: {text}"), highlight=False, markup=False, soft_wrap=True)


class Talk:
    """The voice of one command: talk on stderr, results on stdout; `quiet` keeps warnings and errors only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._err = Console(stderr=True, emoji=False)  # `:cat:` is a name of SPair-71k

    def note(self, text: str) -> None:
        """Say one line on stderr."""
        if not self.quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """Say one line on stderr even when quiet."""
        self._say(f"warning: {text}", "yellow")

    def error(self, error: CosettleError) -> None:
        """Print a known error."""
        for line in error.lines():
            self._say(line, "red" if line.startswith("error") else None)

    def _say(self, text: str, style: str | None = None) -> None:
        self._err.print(shown(text), style=style, highlight=False, markup=False, soft_wrap=True)

    def progress(self, label: str) -> Progress:
        """Return the progress report that suits the output."""
        if self.quiet:
            return SILENT
        if self._err.is_terminal and not os.environ.get("CI"):
            return BarProgress(label, self._err)
        return PlainProgress(label, self._err)

    def result(self, text: str) -> None:
        """Print data on stdout, unwrapped."""
        sys.stdout.write(shown(text) + "\n")

    def json(self, document: Any) -> None:
        """Print one JSON document on stdout; what JSON does not know, such as a path, as text."""
        self.result(json.dumps(document, indent=2, default=str))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table on stdout; columns after the first are right-aligned."""
        table = Table(title=Text(shown(title), style="table.title"), title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(Text(shown(column)), justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(shown(cell)) for cell in row))  # plain: a name may look like markup
        console = Console()
        if not console.is_terminal:
            console.width = 200
        console.print(table)


def shown(text: str) -> str:
    """Return `text` as people may see it: no credentials, and what would steer a terminal spelled out."""
    return printable(masked(text), but="\n\t")


def human_bytes(n_bytes: int | float) -> str:
    """Return a byte count with a decimal unit, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def human_seconds(seconds: int | float) -> str:
    """Return a duration as seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _figures(figures: dict[str, float]) -> str:
    return " ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


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
