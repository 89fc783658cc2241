"""Published weights through a hub mirror and a plain address, both served here; and without a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hub_cases import run_cli, run_python, serving
from PIL import Image
from safetensors.torch import save

from cosettle_cache.store import open_store

PARTS = [("one", "a", 1.0), ("two", "b", 2.0)]
CONTENT = b"weights of nobody" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FETCH = """
import sys
import time
from cosettle_cache.encoders.load import fetch
from cosettle_cache.encoders.registry import Source
from cosettle_cache.core.errors import CheckpointError
start = time.monotonic()
try:
    print(fetch("nobody_b", Source(**eval(sys.argv[1]))))
except CheckpointError as error:
    print(*error.lines(), sep="\\n")
    assert time.monotonic() - start < 15
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
    failed = fetch(HUB, **environment)
    assert failed.returncode == 3
    assert "timm/nobody/resolve/main/model.safetensors by hand" in failed.stdout
    assert "--weights FILE | --weights random" in failed.stdout


def test_weights_without_a_public_address(fetch):
    failed = fetch({"file": "checkpoint.pth", "licence": "not stated"})
    assert failed.returncode == 3
    assert "hint: --weights FILE | --weights random" in failed.stdout


LOAD = """
import sys
from pathlib import Path
import torch
from cosettle_cache.core.files import sha256_file
from cosettle_cache.encoders import load_backbone
from cosettle_cache.encoders.checkpoints import read_checkpoint
from cosettle_cache.encoders.describe import describe_backbone
from cosettle_cache.heads.projection import load_projection, projection_sha256
base, ours, commit = sys.argv[1:]
image = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
here = load_backbone("mae", weights=base)
there = load_backbone("mae", weights="hf:me/mae/ckpts/base+1/base.pth")
keyed = load_backbone("mae", weights=f"hf:me/mae/ckpts/base+1/base.pth@{commit}#model")
assert there.weights_source == f"hf:me/mae/ckpts/base+1/base.pth@{commit}", there.weights_source
assert keyed.weights_source == f"{there.weights_source}#model", keyed.weights_source
assert here.weights_sha256 == there.weights_sha256 == sha256_file(Path(base))
assert torch.equal(here.encode(image), there.encode(image))
assert torch.equal(here.encode(image), keyed.encode(image))
assert describe_backbone("mae", weights="hf:me/mae/ckpts/base+1/base.pth").dim == here.dim
digests = {projection_sha256(load_projection(name)) for name in (ours, "hf:me/mae/ours.pth")}
assert len(digests) == 1
parts = read_checkpoint("hf:me/mae/model.safetensors.index.json")
assert {name: float(tensor) for name, tensor in parts.items()} == {"a": 1.0, "b": 2.0}
assert len(parts.files) == 2
"""


def test_weights_and_projections_of_the_hub_equal_the_files(golden, tmp_path):
    base, ours = (golden(f"backbones/mae/{name}.pth") for name in ("base", "ours"))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    files = {f"{name}.safetensors": save({key: torch.tensor(value)}) for name, key, value in PARTS}
    files |= {"model.safetensors.index.json": json.dumps(index).encode()}
    files |= {"ckpts/base+1/base.pth": base.read_bytes(), "ours.pth": ours.read_bytes()}
    with serving() as hub:
        commit = hub.add("me/mae", files)
        done = run_python(LOAD, base, ours, commit, home=tmp_path, HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr


def test_a_store_does_not_go_on_with_another_file_of_the_hub(golden, tmp_path):
    base, ours = (golden(f"backbones/mae/{name}.pth").read_bytes() for name in ("base", "ours"))
    (tmp_path / "clips/one").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (80 * number,) * 3).save(tmp_path / f"clips/one/{number}.png")
    assert run_cli("manifest", "build", "folder", "clips", home=tmp_path).returncode == 0
    extract = [
        "extract",
        "--backbone",
        "mae",
        "--weights",
        "hf:me/mae/mae.pth",
        "--manifest",
        "folder.parquet",
    ]
    extract += ["--data-root", "clips", "--plan", "frames", "--size", "64x64", "--out", "s.zarr"]
    with serving() as hub:
        commit = hub.add("me/mae", {"mae.pth": base})
        first = run_cli(*extract, home=tmp_path, HF_ENDPOINT=hub.address)
        assert first.returncode == 0, first.stderr
        encoder = open_store(tmp_path / "s.zarr").encoder
        assert encoder["weights_source"] == f"hf:me/mae/mae.pth@{commit}"
        assert encoder["weights_argument"] == "hf:me/mae/mae.pth"
        hub.add("me/mae", {"mae.pth": ours})
        changed = run_cli(*extract, home=tmp_path, HF_ENDPOINT=hub.address)
        assert changed.returncode == 3, changed.stderr
        assert "weights_sha256" in changed.stderr
        assert hashlib.sha256(base).hexdigest() in changed.stderr
        extract[4] += f"@{commit}"
        assert run_cli(*extract, home=tmp_path, HF_ENDPOINT=hub.address).returncode == 0
