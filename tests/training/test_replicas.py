"""Two processes with gloo: the same parameters as one process with the same global batch."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from test_train import SMALL, make_store

from cosettle_cache.core.errors import CosettleError, UsageError
from cosettle_cache.heads.projection import load_projection
from cosettle_cache.store import open_store
from cosettle_cache.training import learner
from cosettle_cache.training.batches import join_replicas
from cosettle_cache.training.log import read_figures, read_validation
from cosettle_cache.training.plan import Axis
from cosettle_cache.training.run import train

AXES = (Axis("separability_weight", (0.02, "auto")),)
RUN = replace(SMALL, batch_size=4, accumulate=2, epochs=2, validation=0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun gives its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def train_as(variables: dict[str, str], folder: Path) -> None:
    os.environ |= variables
    learner.GROUP_CLIPS = 2
    torch.set_num_threads(1)
    with join_replicas("cpu") as (replicas, device):
        assert (replicas.rank, replicas.count) == (int(variables["RANK"]), 2)
        store = open_store(folder / "store.zarr")
        train(store, RUN, folder / "two", sweep=AXES, device=device, replicas=replicas)


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, port = make_store(tmp_path, n_videos=23), free_port()
    second = get_context("spawn").Process(target=train_as, args=(environment(1, port), tmp_path))
    second.start()
    monkeypatch.setattr(learner, "GROUP_CLIPS", 2)  # groups to share
    train(store, RUN, tmp_path / "one", sweep=AXES)
    for name, value in environment(0, port).items():
        monkeypatch.setenv(name, value)
    train_as(environment(0, port), tmp_path)
    second.join(60)
    assert second.exitcode == 0
    for member in ("separability_weight=0.02", "separability_weight=auto"):
        one, two = tmp_path / "one" / member, tmp_path / "two" / member
        wanted, found = (load_projection(folder / "projection.safetensors") for folder in (one, two))
        for name, tensor in wanted.state_dict().items():
            assert (tensor - found.state_dict()[name]).abs().max() <= 1e-5, name
        lines = zip(*(read_figures(folder / "metrics.jsonl") for folder in (one, two)), strict=True)
        assert all(abs(a.total - b.total) <= 1e-4 * abs(a.total) for a, b in lines)
        epochs = zip(*(read_validation(folder / "validation.jsonl") for folder in (one, two)), strict=True)
        assert all(a.margin == pytest.approx(b.margin, rel=1e-3) for a, b in epochs)


def refused_as(variables: dict[str, str], folder: Path, told: Path) -> None:
    try:
        train_as(variables, folder)
    except CosettleError as error:
        told.write_text("\n".join(error.lines()))


def test_a_refusal_of_the_first_process_ends_all(tmp_path: Path) -> None:
    make_store(tmp_path, n_videos=4)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/mine.txt").touch()
    port, spawn = free_port(), get_context("spawn").Process
    told = [tmp_path / "first", tmp_path / "second"]
    ranks = [spawn(target=refused_as, args=(environment(n, port), tmp_path, told[n])) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = (path.read_text() for path in told)
    assert first == second
    assert first.startswith(f"error: {tmp_path}/two holds something else")


@pytest.mark.parametrize(("device", "said"), [("cuda:0", "deals the GPUs"), ("cuda", "process 1 .* no GPU")])
def test_processes_without_a_gpu_of_their_own(
    monkeypatch: pytest.MonkeyPatch, device: str, said: str
) -> None:
    for name, value in environment(1, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=said), join_replicas(device):
        pass
