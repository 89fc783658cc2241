"""Where an encoder's weights came from, with a digest; and random weights that repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from cosettle_cache.core.files import sha256_file
from cosettle_cache.encoders.registry import RANDOM

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class Weights:
    """`source`: file name, hub file or `random:seed`; `sha256`: of the file, or of the random tensors."""

    source: str
    sha256: str


def file_weights(path: Path, source: str | None = None) -> Weights:
    """Return the record of a weights file."""
    return Weights(source or path.name, sha256_file(path))


def random_weights(name: str, seed: int, model: Any) -> Weights:
    """Return the record of randomly initialised weights."""
    digest = hashlib.sha256(f"{name} {seed}".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return Weights(f"{RANDOM}:{seed}", digest.hexdigest())


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """Return what `make` builds under this seed; the generator's state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
