"""On a GPU, pretended: no operator mixes devices, the host waits rarely, and figures are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_cuda import Device
from probe_cases import DIM, labelled_case
from propagation_cases import make_squares
from store_cases import frames_case

from cosettle_cache.analysis.pca import draw_store, plan_pca
from cosettle_cache.analysis.pooling import pool_frames
from cosettle_cache.analysis.run import analyze_store, plan_analysis
from cosettle_cache.core.settings import AnalyzeSettings, PcaSettings
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.store import open_store

N_CLIPS, N_FRAMES = 5, 24


def test_the_pretended_device_is_as_strict_as_one(cuda: Device) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
        there + here
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(there)
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    assert there.device == torch.device("cuda:0") and cuda.waits == 0
    assert (there * 2).sum().item() == 6 and cuda.waits == 1
    assert there[there > 0].cpu().tolist() == [1.0, 1.0, 1.0] and cuda.waits == 3
    here.pin_memory().to("cuda", non_blocking=True)
    assert cuda.waits == 3 and cuda.uploads.total() == 1
    assert here.to("cuda").tolist() == [1.0, 1.0, 1.0] and cuda.waits == 5


def test_a_module_learns_there(cuda: Device) -> None:
    layer = torch.nn.Linear(3, 1).to("cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.cpu()
    layer(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.cpu(), before - 0.2)


@pytest.mark.parametrize("held", [True, False])
def test_analyze(cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    if not held:
        monkeypatch.setattr("cosettle_cache.analysis.run.HELD_BYTES", 0)
    clips = [(f"clip{number}", N_FRAMES, 4, 4) for number in range(N_CLIPS)]
    store = open_store(frames_case(clips, slot_encodings=N_FRAMES).write(tmp_path / "s.zarr"))
    plan, heads = plan_analysis(store, AnalyzeSettings()), [("mine", Projection(8, seed=1))]
    here = analyze_store(store, plan, heads)
    assert cuda.waits == 0
    assert analyze_store(store, plan, heads, device=None).measured == here.measured, (
        "None is the best at hand"
    )
    # By clip and kind of tokens: figures, distances of two definitions, two sums; then pairs of blocks.
    assert 0 < cuda.waits <= N_CLIPS * 2 * 5 + 24, cuda.report()


@pytest.mark.parametrize("foreground", ["none", "auto"])
def test_pca(cuda: Device, tmp_path: Path, foreground: str) -> None:
    store = open_store(make_squares(tmp_path, ("one",), n_frames=N_FRAMES).write(tmp_path / "s.zarr"))
    settings = PcaSettings(foreground=foreground, film="none")
    shares = {}
    for device in ("cpu", "cuda"):
        heads = [("mine", Projection(3, seed=1))]
        report = draw_store(
            store,
            plan_pca(store, settings),
            settings,
            tmp_path,
            tmp_path / device,
            projections=heads,
            device=device,
        )
        assert not report.failures and (cuda.waits == 0 or device == "cuda")
        shares[device] = report.shares
    assert shares["cpu"] == shares["cuda"]
    stills = sorted((tmp_path / "cpu").rglob("*.png"))
    assert len(stills) == 2 * N_FRAMES
    for still in stills:
        assert (tmp_path / "cuda" / still.relative_to(tmp_path / "cpu")).read_bytes() == still.read_bytes()
    assert 0 < cuda.waits <= N_FRAMES, cuda.report()


def test_export_and_probe(cuda: Device, tmp_path: Path) -> None:
    store = open_store(labelled_case({"a": 4, "b": 4}).write(tmp_path / "s.zarr"))
    kinds = [
        make_kinds([("mine", Projection(DIM, seed=1))], DIM, device=device) for device in ("cpu", "cuda")
    ]
    cuda.clear()
    for video_id in store.video_ids:
        here, there = (
            pool_frames(store, of_device, video_id, device=device)
            for of_device, device in zip(kinds, ("cpu", "cuda"), strict=True)
        )
        np.testing.assert_array_equal(here, there)
    assert cuda.waits == len(store.video_ids), cuda.report()
