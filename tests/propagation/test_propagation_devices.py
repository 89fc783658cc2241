"""On a GPU, pretended: no operator mixes devices, and longer clips make the host wait no more often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pretend_cuda import pretend_cuda
from propagation_cases import SquaresCase, make_squares, propagate_store, single_thread
from store_cases import folder_bytes

from cosettle_cache.core.settings import TrackSettings
from cosettle_cache.heads.projection import Projection
from cosettle_cache.propagation import PropagationReport
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.propagation.track import track_store
from cosettle_cache.store import open_store
from cosettle_cache.videos.queries import Queries


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@dataclass(frozen=True)
class NoisySquares(SquaresCase):
    """Tokens of which hardly two are alike."""

    def slot_tokens(self, slot):
        tokens = super().slot_tokens(slot)
        noise = np.random.default_rng(slot.index).normal(scale=0.2, size=tokens.shape)
        return (tokens + noise).astype(np.float16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Data and store of a clip by its number of frames."""
    found = {}
    for n_frames in (6, 12):
        root = tmp_path_factory.mktemp(f"{n_frames}")
        plain = make_squares(root / "data", ("one",), n_frames=n_frames)
        found[n_frames] = root / "data", NoisySquares(plain.manifest, plain.plan).write(root / "s.zarr")
    return found


def heads() -> dict[str, Any]:
    return {"projections": [("mine", Projection(3, seed=1))]}


def waits(run: Callable[[str], object]) -> tuple[int, str]:
    """Run twice on a pretended GPU; return how often the second run waited, and a report of it."""
    with pretend_cuda() as device:
        run("warm")
        device.clear()
        run("cuda")
        return device.waits, device.report()


@pytest.mark.parametrize(
    ("preset", "lists"), [("cosettle", ""), ("cosettle", "cuda"), ("cosettle", "cpu"), ("dino", "")]
)
def test_propagation_waits_as_often_for_longer_clips(clips, tmp_path: Path, preset: str, lists: str) -> None:
    protocol = make_protocol(preset, size="native", top_k=2, n_context=3, red_std=0.229)
    counts = []
    for n_frames, (data, path) in clips.items():
        place = tmp_path / str(n_frames)

        def run(out: str, path=path, data=data, place=place) -> PropagationReport:
            kept = {"": None, "cuda": place / f"lists {out}", "cpu": place / "lists cpu"}[lists]
            device = "cpu" if out == "cpu" else "cuda"  # as the commands say it
            options = {"overlays": "none", "device": device, "neighbors": kept}
            # Projected to so few channels tokens are nearly alike, and ties are searched again, with waits.
            options |= {} if preset == "dino" else heads()
            return propagate_store(open_store(path), data, protocol, place / out, **options)

        here, there = run("cpu"), list[PropagationReport]()
        counts.append(waits(lambda out, run=run, there=there: there.append(run(out))))
        assert there[1].complete and there[1].scores == here.scores
        assert there[1].n_reused == (2 if lists == "cpu" else 0)
        assert folder_bytes(place / "cuda/raw") == folder_bytes(place / "cpu/raw")
    assert counts[0][0] == counts[1][0] > 0, counts[1][1]


def test_ties_beyond_measure_are_searched_again(clips, tmp_path: Path) -> None:
    """Every token of an object is the same one."""
    data, _ = clips[6]
    store = open_store(make_squares(tmp_path, ("one",), n_frames=6).write(tmp_path / "s.zarr"))
    protocol = make_protocol("dino", size="native", top_k=2, n_context=3, red_std=0.229)
    reports = [propagate_store(store, data, protocol, tmp_path / "cpu", overlays="none")]
    with pretend_cuda():
        reports += [propagate_store(store, data, protocol, tmp_path / "o", overlays="none", device="cuda:0")]
    assert reports[0].scores == reports[1].scores


def test_tracking_waits_as_often_for_longer_clips(clips, tmp_path: Path) -> None:
    points = np.array([[20.0, 10.0], [70.0, 50.0], [40.0, 20.0]])
    queries = {"one": Queries(np.array([0, 0, 3]), points, np.arange(3))}
    counts = []
    for n_frames, (data, path) in clips.items():
        place = tmp_path / str(n_frames)

        def run(out: str, path=path, data=data, place=place) -> None:
            device = "cpu" if out == "cpu" else "cuda"  # as the commands say it
            options = {"task": "points", "queries": queries, "device": device, "pictures": "none", **heads()}
            assert track_store(open_store(path), data, TrackSettings(), place / out, **options).complete

        run("cpu")
        counts.append(waits(run))
        here, there = (pq.read_table(place / name / "tracks.parquet") for name in ("cpu", "cuda"))
        assert there.equals(here)
    assert counts[0][0] == counts[1][0] > 0, counts[1][1]
