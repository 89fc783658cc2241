"""docs/extending.md: every diff applies to a copy of the package, and the code of the page runs there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cosettle_cache

PACKAGE = Path(cosettle_cache.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M))
#: How many files each may touch.
MOST_FILES = {"A task": 4, "A mask data set": 2, "An encoder family": 1, "A head": 1, "A regulariser": 1}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], flags=re.S | re.M)


def apply(diff: str, root: Path) -> str:
    """Apply a diff whose hunks are found by their context alone; return the path of its file."""
    header, *hunks = re.split(r"^@@.*\n", diff, flags=re.M)
    source, target = re.findall(r"^(?:---|\+\+\+) (?:[ab]/)?(\S+)$", header, flags=re.M)
    path = root / target
    assert path.exists() == (source != "/dev/null")
    text = path.read_text() if path.exists() else ""
    for hunk in hunks:
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert not before or text.count(before) == 1, f"{target} has not once:\n{before}"
        text = text.replace(before, after) if before else after
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return target


def test_what_the_page_says_works(tmp_path: Path) -> None:
    copied = tmp_path / "checkout"
    shutil.copytree(PACKAGE, copied / "cosettle_cache", ignore=shutil.ignore_patterns("__pycache__"))
    for section, most in MOST_FILES.items():
        touched = {apply(diff, copied) for diff in blocks(section, "diff")}
        assert 1 <= len(touched) <= most, section
    # All in one process, which imports torch once.
    code = "\n".join(block for section in MOST_FILES for block in blocks(section, "python"))
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_has_a_section_for_every_table() -> None:
    assert SECTIONS.keys() == MOST_FILES.keys()
