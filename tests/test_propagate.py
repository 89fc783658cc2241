"""Propagation against the released engine's values, a dense oracle, and what must hold for any protocol."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cosettle_cache.labels import decode_mask
from cosettle_cache.propagate import propagate
from cosettle_cache.protocols import make_protocol

SEARCHES = ("torch", "faiss")


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("case", ["queue_small", "queue_wide", "queue_pose", "queue_vip"])
def test_equals_the_released_engine(case, search, golden, golden_json):
    settings = golden_json("propagation/expected.json")[case]
    known = load_file(golden(f"propagation/{case}.safetensors"))
    protocol = make_protocol(
        top_k=settings["topk"],
        n_context=settings["queue_length"],
        radius=settings["radius"],
        temperature=settings["temperature"],
    )
    soft = propagate(known["features"], known["first_labels"], protocol, search=search)
    assert (soft - known["soft_labels"]).abs().max() <= 1e-4
    rows, cols = settings["grid"]
    size = (rows * settings["upsample"], cols * settings["upsample"])
    classes = range(settings["classes"])
    hard = torch.stack([torch.from_numpy(decode_mask(frame, classes, size, size)) for frame in soft])
    assert (hard == known["masks"]).float().mean() >= 0.999
