"""The closed-form head against plain loops in float64, and against what the theory says of made-up data."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_cuda import Device
from safetensors.torch import load_file
from store_cases import Case, frames_case, pairs_case

from cosettle_cache.core.console import SILENT
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.parallel import one_by_one
from cosettle_cache.core.settings import SpectralSettings
from cosettle_cache.core.tables import read_table
from cosettle_cache.core.types import Grid, Role, Slot
from cosettle_cache.heads.projection import load_projection, projection_sha256, read_provenance
from cosettle_cache.search.correspondence import choose_places, match_nearest, place_index
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.training.frame_pairs import FramePairs, list_pairs
from cosettle_cache.training.spectral import GatherUnit, SpectralReport, choose_held_out, fit_spectral, gather
from cosettle_cache.training.spectrum import SpectralStatistics, Spectrum, make_spectrum

Pair = tuple[str, np.ndarray, np.ndarray]


def unit(tokens: np.ndarray) -> np.ndarray:
    wide = tokens.astype(np.float64).reshape(-1, tokens.shape[-1])
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def all_pairs(store: FeatureStore) -> list[Pair]:
    """Oracle: clip and unit tokens of both frames of every pair, through the store's plainest calls."""
    if store.plan_kind == "pairs":
        videos = store.sample_table["video_id"].to_pylist()
        samples = store.samples(store.sample_ids)
        return [(name, unit(s[0]), unit(s[1])) for name, s in zip(videos, samples, strict=True)]
    found = []
    for name in store.video_ids:
        frames = [unit(frame) for frame in store.tokens(name)]
        found += [(name, a, b) for a, b in pairwise(frames)]
    return found


def match(first: np.ndarray, second: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Oracle of both rules, token by token."""
    if rule == "position":
        return first, second
    closest = []
    for token in first:
        distances = np.linalg.norm(second - token, axis=1)
        closest.append((distances.min(), token, second[distances.argmin()]))
    closest = sorted(closest, key=lambda item: item[0])[: max(1, len(first) // 2)]
    return np.stack([item[1] for item in closest]), np.stack([item[2] for item in closest])


def held_out_names(store: FeatureStore, settings: SpectralSettings) -> set[str]:
    names = list_pairs(store).video_ids
    return {name for name, out in zip(names, choose_held_out(names, settings), strict=True) if out}


def intra_covariance(pairs: Iterable[Pair], rule: str) -> tuple[np.ndarray, int]:
    differences = np.concatenate([np.subtract(*match(a, b, rule)) for _, a, b in pairs])
    return differences.T @ differences / len(differences), len(differences)


CASES = {
    "pairs": lambda: pairs_case(9, n_views=2, side=4, slot_encodings=12),
    "frames": lambda: frames_case(
        [("ant", 6, 2, 3), ("bee", 5, 2, 3), ("cat", 4, 3, 2), ("dog", 7, 3, 2), ("eel", 1, 2, 3)],
        slot_encodings=4,
        n_shifted=1,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("stores") / f"{request.param}.zarr"
    return open_store(CASES[request.param]().write(path))


def test_on_a_gpu_the_host_waits_once_a_group(tmp_path: Path, cuda: Device) -> None:
    store = open_store(pairs_case(12, n_views=2, side=4, dim=16).write(tmp_path / "s.zarr"))
    here = fit_spectral(store, SpectralSettings(), tmp_path / "cpu")
    assert cuda.waits == 0
    there = fit_spectral(store, SpectralSettings(), tmp_path / "cuda", device="cuda")
    n_groups = len(list_pairs(store).groups)
    # By group: three sums and whether all is finite, or that alone; at the end two lists of margins, and what
    # they need of the spectrum.
    assert cuda.waits <= 5 * n_groups + 4, cuda.report()
    assert there.measured.margin == pytest.approx(here.measured.margin, rel=1e-9)


@pytest.mark.parametrize("rule", ["nearest", "position"])
def test_projection_equals_the_plain_formula(store: FeatureStore, rule: str, tmp_path: Path) -> None:
    settings = SpectralSettings(correspondence=rule, spectral_lambda=0.2)
    report = fit_spectral(store, settings, tmp_path)
    out = held_out_names(store, settings)
    fitted = [pair for pair in all_pairs(store) if pair[0] not in out]
    covariance, n_differences = intra_covariance(fitted, rule)
    values, vectors = np.linalg.eigh(covariance)
    wanted = vectors @ np.diag(np.sqrt(np.clip(1 - values / 0.4, 0, None))) @ vectors.T
    projection = load_projection(tmp_path / "projection.safetensors", dim=8)
    assert projection.head == "spectral"
    assert np.allclose(projection.linears[0].weight.detach().numpy(), wanted, atol=2e-5)
    assert report.n_differences == n_differences
    assert report.n_directions == int((values < 0.4).sum())
    spectrum = read_table(tmp_path / "spectrum.parquet")
    assert np.allclose(spectrum["intra"].to_numpy(), values, atol=1e-6)
    assert spectrum["energy"].to_numpy().sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rule", ["nearest", "position"])
def test_margins_equal_the_plain_definition(store: FeatureStore, rule: str, tmp_path: Path) -> None:
    settings = SpectralSettings(correspondence=rule)
    report = fit_spectral(store, settings, tmp_path)
    out = sorted(held_out_names(store, settings))
    matrix = load_projection(tmp_path / "projection.safetensors").linears[0].weight.detach().double().numpy()
    pairs = [pair for pair in all_pairs(store) if pair[0] in out]
    for margin, apply in ((report.measured, matrix), (report.raw_measured, np.eye(8))):
        d_intra = np.mean([mean_intra([p for p in pairs if p[0] == name], rule, apply) for name in out])
        d_inter = mean_inter([representative(store, name) for name in out], apply)
        assert margin.d_intra == pytest.approx(d_intra, rel=1e-4)
        assert margin.d_inter == pytest.approx(d_inter, rel=1e-4)
        assert margin.margin == pytest.approx(d_inter - 0.3 * d_intra, rel=1e-4)


def mean_intra(pairs: list[Pair], rule: str, matrix: np.ndarray) -> float:
    """Oracle: mean over a clip's pairs of the mean distance of corresponding tokens, sphere diameter 1."""
    matched = [match(a, b, rule) for _, a, b in pairs]
    distances = [np.linalg.norm(unit(a @ matrix.T) - unit(b @ matrix.T), axis=1).mean() for a, b in matched]
    return float(np.mean(distances)) / 2


def mean_inter(frames: list[np.ndarray], matrix: np.ndarray) -> float:
    """Oracle: mean distance of tokens at the same place over all pairs of frames, sphere diameter 1."""
    projected = [unit(frame @ matrix.T) for frame in frames]
    couples = [(a, b) for i, a in enumerate(projected) for b in projected[:i]]
    return float(np.mean([np.linalg.norm(a - b, axis=1).mean() for a, b in couples])) / 2


def representative(store: FeatureStore, name: str) -> np.ndarray:
    """Oracle: the frame that stands for a clip, at the 2x2 or 4x4 places that all grids of the case have."""
    if store.plan_kind == "pairs":
        table = store.sample_table.to_pylist()
        sample = next(row["sample"] for row in table if row["video_id"] == name and row["view"] == 0)
        return unit(store.samples([sample])[0, 0])
    tokens = store.tokens(name)
    frame = tokens[(len(tokens) - 1) // 2]
    rows, cols = frame.shape[:2]
    places = [(r * rows // 4, c * cols // 4) for r in (1, 3) for c in (1, 3)]
    return unit(np.stack([frame[r, c] for r, c in places]))


def test_the_chosen_lambda_has_the_largest_margin(store: FeatureStore, tmp_path: Path) -> None:
    report = fit_spectral(store, SpectralSettings(n_lambdas=5), tmp_path)
    rows = read_table(tmp_path / "margins.parquet").to_pylist()
    assert len(rows) == 6
    assert rows[-1]["spectral_lambda"] == math.inf
    best = max(rows[:-1], key=lambda row: row["measured_margin"])
    assert best["chosen"]
    assert best["spectral_lambda"] == report.spectral_lambda
    assert best["measured_margin"] == report.measured.margin
    assert sum(row["chosen"] for row in rows) == 1
    document = json.loads((tmp_path / "spectral.json").read_text())
    assert document["predicted"]["margin"] == report.predicted.margin
    provenance = read_provenance(tmp_path / "projection.safetensors")
    assert provenance["weights_sha256"] == store.fingerprint.weights_sha256
    assert json.loads(provenance["settings"])["n_lambdas"] == 5


def test_predicted_distances_are_root_mean_squares_over_the_fitted_clips(
    store: FeatureStore, tmp_path: Path
) -> None:
    settings = SpectralSettings(correspondence="position", spectral_lambda=0.3)
    report = fit_spectral(store, settings, tmp_path)
    out = held_out_names(store, settings)
    names = sorted({name for name, _, _ in all_pairs(store)} - out)
    matrix = load_projection(tmp_path / "projection.safetensors").linears[0].weight.detach().double().numpy()
    frames = [representative(store, name) @ matrix for name in names]
    length = np.mean([np.square(frame).sum(1).mean() for frame in frames])
    couples = [a - b for i, a in enumerate(frames) for b in frames[:i]]
    inter = np.mean([np.square(couple).sum(1).mean() for couple in couples])
    moved = np.concatenate([(a - b) @ matrix for name, a, b in all_pairs(store) if name not in out])
    intra = np.square(moved).sum(1).mean()
    assert report.predicted.d_inter == pytest.approx(math.sqrt(inter / length) / 2, rel=1e-4)
    assert report.predicted.d_intra == pytest.approx(math.sqrt(intra / length) / 2, rel=1e-4)


@dataclass(frozen=True)
class AnyOrder:
    """Does the groups in a shuffled order, as workers would."""

    seed: int

    def __call__(
        self, unit: Callable[[FramePairs], SpectralStatistics], groups: Iterable[FramePairs]
    ) -> Iterator[tuple[FramePairs, SpectralStatistics]]:
        shuffled = list(groups)
        random.Random(self.seed).shuffle(shuffled)
        yield from one_by_one(unit, shuffled)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_completion_does_not_move_a_bit(store: FeatureStore, seed: int, tmp_path: Path) -> None:
    alone = fit_spectral(store, SpectralSettings(), tmp_path / "a")
    mixed = fit_spectral(store, SpectralSettings(), tmp_path / "b", run=AnyOrder(seed))
    assert mixed.projection_sha256 == alone.projection_sha256
    for name in ("projection.safetensors", "spectrum.parquet", "margins.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def in_another_process(
    unit: Callable[[FramePairs], SpectralStatistics], groups: Iterable[FramePairs]
) -> Iterator[tuple[FramePairs, SpectralStatistics]]:
    todo = list(groups)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield from zip(todo, pool.map(unit, todo), strict=True)


def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    store = open_store(CASES["pairs"]().write(tmp_path / "s.zarr"))
    alone = fit_spectral(store, SpectralSettings(), tmp_path / "a")
    spread = fit_spectral(store, SpectralSettings(), tmp_path / "b", run=in_another_process)
    assert len(list_pairs(store).groups) > 2
    assert spread.projection_sha256 == alone.projection_sha256


def test_statistics_of_parts_add_up_to_those_of_the_whole(store: FeatureStore) -> None:
    pairs = list_pairs(store)
    work = GatherUnit(store, "nearest", choose_places([layout.grid for layout in store.arrays]))
    whole = gather(work, pairs.groups, one_by_one, SILENT)
    even = np.arange(len(pairs.video_ids)) % 2 == 0
    parts = [gather(work, pairs.of_videos(half), one_by_one, SILENT) for half in (even, ~even)]
    total = parts[0] + parts[1]
    assert (total.n_differences, total.n_videos) == (whole.n_differences, whole.n_videos)
    assert np.allclose(total.differences, whole.differences, atol=1e-12)
    assert np.allclose(total.products, whole.products, atol=1e-12)


@dataclass(frozen=True)
class Moving(Case):
    """Clips whose tokens keep their own direction and jitter in the first `n_jitter` channels only."""

    n_jitter: int = 2

    def slot_tokens(self, slot: Slot) -> np.ndarray:
        tokens = super().slot_tokens(slot).astype(np.float64)
        for number, encoding in enumerate(slot.encodings):
            key = [ord(letter) for letter in encoding.video_id]
            still = np.random.default_rng(key).standard_normal(tokens.shape[1:])
            still[..., : self.n_jitter] = 0
            jitter = 0.3 * tokens[number] / np.linalg.norm(tokens[number], axis=-1, keepdims=True)
            jitter[..., self.n_jitter :] = 0
            still /= np.linalg.norm(still, axis=-1, keepdims=True)
            moves = encoding.role in (Role.A, Role.B, Role.PLAIN)
            tokens[number] = still + jitter if moves else still
        return tokens.astype(np.float16)


@pytest.fixture(scope="module")
def moving_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    case = pairs_case(12, n_views=2, side=4, slot_encodings=12)
    path = tmp_path_factory.mktemp("moving") / "s.zarr"
    return open_store(Moving(case.manifest, case.plan).write(path))


def test_directions_that_only_jitter_are_removed(moving_store: FeatureStore, tmp_path: Path) -> None:
    settings = SpectralSettings(correspondence="position")
    report = fit_spectral(moving_store, settings, tmp_path)
    spectrum = read_table(tmp_path / "spectrum.parquet")["intra"].to_numpy()
    assert spectrum[-2] > 20 * spectrum[-3]
    # Under a threshold between the two groups the projection forgets the jitter and keeps the rest.
    between = replace(settings, spectral_lambda=float(spectrum[-2]) / 2.5)
    removed = fit_spectral(moving_store, between, tmp_path / "between")
    assert removed.n_directions == 6
    weight = load_projection(tmp_path / "between" / "projection.safetensors").linears[0].weight.detach()
    assert weight[:2].abs().max() < 0.02
    assert (weight[2:, 2:] - torch.eye(6)).abs().max() < 0.1
    assert removed.measured.d_intra < 0.3 * removed.raw_measured.d_intra
    assert removed.measured.margin > removed.raw_measured.margin
    assert report.measured.margin >= removed.measured.margin - 0.01
    assert removed.predicted.margin > removed.raw_predicted.margin


def test_a_very_large_lambda_is_the_identity(store: FeatureStore, tmp_path: Path) -> None:
    report = fit_spectral(store, SpectralSettings(spectral_lambda=1e9), tmp_path)
    weight = load_projection(tmp_path / "projection.safetensors").linears[0].weight.detach()
    assert (weight - torch.eye(8)).abs().max() < 1e-6
    assert report.n_directions == 8
    assert report.measured.margin == pytest.approx(report.raw_measured.margin, rel=1e-6)


def test_a_lambda_that_removes_everything_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="removes all directions") as raised:
        fit_spectral(store, SpectralSettings(spectral_lambda=1e-9), tmp_path)
    assert "half the smallest eigenvalue" in str(raised.value.wanted)
    assert not list(tmp_path.iterdir())
    for nothing in (-1.0, 0.0, math.inf, math.nan):
        with pytest.raises(UsageError, match=r"threshold|must be a finite number"):
            fit_spectral(store, SpectralSettings(spectral_lambda=nothing), tmp_path)
    with pytest.raises(UsageError, match="unknown correspondence"):
        fit_spectral(store, SpectralSettings(correspondence="flow"), tmp_path)


def test_too_few_clips_and_clips_that_stand_still(tmp_path: Path) -> None:
    few = open_store(pairs_case(3).write(tmp_path / "few.zarr"))
    with pytest.raises(InputError, match="too few clips") as raised:
        fit_spectral(few, SpectralSettings(), tmp_path / "out")
    assert raised.value.found == "3"
    single = frames_case([("ant", 1, 2, 2), ("bee", 1, 2, 2)])
    with pytest.raises(InputError, match="no two frames"):
        fit_spectral(open_store(single.write(tmp_path / "single.zarr")), SpectralSettings(), tmp_path / "out")
    with pytest.raises(InputError, match="stand still"):
        make_spectrum(SpectralStatistics(3, np.zeros((2, 2)), 2, np.eye(2), np.ones((1, 2))))


def test_tokens_that_are_not_finite_are_named(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Broken(Case):
        def slot_tokens(self, slot: Slot) -> np.ndarray:
            tokens = super().slot_tokens(slot)
            tokens[1, 0, 0, 0] = np.inf
            return tokens

    case = pairs_case(6)
    store = open_store(Broken(case.manifest, case.plan).write(tmp_path / "s.zarr"))
    with pytest.raises(InputError, match="not finite") as raised:
        fit_spectral(store, SpectralSettings(), tmp_path / "out")
    assert raised.value.details[0].startswith("array 2x2, from rows")


def test_held_out_clips_depend_on_their_names_alone() -> None:
    names = [f"clip{number}" for number in range(40)]
    settings = SpectralSettings()
    chosen = {name for name, out in zip(names, choose_held_out(names, settings), strict=True) if out}
    assert len(chosen) == 8
    backwards = choose_held_out(names[::-1], settings)
    assert chosen == {name for name, out in zip(names[::-1], backwards, strict=True) if out}
    assert choose_held_out(names, replace(settings, max_held_out=3)).sum() == 3
    assert choose_held_out(names[:4], replace(settings, held_out=0.9)).sum() == 2
    assert not np.array_equal(
        choose_held_out(names, replace(settings, seed=1)), choose_held_out(names, settings)
    )


def test_places_of_an_equal_grid_are_its_tokens() -> None:
    assert place_index(Grid(3, 2), Grid(3, 2)).tolist() == list(range(6))
    assert place_index(Grid(4, 6), Grid(2, 2)).tolist() == [7, 10, 19, 22]
    assert choose_places([Grid(14, 14)]) == choose_places([Grid(30, 55), Grid(30, 72)]) == Grid(14, 14)


def test_nearest_is_the_released_rule(
    golden: Callable[[str], Path], golden_json: Callable[[str], Any]
) -> None:
    tokens = load_file(golden("metrics/analysis.safetensors"))["features"].float()
    distances = []
    for frames in tokens[:, 3:-3]:
        first, second = match_nearest(frames[:-1], frames[1:])
        assert first.shape[1] == 98
        distances.append((first - second).norm(dim=-1).mean())
    wanted = golden_json("metrics/analysis.json")["intra"]["original"]
    assert torch.stack(distances).mean().item() == pytest.approx(wanted, rel=1e-4)


def test_report_and_file_agree(store: FeatureStore, tmp_path: Path) -> None:
    report = fit_spectral(store, SpectralSettings(), tmp_path)
    assert isinstance(report, SpectralReport)
    assert report.projection_sha256 == projection_sha256(load_projection(tmp_path / "projection.safetensors"))
    assert report.n_held_out == 2
    assert report.to_json()["folder"] == str(tmp_path)


@settings(max_examples=25)
@given(st.integers(0, 2**16))
def test_the_margin_grows_on_the_condition_that_the_docs_state(seed: int) -> None:
    intra, inter, energy = np.random.default_rng(seed).gamma(1.0, size=(3, 6))
    spectrum = Spectrum(np.eye(6), np.sort(intra) / 100, inter, energy / energy.sum())
    weakest, raw = spectrum.predict(1e4, 0.3), spectrum.predict(math.inf, 0.3)
    means = [np.average(spectrum.intra, weights=item) for item in (inter, energy, spectrum.intra)]
    gain = 0.3 * raw.d_intra * (means[2] - means[1]) - raw.d_inter * (means[0] - means[1])
    assert (weakest.margin - raw.margin) * 2e4 == pytest.approx(gain / 2, rel=1e-2, abs=1e-6)
