"""Nearest-token tracking on tokens whose answer is known, and against a loop over cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from propagation_cases import single_thread
from torch.nn.functional import cosine_similarity

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import TrackSettings
from cosettle_cache.propagation.track import Tracker, locate, sample_tokens


def shifted(tokens: torch.Tensor, right: int) -> torch.Tensor:
    return torch.roll(tokens, right, dims=1)


def test_a_point_follows_its_token_and_keeps_its_place_between_tokens() -> None:
    tokens = torch.randn(6, 9, 64, generator=torch.Generator().manual_seed(0))
    cells = torch.tensor([[2.5, 3.5], [4.5, 1.5]])
    tracker = Tracker({1: tokens}, torch.tensor([1, 1]), cells, TrackSettings(radius=0.0))
    at = tracker.step(shifted(tokens, 3), 2)
    torch.testing.assert_close(at.cells, cells.double() + torch.tensor([3.0, 0.0], dtype=torch.float64))
    assert at.visible.all()
    torch.testing.assert_close(at.cosines, torch.ones(2))


def test_its_own_frame_gives_back_the_query() -> None:
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    cells = torch.tensor([[0.1, 2.9], [3.3, 1.7]])
    at = Tracker({0: tokens, 4: tokens}, torch.tensor([0, 4]), cells, TrackSettings()).step(tokens, 4)
    torch.testing.assert_close(at.cells[1], cells[1].double())
    assert at.visible[1]


def test_a_point_that_has_gone_does_not_find_back() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, others = (torch.randn(8, 8, 64, generator=generator) for _ in range(2))
    cells = torch.rand(20, 2, generator=generator) * 8
    for occlusion, shown in (("cycle", 0.8), ("cosine", 0.0), ("never", 1.0)):
        asked = TrackSettings(occlusion=occlusion, cycle_radius=1.0)
        tracker = Tracker({0: tokens}, torch.zeros(20, dtype=torch.int64), cells, asked)
        assert tracker.step(others, 1).visible.float().mean() <= shown
    assert tracker.step(others, 1).visible.all()


def test_samples_are_bilinear_and_the_rim_goes_on() -> None:
    tokens = torch.arange(6.0).view(2, 3, 1)
    cells = torch.tensor([[0.5, 0.5], [1.0, 0.5], [2.5, 1.0], [0.0, 0.0], [3.0, 2.0]])
    torch.testing.assert_close(sample_tokens(tokens, cells)[:, 0], torch.tensor([0.0, 0.5, 3.5, 0.0, 5.0]))


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0, 1.5, 3.0, 1e9]),
    st.sampled_from([0.02, 0.5]),
)
def test_locating_equals_a_loop_over_cells(
    seed: int, rows: int, cols: int, radius: float, temperature: float
) -> None:
    maps = torch.rand(3, rows, cols, generator=torch.Generator().manual_seed(seed))
    with single_thread():
        cells, best = locate(maps, radius, temperature)
    for number, scores in enumerate(maps.double().numpy()):
        top = np.unravel_index(scores.argmax(), scores.shape)
        total = place = 0.0
        for row in range(rows):
            for col in range(cols):
                if (row - top[0]) ** 2 + (col - top[1]) ** 2 <= radius**2:
                    weight = np.exp((scores[row, col] - scores[top]) / temperature)
                    total += weight
                    place = place + weight * np.array([col + 0.5, row + 0.5])
        np.testing.assert_allclose(cells[number].numpy(), place / total, atol=1e-4)
        assert best[number].item() == pytest.approx(scores[top])


def test_the_way_back_is_measured_from_the_query() -> None:
    """Oracle of the cycle check: from the place found back to the nearest token of the query's frame."""
    generator = torch.Generator().manual_seed(3)
    home, later = (torch.randn(5, 7, 6, generator=generator) for _ in range(2))
    cells = torch.rand(30, 2, generator=generator) * torch.tensor([7.0, 5.0])
    asked = TrackSettings(radius=0.0, cycle_radius=2.0)
    at = Tracker({0: home}, torch.zeros(30, dtype=torch.int64), cells, asked).step(later, 1)
    for number in range(30):
        here = sample_tokens(later, at.cells[number : number + 1])
        back = cosine_similarity(here[0], home, dim=-1).flatten().argmax().item()
        gap = np.hypot(back % 7 + 0.5 - cells[number, 0].item(), back // 7 + 0.5 - cells[number, 1].item())
        assert at.visible[number].item() == (gap <= 2.0)
    assert 0 < at.visible.float().mean() < 1


def test_other_grids_and_settings_without_meaning_are_refused() -> None:
    tokens = torch.randn(3, 4, 8)
    where = (torch.tensor([0]), torch.tensor([[1.0, 1.0]]))
    with pytest.raises(InputError, match="another grid"):
        Tracker({0: tokens}, *where, TrackSettings()).step(torch.randn(4, 3, 8), 1)
    for bad in (
        {"temperature": 0.0},
        {"radius": -1.0},
        {"occlusion": "maybe"},
        {"query_mode": "last"},
        {"query_stride": 0},
        {"cycle_radius": float("nan")},
    ):
        with pytest.raises(UsageError):
            Tracker({0: tokens}, *where, TrackSettings(**bad))
