"""The house: fourteen rooms with doors, as the README tells them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cosettle_cache

PACKAGE = Path(cosettle_cache.__file__).parent
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}


def imports() -> Iterator[tuple[Path, str]]:
    """Yield (file, module of this package that it imports), inside functions too."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cosettle_cache"):
                yield path.relative_to(PACKAGE), node.module
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"


def test_there_are_fourteen_rooms_and_the_readme_names_each() -> None:
    assert len(ROOMS) == 14
    readme = (PACKAGE.parent / "README.md").read_text()
    assert {line.split("/")[0].strip() for line in readme.splitlines() if line.startswith("  ")} >= ROOMS
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_private_files_stay_in_their_room() -> None:
    for path, module in imports():
        private = [part for part in module.split(".") if part.startswith("_")]
        assert not private or module.split(".")[1] == path.parts[0], f"{path} imports {module}"


def test_private_names_stay_in_their_file() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cosettle_cache"):
                private = [
                    item.name
                    for item in node.names
                    if item.name.startswith("_") and item.name != "__version__"
                ]
                assert not private, f"{path.relative_to(PACKAGE)} imports {private} of {node.module}"


def test_the_readme_is_short() -> None:
    lines = (PACKAGE.parent / "README.md").read_text().splitlines()
    assert len(lines) < 130
    assert max(map(len, lines)) <= 120
