"""Settings hold no number outside the limits of its field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import (
    EncoderSettings,
    PairsSettings,
    ProbeSettings,
    Settings,
    TrainSettings,
    setting,
)
from cosettle_cache.videos.frames import resolve_size


@dataclass(frozen=True, slots=True)
class Mine(Settings):
    share: float = setting(0.5, "", positive=True, max=1)
    count: int | None = setting(2, "", min=1)
    weight: float | Literal["auto"] = setting(1.0, "")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("share", [-1, 0, 2, math.nan, math.inf, "x", "auto", None, True]),
        ("count", [0, 6.7, True, "5", math.nan, 2**63, -(10**400)]),
        ("weight", [math.nan, -math.inf, "x", False, None, [1]]),
    ],
)
def test_numbers_outside_their_limits_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"{name} must be "):
            Mine(**{name: value})


def test_numbers_within_their_limits_are_taken() -> None:
    assert Mine(1, None, "auto") == Mine(np.float32(1), None, "auto")
    assert Mine(count=np.int64(1), weight=-3).count == 1


def test_limits_of_what_the_commands_take() -> None:
    for settings in (PairsSettings, TrainSettings):
        for gap in (-1.0, 0.0, 2.0, math.nan):
            with pytest.raises(UsageError, match="gap must be positive, at most 1"):
                settings(gap=gap)
    for red_std in (-1.0, 0.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="red_std must be positive"):
            EncoderSettings("mae_b", red_std=red_std)
    for penalty in (0.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="inverse penalty"):
            ProbeSettings(penalties=(1.0, penalty))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("extract --backbone mae_b --gap 0", "gap must be positive, at most 1"),
        ("extract --backbone mae_b --red-std -1", "red_std must be positive"),
        ("extract --backbone mae_b --red-std inf", "red_std must be positive"),
        ("train --features x.zarr --gap 0", "gap must be positive, at most 1"),
        ("extract --backbone mae_b --seed 99999999999999999999", "seed must be a whole number, at most 922"),
        ("extract --backbone mae_b --size 1600000", "size must be a whole number, at least 1, at most 16384"),
        (
            "train --features x.zarr --seed 99999999999999999999",
            "seed must be a whole number, at least 0, at mo",
        ),
        ("propagate --task davis --set name=x", "name is no field to set"),
        ("propagate --task davis --set task=x", "task is no field to set"),
    ],
)
def test_options_outside_their_limits_are_one_sentence(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(line.split()) == 2
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", ["100000x100000", "1000000000x16", "short:9999999/16", "long:99999999999999999999/8"]
)
def test_absurd_sizes_are_refused(size: str) -> None:
    with pytest.raises(UsageError, match="is too large a size"):
        resolve_size(size, 480, 854)
    assert resolve_size("4320x7680", 480, 854) == (4320, 7680)
