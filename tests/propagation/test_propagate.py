"""Propagation against the released engine's values, a dense oracle, and what must hold for any protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from propagation_cases import SEARCHES, clips, decode_mask, dense_oracle, single_thread
from safetensors.torch import load_file

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid
from cosettle_cache.metrics import davis_j_and_f
from cosettle_cache.propagation import Propagator, propagate
from cosettle_cache.propagation.labels import encode_mask, encode_mask_nearest
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.propagation.tasks.base import Setting
from cosettle_cache.propagation.tasks.masks import decode_index_map
from cosettle_cache.search.masked import transition
from cosettle_cache.videos.masks import read_mask


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def released_protocol(constants):
    common = {"top_k": constants["topk"], "temperature": constants["temperature"]}
    if constants["protocol"] == "dino":
        window = {"n_context": constants["queue_length"], "radius": constants["neighborhood"]}
        return make_protocol("dino", **common, **window)
    return make_protocol(**common, n_context=constants["queue_length"], radius=constants["radius"])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("clip", ["small", "wide", "pose", "vip"])
@pytest.mark.parametrize("engine", ["queue", "dino"])
def test_equals_the_released_engines(engine, clip, search, golden, golden_json):
    known = load_file(golden(f"propagation/{engine}_{clip}.safetensors"))
    constants = golden_json("propagation/expected.json")[f"{engine}_{clip}"]
    protocol = released_protocol(constants)
    soft = propagate(known["features"], known["first_labels"], protocol, search=search)
    assert (soft - known["soft_labels"]).abs().max() <= 1e-4
    size = tuple(side * constants["upsample"] for side in constants["grid"])
    maps = soft[constants.get("masks_from_frame", 0) :]
    hard = [argmax(frame, size, stretch=protocol.norm_mask) for frame in maps]
    assert (np.stack(hard) == known["masks"].numpy()).mean() >= 0.999


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("clip", ["small", "wide", "ties", "square", "real"])
def test_equals_dinov3s_notebook(clip, search, golden, golden_json):
    known = load_file(golden(f"propagation/dinov3_{clip}.safetensors"))
    constants = golden_json("propagation/dinov3.json")[f"dinov3_{clip}"]
    protocol = make_protocol(
        "dinov3",
        top_k=constants["topk"],
        temperature=constants["temperature"],
        n_context=constants["context"],
        radius=constants["size"],
        window={"circle": "disc", "square": "square"}[constants["shape"]],
    )
    features = known.get("features")
    if features is None:
        features = load_file(golden(constants["tokens"]))["tokens"]
    mask, grid = known["first_mask"].numpy(), Grid(*features.shape[1:3])
    first = encode_mask_nearest(mask, grid)
    n_classes = known["soft_labels"].shape[-1]
    if "first_labels" in known:
        assert torch.equal(first.label_map, known["first_labels"][..., list(first.object_ids)])
    soft = propagate(features, first.label_map, protocol, search=search)
    wanted = torch.zeros(*soft.shape[:3], n_classes)
    wanted[..., list(first.object_ids)] = soft
    assert (wanted - known["soft_labels"]).abs().max() <= 1e-4
    setting = Setting(protocol, (0, 0), grid, 0)
    decode, finish = decode_index_map(first, setting, mask.shape, out=mask.shape)
    masks = np.stack([finish(decode(frame).numpy()) for frame in soft])
    same = masks[1:] == known["masks"].numpy()[1:]
    assert same.mean() >= 0.999
    assert (
        soft.argmax(-1) == known["soft_labels"][..., list(first.object_ids)].argmax(-1)
    ).float().mean() >= 0.999


def argmax(label_map, size, *, stretch):
    """The plain way from a soft map to a hard one (PROTOCOLS 1.1, output)."""
    maps = label_map.permute(2, 0, 1)[None]
    maps = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
    if stretch:
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        maps = torch.where(high > 0, (maps - low) / (high - low), maps)
    return maps.argmax(0).numpy()


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
@given(clips(), st.sampled_from(SEARCHES))
def test_equals_the_dense_oracle(clip, search):
    expected, open_tie = dense_oracle(clip.tokens, clip.first_labels, clip.protocol)
    assume(not open_tie)
    found = propagate(clip.tokens, clip.first_labels, clip.protocol, search=search)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(clips(), st.randoms(use_true_random=False))
def test_permuting_the_objects_permutes_the_answer(clip, random):
    labels = clip.first_labels
    order = random.sample(range(labels.shape[2]), labels.shape[2])
    straight = propagate(clip.tokens, labels, clip.protocol)
    assert torch.equal(propagate(clip.tokens, labels[..., order], clip.protocol), straight[..., order])


@settings(max_examples=25, deadline=None)
@given(clips())
def test_any_subset_of_the_objects_has_the_same_maps(clip):
    whole = propagate(clip.tokens, clip.first_labels, clip.protocol)
    alone = propagate(clip.tokens, clip.first_labels[..., :1], clip.protocol)
    torch.testing.assert_close(alone, whole[..., :1])


@settings(max_examples=25, deadline=None)
@given(clips())
def test_labels_keep_their_mass(clip):
    total = propagate(clip.tokens, clip.first_labels, clip.protocol).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@settings(max_examples=25, deadline=None)
@given(clips(radius=26.0), st.sampled_from(SEARCHES))
def test_a_radius_beyond_the_grid_is_no_radius(clip, search):
    none = make_protocol(**{**clip.protocol.to_json(), "name": "cosettle", "radius": 1e6})
    found = [
        propagate(clip.tokens, clip.first_labels, protocol, search=search)
        for protocol in (clip.protocol, none)
    ]
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
    maps = propagate(tokens, labels, protocol)
    assert torch.equal(propagate(tokens.numpy(), labels, protocol), maps)
    for given_tokens in (tokens, tokens.numpy()):
        found = propagate(given_tokens, labels.numpy(), protocol)
        assert isinstance(found, np.ndarray) and np.array_equal(found, maps.numpy())


@pytest.mark.parametrize("search", ["bf16", "torch"])
def test_what_a_propagator_keeps_does_not_depend_on_the_length(search):
    propagator = Propagator(torch.rand(3, 5, 2), make_protocol(n_context=4), search=search)

    def holders() -> list[object]:
        context = propagator._search._context
        return [propagator._carrier, context._keys if search == "bf16" else context._queue]

    def kept() -> int:
        tensors = [item for holder in holders() for item in vars(holder).values() if torch.is_tensor(item)]
        return sum(
            {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values()
        )

    sizes = []
    for _ in range(30):
        propagator.step(torch.randn(3, 5, 8))
        sizes.append(kept())
    assert len(set(sizes[5:])) == 1
    # Labels of five frames; tokens of four, and their numbers, or of six: exact, rounded, and how far apart.
    labels, tokens = 4 * 5 * 15 * 2, {"torch": 4 * 4 * (15 * 8 + 1), "bf16": 6 * 15 * (8 * (4 + 2) + 4)}
    assert sizes[-1] == labels + tokens[search]


def test_labels_and_tokens_must_share_a_grid():
    with pytest.raises(InputError, match="another shape"):
        Propagator(torch.rand(3, 4, 2), make_protocol()).step(torch.randn(3, 5, 8))


def test_a_search_that_does_not_exist_is_refused():
    with pytest.raises(UsageError):
        propagate(torch.randn(2, 3, 5, 8), torch.rand(3, 5, 2), make_protocol(), search="annoy")


def test_videos_without_a_second_frame_are_refused():
    for n_frames in (0, 1):
        with pytest.raises(InputError, match="nothing to propagate to") as caught:
            propagate(torch.randn(n_frames, 3, 5, 8), torch.rand(3, 5, 2), make_protocol())
        assert caught.value.found == str(n_frames)
