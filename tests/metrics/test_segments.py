"""Segmental metrics against cases worked out by hand, and properties that hold for any labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics.segments import count_segments, edit_score, find_segments


def frames(text: str) -> np.ndarray:
    """`AAB` is the classes 0, 0, 1."""
    return np.array([ord(letter) - ord("A") for letter in text], np.int64)


def score(truth: str, prediction: str, background: str = "") -> tuple[float, ...]:
    counts = count_segments(frames(truth), frames(prediction), background=frames(background).tolist())
    return (counts.accuracy, counts.mean_edit, *counts.f1)


def test_a_perfect_prediction() -> None:
    assert score("AABBBC", "AABBBC") == (1, 1, 1, 1, 1)


def test_a_boundary_that_is_late() -> None:
    # 10 frames, A 0-4, B 4-10; predicted A 0-6, B 6-10. Right: 4 + 4 of 10. The sequence A B is right:
    # edit 1. Overlaps: A 4/6 = 0.667, B 4/6 = 0.667: both found at 0.1, 0.25 and 0.5.
    assert score("AAAABBBBBB", "AAAAAABBBB") == pytest.approx((0.8, 1, 1, 1, 1))


def test_overlaps_between_the_thresholds() -> None:
    # A 0-2, B 2-10; predicted A 0-8, B 8-10. Right: 2 + 2 of 10. Overlaps: A 2/8 = 0.25, B 2/8 = 0.25:
    # found at 0.1 and, because the threshold itself suffices, at 0.25; not at 0.5, where F1 = 0.
    assert score("AABBBBBBBB", "AAAAAAAABB") == pytest.approx((0.4, 1, 1, 1, 0))


def test_a_segment_cut_in_two() -> None:
    # A 0-10; predicted A 0-4, B 4-5, A 5-10. Right: 9 of 10. Edit: A against A B A takes 2 deletions of
    # 3: 1/3. The first A overlaps 4/10, the second 5/10, B nothing. At 0.1 and 0.25 the first A takes the
    # segment and the second is spurious: 1 found, 2 spurious, 0 missed: F1 = 2/(2+2) = 0.5. At 0.5 the
    # first A fails, the second one suffices: again 1 found, 2 spurious: 0.5.
    assert score("A" * 10, "AAAABAAAAA") == pytest.approx((0.9, 1 / 3, 0.5, 0.5, 0.5))


def test_everything_wrong() -> None:
    # A B against C: nothing right; edit: two changes of at most two: 0; 0 found, 1 spurious, 2 missed: F1
    # = 0.
    assert score("AABB", "CCCC") == (0, 0, 0, 0, 0)


def test_the_best_overlap_may_be_taken() -> None:
    # True: A 0-6, B 6-8, A 8-10. Predicted: A 0-3, B 3-4, A 4-8, C 8-10. The third predicted segment (A
    # 4-8) overlaps the first A by 2/8 = 0.25 and the last A not at all. The first predicted A (3/6 = 0.5)
    # has taken the first A: A 4-8 is spurious. B 3-4 does not meet B. Found 1 of 4 predicted, 3 true: F1
    # = 2/7, at all three overlaps (3/6 = 0.5 suffices). Right: frames 0-2 and 4-5: 5 of 10. Edit: A B A
    # against A B A C takes one insertion of at most four: 0.75.
    assert score("AAAAAABBAA", "AAABAAAACC") == pytest.approx((0.5, 0.75, 2 / 7, 2 / 7, 2 / 7))


def test_background_makes_no_segment_but_counts_as_frames() -> None:
    # A is background. True B 2-4; predicted B 3-5. Right: 0, 1, 3, 5: 4 of 6. Without A: edit of B and B
    # is 1. Overlap 1/3: found at 0.1 and 0.25, not at 0.5.
    assert score("AABBAA", "AAABBA", "A") == pytest.approx((4 / 6, 1, 1, 1, 0))
    # Of the foreground, frames 2 and 3, one is right.
    counts = count_segments(frames("AABBAA"), frames("AAABBA"), background=[0])
    assert (counts.n_foreground, counts.foreground_accuracy) == (2, 0.5)
    # With A: A B A and A B A; the A's overlap 2/3 and 1/2 and are found throughout, B as before: at 0.5
    # two of three are found, one is spurious, one missed: 4/6.
    assert score("AABBAA", "AAABBA") == pytest.approx((4 / 6, 1, 1, 1, 4 / 6))


def test_nothing_but_background() -> None:
    # No segment is true, none predicted: nothing to be wrong about.
    assert score("AAA", "AAA", "A") == (1, 1, 1, 1, 1)
    # One is predicted where there is none: edit 0 (one change of one), F1 0.
    assert score("AAA", "ABB", "A") == pytest.approx((1 / 3, 0, 0, 0, 0))


def test_videos_are_pooled() -> None:
    # 10 frames with one segment found of one, edit 1; 2 frames with 0 found, 1 spurious, 1 missed, edit
    # 0. Accuracy 10/12 (frames together), edit 1/2 (mean of videos), F1 2/(2+1+1) = 1/2 (segments
    # together).
    first = count_segments(frames("A" * 10), frames("A" * 10))
    total = first + count_segments(frames("AA"), frames("BB"))
    assert total.accuracy == pytest.approx(10 / 12)
    assert total.mean_edit == pytest.approx(0.5)
    assert total.f1 == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(("truth", "prediction"), [("", ""), ("AB", "A")])
def test_lengths_must_agree(truth: str, prediction: str) -> None:
    with pytest.raises(InputError, match="differ in frames"):
        count_segments(frames(truth), frames(prediction))


labels = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def plain_distance(first: list[int], second: list[int]) -> int:
    """Levenshtein by the book, cell by cell."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_edit_is_the_plain_distance(first: list[int], second: list[int]) -> None:
    longest = max(len(first), len(second), 1)
    assert edit_score(first, second) == pytest.approx(1 - plain_distance(first, second) / longest)


@settings(max_examples=60)
@given(labels, labels, st.permutations(range(4)))
def test_properties(first: list[int], second: list[int], renamed: list[int]) -> None:
    n = min(len(first), len(second))
    truth, prediction = np.array(first[:n]), np.array(second[:n])
    counts = count_segments(truth, prediction)
    figures = (counts.accuracy, counts.mean_edit, *counts.f1)
    assert all(0 <= value <= 1 for value in figures)
    # A stricter overlap finds no more, and nobody finds more than there is.
    assert list(counts.found) == sorted(counts.found, reverse=True)
    assert min(counts.spurious) >= 0 and min(counts.missed) >= 0
    # Names of classes do not matter; perfection is perfect; segments tile the video.
    names = np.array(renamed)
    assert count_segments(names[truth], names[prediction]) == counts
    assert count_segments(truth, truth).f1 == (1, 1, 1)
    segments = find_segments(truth)
    assert [item.start for item in segments[1:]] == [item.stop for item in segments[:-1]]
    assert (segments[0].start, segments[-1].stop) == (0, n)
