"""Label maps: the central 2x2 rule, ties, ids, objects lost on the way, and key points at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from propagation_cases import decode_mask
from safetensors.numpy import load_file

from cosettle_cache.core.types import Grid
from cosettle_cache.propagation.labels import (
    decode_keypoints,
    encode_keypoints,
    encode_mask,
    encode_mask_nearest,
    resize_mask,
)
from cosettle_cache.videos.jhmdb import cells_to_pixels, pixels_to_cells


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint8, (32, 48), elements=st.sampled_from([0, 1, 2, 5])))
def test_a_cell_is_the_mean_of_its_central_four_pixels(mask):
    labels = encode_mask(mask, (32, 48), Grid(2, 3))
    assert labels.object_ids == tuple(np.unique(mask).tolist())
    centre = mask.reshape(2, 16, 3, 16)[:, 7:9, :, 7:9]
    for channel, object_id in enumerate(labels.object_ids):
        expected = (centre == object_id).mean(axis=(1, 3), dtype=np.float32)
        assert np.array_equal(labels.label_map[..., channel].numpy(), expected)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint8, (3, 4), elements=st.sampled_from([0, 1, 3, 254])))
def test_masks_of_whole_cells_come_back(cells):
    mask = cells.repeat(16, 0).repeat(16, 1)
    labels = encode_mask(mask, (48, 64), Grid(3, 4))
    decoded = decode_mask(labels.label_map, labels.object_ids, (48, 64), (48, 64))
    assert np.array_equal(decoded[8::16, 8::16], cells)
    assert decoded.dtype == np.uint8


def test_of_equal_classes_the_first_wins():
    decoded = decode_mask(torch.full((2, 2, 3), 1 / 3), (0, 4, 9), (32, 32), (30, 31))
    assert decoded.shape == (30, 31)
    assert (decoded == 0).all()


def test_an_object_too_small_for_the_input_has_no_class():
    mask = np.zeros((64, 64), np.uint8)
    mask[1, 1] = 7
    mask[32:, 32:] = 2
    assert encode_mask(mask, (32, 32), Grid(2, 2)).object_ids == (0, 2)


def test_a_frame_full_of_one_object_has_one_class():
    labels = encode_mask(np.full((32, 32), 3, np.uint8), (32, 32), Grid(2, 2))
    assert labels.label_map.shape == (2, 2, 1)
    assert (decode_mask(labels.label_map, labels.object_ids, (32, 32), (32, 32)) == 3).all()


def test_masks_are_resized_by_rounding_down():
    mask = np.arange(8, dtype=np.uint8)[None].repeat(2, 0)
    assert resize_mask(mask, (2, 4))[0].tolist() == [0, 2, 4, 6]
    assert resize_mask(mask, (2, 8)) is mask


def whole_gaussian(points, rows, cols):
    """Draw each joint as the released drawing does: one square patch, cut to the image by its corners."""
    maps = np.zeros((rows, cols, len(points[0])))
    patch = np.exp(-2.0 * (np.arange(4)[:, None] - 2) ** 2 - 2.0 * (np.arange(4) - 2) ** 2)
    for joint, (x, y) in enumerate(zip(*points, strict=True)):
        left, top, right, bottom = (int(value) for value in (x - 1.5, y - 1.5, x + 2.5, y + 2.5))
        for row in range(max(top, 0), min(bottom, rows)):
            for col in range(max(left, 0), min(right, cols)):
                maps[row, col, joint] = patch[row - top, col - left]
    return maps


coordinates = st.floats(-4, 24, allow_nan=False).map(lambda value: round(value, 2))


@given(hnp.arrays(np.float64, (2, 3), elements=coordinates))
def test_keypoints_are_drawn_as_released(points):
    label_map = encode_keypoints(points, Grid(18, 20)).numpy()
    expected = whole_gaussian(points, 18, 20)
    np.testing.assert_allclose(label_map[..., 1:], expected, atol=1e-7)
    assert np.array_equal(label_map[..., 0] == 1, ~expected.any(axis=-1))
    assert label_map.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "peak"),
    # The nearest cell, half up; one cell inwards near the edge (PROTOCOLS 2.2).
    [(0.2, 1), (0.6, 2), (1.4, 2), (1.5, 2), (2.4, 2), (2.5, 3), (9.9, 10), (18.5, 19), (19.4, 19)],
)
def test_the_edge_rule_of_keypoints(x, peak):
    joint = encode_keypoints(np.array([[x], [10.0]]), Grid(20, 20))[10, :, 1]
    assert int(joint.argmax()) == peak
    assert joint[peak] == 1


def test_a_keypoint_beyond_the_far_edge_leaves_its_tail():
    joint = encode_keypoints(np.array([[19.6], [10.0]]), Grid(20, 20))[10, :, 1]
    np.testing.assert_allclose(joint[-3:], [0, np.exp(-8), np.exp(-2)], rtol=1e-6)


def test_a_keypoint_outside_is_lost():
    label_map = encode_keypoints(np.array([[25.0, 8.0], [3.0, 8.0]]), Grid(20, 20))
    assert not label_map[..., 1].any()
    points = decode_keypoints(label_map)
    assert points[:, 0].tolist() == [-1, -1]
    assert points[:, 1].tolist() == pytest.approx([8, 8])


def test_keypoints_are_decoded_as_released(golden):
    arrays = load_file(golden("propagation/queue_pose.safetensors"))
    for label_map, expected in zip(arrays["soft_labels"], arrays["keypoints_xy"], strict=True):
        points = decode_keypoints(torch.from_numpy(label_map))
        np.testing.assert_allclose(points.numpy(), expected, atol=1e-3)


def test_fewer_cells_as_in_videowalk():
    label_map = torch.zeros(2, 3, 2)
    label_map[0, :, 1] = torch.tensor([3.0, 2.0, 1.0])
    assert decode_keypoints(label_map, n_cells=1).flatten().tolist() == [0, 0]
    assert decode_keypoints(label_map, n_cells=2)[0].item() == pytest.approx(0.4)
    assert decode_keypoints(label_map, n_cells=99)[0].item() == pytest.approx(4 / 6)


@given(hnp.arrays(np.float64, (2, 4), elements=coordinates))
def test_pixels_and_cells_are_inverse(points):
    cells = pixels_to_cells(points, (240, 320), Grid(20, 20))
    np.testing.assert_allclose(cells, points / [[16], [12]])
    np.testing.assert_allclose(cells_to_pixels(cells, (240, 320), Grid(20, 20)), points, atol=1e-12)


@settings(max_examples=50)
@given(hnp.arrays(np.uint8, (9, 15), elements=st.sampled_from([1, 2, 5])))
def test_nearest_labels_are_ids_at_the_middle_of_each_cell(mask):
    labels = encode_mask_nearest(mask, Grid(3, 5))
    cells = mask[1::3, 1::3]
    assert labels.object_ids == (0, *np.unique(cells).tolist())
    assert not labels.label_map[..., 0].any()
    assert np.array_equal(np.array(labels.object_ids)[labels.label_map.argmax(-1)], cells)
    assert np.array_equal(labels.label_map.sum(-1), np.ones((3, 5)))


@pytest.mark.parametrize("case", ["small", "wide", "vip", "pose"])
def test_stretched_masks_are_dinos(golden, case):
    arrays = load_file(golden(f"propagation/dino_{case}.safetensors"))
    size = arrays["masks"].shape[1:]
    for label_map, expected in zip(arrays["soft_labels"][1:], arrays["masks"], strict=True):
        ids = range(label_map.shape[-1])
        assert np.array_equal(
            decode_mask(torch.from_numpy(label_map), ids, size, size, stretched=True), expected
        )


def test_a_class_that_is_everywhere_the_same_wins_nothing():
    label_map = torch.tensor([[[0.6, 0.1, 0.3], [0.6, 0.2, 0.2]]])
    assert decode_mask(label_map, (0, 4, 9), (1, 2), (1, 2), stretched=True).tolist() == [[9, 4]]
