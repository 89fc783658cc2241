"""What is not ours is neither overwritten nor believed: folders, names and documents of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosettle_cache.core.errors import CosettleError, InputError, UsageError
from cosettle_cache.core.files import MARK, inside, own_file, own_folder, parse_json, read_json, read_text

HOLD = """
import sys
from pathlib import Path
from cosettle_cache.core.files import own_folder
with own_folder(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_taken_new_empty_or_marked(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    for _ in range(2):  # new, then with the results of the first
        with own_folder(out, "train") as folder:
            (folder / "projection").write_text("result")
    mark = json.loads((out / MARK).read_text())
    assert (mark["command"], mark["pid"]) == ("train", os.getpid())
    with pytest.raises(UsageError, match="holds something else") as error, own_folder(out, "pca"):
        pass
    assert error.value.found == "results of train"


@pytest.mark.parametrize("name", ["frame.png", ".hidden", "a.jsonl"])
@pytest.mark.parametrize("command", ["train", "propagate", "pca"])
def test_a_foreign_folder_is_left_as_it_is(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="nothing in it is overwritten"), own_folder(tmp_path, command):
        pass
    assert tree(tmp_path) == {name: b"mine"}


def test_a_file_is_written_where_nothing_or_ours_is(tmp_path: Path) -> None:
    """Ours holds OURS; inputs, folders, pipes, links to nothing and files of runs are kept."""

    def free(name: str, *inputs: Path) -> bool:
        try:
            own_file(tmp_path / name, "ours", lambda path: path.read_bytes() == b"OURS", inputs)
        except UsageError:
            return False
        return True

    for name, data in {"ours": b"OURS", "mine": b"mine", "run/ours": b"OURS", f"run/{MARK}": b"{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("absent")
    (tmp_path / "same").symlink_to("ours")
    names = ["new", "new/new", "ours", "run/new", "same", "mine", "run", "run/ours", "pipe", "link", "mine/x"]
    assert list(filter(free, names)) == ["new", "new/new", "ours", "run/new", "same", "mine/x"]
    assert not free("ours", tmp_path / "same")
    assert not free("new", tmp_path / "run/../new")
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("mark", ["[]", "{}", '{"command": 3}', "{", "[" * 100_000, "null", None])
def test_a_mark_that_is_not_ours_opens_nothing(tmp_path: Path, mark: str | None) -> None:
    os.mkfifo(tmp_path / MARK) if mark is None else (tmp_path / MARK).write_text(mark)
    with pytest.raises(CosettleError), own_folder(tmp_path, "train"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


@pytest.mark.parametrize(
    ("command", "name"), [("propagate", "progress/run.json"), ("train", "checkpoint.pt")]
)
def test_results_of_version_0_1_are_known(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UsageError), own_folder(tmp_path, "analyze"):
        pass
    with own_folder(tmp_path, command):
        pass


def test_one_run_holds_a_folder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another run writes") as error, own_folder(tmp_path, "train"):
            pass
        assert error.value.found == f"process {other.pid} on {os.uname().nodename}"
        other.kill()
    with own_folder(tmp_path, "train"):  # the lock died with its process
        pass


def test_shared_folders_are_held_by_several(tmp_path: Path) -> None:
    with own_folder(tmp_path, "cache", shared=True), own_folder(tmp_path, "cache", shared=True):
        pass
    with pytest.raises(UsageError), own_folder(tmp_path, "train"):
        pass


@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://b", "https://host/a"])
def test_a_url_is_no_folder(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a URL"), own_folder(Path(url), "train"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a/b.c", "a b", "…/é", "a:b", "a\\b", "..a", "x" * 200])
def test_plain_names_become_paths(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


ALIASES = ["", ".", "..", "./x", "x/", "a//b", "a/./b", "../x", "a/../x", "/x", "/"]
STRANGE = ["a\0", "a\nb", "\x1b[2J", "\x7f", "a\u202eb", "a\udcff", "\u2028", "x" * 201, "é" * 101]


@pytest.mark.parametrize("name", [*ALIASES, *STRANGE])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a file's name"):
        inside(tmp_path, name)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 200_000, b"9" * 5000, b"\xef\xbb\xbf{"])
def test_documents_that_are_no_json_are_one_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "a")
    with pytest.raises(InputError, match="line 3 is not JSON"):
        parse_json(text, "line 3")


@pytest.mark.parametrize("name", ["absent", "folder", "pipe", "x" * 5000, "a\0b", "large"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("123")
    with pytest.raises(InputError):
        read_text(tmp_path / name, most_bytes=2)
