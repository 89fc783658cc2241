"""The reference pages, made from the program itself: every command and option, every public Python name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import cosettle_cache
from cosettle_cache.cli import app

COMMANDS = """# Commands

Made by `python -m cosettle_cache.cli.reference docs`; a test keeps it true. Exit codes: 0 done, 1 bug,
2 usage, 3 input or output, 4 finished but not clean (a video failed, an expectation was missed), 5 damaged
store, 130 interrupted.
"""

NAMES = """# Python names

Made by `python -m cosettle_cache.cli.reference docs` from the docstrings; a test keeps it true. All are
imported from `cosettle_cache` and stay stable. A path is `str` or `Path`, an array numpy or torch.
Shapes are written as [jaxtyping](https://docs.kidger.site/jaxtyping/) does it. Wrong input raises a
`cosettle_cache.core.errors.CosettleError` that says what was wanted and what was found.
"""


def command_reference() -> str:
    """Return docs/cli.md."""
    return "\n".join([COMMANDS, *_commands(typer.main.get_command(app), "cosettle-cache")])


def _commands(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        for child in command.list_commands(None):
            yield from _commands(children[child], f"{name} {child}")
        return
    yield f"## {name}\n"
    yield re.sub(r"Example: (.*)", r"    \1", re.sub(r"\n +", "\n", command.help), flags=re.S) + "\n"
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for parameter in command.params:
        if parameter.name != "help":
            yield _option(parameter)
    yield ""


def _option(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    words = ", ".join(parameter.opts) if is_option else parameter.metavar or parameter.name.upper()
    value = parameter.default
    default = "required" if parameter.required else "" if value is None or value is False else f"`{value}`"
    return f"| `{words}` | {default} | {getattr(parameter, 'help', None) or ''} |"


def name_reference() -> str:
    """Return docs/api.md: the public names, and the classes of what they return."""
    from cosettle_cache.core.types import EvalProtocol
    from cosettle_cache.encoders import Backbone
    from cosettle_cache.metrics.davis import ObjectScore
    from cosettle_cache.metrics.vip import MeanIoU
    from cosettle_cache.store import FeatureStore
    from cosettle_cache.training.losses import LossTerms

    public = [getattr(cosettle_cache, name) for name in cosettle_cache.__all__ if name != "__version__"]
    returned = [Backbone, FeatureStore, EvalProtocol, LossTerms, ObjectScore, MeanIoU]
    parts = [NAMES, *map(_name, public), "## What they return\n", *(_name(item, "###") for item in returned)]
    return "\n".join(parts)


def _name(item: Any, mark: str = "##") -> str:
    members = vars(item).items() if inspect.isclass(item) else ()
    entries = [_entry(mark, item.__name__, item)]
    for name, member in members:
        function = getattr(member, "fget", getattr(member, "func", member))
        if not name.startswith("_") and inspect.isfunction(function):
            entries.append(_entry(f"{mark}#", f"{item.__name__}.{name}", function, call=function is member))
    return "".join(entries)


def _entry(mark: str, name: str, item: Any, *, call: bool = True) -> str:
    """Return heading, signature (none for a property) and docstring."""
    code = f"```python\n{name}{_signature(item)}\n```\n\n" if call else ""
    return f"{mark} {name}\n\n{code}{inspect.getdoc(item) or ''}\n\n"


class _Text(str):
    """An annotation as it is written: without quotes around it."""

    __repr__ = str.__str__


def _signature(item: Any) -> str:
    signature = inspect.signature(item)
    parameters = [
        parameter.replace(annotation=_Text(parameter.annotation))
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=_Text(signature.return_annotation)))


if __name__ == "__main__":
    Path(sys.argv[1], "cli.md").write_text(command_reference(), encoding="utf-8")
    Path(sys.argv[1], "api.md").write_text(name_reference(), encoding="utf-8")
