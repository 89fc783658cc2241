"""From a command's result or error to an exit code: the one place where known errors become words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import CosettleError, ExitCode

P = ParamSpec("P")


def exits(command: Callable[P, int | None]) -> Callable[P, None]:
    """Wrap a command so that its return value, a known error or an interrupt becomes the exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(_run(functools.partial(command, *args, **kwargs)))

    return wrapped


def _run(command: Callable[[], int | None]) -> int:
    try:
        return int(command() or ExitCode.DONE)
    except CosettleError as error:
        Talk().error(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        Talk().warn("interrupted")
        return int(ExitCode.INTERRUPTED)
