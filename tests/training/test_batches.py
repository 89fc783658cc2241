"""Feeding: orders by shard, several stores as one, and samples that frames stores make."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store_cases import Case, frames_case, pairs_case
from test_train import SMALL, After, ClipsCase, make_store

from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.core.settings import TrainSettings
from cosettle_cache.core.types import Fingerprint
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store.plan import choose_pair
from cosettle_cache.training.batches import EpochOrder, Replicas, ShuffleShards, Step, make_portions
from cosettle_cache.training.plan import make_train_plan
from cosettle_cache.training.run import train
from cosettle_cache.training.samples import HeldOut, JoinedSamples, choose_frames, make_samples, walk_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class OtherEncoder(Case):
    def fingerprint(self, **changes: object) -> Fingerprint:
        return super().fingerprint(backbone="other", weights_sha256="1" * 64, **changes)


@given(
    n=st.integers(1, 60),
    per_shard=st.integers(1, 9),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
    batch=st.integers(1, 9),
)
def test_shard_order_visits_a_few_shards_at_a_time(
    n: int, per_shard: int, window: int, seed: int, batch: int
) -> None:
    shuffle = ShuffleShards(lambda ids: ids // per_shard, window)
    order = EpochOrder(lambda _: np.arange(n), batch, seed, shuffle)
    visited = order.visited(0)
    assert sorted(visited.tolist()) == list(range(n))
    seen: list[int] = []
    for shard in (visited // per_shard).tolist():
        if shard not in seen[-window:]:
            assert shard not in seen
            seen.append(shard)
    assert [ids.tolist() for ids in order(0)] == [ids.tolist() for ids in order(0)]


@given(n=st.integers(1, 40), share=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_held_out_samples_leave_the_others_in_order(n: int, share: float, seed: int) -> None:
    held_out = np.random.default_rng(seed).random(n) < share
    everything = EpochOrder(lambda _: np.arange(n), 4, seed).visited(1)
    kept = EpochOrder(lambda _: np.arange(n), 4, seed, held_out=lambda ids: held_out[ids]).visited(1)
    assert kept.tolist() == [item for item in everything.tolist() if not held_out[item]]


@given(n=st.integers(0, 40), count=st.integers(1, 5), portions=st.integers(1, 4))
def test_replicas_and_portions_share_a_step_without_overlap(n: int, count: int, portions: int) -> None:
    step = Step(0, 0, 0.0, True, np.arange(n))
    parts = [list(make_portions([step], portions, Replicas(rank, count).share)) for rank in range(count)]
    assert all([part.ends_step for part in of_one] == [False] * (portions - 1) + [True] for of_one in parts)
    ids = np.concatenate([part.ids for of_one in parts for part in of_one])
    assert ids.tolist() == list(range(n))
    limit = math.ceil(math.ceil(n / count) / portions)
    assert max(len(part.ids) for of_one in parts for part in of_one) <= limit


@given(
    n=st.integers(3, 50),
    gap=st.floats(0.01, 0.9),
    draws=st.lists(st.floats(0, 0.999), min_size=2, max_size=4),
)
def test_frames_of_a_walk_are_equally_far_apart(n: int, gap: float, draws: list[float]) -> None:
    frames = choose_frames(n, gap, draws)
    assert len(frames) == len(draws) and all(0 <= frame < n for frame in frames)
    if len(draws) == 2:
        assert frames == choose_pair(n, gap, *draws)
    else:
        assert len(set(np.diff(frames).tolist())) == 1


def test_walks_go_out_and_back() -> None:
    assert [walk_of(n) for n in (3, 4, 5)] == [(0, 1, 2), (0, 1, 2, 1, 3), (0, 1, 2, 3, 2, 1, 4)]


def test_two_stores_are_one(tmp_path: Path) -> None:
    stores = [make_store(tmp_path, 5, name="a.zarr"), make_store(tmp_path, 7, seed=1, name="b.zarr")]
    samples = make_samples(stores, SMALL)
    ids = samples.epoch_ids(0)
    assert len(ids) == 12 and len(set(samples.slots(ids).tolist())) == sum(store.n_slots for store in stores)
    shuffled = np.random.default_rng(0).permutation(ids)
    for order in (shuffled, samples.arrange(shuffled)):
        found = np.empty((12, *samples.shape), np.float16)
        samples.read_into(order, found)
        wanted = [stores[item % 2].samples([item // 2])[0] for item in order.tolist()]
        assert np.array_equal(found, np.stack(wanted))
    assert (np.diff(samples.arrange(shuffled) % 2) >= 0).all()
    assert samples.name(int(ids[-1])).startswith("store 2, sample ")
    assert samples.videos(shuffled) == [
        stores[item % 2].sample_table["video_id"][item // 2].as_py() for item in shuffled.tolist()
    ]
    report = train(stores, replace(SMALL, order="shards", shard_window=1, validation=0.2), tmp_path / "run")
    assert not report.interrupted and report.samples == report.steps * 3


def test_stores_of_two_encoders_and_two_grids_are_refused(tmp_path: Path) -> None:
    first = make_store(tmp_path, 4)
    case = pairs_case(4, n_views=2, side=4, dim=16)
    other = open_store(OtherEncoder(case.manifest, case.plan).write(tmp_path / "other.zarr"))
    with pytest.raises(FingerprintError, match="another encoder") as raised:
        make_train_plan([first, other], SMALL)
    assert raised.value.details[0] == "backbone: wanted tiny, found other"
    small = open_store(pairs_case(4, n_views=2, side=2, dim=16).write(tmp_path / "small.zarr"))
    with pytest.raises(InputError, match="another shape"):
        make_train_plan([first, small], SMALL)


def make_frames_store(folder: Path, n_shifted: int = 2, name: str = "frames.zarr") -> FeatureStore:
    videos = [(f"clip{number}", 6 + number % 3, 4, 4) for number in range(8)]
    case = frames_case(videos, dim=16, n_shifted=n_shifted, slot_encodings=7)
    return open_store(ClipsCase(case.manifest, case.plan).write(folder / name))


@pytest.mark.parametrize("palindrome", [2, 3])
def test_frames_stores_make_samples(tmp_path: Path, palindrome: int) -> None:
    store = make_frames_store(tmp_path)
    settings = TrainSettings(palindrome=palindrome, gap=0.3, epochs=3, seed=5)
    samples: JoinedSamples = make_samples([store], settings)
    assert samples.shape == (palindrome + 1, 4, 4, 16)
    epochs = [samples.epoch_ids(epoch) for epoch in range(3)]
    assert len(np.unique(np.concatenate(epochs))) == 24
    found = np.empty((8, *samples.shape), np.float16)
    samples.read_into(epochs[1], found)
    for tokens, video, name in zip(
        found, samples.videos(epochs[1]), map(samples.name, epochs[1].tolist()), strict=True
    ):
        frames = [int(word) for word in name.split("frames ")[1].split(", shift")[0].split(", ")]
        plain = store.tokens(video)
        assert np.array_equal(tokens[:-1], plain[frames])
        shifted = shifted_encodings(store, video, int(frames[0]))
        assert any(np.array_equal(tokens[-1], item) for item in shifted)
    again = np.empty_like(found)
    make_samples([store], settings).read_into(epochs[1], again)
    assert np.array_equal(found, again)


def shifted_encodings(store: FeatureStore, video: str, frame: int) -> np.ndarray:
    rows = [
        row["row"]
        for row in store.index.to_pylist()
        if (row["video_id"], row["frame"], row["role"]) == (video, frame, "shifted")
    ]
    out = np.empty((len(rows), 4, 4, 16), np.float16)
    store.read_encodings(store.arrays[0].grid, rows, out)
    return out


@pytest.mark.parametrize("palindrome", [2, 3])
def test_training_from_frames_resumes_to_the_bit(tmp_path: Path, palindrome: int) -> None:
    store = make_frames_store(tmp_path)
    run = replace(SMALL, palindrome=palindrome, gap=0.3, order="shards", shard_window=2)
    whole = train(store, run, tmp_path / "whole")
    stop = threading.Event()
    train(store, run, tmp_path / "broken", progress=After(3, stop.set), stop=stop)
    resumed = train(store, run, tmp_path / "broken")
    assert (resumed.steps_before, resumed.projection_sha256) == (3, whole.projection_sha256)


def test_a_frames_store_of_two_grids_is_refused(tmp_path: Path) -> None:
    store = open_store(frames_case(n_shifted=1).write(tmp_path / "f.zarr"))
    with pytest.raises(InputError, match="one grid"):
        make_train_plan(store, SMALL)


def test_clips_with_missing_encodings_are_left_out(tmp_path: Path) -> None:
    videos = [(f"clip{number}", 6, 4, 4) for number in range(4)]
    case = frames_case(videos, dim=16, n_shifted=1, slot_encodings=12)
    store = open_store(case.write(tmp_path / "f.zarr", slots=[0, 2]))
    samples = make_samples([store], SMALL)
    assert samples.videos(samples.epoch_ids(0)) == ["clip0", "clip2"]
    assert make_train_plan(store, SMALL).warnings[-1].startswith("the store is not complete")
    none = open_store(frames_case([("a", 1, 4, 4)], dim=16, n_shifted=1).write(tmp_path / "g.zarr"))
    with pytest.raises(InputError, match="has 2 frames"):
        make_samples([none], SMALL)


def test_the_same_clip_is_held_out_of_every_store(tmp_path: Path) -> None:
    stores: list[Any] = [
        make_store(tmp_path, 20, name="a.zarr"),
        make_store(tmp_path, 20, seed=1, name="b.zarr"),
    ]
    samples = make_samples(stores, SMALL)
    held_out = HeldOut(samples, 0.3, 0)
    videos = samples.videos(held_out.ids)
    assert 0 < len(videos) < 30 and all(videos.count(video) == 2 for video in videos)
