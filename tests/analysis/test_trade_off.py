"""The trade-off metrics: the released values, plain loops in float64 as oracle, and the store's pass."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from store_cases import Case, frames_case, pairs_case

from cosettle_cache import trade_off
from cosettle_cache.analysis.run import AnalysisReport, analyze_store, plan_analysis
from cosettle_cache.analysis.trade_off import TradeOff, block_pairs, effective_rank
from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import read_json
from cosettle_cache.core.parallel import one_by_one
from cosettle_cache.core.settings import AnalyzeSettings
from cosettle_cache.core.tables import read_table
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.store import FeatureStore, open_store

CLIPS = [("ant", 9, 4, 4), ("bee", 11, 4, 4), ("cat", 40, 4, 4), ("dog", 8, 4, 4), ("eel", 17, 4, 4)]


@pytest.fixture(scope="module")
def released(golden: Callable[[str], Path]) -> torch.Tensor:
    tokens = load_file(golden("metrics/analysis.safetensors"))["features"]
    return tokens.unflatten(2, (14, 14))


def test_released_values(released: torch.Tensor, golden_json: Callable[[str], Any]) -> None:
    wanted = golden_json("metrics/analysis.json")
    found = asdict(trade_off(released, definition="compat", n_frames=16, batch_clips=5))
    expected = {
        "inter_distance": wanted["inter"]["original"],
        "intra_distance": wanted["intra"]["original"],
        "effective_rank": wanted["effective_rank"],
        "cycle_accuracy": wanted["cycle_accuracy"],
    }
    for percent in (90, 95, 100):
        for side in ("inter", "intra"):
            expected[f"d_{side}_{percent}"] = wanted[side][f"normalized_{percent}"]
            expected[f"{side}_diameter_{percent}"] = wanted[f"{side}_diameter"][str(percent)]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_all_tokens_instead_of_those_drawn_changes_inter_distances_only(released: torch.Tensor) -> None:
    drawn = asdict(trade_off(released, definition="compat", n_frames=16, batch_clips=5))
    whole = asdict(trade_off(released))
    for name in drawn:
        same = drawn[name] == pytest.approx(whole[name], rel=1e-6)
        assert same == (not name.startswith(("inter_distance", "d_inter", "margin"))), name


def test_the_mean_of_batches_weighs_a_short_one_as_much(released: torch.Tensor) -> None:
    one_by_one = [
        trade_off(released[[n, n]], definition="compat", n_frames=16).cycle_accuracy for n in range(10)
    ]
    batches = trade_off(released, definition="compat", n_frames=16, batch_clips=7).cycle_accuracy
    assert batches == pytest.approx((np.mean(one_by_one[:7]) + np.mean(one_by_one[7:])) / 2, abs=1e-6)


def clip_arrays(seed: int = 0) -> list[np.ndarray]:
    """Clips of different lengths on a 4x4 grid whose frames drift."""
    generator = np.random.default_rng(seed)
    clips = []
    for n_frames in (9, 8, 13):
        drift = generator.standard_normal((n_frames, 4, 4, 6)).cumsum(0)
        clips.append((generator.standard_normal((1, 4, 4, 6)) * 3 + 0.3 * drift).astype(np.float32))
    return clips


def test_the_papers_definition_by_plain_loops() -> None:
    clips = clip_arrays()
    found = trade_off(clips, definition="paper", gamma=0.5)
    flat = [clip.reshape(len(clip), 16, 6).astype(np.float64) for clip in clips]
    intra, quotients, diameters = [], [], []
    for clip in flat:
        moved = [np.linalg.norm(clip[t] - clip[t + 1], axis=1) for t in range(3, len(clip) - 4)]
        radii = [np.linalg.norm(frame - clip.mean(0), axis=1).mean() for frame in clip]
        intra.append(np.mean(moved))
        diameters.append(2 * max(radii))
        quotients.append(intra[-1] / diameters[-1])
    middles = [clip[len(clip) // 2] for clip in flat]
    centre = np.mean(middles, axis=0)
    diameter = 2 * max(np.linalg.norm(middle - centre, axis=1).mean() for middle in middles)
    inter = np.mean([np.linalg.norm(a - b, axis=1).mean() for a, b in combinations(middles, 2)])
    assert found.intra_distance == pytest.approx(np.mean(intra), rel=1e-5)
    assert found.intra_diameter_100 == pytest.approx(np.mean(diameters), rel=1e-5)
    assert found.d_intra_100 == pytest.approx(np.mean(quotients), rel=1e-5)
    assert found.inter_distance == pytest.approx(inter, rel=1e-5)
    assert found.d_inter_100 == pytest.approx(inter / diameter, rel=1e-5)
    assert found.margin_100 == pytest.approx(inter / diameter - 0.5 * np.mean(quotients), rel=1e-5)
    assert found.cycle_accuracy == pytest.approx(np.mean([walks(clip) for clip in clips]))
    assert found.d_inter_90 is None


def walks(clip: np.ndarray) -> float:
    """Oracle of the cycle accuracy on unit tokens."""
    unit = clip / np.linalg.norm(clip, axis=-1, keepdims=True)
    pooled = unit.reshape(len(clip), 2, 2, 2, 2, 6).mean(axis=(2, 4)).reshape(len(clip), 4, 6)
    found = []
    for start, turn in ((0.25, 0.4), (0.35, 0.5), (0.45, 0.6), (0.55, 0.7), (0.65, 0.8)):
        a, b = pooled[int(start * len(clip))], pooled[int(turn * len(clip))]
        there, back = (np.exp(m / 0.03) / np.exp(m / 0.03).sum(1, keepdims=True) for m in (a @ b.T, b @ a.T))
        found.append((there @ back).argmax(1) == np.arange(4))
    return float(np.mean(found))


def test_arrays_and_tensors_give_the_same() -> None:
    clips = [clip[:8] for clip in clip_arrays()]
    found = trade_off(clips)
    assert trade_off([torch.from_numpy(clip) for clip in clips]) == found
    assert trade_off(np.stack(clips)) == trade_off(torch.from_numpy(np.stack(clips))) == found


def test_clips_that_stand_still_have_no_intra_distance() -> None:
    clips = [np.repeat(clip[:1], 9, axis=0) for clip in clip_arrays()]
    found = trade_off(clips)
    assert found.intra_distance == 0
    constant = trade_off(np.ones((2, 8, 4, 4, 6), np.float32))
    assert (constant.d_intra_100, constant.d_inter_100) == (0, 0)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(np.eye(5) * 7) == pytest.approx(1)
    assert effective_rank(np.diag([1.0, 0, 0, 0])) == pytest.approx(0.25)
    assert effective_rank(np.diag([9.0, 1, 0, 0])) == pytest.approx(
        np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 4
    )


@pytest.mark.parametrize(("n_clips", "size"), [(2, 1), (5, 2), (6, 3), (7, 100)])
def test_every_two_clips_meet_once(n_clips: int, size: int) -> None:
    met = []
    for pair in block_pairs(n_clips, size):
        first, second = (range(part.start, part.stop) for part in (pair.first, pair.second))
        both = [(a, b) for a in first for b in second]
        met += [(a, b) for a, b in both if a < b] if pair.alone else both
    assert sorted(met) == list(combinations(range(n_clips), 2))


def test_what_cannot_be_measured_in_memory() -> None:
    clips = clip_arrays()
    with pytest.raises(InputError, match="need several"):
        trade_off(clips[:1])
    with pytest.raises(InputError, match="another length"):
        trade_off([clips[0], clips[1][:7]])
    with pytest.raises(InputError, match="grid"):
        trade_off([clips[0], clips[1][:, :2]])
    with pytest.raises(InputError, match="too small"):
        trade_off([clip[:, :1] for clip in clips])
    clips[1][3, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        trade_off(clips)
    with pytest.raises(UsageError, match="unknown definition"):
        trade_off(clips, definition="folklore")


def heads(dim: int = 8) -> list[tuple[str, Projection]]:
    return [("linear", Projection(dim, seed=1)), ("mlp", Projection(dim, "mlp2", seed=2))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return open_store(frames_case(CLIPS, slot_encodings=7).write(tmp_path_factory.mktemp("a") / "s.zarr"))


def analyze(store: FeatureStore, **options: Any) -> AnalysisReport:
    return analyze_store(store, plan_analysis(store, AnalyzeSettings()), heads(), **options)


def known(figures: TradeOff) -> dict[str, float]:
    return {name: value for name, value in asdict(figures).items() if value is not None}


@torch.no_grad()
def test_a_store_gives_what_its_tokens_in_memory_give(store: FeatureStore) -> None:
    report = analyze(store)
    raw = [torch.from_numpy(store.tokens(name)).float() for name in store.video_ids]
    kinds = {"raw": raw} | {name: [head(clip) for clip in raw] for name, head in heads()}
    assert len(report.measured) == 2 * len(kinds)
    for item in report.measured:
        alone = trade_off(kinds[item.tokens], definition=item.definition.name)
        assert known(item.total) == pytest.approx(known(alone), rel=1e-5)
    assert [clip.video_id for clip in report.plan.clips] == [name for name, *_ in CLIPS]


@dataclass(frozen=True)
class AnyOrder:
    """Does the items in an order drawn from a seed."""

    seed: int

    def __call__(self, unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        shuffled = list(items)
        random.Random(self.seed).shuffle(shuffled)
        yield from one_by_one(unit, shuffled)


def in_another_process(unit: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    todo = list(items)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield from zip(todo, pool.map(unit, todo), strict=True)


@pytest.mark.parametrize("run", [AnyOrder(3), in_another_process], ids=["any order", "another process"])
def test_whoever_works_the_figures_are_the_same(
    store: FeatureStore, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosettle_cache.analysis.run.BLOCK_BYTES", 2 * 4 * 16 * 8)
    alone, spread = analyze(store), analyze(store, run=run)
    assert alone.measured == spread.measured


def test_blocks_and_held_clips_do_not_move_figures(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(store)
    monkeypatch.setattr("cosettle_cache.analysis.run.HELD_BYTES", 0)
    monkeypatch.setattr("cosettle_cache.analysis.run.BLOCK_BYTES", 0)
    monkeypatch.setattr("cosettle_cache.analysis.trade_off.BLOCK_TOKENS", 3 * 16)
    pieces = analyze(store)
    for one, other in zip(whole.measured, pieces.measured, strict=True):
        assert known(other.total) == pytest.approx(known(one.total), rel=1e-5)


def test_clips_of_several_grids_are_compared_at_common_places(tmp_path: Path) -> None:
    case = frames_case([("ant", 9, 4, 6), ("bee", 9, 6, 4), ("cat", 9, 4, 6)])
    store = open_store(case.write(tmp_path / "s.zarr"))
    report = analyze(store)
    assert str(report.plan.places) == "4x4"
    assert report.measured[0].total.n_videos == 3


class Spoiled(Case):
    """A case whose second slot holds a token that is not finite."""

    def slot_tokens(self, slot: Any) -> np.ndarray:
        tokens = super().slot_tokens(slot)
        if slot.index == 1:
            tokens[1, 0, 0, 0] = np.inf
        return tokens


def run(*arguments: object) -> int:
    return run_command(["analyze", *map(str, arguments)])


def test_as_typed(store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, head = tmp_path / "out", tmp_path / "mine" / "projection.safetensors"
    head.parent.mkdir()
    save_projection(head, heads()[0][1], {})
    typed = ("--features", store.path, "--projection", head, "--out", out)
    assert run(*typed, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == ["raw", "mine"]
    assert not out.exists()
    assert run(*typed, "--json", "--quiet") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == read_json(out / "analysis.json")
    rows = read_table(out / "analysis.parquet").to_pylist()
    assert [(row["definition"], row["tokens"]) for row in rows] == [
        (name, tokens) for name in ("released", "paper") for tokens in ("raw", "mine")
    ]
    for row in rows:
        figures = document["figures"][row["definition"]][row["tokens"]]
        assert figures == {name: row[name] for name in figures}
        assert row["manifest_digest"] == store.fingerprint.manifest_digest
        assert bool(row["projection_sha256"]) == (row["tokens"] == "mine")
    videos = read_table(out / "analysis_videos.parquet").to_pylist()
    assert len(videos) == 4 * len(CLIPS)
    intra = [row["d_intra_100"] for row in videos[: len(CLIPS)]]
    assert rows[0]["d_intra_100"] == pytest.approx(np.mean(intra))
    assert (out / "tradeoff.png").stat().st_size > 5000


def test_short_clips_are_named_and_the_others_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = frames_case([*CLIPS, ("fly", 7, 4, 4)], slot_encodings=7)
    store, out = case.write(tmp_path / "s.zarr"), tmp_path / "out"
    assert run("--features", store, "--out", out, "--quiet") == 4
    captured = capsys.readouterr()
    assert "1 of 6 clips were left out" in captured.err
    assert "fly: 7 frames; the definition released needs 8 frames or more" in captured.err
    assert "5 clips, 85 frames" in captured.out
    assert list(read_json(out / "analysis.json")["left_out"]) == ["fly"]
    assert run("--features", store, "--out", out, "--compat", "--quiet") == 3
    assert "wanted: 2 clips" in capsys.readouterr().err


def test_bad_tokens_and_failed_slots_cost_their_clips_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = frames_case(CLIPS, slot_encodings=7)
    case = Spoiled(**{name: getattr(plain, name) for name in ("manifest", "plan", "seed", "encoder")})
    store = case.write(tmp_path / "s.zarr", range(case.plan.n_slots - 1))
    assert run("--features", store, "--out", tmp_path / "out", "--quiet") == 4
    captured = capsys.readouterr()
    assert "ant: tokens that are not finite" in captured.err
    assert "eel: its slots have not been extracted yet" in captured.err
    assert "3 clips" in captured.out


def test_what_does_not_fit_ends_with_a_sentence(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_case(3).write(tmp_path / "pairs.zarr")
    assert run("--features", pairs) == 3
    assert "--plan frames" in capsys.readouterr().err
    wide = tmp_path / "wide.safetensors"
    save_projection(wide, Projection(4), {})
    assert run("--features", store.path, "--projection", wide) == 3
    assert "another width" in capsys.readouterr().err
    few = frames_case(CLIPS[:1]).write(tmp_path / "few.zarr")
    assert run("--features", few) == 3
    assert "need several" in capsys.readouterr().err
