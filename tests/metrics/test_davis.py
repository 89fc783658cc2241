"""J&F against the official tool's figures, and against a whole-image oracle on drawn masks."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.numpy import load_file

from cosettle_cache.core.errors import InputError
from cosettle_cache.metrics import DavisScorer, boundary_tolerance, davis_j_and_f

STATISTICS = ("mean", "recall", "decay")


def oracle_boundary(mask):
    """Compare each pixel of the whole image with its right, lower and lower-right neighbours, one by one."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, down, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != down) | (mask != diagonal)


def oracle_near(boundary, tolerance):
    """Mark the pixels within `tolerance` of a boundary pixel, by shifting the map over a disk."""
    near = np.zeros_like(boundary)
    padded = np.pad(boundary, tolerance)
    height, width = boundary.shape
    for row in range(-tolerance, tolerance + 1):
        for col in range(-tolerance, tolerance + 1):
            if row**2 + col**2 <= tolerance**2:
                near |= padded[tolerance + row :, tolerance + col :][:height, :width]
    return near


def oracle(truth, prediction):
    """J and F `[object scored frame]` on whole images, written as the definitions read."""
    n_objects = int(truth[0][truth[0] != 255].max())
    tolerance = int(np.ceil(0.008 * np.linalg.norm(truth.shape[1:])))
    j, f = np.zeros((2, n_objects, len(truth) - 2))
    for column, frame in enumerate(range(1, len(truth) - 1)):
        for row in range(n_objects):
            a, b = truth[frame] == row + 1, prediction[frame] == row + 1
            j[row, column] = (a & b).sum() / (a | b).sum() if (a | b).any() else 1
            f[row, column] = oracle_f(oracle_boundary(a), oracle_boundary(b), tolerance)
    return j, f


def oracle_f(a, b, tolerance):
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = (b & oracle_near(a, tolerance)).sum() / b.sum()
    recall = (a & oracle_near(b, tolerance)).sum() / a.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def oracle_decay(values):
    """The official quarters: ends rounded half up, inclusive on the right; ends not cut to 8 bits."""
    ends = np.floor(np.linspace(1, len(values), 5) + 0.5).astype(int) - 1
    return values[ends[0] : ends[1] + 1].mean() - values[ends[3] : ends[4] + 1].mean()


@st.composite
def clips(draw):
    """A true and a predicted clip of drawn boxes and noise, some touching the rim, some empty, some void."""
    shape = draw(st.tuples(st.integers(3, 5), st.integers(1, 40), st.integers(1, 40)))
    n_objects = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth = _boxes(rng, shape, [*range(1, n_objects + 2), 255])
    truth[0].flat[0] = n_objects
    truth[0][(truth[0] > n_objects) & (truth[0] != 255)] = 0
    if draw(st.booleans()):
        noise = rng.random(shape) < 0.1
        return truth, np.where(noise, rng.integers(0, n_objects + 1, shape), truth % (n_objects + 1)).astype(
            "u1"
        )
    return truth, _boxes(rng, shape, range(1, n_objects + 1))


def _boxes(rng, shape, indices):
    masks = np.zeros(shape, np.uint8)
    for mask in masks:
        for index in rng.permutation(indices):
            if rng.random() < 0.7:
                top, bottom = np.sort(rng.integers(0, shape[1] + 1, 2))
                left, right = np.sort(rng.integers(0, shape[2] + 1, 2))
                mask[top:bottom, left:right] = index
    return masks


@settings(deadline=None, max_examples=150)
@given(clips())
def test_equals_whole_image_oracle(clip):
    j, f = oracle(*clip)
    scores = davis_j_and_f(*clip)
    assert [score.object_id for score in scores] == list(range(1, len(j) + 1))
    np.testing.assert_array_equal([score.j for score in scores], j)
    np.testing.assert_array_equal([score.f for score in scores], f)


@settings(deadline=None, max_examples=25)
@given(clips(), st.permutations([1, 2, 3]))
def test_permuting_objects_permutes_scores(clip, order):
    truth, prediction = clip
    truth = np.where(truth > 3, 0, truth).astype(np.uint8)
    truth[0].flat[:3] = [1, 2, 3][: truth[0].size]
    n_objects = int(truth[0].max())
    order = [index for index in order if index <= n_objects]
    table = np.array([0, *order, *range(n_objects + 1, 4)], np.uint8)
    plain = davis_j_and_f(truth, np.minimum(prediction, n_objects))
    permuted = davis_j_and_f(table[truth], table[np.minimum(prediction, n_objects)])
    for score, index in zip(plain, order, strict=True):
        np.testing.assert_array_equal(score.j, permuted[index - 1].j)
        np.testing.assert_array_equal(score.f, permuted[index - 1].f)


@pytest.mark.parametrize("case", ["a", "b", "c", "tiny"])
def test_equals_official_figures(golden, golden_json, case):
    arrays, expected = load_file(golden("metrics/davis.safetensors")), golden_json("metrics/davis.json")[case]
    scores = davis_j_and_f(arrays[f"{case}.ground_truth"], arrays[f"{case}.prediction"])
    assert len(scores) == expected["objects"]
    np.testing.assert_allclose([score.j for score in scores], expected["J"], rtol=0, atol=1e-9)
    np.testing.assert_allclose([score.f for score in scores], expected["F"], rtol=0, atol=1e-9)
    for score in scores:
        statistics = expected["statistics_mean_recall_decay"][f"object_{score.object_id}"]
        for measure in "jf":
            found = [getattr(score, f"{measure}_{name}") for name in STATISTICS]
            np.testing.assert_allclose(found, statistics[measure.upper()], rtol=0, atol=1e-9)


def test_mean_over_objects_equals_official_global(golden, golden_json):
    arrays, expected = (
        load_file(golden("metrics/davis.safetensors")),
        golden_json("metrics/davis.json")["global"],
    )
    scores = [
        score
        for case in ("a", "b", "c", "tiny")
        for score in davis_j_and_f(arrays[f"{case}.ground_truth"], arrays[f"{case}.prediction"])
    ]
    for measure in "JF":
        for name in STATISTICS:
            found = np.mean([getattr(score, f"{measure.lower()}_{name}") for score in scores])
            assert found == pytest.approx(expected[f"{measure}-{name.capitalize()}"], abs=1e-9)


@pytest.mark.data
def test_osvos_results_equal_official_figures(shared_data):
    results, truth_root = shared_data("osvos_results"), shared_data("DAVIS/Annotations/480p")
    expected = json.loads(shared_data("osvos_results_reference.json").read_text())
    for folder in sorted(results.iterdir()):
        scorer = None
        for path in sorted((truth_root / folder.name).glob("*.png")):
            truth = np.asarray(Image.open(path))
            scorer = scorer or DavisScorer.from_first_mask(truth)
            scorer.add(truth, np.asarray(Image.open(folder / path.name)))
        for score in scorer.finish():
            reference = expected.pop(f"{folder.name}_{score.object_id}")
            assert len(score.j) == reference.pop("frames")
            for name, value in reference.items():
                assert getattr(score, name.lower()) == pytest.approx(value, abs=1e-6), (folder.name, name)
    assert not expected


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [(480, 854, 8), (480, 910, 9), (480, 880, 9), (480, 1152, 10), (480, 832, 8), (16, 16, 1)],
)
def test_boundary_tolerance(height, width, pixels):
    assert boundary_tolerance(height, width) == pixels


def test_empty_cases():
    empty, filled = np.zeros((20, 20), np.uint8), np.ones((20, 20), np.uint8)
    square = cv2.rectangle(empty.copy(), (5, 5), (12, 12), 1, -1)
    truth = np.stack([square, empty, empty, square, filled, filled, square])
    prediction = np.stack([square, empty, square, empty, filled, square, square])
    (score,) = davis_j_and_f(truth, prediction)
    np.testing.assert_array_equal(score.j, [1, 0, 0, 1, 64 / 400])
    # A mask that fills the frame has no boundary: it matches another such mask and nothing else.
    np.testing.assert_array_equal(score.f, [1, 0, 0, 1, 0])


def test_first_and_last_frame_do_not_count():
    rng = np.random.default_rng(0)
    truth = np.ones((5, 8, 8), np.uint8)
    prediction = truth.copy()
    prediction[[0, -1]] = rng.integers(0, 255, (2, 8, 8))
    (score,) = davis_j_and_f(truth, prediction)
    assert score.j_mean == score.f_mean == 1
    assert len(score.j) == 3


def test_decay_beyond_256_frames():
    width = 400
    truth = np.ones((width + 2, 1, width), np.uint8)
    prediction = (np.arange(width) < np.arange(width + 2)[:, None, None]).astype(np.uint8)
    (score,) = davis_j_and_f(truth, prediction)
    np.testing.assert_allclose(score.j, np.arange(1, width + 1) / width)
    assert score.j_decay == pytest.approx(oracle_decay(score.j), abs=1e-12)
    assert score.j_decay < -0.7


@given(hnp.arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 1)))
def test_statistics_follow_the_definition(values):
    from cosettle_cache.metrics.davis import _statistics

    mean, recall, decay = _statistics(values)
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert recall == (values > 0.5).mean()
    assert decay == pytest.approx(oracle_decay(values), abs=1e-12)


def test_missing_objects_are_scored_as_empty():
    truth = np.zeros((4, 10, 10), np.uint8)
    truth[:, :3], truth[:, 6:] = 1, 2
    first, second = davis_j_and_f(truth, np.where(truth == 1, 1, 0).astype(np.uint8))
    assert (first.j_mean, second.j_mean, second.f_mean) == (1, 0, 0)


def test_void_in_truth_is_background_and_counts_against_the_prediction():
    truth = np.ones((3, 4, 4), np.uint8)
    truth[:, 2:] = 255
    (score,) = davis_j_and_f(truth, np.ones((3, 4, 4), np.uint8))
    assert score.j_mean == 0.5


def test_scorer_does_not_keep_the_callers_arrays():
    scorer = DavisScorer(1, 6, 6)
    truth, prediction = np.zeros((2, 6, 6), np.uint8)
    for frame in range(4):
        truth[:], prediction[:] = 0, 0
        truth[: frame + 1], prediction[:1] = 1, 1
        scorer.add(truth, prediction)
    (score,) = scorer.finish()
    np.testing.assert_allclose(score.j, [1 / 2, 1 / 3])


def test_unknown_objects_are_named():
    truth = np.ones((4, 5, 5), np.uint8)
    prediction = truth.copy()
    prediction[2, 0, :2] = 3, 255
    with pytest.raises(InputError, match="frame 2") as caught:
        davis_j_and_f(truth, prediction)
    assert (caught.value.wanted, caught.value.found) == ("indices 0 to 1", "3, 255")


def test_other_sizes_and_lengths_are_refused():
    truth = np.ones((4, 5, 7), np.uint8)
    with pytest.raises(InputError, match="size") as caught:
        davis_j_and_f(truth, np.ones((4, 7, 5), np.uint8))
    assert (caught.value.wanted, caught.value.found) == ("5x7", "7x5")
    with pytest.raises(InputError, match="length") as caught:
        davis_j_and_f(truth, truth[:3])
    assert (caught.value.wanted, caught.value.found) == ("4 frames", "3 frames")


@pytest.mark.parametrize("n_frames", [0, 1, 2])
def test_clips_without_a_scored_frame_are_refused(n_frames):
    truth = np.ones((n_frames, 5, 5), np.uint8)
    with pytest.raises(InputError, match="too short"):
        davis_j_and_f(truth, truth)


def test_truth_without_objects_is_refused():
    truth = np.full((4, 5, 5), 255, np.uint8)
    with pytest.raises(InputError, match="no object"):
        davis_j_and_f(truth, truth)
