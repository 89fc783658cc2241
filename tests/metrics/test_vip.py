"""mIoU against the released script's figures and a loop over classes; pooling; the ways to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics import clip_miou, count_pixels, davis_j_and_f, mean_iou, no_pixels, pck

N = 4
truths = hnp.arrays(np.uint8, (3, 4, 5), elements=st.sampled_from([0, 1, 2, 3, 9, 255]))
predictions = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, N - 1))


def oracle(truth, prediction):
    scored = truth < N
    ious = []
    for index in range(N):
        a, b = (truth == index) & scored, (prediction == index) & scored
        ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else np.nan)
    return np.array(ious)


def test_equals_the_released_figures(golden, golden_json):
    arrays, expected = load_file(golden("metrics/vip.safetensors")), golden_json("metrics/vip.json")
    found = mean_iou(arrays["ground_truth"], arrays["prediction"], 20)
    assert found.miou == pytest.approx(expected["mean_iou"], abs=1e-12)
    assert found.pixel_accuracy == pytest.approx(expected["pixel_accuracy"], abs=1e-12)
    per_class = [np.nan if iou is None else iou for iou in expected["per_class"]]
    np.testing.assert_allclose(found.per_class, per_class, rtol=0, atol=1e-12)


@given(truths, predictions)
def test_equals_a_loop_over_classes(truth, prediction):
    found = mean_iou(truth, prediction, N)
    expected = oracle(truth, prediction)
    np.testing.assert_allclose(found.per_class, expected, atol=1e-12)
    if (truth < N).any():
        assert found.miou == pytest.approx(np.nanmean(expected), abs=1e-12)
        assert found.pixel_accuracy == pytest.approx((truth == prediction)[truth < N].mean())
    else:
        assert np.isnan(found.miou) and np.isnan(found.pixel_accuracy)


@settings(max_examples=25)
@given(truths, predictions, st.permutations(range(3)))
def test_counts_of_frames_add_up_in_any_order(truth, prediction, order):
    counts = [count_pixels(truth[i], prediction[i], N) for i in order]
    pooled = sum(counts, start=no_pixels(N)).score()
    np.testing.assert_array_equal(pooled.per_class, mean_iou(truth, prediction, N).per_class)


def test_the_paper_averages_over_clips_first():
    truth = np.array([[[0, 1]], [[1, 1]]], np.uint8)
    prediction = np.array([[[0, 1]], [[1, 0]]], np.uint8)
    clips = [count_pixels(*pair, 3) for pair in zip(truth, prediction, strict=True)]
    # Class 0: 1 and 0, class 1: 1 and 1/2; class 2 is nowhere.
    assert clip_miou(clips) == pytest.approx((0.5 + 0.75) / 2)
    assert mean_iou(truth, prediction, 3).miou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_classes_that_do_not_exist_and_other_sizes_are_refused():
    frame = np.zeros((2, 3), np.uint8)
    with pytest.raises(InputError, match="does not exist") as caught:
        count_pixels(frame, np.full((2, 3), 20, np.uint8), 20)
    assert (caught.value.wanted, caught.value.found) == ("classes 0 to 19", "20")
    with pytest.raises(InputError, match="differ in size"):
        count_pixels(frame, np.zeros((3, 2), np.uint8), 20)
    with pytest.raises(InputError, match="differ in length"):
        mean_iou(frame[None], np.zeros((2, 2, 3), np.uint8), 20)


def test_tensors_are_taken_like_arrays() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 3, (2, 4, 5, 6)).astype(np.uint8)
    joints = rng.uniform(1, 9, (2, 2, 3, 4))
    as_tensors = torch.from_numpy(maps)
    assert mean_iou(*as_tensors, 3).miou == mean_iou(*maps, 3).miou
    assert pck([torch.from_numpy(joints[0])], [torch.from_numpy(joints[1])]) == pck([joints[0]], [joints[1]])
    plain, of_tensors = davis_j_and_f(*np.minimum(maps, 1)), davis_j_and_f(*as_tensors.clamp(max=1))
    assert [score.jf_mean for score in of_tensors] == [score.jf_mean for score in plain]
