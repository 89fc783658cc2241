"""A store in a repository of the hub: read as it is on the disk, at one commit; never written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_cases import TOKEN, Hub, run_cli, run_python, serving
from store_cases import frames_case, pairs_case

from cosettle_cache.store import open_store

READ = """
import pickle, sys
import numpy as np
from cosettle_cache.store import open_store, verify_store
url, folder, cache = sys.argv[1:]
there, here = open_store(url), open_store(folder)
cached = open_store(url, cache_dir=__import__("pathlib").Path(cache))
again = pickle.loads(pickle.dumps(there))
for store in (there, again, cached, cached):
    for ids in (list(here.sample_ids), [3, 1]):
        assert np.array_equal(store.samples(ids), here.samples(ids))
assert there.index.equals(here.index)
assert there.fingerprint == here.fingerprint and there.slot_states() == here.slot_states()
assert there.n_bytes == here.n_bytes
assert not verify_store(url).damages
print(there.path)
"""


@pytest.fixture
def hub():
    with serving() as server:
        yield server


def test_a_store_on_the_hub_equals_the_local_one(hub: Hub, tmp_path: Path) -> None:
    folder = pairs_case().write(tmp_path / "s.zarr")
    commit = hub.add_folder("datasets/me/clips", folder, "a b/s.zarr")
    hub.repositories["datasets/me/clips"].access = "private"
    url = "hf://datasets/me/clips/a b/s.zarr"
    where = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    done = run_python(READ, url, folder, tmp_path / "shards", home=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"hf://datasets/me/clips@{commit}/a b/s.zarr"
    # Large files are kept elsewhere, where the token is nobody's business.
    assert hub.tokens
    assert set(hub.tokens) == {None}


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_frames_of_any_codec_and_at_a_commit(hub: Hub, tmp_path: Path, codec: str) -> None:
    folder = frames_case(codec=codec).write(tmp_path / "s.zarr")
    commit = hub.add_folder("me/clips", folder, "s.zarr")
    hub.add("me/clips", {"s.zarr/zarr.json": b"{}"})  # somebody breaks it later
    script = """
import sys
import numpy as np
from cosettle_cache.store import open_store
there, here = map(open_store, sys.argv[1:])
assert all(np.array_equal(there.tokens(name), here.tokens(name)) for name in here.video_ids)
"""
    done = run_python(
        script, f"hf://me/clips@{commit}/s.zarr", folder, home=tmp_path, HF_ENDPOINT=hub.address
    )
    assert done.returncode == 0, done.stderr


def test_a_store_is_copied_from_the_hub_and_told(hub: Hub, tmp_path: Path) -> None:
    folder = pairs_case().write(tmp_path / "s.zarr")
    hub.add_folder("datasets/me/clips", folder, "s.zarr")
    url, where = "hf://datasets/me/clips/s.zarr", {"HF_ENDPOINT": hub.address}
    done = run_cli("store", "copy", url, tmp_path / "copy.zarr", home=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    assert open_store(tmp_path / "copy.zarr").index.equals(open_store(folder).index)
    done = run_cli("store", "info", url, "--json", home=tmp_path, **where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"].startswith("hf://datasets/me/clips@")


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("hf://datasets/me/none/s.zarr", {}, "there is no such repository, or it is private"),
        ("hf://datasets/me/clips@v9/s.zarr", {}, "the repository has no such revision"),
        ("hf://datasets/me/clips/other.zarr", {}, "holds no store"),
        ("hf://datasets/me/gated/s.zarr", {"HF_TOKEN": TOKEN}, "the repository is gated"),
        ("hf://datasets/me/clips/s.zarr", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("hf://datasets/me/clips/s.zarr", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be read"),
        ("hf://datasets/me", {}, "names no folder on the hub"),
        ("hf:me/clips/s.zarr", {}, "is a name on the hub"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    hub: Hub, tmp_path: Path, url: str, environment: dict[str, str], said: str
) -> None:
    hub.add("datasets/me/clips", {"README.md": b""})
    hub.add("datasets/me/gated", {"README.md": b""}, "gated")
    done = run_cli("store", "info", url, home=tmp_path, **{"HF_ENDPOINT": hub.address, **environment})
    assert done.returncode == (2 if "hub" in said else 3), done.stderr
    assert said in done.stderr.splitlines()[0]
    assert done.stderr.startswith("error: hf:")


def test_nothing_is_written_there(hub: Hub, tmp_path: Path) -> None:
    folder = pairs_case().write(tmp_path / "s.zarr")
    hub.add_folder("datasets/me/clips", folder, "s.zarr")
    url, where = "hf://datasets/me/clips/s.zarr", {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    encoder = ("--backbone", "dino_b", "--weights", "random")
    for command in (
        ("store", "copy", folder, "hf://datasets/me/other/s.zarr"),
        ("extract", *encoder, "--out", url, "--dry-run"),
        ("extract", *encoder, "--out", "hf:me/clips"),
    ):
        done = run_cli(*command, home=tmp_path, **where)
        assert done.returncode == 2, done.stderr
        assert "can only be read" in done.stderr
    assert not [line for line in hub.asked if not line.startswith(("GET", "HEAD"))]
    assert not list(tmp_path.glob("hf*"))
