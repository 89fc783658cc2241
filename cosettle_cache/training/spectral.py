"""The projection that the paper's Theorem 1 gives in closed form, without training.

A store comes in; a folder with the projection, its spectrum, the margin of every threshold tried and a report
goes out. One pass over the frame pairs sums up how corresponding unit tokens differ, group by group, here or
on workers, with the same bits; a second one over the clips held out measures. docs/training.md derives it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import own_folder
from cosettle_cache.core.parallel import Run, in_order, one_by_one, upload
from cosettle_cache.core.settings import SpectralSettings, draw_mark, flat
from cosettle_cache.core.tables import write_json, write_table
from cosettle_cache.core.types import Grid
from cosettle_cache.heads.projection import Projection, projection_sha256, save_projection
from cosettle_cache.search.correspondence import choose_places, find_correspondence, place_index
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore
from cosettle_cache.training.frame_pairs import FramePairs, PairList, list_pairs, read_pairs
from cosettle_cache.training.log import projection_provenance
from cosettle_cache.training.spectrum import (
    Margin,
    SpectralStatistics,
    Spectrum,
    inter_distances,
    intra_distances,
    make_spectrum,
)

Unit = Float64[Tensor, "item token dim"]

#: Tokens per batch and frame: 32 samples of the released size.
BATCH_TOKENS = 32 * 196


@dataclass(frozen=True, slots=True)
class GatherUnit:
    """Sums up a group of frame pairs: a unit of work that any process can do with the store at hand."""

    store: FeatureStore
    correspondence: str
    places: Grid
    device: str = "cpu"

    def __call__(self, group: FramePairs) -> SpectralStatistics:
        """Return the sums over a group."""
        zero = SpectralStatistics.zero(self.store.arrays[0].n_channels, self.places.n_tokens)
        arrays = (zero.differences, zero.products, zero.places)
        sums = [torch.zeros(array.shape, dtype=torch.float64, device=self.device) for array in arrays]
        n_differences = n_videos = 0
        for _, first, second, representatives in self.batches(group):
            differences, tokens = (first - second).flatten(0, 1), representatives.flatten(0, 1)
            n_differences, n_videos = n_differences + len(differences), n_videos + len(representatives)
            parts = (differences.T @ differences, tokens.T @ tokens, representatives.sum(0))
            for total, part in zip(sums, parts, strict=True):
                total.add_(part)
        found = [total.cpu().numpy() for total in sums]
        return SpectralStatistics(n_differences, found[0], n_videos, found[1], found[2])

    def batches(self, group: FramePairs) -> Iterator[tuple[FramePairs, Unit, Unit, Unit]]:
        """Yield the unit tokens of a group, a few pairs of frames at a time.

        They are the corresponding ones of the first and of the second frames, both `[pair token dim]`, and
        those that stand for videos, `[video place dim]`.
        """
        size = max(1, BATCH_TOKENS // group.grid.n_tokens)
        match, device = find_correspondence(self.correspondence), torch.device(self.device)
        index = upload(torch.from_numpy(place_index(group.grid, self.places)), device)
        finite: list[tuple[FramePairs, Tensor]] = []
        for part, *frames in read_pairs(self.store, group, size):
            loaded = [upload(torch.from_numpy(tokens), device).flatten(1, 2) for tokens in frames]
            finite += [(part, tokens.isfinite().flatten(1).all(1)) for tokens in loaded]
            first, second = map(unit_tokens, loaded)
            chosen = upload(torch.from_numpy(np.flatnonzero(part.representative)), device)
            representatives = first[chosen][:, index].double()
            a, b = match(first, second)
            yield part, a.double(), b.double(), representatives
        _check_finite(finite)


def _check_finite(found: Sequence[tuple[FramePairs, Bool[Tensor, " _"]]]) -> None:
    """Raise `InputError` for the first pairs that hold tokens which are not finite; asks a device once."""
    flags = iter(torch.cat([flags for _, flags in found]).cpu().numpy())
    for part, _ in found:
        finite = np.fromiter(flags, bool, len(part))
        if not finite.all():
            rows = ", ".join(map(str, part.first[~finite][:8].tolist()))
            raise InputError(
                f"{int((~finite).sum())} pairs of frames hold tokens that are not finite",
                details=[f"array {part.grid}, from rows {rows}"],
                hint="extract these clips again into another store",
            )


def gather(
    unit: GatherUnit, groups: Sequence[FramePairs], run: Run, progress: Progress
) -> SpectralStatistics:
    """Return the sums over all groups, added in their order."""
    total = SpectralStatistics.zero(unit.store.arrays[0].n_channels, unit.places.n_tokens)
    with counting(progress, sum(map(len, groups)), "pairs") as advance:
        for group, statistics in in_order(run, unit, groups):
            total += statistics
            advance(len(group))
    return total


#: Two clips to compare with each other on either side of the split.
_FEWEST_CLIPS = 4


@dataclass(frozen=True, slots=True)
class SpectralReport:
    """What was found. `predicted` is the theory on the fitted clips, `measured` the clips held out.

    `raw` stands for the tokens before the projection. `n_differences` counts pairs of corresponding tokens.
    """

    folder: Path
    spectral_lambda: float
    n_directions: int
    dim: int
    rank: int
    correspondence: str
    gamma: float
    n_clips: int
    n_held_out: int
    n_differences: int
    raw_measured: Margin
    raw_predicted: Margin
    measured: Margin
    predicted: Margin
    seconds: float
    projection_sha256: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Trial:
    """One threshold: how many directions it leaves, what is measured and what the theory predicts."""

    spectral_lambda: float
    n_directions: int
    measured: Margin
    predicted: Margin


def fit_spectral(
    store: FeatureStore,
    settings: SpectralSettings,
    out: Path,
    *,
    device: str = "cpu",
    run: Run | None = None,
    progress: Progress | None = None,
) -> SpectralReport:
    """Write the spectral projection of `store` into the folder `out`.

    `run` hands groups of slots to workers; sums are added up in the order of the store, whoever is first.
    Raises `InputError` for fewer than four clips with two frames or for tokens that are not finite, and
    `UsageError` for a lambda that removes every direction, or a folder that holds anything else.
    """
    started, wanted = time.perf_counter(), settings.spectral_lambda
    pairs, held_out = _split(store, settings)
    unit = GatherUnit(store, settings.correspondence, choose_places([a.grid for a in store.arrays]), device)
    statistics = gather(unit, pairs.of_videos(~held_out), run or one_by_one, progress or SILENT)
    spectrum = make_spectrum(statistics)
    if wanted is not None:
        spectrum.check_lambda(wanted)
    trials = _try(unit, pairs.of_videos(held_out), spectrum, settings)
    raw, asked = trials[-1], [trial for trial in trials if trial.spectral_lambda == wanted]
    chosen = asked[0] if asked else max(trials[:-1], key=lambda trial: trial.measured.margin)
    projection = Projection(len(spectrum.basis), "spectral")
    matrix = torch.from_numpy(spectrum.matrix(chosen.spectral_lambda))
    projection.load_state_dict({"linears.0.weight": matrix})
    with own_folder(out, "projection fit"):
        report = SpectralReport(
            folder=out,
            spectral_lambda=chosen.spectral_lambda,
            n_directions=chosen.n_directions,
            dim=projection.dim,
            rank=spectrum.rank,
            correspondence=settings.correspondence,
            gamma=settings.gamma,
            n_clips=int((~held_out).sum()),
            n_held_out=int(held_out.sum()),
            n_differences=statistics.n_differences,
            raw_measured=raw.measured,
            raw_predicted=raw.predicted,
            measured=chosen.measured,
            predicted=chosen.predicted,
            seconds=time.perf_counter() - started,
            projection_sha256=projection_sha256(projection),
            warnings=tuple(_warnings(store, spectrum, trials, chosen, asked=bool(asked))),
        )
        _write_tables(report, spectrum, trials)
        names = ("spectral_lambda", "n_directions", "measured")
        figures = {name: report.to_json()[name] for name in names} | {"raw": asdict(raw.measured)}
        provenance = projection_provenance([store], settings, spectral=figures)
        save_projection(out / "projection.safetensors", projection, provenance)
        return report


def plan_spectral(store: FeatureStore, settings: SpectralSettings) -> dict[str, Any]:
    """Return what `fit_spectral` would do, as plain JSON types; raise what it would raise before its pass."""
    pairs, held_out = _split(store, settings)
    return {
        "clips": len(held_out),
        "held_out": int(held_out.sum()),
        "pairs_of_frames": sum(map(len, pairs.groups)),
        "settings": asdict(settings),
    }


def _split(store: FeatureStore, settings: SpectralSettings) -> tuple[PairList, Bool[np.ndarray, " video"]]:
    """Return the pairs of frames, and which clips are held out; raise `UsageError` for useless settings."""
    find_correspondence(settings.correspondence)
    if settings.spectral_lambda is not None and not 0 < settings.spectral_lambda < math.inf:
        raise UsageError(
            "the spectral lambda is a threshold",
            wanted="a number greater than 0",
            found=settings.spectral_lambda,
        )
    if settings.n_lambdas < 2 or not 0 <= settings.held_out < 1 or settings.max_held_out < 2:
        raise UsageError(
            "these settings leave nothing to choose from",
            wanted="n_lambdas and max_held_out of 2 or more, held_out in [0, 1)",
            found=asdict(settings),
        )
    pairs = list_pairs(store)
    return pairs, choose_held_out(pairs.video_ids, settings)


def choose_held_out(video_ids: Sequence[str], settings: SpectralSettings) -> Bool[np.ndarray, " video"]:
    """Return which clips are held out: those whose hash with the seed is smallest, whatever the store."""
    if len(video_ids) < _FEWEST_CLIPS:
        raise InputError(
            "too few clips with two frames: distances between clips need two to fit on and two held out",
            wanted=f"{_FEWEST_CLIPS} clips",
            found=f"{len(video_ids)}",
        )
    wanted = min(math.ceil(settings.held_out * len(video_ids)), settings.max_held_out)
    n_held_out = min(max(2, wanted), len(video_ids) - 2)
    marks = [draw_mark(settings.seed, name) for name in video_ids]
    chosen = np.zeros(len(video_ids), bool)
    chosen[sorted(range(len(marks)), key=marks.__getitem__)[:n_held_out]] = True
    return chosen


def _try(
    unit: GatherUnit, groups: Sequence[FramePairs], spectrum: Spectrum, settings: SpectralSettings
) -> tuple[Trial, ...]:
    """Return a trial per lambda, ascending; the last one is the tokens as they are (lambda infinite)."""
    extra = [] if settings.spectral_lambda is None else [settings.spectral_lambda]
    lambdas = [*sorted({*spectrum.candidates(settings.n_lambdas).tolist(), *extra}), math.inf]
    gains = np.stack([spectrum.gains(item) for item in lambdas])
    basis, weights = (torch.from_numpy(array).to(unit.device) for array in (spectrum.basis, gains))
    by_video: dict[int, list[Tensor]] = defaultdict(list)
    representatives: list[Tensor] = []
    for group in groups:
        for part, first, second, standing in unit.batches(group):
            distances = intra_distances(first, second, basis, weights)
            for video, distance in zip(part.video.tolist(), distances, strict=True):
                by_video[video].append(distance)
            representatives.append(standing)
    # All videos count alike.
    intra = torch.stack([torch.stack(items).mean(0) for items in by_video.values()]).mean(0)
    inter = inter_distances(torch.cat(representatives), basis, weights)
    pairs = zip(inter.tolist(), intra.tolist(), strict=True)
    measured = [Margin.of(*pair, settings.gamma) for pair in pairs]
    predicted = [spectrum.predict(item, settings.gamma) for item in lambdas]
    return tuple(map(Trial, lambdas, (gains > 0).sum(1).tolist(), measured, predicted))


def _warnings(
    store: FeatureStore, spectrum: Spectrum, trials: Sequence[Trial], chosen: Trial, *, asked: bool
) -> Iterator[str]:
    dim, rank = len(spectrum.basis), spectrum.rank
    if rank < dim:
        yield f"the tokens move in {rank} of {dim} directions only; more clips would fill the rest"
    if chosen.measured.margin <= trials[-1].measured.margin:
        yield "on the clips held out no gain in margin over the raw tokens was measured"
    if not asked and chosen in (trials[0], trials[-2]):
        yield f"the chosen lambda {chosen.spectral_lambda:.4g} is at the end of those tried"
    if not store.complete:
        yield "the store is not complete: some slots are to do or hold failed clips"


def _write_tables(report: SpectralReport, spectrum: Spectrum, trials: Sequence[Trial]) -> None:
    """Write a row per direction; a row per lambda tried, the last (infinite) for raw tokens; the report."""
    table = {"intra": spectrum.intra, "inter": spectrum.inter, "energy": spectrum.energy}
    table["gain"] = spectrum.gains(report.spectral_lambda)
    write_table(report.folder / "spectrum.parquet", pa.table(table))
    rows = []
    for trial in trials:
        row = {name.replace(".", "_"): value for name, value in flat(asdict(trial)).items()}
        rows.append(row | {"chosen": trial.spectral_lambda == report.spectral_lambda})
    write_table(report.folder / "margins.parquet", pa.Table.from_pylist(rows))
    write_json(report.folder / "spectral.json", report.to_json())
