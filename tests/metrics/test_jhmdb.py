"""PCK against the inherited script's figures and a plain loop; lost joints, single joints, missing frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics import count_joints, count_joints_strictly, pck, strict_pck

SIZE = (240, 320)
THRESHOLDS = (0.1, 0.2, 0.5)


def oracle(truths, predictions, threshold):
    """The inherited script, joint by joint: visible joints in frames from 1 on, pooled over clips."""
    distances = {}
    for truth, prediction in zip(truths, predictions, strict=True):
        for frame in range(1, truth.shape[2]):
            seen = [joint for joint in range(truth.shape[1]) if prediction[0, joint, frame] >= 0]
            box = truth[:, seen, frame]
            for joint in seen:
                scale = 0.6 * np.linalg.norm(box.max(axis=1) - box.min(axis=1))
                error = np.linalg.norm(prediction[:, joint, frame] - truth[:, joint, frame])
                right = error <= threshold * scale if scale else False
                distances.setdefault(joint, []).append(right)
    return 100 * np.mean([np.mean(rights) for rights in distances.values()])


@st.composite
def poses(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    truths = [rng.uniform(-10, 250, (2, 4, n)) for n in lengths]
    predictions = [truth + rng.normal(0, 15, truth.shape) for truth in truths]
    for prediction in predictions:
        prediction[:, rng.random(prediction.shape[1:]) < 0.3] = -1
        prediction[0, 0, 1] = max(prediction[0, 0, 1], 0)
    return truths, predictions


def golden_poses(golden):
    arrays = load_file(golden("metrics/jhmdb.safetensors"))
    pixels_per_cell = np.array([320, 240])[:, None, None] / 20
    truths = [arrays[f"{clip}.pos_img"] - 1 for clip in range(4)]
    return truths, [arrays[f"{clip}.predicted_xy_grid"] * pixels_per_cell for clip in range(4)]


def test_equals_the_inherited_figures(golden, golden_json):
    expected = golden_json("metrics/jhmdb.json")["PCK"]
    found = pck(*golden_poses(golden), [float(name) for name in expected])
    for name, percent in expected.items():
        assert found[float(name)] == pytest.approx(percent, abs=1e-9)


@settings(max_examples=60)
@given(poses())
def test_equals_a_plain_loop(clips):
    found = pck(*clips, THRESHOLDS)
    for threshold in THRESHOLDS:
        assert found[threshold] == pytest.approx(oracle(*clips, threshold), abs=1e-9)


@settings(max_examples=40)
@given(poses())
def test_strict_is_never_helped_by_losing_a_joint(clips):
    truths, predictions = clips
    before = strict_pck(truths, predictions, [SIZE] * len(truths), THRESHOLDS)
    predictions[0][:, 1] = -1
    after = strict_pck(truths, predictions, [SIZE] * len(truths), THRESHOLDS)
    assert all(after[threshold] <= before[threshold] for threshold in THRESHOLDS)


def test_losing_a_joint_can_raise_the_inherited_figure():
    truth = np.array([[0.0, 100, 50], [0, 0, 0]])[:, :, None].repeat(3, 2)
    prediction = truth.copy()
    prediction[1, 2] += 40
    assert pck([truth], [prediction], [0.1]) == {0.1: pytest.approx(200 / 3)}
    prediction[:, 2] = -1
    assert pck([truth], [prediction], [0.1]) == {0.1: 100}
    assert strict_pck([truth], [prediction], [SIZE], [0.1]) == {0.1: pytest.approx(200 / 3)}
    assert count_joints(truth, prediction, [0.1]).visible_share == pytest.approx(2 / 3)


def test_the_strict_reading_leaves_out_joints_outside_the_image():
    truth = np.array([[0.0, 100, 400], [0, 0, 0]])[:, :, None].repeat(2, 2)
    counts = count_joints_strictly(truth, truth, SIZE, [0.1])
    assert counts.scored.tolist() == [1, 1, 0]
    assert counts.shares().tolist() == [1.0]


def test_a_single_visible_joint_has_no_scale_and_is_wrong():
    truth = np.zeros((2, 2, 2))
    prediction = np.full((2, 2, 2), -1.0)
    prediction[:, 0] = 0
    assert pck([truth], [prediction], [0.5]) == {0.5: 0}


def test_nothing_visible_is_no_number():
    lost = np.full((2, 3, 4), -1.0)
    counts = count_joints(np.zeros((2, 3, 4)), lost, [0.1])
    assert np.isnan(counts.shares()).all()
    assert counts.visible_share == 0
    assert np.isnan(count_joints(lost[:, :, :1], lost[:, :, :1]).visible_share)


def test_predicted_frames_beyond_the_truth_are_ignored_and_fewer_refused():
    truth = np.random.default_rng(0).uniform(0, 100, (2, 5, 4))
    longer = np.concatenate([truth, truth], axis=2)
    assert pck([truth], [longer]) == pck([truth], [truth])
    with pytest.raises(InputError, match="differ in joints or frames") as caught:
        pck([longer], [truth])
    assert (caught.value.wanted, caught.value.found) == ("5 joints in 8 frames", "5 joints in 4 frames")
    with pytest.raises(InputError, match="no clips"):
        pck([], [])
