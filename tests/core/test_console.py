"""What people see holds no credentials and steers no terminal, and losing the reader ends no work."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from cosettle_cache.cli import run_command
from cosettle_cache.cli.options import exits
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError, masked
from cosettle_cache.core.tables import write_json

SECRET = "wJalr/K7MDENG+bPx"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"s3://key:{SECRET}@bucket/a", "s3://***@bucket/a"),
        (f"s3:/key:{SECRET}@bucket/a", "s3:/***@bucket/a"),
        ("https://u:p@ss@host:90/x?a=b", "https://***@host:90/x?a=b"),
        ("https://token@host/x", "https://***@host/x"),
        ("from 'tcp://u:v@h' and \"tls://w:x@i\"", "from 'tcp://***@h' and \"tls://***@i\""),
        ("http://host:9000/b@1/x, s3://b/a@v1, a@b.c", "http://host:9000/b@1/x, s3://b/a@v1, a@b.c"),
    ],
)
def test_credentials_are_masked(text: str, wanted: str) -> None:
    assert masked(text) == masked(masked(text)) == wanted


def test_errors_and_documents_hold_no_credentials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"s3://key:{SECRET}@bucket/x"
    error = InputError(f"{url} a", wanted=url, found=Path(url), hint=url, details=[url])
    for found in (error, pickle.loads(pickle.dumps(error))):
        assert SECRET not in "\n".join([*found.lines(), found.summary, str(found), repr(found)])
    write_json(tmp_path / "run.json", {"store": url})
    assert json.loads((tmp_path / "run.json").read_text()) == {"store": "s3://***@bucket/x"}
    talk = Talk()
    talk.json({"store": url})
    talk.table(url, [url], [[url]])
    talk.note(url)
    assert run_command(["train", "--features", f"ftp://key:{SECRET}@host/x"]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_names_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    talk, name = Talk(), "a\x1b[2J\x07\r\x9b\u202e\udcff\u00e9"
    talk.note(name)
    talk.error(InputError(name, details=[name]))
    talk.progress(name).start(1, "videos")
    talk.result(name)
    talk.table(name, ["video"], [[name]])
    out, err = capsys.readouterr()
    spelled = r"a\x1b[2J\x07\r\x9b\u202e\udcff" + "\u00e9"
    assert (out.count(spelled), err.count(spelled)) == (3, 4)
    assert not set("\x1b\x07\r\x9b\u202e\udcff") & set(out + err)
    talk.warn("a pair:cat: no key points")  # no picture of a cat
    assert "pair:cat: no" in capsys.readouterr().err


def shell(line: str, **environment: str) -> tuple[int, str, str]:
    """Run a line of shell in which `$RUN` is the command; return its exit code, stdout and stderr."""
    environment = os.environ | {"RUN": f"{sys.executable} -m cosettle_cache.cli"} | environment
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False, env=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


LOST = "error: the work was done, but not all could be written to stdout\n"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("$RUN backbones > /dev/full", (4, "", LOST)),
        ("$RUN backbones >&-", (4, "", LOST)),
        ("$RUN backbones | true; exit ${PIPESTATUS[0]}", (4, "", LOST)),
        ("$RUN run none.toml 2>&-", (3, "", "")),
    ],
)
def test_the_exit_code_says_what_nobody_could_read(line: str, wanted: tuple[int, str, str]) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    assert shell(line) == wanted


def test_work_goes_on_without_anyone_to_tell(tmp_path: Path) -> None:
    (tmp_path / "clips/a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"clips/a/{number}.png")
    build = ["manifest", "build", "folder", "clips", "--data-root", str(tmp_path), "--out"]
    assert run_command([*build, str(tmp_path / "told.parquet")]) == 0
    assert shell(f"$RUN {' '.join(build)} {tmp_path}/untold.parquet >&- 2>&-")[0] == 4
    assert (tmp_path / "untold.parquet").read_bytes() == (tmp_path / "told.parquet").read_bytes()


def test_names_outside_the_locale_are_utf8(tmp_path: Path) -> None:
    (tmp_path / "clips/\u00e9").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"clips/\u00e9/{number}.png")
    line = f"cd {tmp_path}; $RUN manifest build folder clips/\u00e9 --data-root . --out a.csv"
    assert shell(line, LC_ALL="C", PYTHONUTF8="0")[0] == 0
    assert "\u00e9" in (tmp_path / "a.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "--features", "a\0b"], 2, "--features cannot be what is given"),
        (["train", "--features", "x" * 5000], 2, "--features cannot be what is given"),
        (["report", ".", "--out", "s3://bucket/report.html"], 2, "s3:/bucket/report.html is a URL"),
        (["manifest", "build", "folder", ".", "--out", "s3://bucket/a.parquet"], 2, "is a URL"),
    ],
)
def test_options_that_no_path_can_be(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run_command(words) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EMFILE, "Too many open files"),
            "Too many open files\nhint: raise the limit (ulimit -n)",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xyz"), "xyz: File name too long"),
        (MemoryError(), "out of memory\nhint: try a smaller --batch"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n"),
            "out of memory\n  found:  CUDA out of memory. Tried to allocate\n"
            "hint: try a smaller --batch, or another --device",
        ),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @exits
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        command()
    assert end.value.exit_code == 3
    assert capsys.readouterr().err == f"error: {said}\n"
