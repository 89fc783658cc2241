"""Average precision and nearest neighbours: by hand, against plain loops, and the same by every search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from propagation_cases import SEARCHES, needs_faiss

from cosettle_cache.core.errors import UsageError
from cosettle_cache.metrics.retrieval import average_precisions
from cosettle_cache.search.vectors import nearest

#: Those that rank vectors, of the searches that can run here.
VECTOR_SEARCHES = [search for search in SEARCHES if search != "bf16"]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return unit(np.stack([np.cos(angles), np.sin(angles)], 1))


def test_average_precision_by_hand() -> None:
    # Five vectors on a circle; nearer by angle is more similar.
    vectors, classes = on_circle(0, 10, 30, 60, 100), np.array([0, 1, 0, 0, 2])
    # 0: ranked 10 (no), 30 (yes: 1/2), 60 (yes: 2/3), 100 -> (1/2 + 2/3) / 2. 30: ranked 10 (20 away,
    # no), 0 and 60 (both 30 away: the earlier first), 100 -> (1/2 + 2/3) / 2. 60: ranked 30 (yes: 1/1),
    # 100 (40 away), 10 (50), 0 (yes: 2/4) -> (1 + 1/2) / 2. Classes 1 and 2 are alone.
    found = average_precisions(vectors, classes)
    assert found == pytest.approx([7 / 12, np.nan, 7 / 12, 3 / 4, np.nan], nan_ok=True)


def test_equal_vectors_stand_in_the_order_of_the_list() -> None:
    vectors = on_circle(0, 0, 0, 0)
    # 0 sees 1 (no), 2 (yes: 1/2), 3 (no); 2 sees 0 (yes: 1). 1 sees 0, 2 (no), 3 (yes: 1/3); 3 sees 0, 1:
    # 1/2.
    assert average_precisions(vectors, np.array([0, 1, 0, 1])) == pytest.approx([1 / 2, 1 / 3, 1, 1 / 2])
    for search in VECTOR_SEARCHES:
        found = nearest(vectors, vectors, 3, own=np.arange(4), search=search)
        assert found.index.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def plain_nearest(queries: np.ndarray, keys: np.ndarray, k: int, own: np.ndarray | None) -> np.ndarray:
    scores = (queries.astype(np.float64) @ keys.astype(np.float64).T).round(12)
    if own is not None:
        scores[np.arange(len(queries)), own] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def plain_precisions(vectors: np.ndarray, classes: np.ndarray) -> list[float]:
    ranked = plain_nearest(vectors, vectors, len(vectors) - 1, np.arange(len(vectors)))
    found = []
    for query, order in enumerate(ranked):
        hits, shares = 0, []
        for rank, other in enumerate(order, 1):
            if classes[other] == classes[query]:
                hits += 1
                shares.append(hits / rank)
        found.append(float(np.mean(shares)) if shares else np.nan)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**16), st.booleans())
def test_against_plain_loops(n: int, n_classes: int, seed: int, repeats: bool) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((n, 6)))
    if repeats:
        vectors = vectors[rng.integers(0, max(1, n // 3), n)]
    classes = rng.integers(0, n_classes, n)
    expected = plain_precisions(vectors, classes)
    if not repeats:
        assert average_precisions(vectors, classes) == pytest.approx(expected, nan_ok=True)
    k = int(rng.integers(1, n))
    wanted = plain_nearest(vectors, vectors, k, np.arange(n))
    for search in VECTOR_SEARCHES:
        assert (nearest(vectors, vectors, k, own=np.arange(n), search=search).index == wanted).all()


def test_crowds_of_near_equals_are_searched_again() -> None:
    # 400 keys that float32 cannot tell apart: more than any first fetch.
    rng = np.random.default_rng(0)
    keys = unit(on_circle(20)[0] + 1e-7 * rng.standard_normal((400, 2)))
    queries = on_circle(0, 90)
    for search in VECTOR_SEARCHES:
        found = nearest(queries, keys, 5, search=search)
        assert (found.index == plain_nearest(queries, keys, 5, None)).all()
        assert found.similarity[0] == pytest.approx(np.cos(np.radians(20)), abs=1e-5)


@needs_faiss
def test_every_search_gives_the_same_values() -> None:
    vectors = unit(np.random.default_rng(1).standard_normal((700, 48)))
    by_torch = nearest(vectors[:600], vectors[100:], 7, search="torch")
    by_faiss = nearest(vectors[:600], vectors[100:], 7, search="faiss")
    assert (by_torch.index == by_faiss.index).all()
    assert (by_torch.similarity == by_faiss.similarity).all()


def test_more_neighbours_than_there_are() -> None:
    vectors = on_circle(0, 1, 2)
    with pytest.raises(UsageError, match="2 other vectors"):
        nearest(vectors, vectors, 3, own=np.arange(3))
