"""The searches: multiplicity, windows, the certificate, the queue, and what tokens they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from propagation_cases import SEARCHES, clips, needs_faiss, single_thread

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid
from cosettle_cache.propagation.context import ContextSearch, Queue
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.search.choose import make_ranker
from cosettle_cache.search.masked import (
    SLAB_COLS,
    FaissRanker,
    SearchSize,
    Slab,
    TorchRanker,
    make_slabs,
)
from cosettle_cache.search.rough import FrameKeys, Look, RoughRanker

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def make_search(protocol, rows=3, cols=4, dim=8, search="torch"):
    return ContextSearch(Grid(rows, cols), dim, protocol, device=CPU, search=search)


def clip_search(clip, search="torch"):
    return make_search(clip.protocol, *clip.tokens.shape[1:], search)


@settings(max_examples=40, deadline=None)
@given(clips())
@needs_faiss
def test_all_searches_find_the_same(clip):
    searches = [clip_search(clip, search) for search in SEARCHES]
    for frame in clip.tokens:
        first, *others = (search.step(frame) for search in searches)
        for other in others if first is not None else []:
            torch.testing.assert_close(first.similarity, other.similarity, atol=1e-5, rtol=0)
            assert torch.equal(first.count.sum(1), other.count.sum(1))


@settings(max_examples=40, deadline=None)
@given(clips())
def test_neighbours_are_what_they_say(clip):
    tokens, protocol = clip.tokens, clip.protocol
    unit = torch.nn.functional.normalize(tokens, dim=-1).flatten(1, 2)
    search = clip_search(clip)
    search.step(tokens[0])
    for t in range(1, len(tokens)):
        found = search.step(tokens[t])
        there = found.count > 0
        cosine = (unit[t][:, None] * unit[found.frame.long(), found.position.long()]).sum(-1)
        torch.testing.assert_close(found.similarity[there], cosine[there], atol=1e-5, rtol=0)
        assert (found.similarity.diff(dim=1)[there[:, 1:]] <= 0).all()
        assert (found.frame[there] < t).all()
        assert ((found.frame == 0) | (found.frame >= t - protocol.n_context))[there].all()
        places = torch.tensor([int(count[:-1].sum()) for count in _without_padding(found.count)])
        if protocol.keep_ties:
            beyond = there & (found.count.cumsum(1) - found.count >= protocol.top_k)
            last = found.similarity.masked_fill(~there | beyond, torch.inf).amin(1, keepdim=True)
            assert (found.similarity == last)[beyond].all()
        else:
            assert (found.count.sum(1) <= protocol.top_k).all()
            assert (places < protocol.top_k).all()


def _without_padding(count):
    return [row[row > 0] for row in count]


@pytest.mark.parametrize("t", [1, 2, 19, 20, 21, 25])
def test_the_first_frame_stands_as_often_as_in_the_padded_clip(t):
    protocol = make_protocol(top_k=21, radius=0.5)
    search = make_search(protocol, 1, 1)
    for _ in range(t):
        search.step(torch.ones(1, 1, 8))
    found = search.step(torch.ones(1, 1, 8))
    assert found.count[found.frame == 0].sum() == 1 + max(0, 21 - t)
    assert found.count[found.frame > 0].sum() == min(t - 1, 20)


def test_copies_of_the_first_frame_stay_inside_the_window():
    protocol = make_protocol(top_k=15, radius=1, n_context=4)
    search = make_search(protocol, 1, 3)
    tokens = torch.randn(1, 3, 8)
    search.step(tokens)
    found = search.step(tokens)
    near = found.position == torch.arange(3)[:, None]
    there = found.count > 0
    assert there.sum() == 9
    assert (found.count[near & there] == 5).all()
    assert (found.count[~near & there] == 1).all()


@pytest.mark.parametrize("k", [1, 7])
@needs_faiss
def test_the_certificate_sends_queries_to_the_dense_search(k):
    # Every key outside the window beats every key inside: what FAISS fetches is all hidden.
    queries, blocked = torch.ones(5, 4), torch.ones(5, 40, dtype=torch.bool)
    keys = torch.full((40, 2, 4), 1.0)
    keys[:8] = torch.rand(8, 2, 4) * 0.5
    blocked[:, :8] = False
    values, index = FaissRanker().rank(queries, keys, blocked, k)
    dense_values, dense_index = TorchRanker().rank(queries, keys, blocked, k)
    torch.testing.assert_close(values, dense_values)
    assert torch.equal(index, dense_index)
    assert (index // 2 < 8).all()


def rough_look(queries, keys, blocked=None):
    """Return `queries` as the last frame of a video that look at `keys` [position frame dim]."""
    n_positions, n_frames, dim = keys.shape
    frames = FrameKeys(n_frames + 1, n_positions, dim, CPU, torch.bfloat16)
    for frame, tokens in enumerate(keys.transpose(0, 1), start=1):
        frames.put(tokens, frame)
    frames.put(torch.nn.functional.pad(queries, (0, 0, 0, n_positions - len(queries))), n_frames + 1)
    asked, nothing = slice(0, len(queries)), slice(0, 0)
    slab = Slab(nothing, asked, slice(0, n_positions), blocked)
    return Look(frames, n_frames + 1, 1, slab, Slab(nothing, asked, nothing, None))


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.05, 1.0])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_bfloat16_products_miss_nothing(spread, hidden):
    # Keys that bfloat16 cannot tell apart, or only just, and far more of them than candidates are fetched.
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 24, generator=generator)
    keys, queries = (centre + spread * torch.randn(n, 24, generator=generator) for n in (3000, 20))
    keys, queries = (torch.nn.functional.normalize(part, dim=-1) for part in (keys, queries))
    keys = keys.view(150, 20, 24)
    blocked = torch.rand(20, 150, generator=generator) < hidden if hidden else None
    found = RoughRanker().find(rough_look(queries, keys, blocked), 7)
    expected, _ = TorchRanker().rank(queries, keys, blocked, 7)
    torch.testing.assert_close(found.similarity, expected, atol=1e-6, rtol=0)
    cosine = (queries[:, None] * keys[found.position, found.frame - 1]).sum(-1)
    torch.testing.assert_close(cosine, found.similarity, atol=1e-6, rtol=0)
    if blocked is not None:
        assert not blocked.gather(1, found.position).any()


def test_a_few_uncertain_queries_look_at_all_keys_that_may_reach():
    generator = torch.Generator().manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(4000, 24, generator=generator), dim=-1)
    # Query 0 has 60 neighbours that are the same in bfloat16; the best come last.
    keys[-60:] = torch.nn.functional.normalize(
        keys[:1] + torch.linspace(6e-3, 5e-3, 60)[:, None] * torch.eye(24)[:1], dim=-1
    )
    queries = torch.cat(
        [keys[:1], torch.nn.functional.normalize(torch.randn(9, 24, generator=generator), dim=-1)]
    )
    look = rough_look(queries, keys[:, None])
    assert not RoughRanker().name(look, 7).certain[0]
    found = RoughRanker().find(look, 7)
    expected, expected_index = TorchRanker().rank(queries, keys[:, None], None, 7)
    torch.testing.assert_close(found.similarity, expected, atol=1e-6, rtol=0)
    assert set(found.position[0].tolist()) == set(expected_index[0].tolist())


def test_threads_of_the_search_leave_torch_its_own():
    torch.set_num_threads(3)
    try:
        ranker = RoughRanker()
        assert ranker.n_parallel == 3
        slabs = make_slabs(Grid(2, 30), None, CPU)
        number = torch.zeros(1, 1)

        def job(slab):
            return number + torch.get_num_threads(), torch.zeros(1, 1, dtype=torch.long)

        assert [float(values) for values, _ in ranker.map(job, slabs)] == [1.0] * len(slabs)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_bfloat16_products_lie_within_the_bound():
    # Tokens whose roundings all err to one side, as far as they can.
    step = torch.ones(1, 64) + 2.0**-8 - 2.0**-20
    query, key = (torch.nn.functional.normalize(step * sign, dim=-1) for sign in (1, 1))
    generator = torch.Generator().manual_seed(0)
    queries = torch.cat(
        [query, torch.nn.functional.normalize(torch.randn(200, 64, generator=generator), dim=-1)]
    )
    keys = torch.cat([key, queries + 0.02 * torch.randn(201, 64, generator=generator)])
    keys = torch.nn.functional.normalize(keys, dim=-1)
    look = rough_look(queries, keys[:, None])
    product = (queries.bfloat16() @ keys.bfloat16().T).float()
    error = torch.stack([RoughRanker()._error(look, column) for column in product.T], dim=1)
    assert ((product - queries @ keys.T).abs() <= error).all()
    assert error.max() < 0.013


def test_a_queue_replaces_its_oldest_frame():
    queue = Queue(3, Grid(2, 1), 1, CPU)
    for frame in range(1, 6):
        queue.append(torch.full((2, 1), float(frame)), frame)
    assert sorted(queue.frames.tolist()) == [3, 4, 5]
    assert torch.equal(queue.keys[:, :, 0], queue.frames.float().expand(2, 3))


def test_a_queue_fills_in_one_storage():
    grid, frames = Grid(9, 20), torch.randn(4, 180, 2)
    queue = Queue(4, grid, 2, CPU)
    storage = queue.keys.untyped_storage().data_ptr()
    for frame, tokens in enumerate(frames, start=1):
        queue.append(tokens, frame)
        assert torch.equal(queue.keys, frames[:frame].transpose(0, 1))
    assert queue.keys.untyped_storage().data_ptr() == storage


@settings(max_examples=15, deadline=None)
@given(clips(), st.sampled_from(SEARCHES))
def test_a_memory_limit_changes_nothing_but_memory(clip, search):
    grid, dim = clip.grid, clip.tokens.shape[-1]
    ranker = make_ranker(search, CPU)
    size = SearchSize(grid, dim, clip.protocol, ranker.n_parallel, rough=ranker.dtype)
    least = size.needed_bytes(1)
    narrow = ContextSearch(grid, dim, clip.protocol, device=CPU, search=search, memory_limit=least)
    wide = ContextSearch(grid, dim, clip.protocol, device=CPU, search=search)
    for frame in clip.tokens:
        a, b = narrow.step(frame), wide.step(frame)
        if a is not None:
            torch.testing.assert_close(a.similarity, b.similarity, atol=1e-5, rtol=0)
            assert torch.equal(a.count.sum(1), b.count.sum(1))
    with pytest.raises(UsageError, match="needs more memory") as caught:
        ContextSearch(grid, dim, clip.protocol, device=CPU, search=search, memory_limit=least - 1)
    assert caught.value.wanted == f"at least {least} bytes"


def test_slabs_are_as_wide_as_the_limit_allows():
    size = SearchSize(Grid(30, 55), 768, make_protocol(), n_parallel=2)
    needs = [size.needed_bytes(cols) for cols in range(1, SLAB_COLS + 1)]
    assert needs == sorted(needs) and needs[-1] < 200e6
    assert [size.slab_cols(need) for need in needs] == list(range(1, SLAB_COLS + 1))
    assert size.slab_cols(None) == SLAB_COLS


def test_slabs_cover_every_query_once_and_open_windows_have_no_mask():
    slabs = make_slabs(Grid(4, 20), make_protocol(radius=3), CPU)
    assert [col for slab in slabs for col in range(20)[slab.query_cols]] == list(range(20))
    assert all(slab.blocked is not None for slab in slabs)
    assert all(slab.blocked is None for slab in make_slabs(Grid(4, 20), make_protocol(radius=30), CPU))


@pytest.mark.parametrize("search", SEARCHES)
def test_tokens_that_cannot_be_are_refused(search):
    context = make_search(make_protocol(), search=search)
    context.step(torch.randn(3, 4, 8))
    with pytest.raises(InputError, match="another shape"):
        context.step(torch.randn(3, 5, 8))
    with pytest.raises(InputError, match="not finite"):
        context.step(torch.full((3, 4, 8), torch.nan))


def test_searches_that_cannot_run_are_refused():
    with pytest.raises(UsageError, match="no search"):
        make_ranker("annoy", CPU)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_still_clip_keeps_every_repetition(search):
    protocol = make_protocol("dino", top_k=2, radius=1, n_context=30)
    tokens = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    context = make_search(protocol, 4, 6, search=search)
    for _ in range(12):
        context.step(tokens)
    found = context.step(tokens)
    assert (found.count.sum(1) == 12).all()
    assert torch.equal(found.position, torch.arange(24, dtype=torch.int32)[:, None].expand(24, 12))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_frame_of_one_colour_ties_with_everything(search):
    context = make_search(make_protocol("dino", n_context=2, radius=2), 4, 6, search=search)
    tokens = torch.randn(8, generator=torch.Generator().manual_seed(0)).expand(4, 6, 8)
    for _ in range(3):
        context.step(tokens)
    corner, inner = context.step(tokens).count.sum(1)[[0, 14]]
    assert (int(corner), int(inner)) == (3 * 9, 3 * 20)


def test_more_neighbours_than_candidates_are_refused():
    for protocol, most in ((make_protocol(n_context=2), 36), (make_protocol("dino"), 12)):
        make_search(replace(protocol, top_k=most))
        with pytest.raises(UsageError, match="more neighbours than a 3x4 grid") as caught:
            make_search(replace(protocol, top_k=most + 1))
        assert caught.value.wanted == f"at most {most}"
