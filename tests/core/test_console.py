"""What people see holds no credentials and steers no terminal, and losing the reader ends no work."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from cosettle_cache.cli import run_command
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
