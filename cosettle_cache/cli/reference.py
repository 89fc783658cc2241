"""The command reference: every command and option as Markdown, made from the commands themselves."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from cosettle_cache.cli import app

HEADER = """# Commands

Made by `python -m cosettle_cache.cli.reference docs/cli.md`; a test keeps it true. Exit codes: 0 done, 1 bug,
2 usage, 3 input or output, 4 finished but not clean (a video failed, an expectation was missed), 5 damaged
store, 130 interrupted.
"""


def reference() -> str:
    """Return the whole reference."""
    return "\n".join([HEADER, *_sections(typer.main.get_command(app), "cosettle-cache")])


def _sections(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is None:
        yield from _section(command, name)
        return
    for child in command.list_commands(None):
        yield from _sections(children[child], f"{name} {child}")


def _section(command: Any, name: str) -> Iterator[str]:
    yield f"## {name}\n"
    yield re.sub(r"Example: (.*)", r"    \1", re.sub(r"\n +", "\n", command.help), flags=re.S) + "\n"
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for parameter in command.params:
        if parameter.name != "help":
            yield _row(parameter)
    yield ""


def _row(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    words = ", ".join(parameter.opts) if is_option else parameter.metavar or parameter.name.upper()
    default = "required" if parameter.required else _default(parameter.default)
    return f"| `{words}` | {default} | {getattr(parameter, 'help', None) or ''} |"


def _default(value: object) -> str:
    return "" if value is None or value is False else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
