"""Label maps: the central 2x2 rule, ties, ids, and masks that lose an object on the way."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cosettle_cache.labels import decode_mask, encode_mask, resize_mask
from cosettle_cache.types import Grid


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
