"""Options that several commands share, so that a word means the same thing everywhere."""

from __future__ import annotations

import errno
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import typer

from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import (
    CosettleError,
    ExitCode,
    InputError,
    UncleanError,
    UsageError,
    first_line,
)
from cosettle_cache.core.files import check_local
from cosettle_cache.core.hub import parse_name
from cosettle_cache.core.settings import DATA_ROOT_VARIABLE, Settings, parse_bytes, setting

if TYPE_CHECKING:
    from cosettle_cache.store import FeatureStore

#: Paths that may be names on the hub.
_ON_HUB = ("file", "projection")

#: What Linux takes as a path; other text that is longer is no option either.
_MOST_PATH_BYTES = 4095

DataRoot = Annotated[
    Path | None,
    typer.Option(
        envvar=DATA_ROOT_VARIABLE, help="Folder that media paths are relative to.", show_envvar=True
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="FILE, hf:OWNER/NAME/FILE or 'random'; default: the published weights.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: cuda where there is one.")]
FramesStore = Annotated[str, typer.Option(help="A frames store, local or at a URL.")]
FramesStoreOrNone = Annotated[
    str | None, typer.Option(help="A frames store, local or at a URL; default: made on the way.")
]
Projections = Annotated[
    list[Path] | None, typer.Option(help="FILE, FILE:SHARE or hf:OWNER/NAME/FILE, beside raw; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and stop.")]


@dataclass(frozen=True, slots=True)
class Work(Settings):
    """Where the work is done."""

    workers: int = setting(0, "Processes here; 0: this one.", min=0, max=1000)
    scheduler: str | None = setting(None, "A dask scheduler whose workers do it, as tcp://host:8786.")


@dataclass(frozen=True, slots=True)
class Cache(Settings):
    """Copies on this machine of what a remote store holds."""

    cache_dir: Path | None = setting(  # noqa: RUF009 - frozen
        None, "Folder for copies of a remote store's shards; docs/machines.md."
    )
    cache_size: str = setting("20GB", "Most bytes of these copies.", metavar="SIZE")

    def open(self, features: str) -> FeatureStore:
        """Open the store that `--features` names, local or at a URL."""
        from cosettle_cache.store import open_store

        return open_store(features, cache_dir=self.cache_dir, cache_bytes=parse_bytes(self.cache_size))


@dataclass(frozen=True, slots=True)
class Mode(Settings):
    """What a command is to do at all, and what it says."""

    dry_run: bool = setting(False, "Print what would be done and stop.")
    as_json: bool = setting(False, "One JSON document on stdout instead of text.", names=("--json",))
    quiet: bool = setting(False, "No progress, no notes.", names=("--quiet", "-q"))


def check_clean(failures: Mapping[str, str], message: str) -> None:
    """Raise `UncleanError` with a line per failure, named by its video, if there are any."""
    if failures:
        raise UncleanError(message, details=[f"{name}: {reason}" for name, reason in failures.items()])


def finish(report: Any, failures: Mapping[str, str]) -> int:
    """Return the exit code of a run over videos; raise its own error, or `UncleanError` for its failures."""
    if report.error:
        raise report.error
    if report.interrupted:
        return ExitCode.INTERRUPTED
    check_clean(failures, f"{len(failures)} videos had failures")
    return ExitCode.DONE


_only_checked: ContextVar[bool] = ContextVar("_only_checked", default=False)


@contextmanager
def only_checked() -> Iterator[None]:
    """Let command lines be read and their options checked, and no command do anything."""
    before = _only_checked.set(True)
    try:
        yield
    finally:
        _only_checked.reset(before)


def exits(command: Callable[..., int | None]) -> Callable[..., None]:
    """Make a typer command of a function: settings become options, results and known errors exit codes.

    A parameter whose type is a settings class is replaced by one option per field that `setting` made, and
    `command` is called with the object.
    """
    signature = inspect.signature(command, eval_str=True)
    classes = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}

    @functools.wraps(command)
    def wrapped(*given: Any, **values: Any) -> None:
        try:
            for name, value in values.items():
                _check_paths(name, value if isinstance(value, list) else [value])
            values = _settings(classes, values)
            result = None if _only_checked.get() else command(*given, **values)
            code = int(result or ExitCode.DONE)
        except CosettleError as error:
            Talk().error(error)
            code = int(error.exit_code)
        except (OSError, MemoryError, RuntimeError) as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            Talk().error(refusal)
            code = int(refusal.exit_code)
        except KeyboardInterrupt:
            Talk().warn("interrupted")
            code = int(ExitCode.INTERRUPTED)
        raise typer.Exit(code)

    parameters: list[inspect.Parameter] = []
    # What many commands share comes last, wherever it stands in the signature.
    for parameter in sorted(signature.parameters.values(), key=lambda p: p.annotation in (Work, Cache, Mode)):
        if parameter.name in classes:
            parameters += _options(classes[parameter.name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _check_paths(name: str, values: Sequence[Any]) -> None:
    """Raise `UsageError` for a value of the option `name` that no path can be, or a URL for a local path."""
    option = "--" + name.replace("_", "-")
    for value in values:
        text = str(value) if isinstance(value, str | Path) else ""
        if "\0" in text or len(os.fsencode(text)) > _MOST_PATH_BYTES:
            wanted = f"text without zero bytes, {_MOST_PATH_BYTES} bytes at most"
            raise UsageError(f"{option} cannot be what is given", wanted=wanted, found=repr(text[:100]))
        if isinstance(value, Path) and not (name in _ON_HUB and parse_name(value)):
            check_local(value)


def _refusal(error: OSError | MemoryError | RuntimeError) -> CosettleError | None:
    """Return what the system refused as an error with one sentence; None for a bug of ours."""
    if isinstance(error, RuntimeError):
        # torch's, which is not imported for this: of a card, and of the host.
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):
            return None
        found = first_line(error)
        return InputError("out of memory", found=found, hint="try a smaller --batch, or another --device")
    if isinstance(error, MemoryError):
        return InputError("out of memory", found=str(error) or None, hint="try a smaller --batch")
    place = f"{error.filename}: " if error.filename else ""
    hint = "raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else None
    return InputError(f"{place}{error.strerror or error or type(error).__name__}", hint=hint)


def _options(settings: Any) -> Iterator[inspect.Parameter]:
    kinds: dict[str, Any] = get_type_hints(settings)
    for item in fields(settings):
        option = dict(item.metadata)
        if "help" not in option:
            continue
        flag = ("--" + item.name.replace("_", "-"),) if item.default is False else ()  # without a --no-flag
        names, parse = option.pop("names", flag), option.pop("parse", None)
        choices = option.pop("choices", ())
        option.pop("positive", None)  # which the settings check themselves
        if table := option.pop("table", ""):
            package, _, words = table.partition(":")
            option["help"] += ", ".join(getattr(import_module(package), words)) + "."
        kind, default = kinds[item.name], cast(Any, item.default)
        if default is MISSING:
            default = inspect.Parameter.empty
        if choices:
            kind = Literal[tuple(choices)]
        elif parse is not None:
            kind, default = (list[str], []) if isinstance(default, tuple) else (str, str(default))
            if item.default is None:
                kind, default = str | None, None
        elif get_origin(kind) is tuple:
            kind, default = list[get_args(kind)[0]], list(default)  # type: ignore[misc]
        annotation = Annotated[kind, typer.Option(*names, **option)]  # type: ignore[valid-type]
        keyword = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(item.name, keyword, default=default, annotation=annotation)


def _settings(classes: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the options of each settings class made into an object of it."""
    for name, settings in classes.items():
        typed: dict[str, Any] = {}
        for item in fields(settings):
            if "help" in item.metadata:
                value = values.pop(item.name)
                parse = item.metadata.get("parse") or (tuple if isinstance(value, list) else None)
                typed[item.name] = value if parse is None or value is None else parse(value)
        values[name] = settings(**typed)
    return values
