"""`hf:` names against a hub served here: cache, offline mode, revisions, digests, and every refusal."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_cases import TOKEN, Hub, run_cli, run_python, serving

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.hub import HubFile, find_folder, local_file, parse_name

DATA = b"weights of nobody" * 100
DIGEST = hashlib.sha256(DATA).hexdigest()
NAME = "hf:me/head/ckpts/mine+ours/checkpoint.pth"
RESOLVE = """
import sys, time
from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.hub import file_beside, local_file, origin_of
start = time.monotonic()
try:
    for name in sys.argv[1:]:
        print(local_file(name), origin_of(name), file_beside(name, "other.bin"), sep="\\n")
except CosettleError as error:
    print(*error.lines(), sep="\\n")
    print(f"{time.monotonic() - start:.1f} s")
    sys.exit(int(error.exit_code))
"""


@pytest.fixture
def hub():
    with serving() as server:
        yield server


def resolve(hub: Hub, home: Path, *names: str, **environment: str) -> tuple[int, list[str]]:
    done = run_python(RESOLVE, *names, home=home, **{"HF_ENDPOINT": hub.address, **environment})
    assert not done.stderr or "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_name_is_a_file_of_a_repository() -> None:
    assert parse_name("weights/model.pth") is None
    assert parse_name(Path("hf:me/head/a/b.pth")) == HubFile("me/head", "a/b.pth")
    assert parse_name("hf:me/head/b.pth@refs/pr/1") == HubFile("me/head", "b.pth", "refs/pr/1")
    assert parse_name(f"hf:me/head/b.pth@v1#sha256={DIGEST}") == HubFile("me/head", "b.pth", "v1", DIGEST)
    assert local_file("a/b") == Path("a/b")


@pytest.mark.parametrize(
    "name",
    [
        *("hf:", "hf:me", "hf:me/head", "hf:me/head/", "hf:me/head@v1/b.pth", "hf:me/head/../b.pth"),
        *("hf:me/head/b.pth@", "hf:me/head/b.pth#sha256=12", "hf:me/head/b.pth#model", "hf:m e/head/b.pth"),
        *("hf://me/head/b.pth", "hf:me/head/b\n.pth", "hf:me/head//b.pth"),
    ],
)
def test_other_names_are_refused_with_the_form(name: str) -> None:
    with pytest.raises(UsageError, match="names no file on the hub") as refused:
        parse_name(name)
    assert "hf:OWNER/NAME/FILE" in str(refused.value.wanted)


@pytest.mark.parametrize("url", ["hf://me", "hf://datasets/me", "hf://me/a@/x", "hf://me/a/../b", "hf://"])
def test_other_urls_are_refused_with_the_form(url: str) -> None:
    with pytest.raises(UsageError, match="names no folder on the hub"):
        find_folder(url)


def test_a_file_comes_from_the_mirror_once_and_from_the_cache_offline(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("me/head", {"ckpts/mine+ours/checkpoint.pth": DATA})
    code, (path, origin, beside) = resolve(hub, tmp_path, NAME)
    assert code == 0
    assert Path(path).read_bytes() == DATA
    assert origin == f"{NAME}@{commit}"
    assert beside == f"hf:me/head/ckpts/mine+ours/other.bin@{commit}"
    asked = [line.partition(" ")[0] for line in hub.asked if "resolve" in line]
    assert asked == ["HEAD", "GET"]
    # Offline, with the hub gone, and by its commit: the same file, without a request.
    assert resolve(hub, tmp_path, NAME, HF_HUB_OFFLINE="1") == (0, [path, origin, beside])
    assert resolve(hub, tmp_path, f"{NAME}@{commit}")[1][0] == path
    assert sum("resolve" in line for line in hub.asked) == 2
    assert resolve(hub, tmp_path, NAME, HF_ENDPOINT="http://127.0.0.1:9") == (0, [path, origin, beside])


def test_main_moves_and_a_pin_does_not(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("me/head", {"b.pth": DATA})
    assert resolve(hub, tmp_path, f"hf:me/head/b.pth#sha256={DIGEST}")[0] == 0
    hub.add("me/head", {"b.pth": b"other"})
    code, lines = resolve(hub, tmp_path, f"hf:me/head/b.pth#sha256={DIGEST}")
    assert code == 3
    assert lines[0] == "error: hf:me/head/b.pth is not the file that was pinned"
    assert lines[1] == f"  wanted: sha256 {DIGEST}"
    assert Path(resolve(hub, tmp_path, "hf:me/head/b.pth")[1][0]).read_bytes() == b"other"
    code, lines = resolve(hub, tmp_path, f"hf:me/head/b.pth@{old}#sha256={DIGEST}")
    assert (code, Path(lines[0]).read_bytes()) == (0, DATA)


@pytest.mark.parametrize(
    ("name", "environment", "said", "hint"),
    [
        ("hf:me/head/c.pth", {}, "the repository has no such file", "/me/head/tree/main"),
        ("hf:me/head/b.pth@v9", {}, "the repository has no such revision", "/me/head/tree/main"),
        ("hf:me/none/b.pth", {}, "there is no such repository, or it is private", "set HF_TOKEN"),
        ("hf:me/none/b.pth", {"HF_TOKEN": TOKEN}, "there is no such repository, or", "check the name"),
        ("hf:me/hidden/b.pth", {}, "there is no such repository, or it is private", "set HF_TOKEN"),
        ("hf:me/gated/b.pth", {}, "the repository is gated", "accept its terms at "),
        ("hf:me/gated/b.pth", {"HF_TOKEN": TOKEN}, "the repository is gated", "accept its terms at "),
        ("hf:me/head/b.pth", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set and the file is not", "by hand"),
        ("hf:me/head/b.pth", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "9 cannot be reached", "by hand"),
        ("hf:me/head", {}, "names no file on the hub", ""),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    hub: Hub, tmp_path: Path, name: str, environment: dict[str, str], said: str, hint: str
) -> None:
    hub.add("me/head", {"b.pth": DATA})
    hub.add("me/hidden", {"b.pth": DATA}, "private")
    hub.add("me/gated", {"b.pth": DATA}, "gated")
    code, lines = resolve(hub, tmp_path, name, **environment)
    assert code == (2 if "no file" in said else 3), lines
    assert lines[0].startswith(f"error: {name}")
    assert said in lines[0]
    assert hint in lines[-2]
    assert float(lines[-1].split()[0]) < 10


def test_a_token_opens_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/hidden", {"b.pth": DATA}, "private")
    assert resolve(hub, tmp_path, "hf:me/hidden/b.pth", HF_TOKEN=TOKEN)[0] == 0


def test_outputs_are_not_names_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    done = run_cli("projection", "export", "a.safetensors", "hf:me/head/c.pth", home=tmp_path)
    assert done.returncode == 2
    assert "hf:me/head/c.pth is a name on the hub" in done.stderr
    assert not list(tmp_path.glob("hf*"))
