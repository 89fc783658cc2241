"""The path from a store to labels, to be walked where the system has every call and where it has not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from store_cases import pairs_case

from cosettle_cache import load_projection, make_protocol, open_store, propagate
from cosettle_cache.cli import run_command

TRAIN = ["--batch", "5", "--epochs", "1", "--warmup-epochs", "0", "--order", "shards", "--quiet"]


def walk(folder: Path) -> dict[str, np.ndarray]:
    """Write a store, verify it, read it, train two steps on it and propagate; return what came out."""
    store = open_store(pairs_case(side=4).write(folder / "store.zarr"))
    store.will_need(range(store.n_slots))
    tokens = store.samples(np.arange(10))
    assert run_command(["store", "verify", store.path, "--quiet"]) == 0
    assert run_command(["train", "--features", store.path, *TRAIN, "--out", str(folder / "run")]) == 0
    weights = load_projection(folder / "run/projection.safetensors").state_dict()
    first, protocol = np.eye(16, dtype=np.float32).reshape(4, 4, 16), make_protocol("cosettle", top_k=3)
    labels = propagate(tokens[:4, 0], first, protocol)
    made = {"tokens": tokens, "piece": store.samples([7, 2]), "labels": labels, **weights}
    return {name: np.asarray(array) for name, array in made.items()}
