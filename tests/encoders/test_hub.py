"""Published weights through a hub mirror and a plain address, both served here; and without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONTENT = b"weights of nobody" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FETCH = """
import sys
from cosettle_cache.encoders.load import fetch
from cosettle_cache.encoders.registry import Source
from cosettle_cache.core.errors import CheckpointError
try:
    print(fetch("nobody_b", Source(**eval(sys.argv[1]))))
except CheckpointError as error:
    print(*error.lines(), sep="\\n")
    raise SystemExit(3)
"""
HUB = {"file": "model.safetensors", "licence": "none", "hub_id": "timm/nobody"}


class Mirror(BaseHTTPRequestHandler):
    """Answers as the hub does for one file, and with the same bytes at any other address."""

    def do_HEAD(self):
        self.send_response(200)
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{SHA256}"', "Content-Length": str(len(CONTENT))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(CONTENT[: len(CONTENT) // (2 if "cut" in self.path else 1)])
        if not self.path.startswith("/api/"):  # the client asks for more than the file
            self.server.downloads.append(self.path)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.downloads = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(tmp_path):
    def run(source, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        folders = {"HF_HOME": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, "-c", FETCH, repr(source)],
            env=clean | folders | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_the_hub_client_respects_a_mirror_and_its_cache(mirror, fetch):
    first = fetch(HUB, HF_ENDPOINT=address(mirror))
    assert first.returncode == 0, first.stdout + first.stderr
    assert Path(first.stdout.strip()).read_bytes() == CONTENT
    again = fetch(HUB, HF_ENDPOINT=address(mirror), HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout
    assert mirror.downloads == ["/timm/nobody/resolve/main/model.safetensors"]


def test_a_plain_address_is_cached_and_its_checksum_compared(mirror, fetch):
    source = {"file": "w.pth", "licence": "none", "url": f"{address(mirror)}/w.pth", "sha256": SHA256}
    first, again = fetch(source), fetch(source)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (first.stdout, mirror.downloads) == (again.stdout, ["/w.pth"])
    other = fetch(source | {"file": "v.pth", "sha256": "0" * 64})
    assert other.returncode == 3
    assert "0" * 64 in other.stdout
    cut = fetch(source | {"file": "cut.pth", "url": f"{address(mirror)}/cut.pth"})
    assert "ended after 850 of 1,700 bytes" in cut.stdout
    assert not list(Path(first.stdout.strip()).parent.glob("*cut*"))
    Path(first.stdout.strip()).write_bytes(CONTENT + b"!")
    assert "not the published file" in fetch(source).stdout


@pytest.mark.parametrize(
    "environment",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}],
    ids=["unreachable", "offline"],
)
def test_without_a_network_it_fails_within_seconds_and_says_what_to_do(fetch, environment):
    start = time.monotonic()
    failed = fetch(HUB, **environment)
    assert failed.returncode == 3
    assert "timm/nobody/resolve/main/model.safetensors by hand" in failed.stdout
    assert "--weights FILE | --weights random" in failed.stdout
    assert time.monotonic() - start < 15


def test_weights_without_a_public_address(fetch):
    failed = fetch({"file": "checkpoint.pth", "licence": "not stated"})
    assert failed.returncode == 3
    assert "hint: --weights FILE | --weights random" in failed.stdout
