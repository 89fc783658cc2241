"""`TokenClips`: windows, samples and draws as asked for, equal in any workers however they start."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import frames_case, pairs_case
from torch.utils.data import DataLoader

from cosettle_cache import Projection, TokenClips, open_store
from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import CosettleError, FingerprintError, InputError, UsageError
from cosettle_cache.heads.projection import save_projection
from cosettle_cache.training.clips import Clip

VIDEOS = (("bear", 9, 2, 3), ("camel", 7, 2, 3), ("dog", 8, 2, 3), ("eel", 2, 2, 3))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return frames_case(VIDEOS, n_shifted=1).write(tmp_path_factory.mktemp("clips") / "frames")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs_case(4).write(tmp_path_factory.mktemp("clips") / "pairs")


def summary(clips: TokenClips, **options: Any) -> list[tuple[tuple[str, ...], list[list[int]], float]]:
    """Return ids, frames and the sum of the tokens of every batch of a loader."""
    loader = DataLoader(clips, 2, **options)
    return [(tuple(b.video_id), b.frames.tolist(), float(b.tokens.double().sum())) for b in loader]


def test_every_window_has_the_tokens_of_its_frames(frames: Path) -> None:
    store, clips = open_store(frames), TokenClips(frames, 3, 2, step=2)
    starts = [(clip.video_id, int(clip.frames[0])) for clip in clips]
    assert starts == [
        ("bear", 0),
        ("bear", 2),
        ("bear", 4),
        ("camel", 0),
        ("camel", 2),
        ("dog", 0),
        ("dog", 2),
    ]
    assert clips.too_short == ("eel",)
    for clip in (*clips, clips[-1]):
        assert clip.tokens.dtype == torch.float16 and np.diff(clip.frames).tolist() == [2, 2]
        np.testing.assert_array_equal(clip.tokens, store.tokens(clip.video_id, clip.frames.tolist()))
    with pytest.raises(IndexError):
        clips[len(clips)]


def test_whole_videos_and_frames_of_a_store_that_keeps_every_second(tmp_path: Path) -> None:
    clips = TokenClips(open_store(frames_case(VIDEOS, every=2).write(tmp_path / "half")))
    assert [clip.frames.tolist() for clip in clips] == [[0, 2, 4, 6, 8], [0, 2, 4, 6], [0, 2, 4, 6], [0]]
    every_third = TokenClips(clips.store, None, 3)[0]
    assert every_third.frames.tolist() == [0, 6]
    loader = DataLoader(clips, batch_size=None)
    assert [len(clip.tokens) for clip in loader] == [5, 4, 4, 1]
    with pytest.raises(RuntimeError, match="equal size"):
        next(iter(DataLoader(clips, 2)))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_seed_and_epoch_decide_the_clips_and_not_the_workers(frames: Path, how: str) -> None:
    clips = TokenClips(frames, 3, seed=5)
    epochs = []
    for epoch in range(3):
        clips.set_epoch(epoch)
        epochs.append(summary(clips))
    assert epochs[0] != epochs[1]
    # Workers that stay, opened after this process has read.
    loader = DataLoader(clips, 2, num_workers=2, persistent_workers=True, multiprocessing_context=how)
    for epoch in (0, 1, 0):
        clips.set_epoch(epoch)
        found = [(tuple(b.video_id), b.frames.tolist(), float(b.tokens.double().sum())) for b in loader]
        assert found == epochs[epoch]
    anew = TokenClips(open_store(frames), 3, seed=5)
    anew.set_epoch(2)
    assert summary(anew) == epochs[2]
    assert summary(TokenClips(frames, 3, seed=6)) != epochs[0]


def test_draws_reach_every_start(frames: Path) -> None:
    clips = TokenClips(frames, 3, 2)
    starts = set()
    for epoch in range(60):
        clips.set_epoch(epoch)
        starts.add(int(clips[0].frames[0]))
    assert starts == set(range(5))  # of 9 frames, in windows of 5


def test_samples_of_a_pairs_store(pairs: Path) -> None:
    store, clips = open_store(pairs), TokenClips(pairs)
    assert len(clips) == len(store.sample_ids) == 8
    index = store.index.to_pylist()
    for number, clip in zip(store.sample_ids.tolist(), clips, strict=True):
        rows = index[3 * number : 3 * number + 3]
        assert [row["role"] for row in rows] == ["a", "b", "shifted"]
        assert (clip.video_id, clip.frames.tolist()) == (rows[0]["video_id"], [row["frame"] for row in rows])
        np.testing.assert_array_equal(clip.tokens, store.samples([number])[0])


def test_samples_that_failed_are_left_out(tmp_path: Path) -> None:
    path = pairs_case(4).write(tmp_path / "pairs", failures={"clip1": "it is broken"})
    clips = TokenClips(path)
    assert {clip.video_id for clip in clips} == {"clip0", "clip2", "clip3"}
    np.testing.assert_array_equal(clips[2].tokens, open_store(path).samples([4])[0])


def test_projected_tokens(frames: Path, tmp_path: Path) -> None:
    projection = Projection(8, seed=1)
    save_projection(tmp_path / "head.safetensors", projection, {})
    raw, clips = TokenClips(frames, 3), TokenClips(frames, 3, projection=tmp_path / "head.safetensors")
    for clip, wanted in zip(clips, raw, strict=True):
        assert clip.tokens.dtype == torch.float32 and not clip.tokens.requires_grad
        torch.testing.assert_close(clip.tokens, projection(wanted.tokens.float()).detach())
    assert summary(clips, num_workers=1) == summary(clips)
    save_projection(tmp_path / "other.safetensors", projection, {"weights_sha256": "1" * 64})
    with pytest.raises(FingerprintError, match="another encoder"):
        TokenClips(frames, projection=str(tmp_path / "other.safetensors"))


def test_one_grid_of_several_is_chosen_by_name(tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "grids")
    with pytest.raises(UsageError, match="has several") as error:
        TokenClips(path)
    assert error.value.wanted == "grid='2x3' or grid='3x2'"
    assert [clip.video_id for clip in TokenClips(path, grid="3x2")] == ["dog"]
    with pytest.raises(UsageError, match="no such one"):
        TokenClips(path, grid="4x4")


def test_pickled_it_is_opened_anew(frames: Path) -> None:
    clips = TokenClips(frames, 3, seed=2)
    before, data = clips[1], pickle.dumps(clips)
    again: Clip = pickle.loads(data)[1]
    assert len(data) < 20_000
    assert before.video_id == again.video_id and torch.equal(before.tokens, again.tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"length": 2, "step": 0}, "step must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"step": 2}, "whole videos have no step"),
        ({"length": 10}, "no video .* is long enough"),
        ({"length": 5, "stride": 3}, "no video .* is long enough"),
    ],
)
def test_what_means_nothing_is_refused(frames: Path, options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TokenClips(frames, **options)


def test_stores_that_cannot_serve(pairs: Path, tmp_path: Path) -> None:
    for options in ({"length": 2}, {"stride": 2}):
        with pytest.raises(UsageError, match="no length and no stride"):
            TokenClips(pairs, **options)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CosettleError):
            TokenClips(path)
    for case in (frames_case(VIDEOS), pairs_case()):
        with pytest.raises(InputError, match=r"no clip of .* yet"):
            TokenClips(case.write(tmp_path / case.plan.kind, slots=[]))


def test_the_example_learns_the_order_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["manifest", "build", "sprites", "--split", "train", "--out", "s.parquet"]) == 0
    encoder = ["--backbone", "timm/test_vit.r160_in1k", "--weights", "random", "--device", "cpu"]
    line = ["extract", *encoder, "--manifest", "s.parquet", "--plan", "frames", "--out", "s.zarr", "--quiet"]
    assert run_command(line) == 0
    example = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "temporal_head.py"))
    losses, accuracy = example["main"]("s.zarr", epochs=30, workers=0)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert accuracy > 0.8
    assert "held-out clips right" in capsys.readouterr().out
