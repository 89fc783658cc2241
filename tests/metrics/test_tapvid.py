"""TAP-Vid's figures: hand-derived values, and a slow oracle that follows the definitions word by word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.metrics import count_tracks
from cosettle_cache.metrics.tapvid import THRESHOLDS
from cosettle_cache.videos.queries import sample_queries
from cosettle_cache.videos.tapvid import PointTracks


def test_values_by_hand() -> None:
    """One point given in frame 1 of 5. Frames 2 to 4 count: off by 3, hidden but shown, shown but hidden."""
    truth = np.full((1, 5, 2), 100.0)
    visible = np.array([[True, True, True, False, True]])
    found = truth.copy()
    found[0, 0] = 0  # before the query: does not count
    found[0, 2, 0] += 3
    shown = np.array([[False, True, True, True, False]])
    counts = count_tracks(truth, visible, found, shown, np.array([1]), "first")
    # Near: frame 4 always, frame 2 from 4 px on; two visible points.
    np.testing.assert_allclose(counts.deltas, [0.5, 0.5, 1, 1, 1])
    # Frame 2 is the only hit, from 4 px on; two visible; false alarms: frame 3, and frame 2 while it is far.
    np.testing.assert_allclose(counts.jaccards, [0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert counts.delta_avg == pytest.approx(0.8)
    assert counts.aj == pytest.approx(0.2)
    assert counts.oa == pytest.approx(1 / 3)  # frame 2
    strided = count_tracks(truth, visible, found, shown, np.array([1]), "strided")
    np.testing.assert_allclose(strided.deltas, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert strided.oa == pytest.approx(1 / 4)


def test_a_distance_at_the_threshold_is_too_far() -> None:
    truth, flags = np.zeros((1, 2, 2)), np.ones((1, 2), bool)
    found = truth + np.array([0.0, 4.0])
    counts = count_tracks(truth, flags, found, flags, np.array([0]))
    np.testing.assert_array_equal(counts.deltas, [0, 0, 0, 1, 1])


def test_what_a_clip_does_not_have_is_no_number() -> None:
    truth, hidden = np.zeros((1, 3, 2)), np.array([[True, False, False]])
    counts = count_tracks(truth, hidden, truth, hidden, np.array([0]))
    assert counts.oa == 1
    assert np.isnan(counts.delta_avg)
    assert np.isnan(counts.aj)
    shown = count_tracks(truth, hidden, truth, ~hidden, np.array([0]))
    assert (shown.oa, shown.aj) == (0, 0)


def test_tracks_of_another_length_and_unknown_modes_are_refused() -> None:
    truth, flags = np.zeros((2, 3, 2)), np.ones((2, 3), bool)
    with pytest.raises(InputError, match="do not fit"):
        count_tracks(truth, flags, truth[:, :2], flags[:, :2], np.array([0, 0]))
    with pytest.raises(UsageError, match="query mode"):
        count_tracks(truth, flags, truth, flags, np.array([0, 0]), "last")


def oracle(truth, visible, found, shown, query_frames, mode):
    """Average Jaccard, position accuracy and occlusion accuracy, pair by pair."""
    pairs = [
        (q, t)
        for q in range(truth.shape[0])
        for t in range(truth.shape[1])
        if (t > query_frames[q] if mode == "first" else t != query_frames[q])
    ]
    oa = np.mean([visible[pair] == shown[pair] for pair in pairs])
    jaccards, deltas = [], []
    for threshold in THRESHOLDS:
        true_positive = false_positive = false_negative = near = 0
        for pair in pairs:
            within = np.hypot(*(truth[pair] - found[pair])) < threshold
            near += bool(visible[pair] and within)
            if visible[pair] and shown[pair] and within:
                true_positive += 1
            else:
                false_negative += bool(visible[pair])
                false_positive += bool(shown[pair])
        n_visible = sum(visible[pair] for pair in pairs)
        whole = true_positive + false_negative + false_positive
        deltas.append(near / n_visible if n_visible else np.nan)
        jaccards.append(true_positive / whole if whole else np.nan)
    return np.mean(jaccards), np.mean(deltas), oa


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, 7), st.sampled_from(["first", "strided"]))
def test_equals_the_oracle(seed: int, n_queries: int, n_frames: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 256, (n_queries, n_frames, 2))
    found = truth + rng.normal(0, rng.uniform(0.3, 12), truth.shape)
    visible, shown = (rng.random((n_queries, n_frames)) < rng.random() for _ in range(2))
    queries = rng.integers(0, n_frames - 1, n_queries)
    counts = count_tracks(truth, visible, found, shown, queries, mode)
    wanted = oracle(truth, visible, found, shown, queries, mode)
    np.testing.assert_allclose((counts.aj, counts.delta_avg, counts.oa), wanted, atol=1e-12)


def test_first_asks_once_where_a_point_first_shows() -> None:
    visible = np.array([[False, True, True], [False, False, False], [True, False, True]])
    points = np.arange(18.0).reshape(3, 3, 2)
    queries = sample_queries(PointTracks(points, visible), "first")
    assert queries.tracks.tolist() == [0, 2]
    assert queries.frames.tolist() == [1, 0]
    np.testing.assert_array_equal(queries.points, [points[0, 1], points[2, 0]])


def test_strided_asks_again_wherever_a_point_shows() -> None:
    visible = np.array([[True, True, False, True], [False, True, True, True]])
    points = np.arange(16.0).reshape(2, 4, 2)
    queries = sample_queries(PointTracks(points, visible), "strided", 2)
    assert list(zip(queries.frames.tolist(), queries.tracks.tolist(), strict=True)) == [(0, 0), (2, 1)]
    np.testing.assert_array_equal(queries.points, [points[0, 0], points[1, 2]])
