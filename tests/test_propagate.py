"""Propagation against the released engine's values, a dense oracle, and what must hold for any protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from propagation_cases import SEARCHES, dense_oracle, protocols, single_thread, videos
from safetensors.torch import load_file

from cosettle_cache.affinity import transition
from cosettle_cache.datasets.davis import read_mask
from cosettle_cache.errors import InputError, UsageError
from cosettle_cache.labels import decode_mask, encode_mask
from cosettle_cache.metrics import davis_j_and_f
from cosettle_cache.propagate import Propagator, propagate
from cosettle_cache.protocols import make_protocol
from cosettle_cache.types import Grid


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("case", ["queue_small", "queue_wide", "queue_pose", "queue_vip"])
def test_equals_the_released_engine(case, search, golden, golden_json):
    known = load_file(golden(f"propagation/{case}.safetensors"))
    constants = golden_json("propagation/expected.json")[case]
    protocol = make_protocol(
        top_k=constants["topk"],
        n_context=constants["queue_length"],
        radius=constants["radius"],
        temperature=constants["temperature"],
    )
    soft = propagate(known["features"], known["first_labels"], protocol, search=search)
    assert (soft - known["soft_labels"]).abs().max() <= 1e-4
    size = tuple(side * constants["upsample"] for side in constants["grid"])
    hard = [decode_mask(frame, range(constants["classes"]), size, size) for frame in soft]
    assert (np.stack(hard) == known["masks"].numpy()).mean() >= 0.999


@pytest.mark.data
def test_j_and_f_on_real_frames_equal_the_released_engine(golden, golden_json, shared_data):
    known = load_file(golden("real/dogs-jump.safetensors"))
    figures = golden_json("real/dogs-jump.json")
    folder = shared_data("DAVIS-240p/Annotations")
    paths = sorted(folder.glob("*/dogs-jump/*.png"))[: figures["frames"]]
    truth = np.stack([read_mask(path) for path in paths])
    size = tuple(figures["size"])
    first = encode_mask(truth[0], size, Grid(15, 27))
    assert torch.equal(first.label_map, known["first_labels"])
    soft = propagate(known["tokens"], first.label_map, make_protocol())
    masks = np.stack([decode_mask(frame, first.object_ids, size, size) for frame in soft])
    scores = davis_j_and_f(truth, masks)
    assert [score.j_mean for score in scores] == pytest.approx(figures["J"], abs=5e-4)
    assert [score.f_mean for score in scores] == pytest.approx(figures["F"], abs=5e-4)


@settings(max_examples=100, deadline=None)
@given(videos(), protocols(), st.sampled_from(SEARCHES))
def test_equals_the_dense_oracle(video, protocol, search):
    tokens, first_labels = video
    expected, open_tie = dense_oracle(tokens, first_labels, protocol)
    assume(not open_tie)
    found = propagate(tokens, first_labels, protocol, search=search)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(videos(), protocols(), st.randoms(use_true_random=False))
def test_permuting_the_objects_permutes_the_answer(video, protocol, random):
    tokens, first_labels = video
    order = random.sample(range(first_labels.shape[2]), first_labels.shape[2])
    straight = propagate(tokens, first_labels, protocol)
    assert torch.equal(propagate(tokens, first_labels[..., order], protocol), straight[..., order])


@settings(max_examples=25, deadline=None)
@given(videos(), protocols())
def test_any_subset_of_the_objects_has_the_same_maps(video, protocol):
    tokens, first_labels = video
    whole = propagate(tokens, first_labels, protocol)
    torch.testing.assert_close(propagate(tokens, first_labels[..., :1], protocol), whole[..., :1])


@settings(max_examples=25, deadline=None)
@given(videos(), protocols())
def test_labels_keep_their_mass(video, protocol):
    tokens, first_labels = video
    total = propagate(tokens, first_labels, protocol).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=25, deadline=None)
@given(videos(), st.sampled_from(["disc", "square"]), st.sampled_from(SEARCHES))
def test_a_radius_beyond_the_grid_is_no_radius(video, window, search):
    tokens, first_labels = video
    wide, none = (make_protocol(window=window, radius=radius, n_context=3) for radius in (26, 1e6))
    found = [propagate(tokens, first_labels, protocol, search=search) for protocol in (wide, none)]
    assert torch.equal(*found)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 20)), min_size=1, max_size=12), st.floats(0.01, 10)
)
def test_transitions_sum_to_one_and_count_copies(neighbours, temperature):
    assume(any(count for _, count in neighbours))
    similarity = torch.tensor([[cosine for cosine, _ in neighbours]], dtype=torch.float64)
    count = torch.tensor([[count for _, count in neighbours]])
    weights = transition(similarity, count, temperature)
    copies = torch.softmax(similarity.repeat_interleave(count[0], dim=1) / temperature, dim=1)
    summed = torch.zeros_like(weights[0])
    summed.index_add_(0, torch.arange(len(neighbours)).repeat_interleave(count[0]), copies[0])
    torch.testing.assert_close(weights[0], summed)
    assert weights.sum() == pytest.approx(1)


def test_half_precision_arrays_are_taken_as_they_are():
    tokens, labels = torch.randn(4, 3, 5, 8).half(), torch.rand(3, 5, 2)
    protocol = make_protocol()
    assert torch.equal(propagate(tokens.numpy(), labels, protocol), propagate(tokens, labels, protocol))


def test_what_a_propagator_keeps_does_not_depend_on_the_length():
    propagator = Propagator(torch.rand(3, 5, 2), make_protocol(n_context=4))

    def kept() -> int:
        holders = [propagator, propagator._search, propagator._search._queue]
        tensors = [item for holder in holders for item in vars(holder).values() if torch.is_tensor(item)]
        return sum(item.untyped_storage().nbytes() for item in tensors)

    sizes = []
    for _ in range(30):
        propagator.step(torch.randn(3, 5, 8))
        sizes.append(kept())
    assert len(set(sizes[5:])) == 1
    assert sizes[5] < sizes[0]


def test_labels_and_tokens_must_share_a_grid():
    with pytest.raises(InputError, match="another shape"):
        Propagator(torch.rand(3, 4, 2), make_protocol()).step(torch.randn(3, 5, 8))


def test_a_search_that_does_not_exist_is_refused():
    with pytest.raises(UsageError):
        propagate(torch.randn(2, 3, 5, 8), torch.rand(3, 5, 2), make_protocol(), search="annoy")
