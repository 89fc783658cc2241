"""What is written is what is read, through the direct reader and through Zarr, whatever the shapes."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import Case, folder_bytes, frames_case, pairs_case

from cosettle_cache.core.errors import FingerprintError, InputError, UsageError
from cosettle_cache.core.types import ArrayLayout, Grid, PlanKind, Role
from cosettle_cache.store import SPEC_VERSION, FeatureStore, StoreWriter, open_store, store_summary


def bits(tokens: np.ndarray) -> np.ndarray:
    """Equal bytes, not equal numbers: NaN and signed zeros count."""
    return np.ascontiguousarray(tokens).view(np.uint16)


def zarr_tokens(path: Path, layout: ArrayLayout) -> np.ndarray:
    """Return an array as Zarr reads it; an int8 one is turned back as the format's page says."""
    stored = zarr.open_array(path, path=f"tokens/{layout.grid}", mode="r")[:]
    if layout.dtype == "float16":
        return stored
    values = stored[..., : layout.n_channels].astype(np.float32)
    scales = np.ascontiguousarray(stored[..., layout.n_channels :]).view(np.float16).astype(np.float32)
    return (values * np.repeat(scales, 64, axis=-1)[..., : layout.n_channels]).astype(np.float16)


def frames_of(case: Case, video_id: str) -> np.ndarray:
    """Return the plain tokens of a video from what the writer was given."""
    found = []
    for index in range(case.plan.n_slots):
        slot = case.plan.slot(index)
        tokens = case.kept_tokens(slot)
        found += [
            (encoding.frame, tokens[number])
            for number, encoding in enumerate(slot.encodings)
            if encoding.video_id == video_id and encoding.role is Role.PLAIN
        ]
    return np.stack([tokens for _, tokens in sorted(found, key=lambda item: item[0])])


def check_frames(case: Case, store: FeatureStore) -> None:
    assert list(store.video_ids) == [video.video_id for video in case.manifest]
    for video_id in store.video_ids:
        wanted = frames_of(case, video_id)
        assert np.array_equal(bits(store.tokens(video_id)), bits(wanted))
        assert np.array_equal(bits(np.stack(list(store.iter_tokens(video_id)))), bits(wanted))
        assert store.n_frames(video_id) == len(wanted)
        assert store.grid(video_id) == Grid(*wanted.shape[1:3])


def test_frames_plan_round_trip(tmp_path: Path) -> None:
    case = frames_case(n_shifted=2)
    store = open_store(case.write(tmp_path / "store.zarr"))
    check_frames(case, store)
    assert store.complete
    assert store.plan_kind is PlanKind.FRAMES
    assert store.slot_states() == {"todo": 0, "done": store.n_slots, "failed": 0}
    assert store.fingerprint == case.fingerprint()
    assert store.manifest == case.manifest
    assert store.arrays == case.plan.arrays
    assert store.encoder == {"patch": 16}


def test_every_other_frame_counts_as_all_planned_frames(tmp_path: Path) -> None:
    case = frames_case(every=2)
    check_frames(case, open_store(case.write(tmp_path / "store.zarr")))


def test_pairs_plan_round_trip(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr"))
    layout = case.plan.arrays[0]
    wanted = case.array(layout.grid).reshape(-1, 3, layout.grid.rows, layout.grid.cols, layout.n_channels)
    ids = np.random.default_rng(1).permutation(store.sample_ids)
    assert np.array_equal(bits(store.samples(ids)), bits(wanted[ids]))
    assert store.samples([]).shape == (0, *wanted.shape[1:])
    assert store.video_ids == tuple(video.video_id for video in case.manifest)
    assert store.sample_table.to_pydict() == {
        "sample": list(range(len(wanted))),
        "video_id": [f"clip{number // 2}" for number in range(10)],
        "view": [0, 1] * 5,
    }


def test_read_into_fills_the_callers_buffer_again_and_again(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr"))
    buffer = np.zeros((2, 3, 2, 2, 8), np.float16)
    for ids in ([0, 5], [7, 7]):
        store.read_into(ids, buffer)
        assert np.array_equal(bits(buffer), bits(store.samples(ids)))
    for bad in (buffer[:1], buffer[..., ::2], np.zeros((2, 3, 2, 2, 16), np.float16)[..., ::2]):
        with pytest.raises(UsageError, match="does not fit"):
            store.read_into([0, 5], bad)


def test_index_rows_are_the_plan(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr"))
    encodings = [e for index in range(case.plan.n_slots) for e in case.plan.slot(index).encodings]
    rows = store.index.to_pylist()
    assert [row["row"] for row in rows] == list(range(len(encodings)))
    for row, encoding in zip(rows, encodings, strict=True):
        assert (row["video_id"], row["frame"], row["view"]) == (
            encoding.video_id,
            encoding.frame,
            encoding.view,
        )
        assert row["role"] == encoding.role
        assert row["error"] is None
        assert encoding.crop is not None
        assert row["crop_left"] == encoding.crop.left
        assert row["shift_col"] == (encoding.shift.col if encoding.shift else None)


def test_failed_video_is_absent_and_named(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", failures={"camel": "frame 2 is truncated"})
    store = open_store(path)
    assert store.video_ids == ("bear", "dog", "eel")
    assert store.failures == {"camel": "frame 2 is truncated"}
    assert not store.complete
    assert store.slot_states() == {"todo": 0, "done": 2, "failed": 2}
    with pytest.raises(InputError, match="camel: frame 2 is truncated"):
        store.tokens("camel")
    with pytest.raises(InputError, match="no video zebra"):
        store.tokens("zebra")
    check = zarr_tokens(path, case.plan.arrays[0])
    assert np.isnan(check[5:9].astype(np.float32)).all()
    assert np.array_equal(bits(check[:5]), bits(store.tokens("bear")))


def test_failed_sample_is_absent_and_named(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr", failures={"clip1": "zero bytes"}))
    assert store.sample_ids.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert store.video_ids == ("clip0", "clip2", "clip3", "clip4")
    with pytest.raises(InputError, match=r"clip1.*zero bytes"):
        store.samples([0, 2])
    with pytest.raises(InputError, match="no chunk 10"):
        store.samples([10])
    with pytest.raises(InputError, match="another plan"):
        store.tokens("clip0")


def test_slots_to_do_are_not_there(tmp_path: Path) -> None:
    case = pairs_case()
    store = open_store(case.write(tmp_path / "store.zarr", slots=[1]))
    assert store.sample_ids.tolist() == [4, 5, 6, 7]
    assert store.video_ids == ("clip2", "clip3")
    assert store.slot_states() == {"todo": 2, "done": 1, "failed": 0}
    with pytest.raises(InputError, match="not extracted yet"):
        store.samples([0])


def test_a_video_across_slots_needs_both(tmp_path: Path) -> None:
    case = frames_case()
    store = open_store(case.write(tmp_path / "store.zarr", slots=[0, 3]))
    assert store.video_ids == ("dog",)
    with pytest.raises(InputError, match="not been extracted yet"):
        store.tokens("bear")


def test_retry_makes_a_failed_slot_done(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", failures={"dog": "gone"})
    reader = open_store(path)
    assert reader.video_ids == ("bear", "camel", "eel")
    writer = case.writer(path)
    assert writer.todo() == []
    assert writer.todo(retry_failed=True) == [3]
    case.commit(writer, 3)
    check_frames(case, open_store(path))
    assert folder_bytes(path) == folder_bytes(case.write(tmp_path / "other.zarr"))
    assert reader.video_ids == ("bear", "camel", "eel")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr")
    with pytest.raises(FingerprintError) as caught:
        case.writer(path, backbone="other", versions={"numpy": "3"})
    assert caught.value.details == (
        "backbone: wanted other, found tiny",
        "versions.numpy: wanted 3, found 2",
    )
    with pytest.raises(FingerprintError) as caught:
        frames_case(dim=16).writer(path)
    assert "16 channels" in caught.value.details[0]


def test_places_that_are_no_store(tmp_path: Path) -> None:
    case = frames_case()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    zarr.create_group(tmp_path / "foreign")
    for name in ("file", "full", "foreign"):
        with pytest.raises(InputError):
            case.writer(tmp_path / name)
        with pytest.raises(InputError):
            open_store(tmp_path / name)
    for name in ("empty", "absent"):
        with pytest.raises(InputError) as caught:
            open_store(tmp_path / name)
        assert caught.value.hint
        assert case.writer(tmp_path / name).n_slots == 4
    assert sorted(item.name for item in tmp_path.iterdir()) == ["absent", "empty", "file", "foreign", "full"]


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "store.zarr")
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"spec_version": 1', f'"spec_version": {SPEC_VERSION + 1}'))
    with pytest.raises(InputError, match="newer"):
        open_store(path)


def test_summary(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0, 1, 3], failures={"camel": "gone"})
    summary = store_summary(open_store(path))
    assert (summary["n_slots"], summary["n_todo"], summary["n_done"], summary["n_failed"]) == (4, 1, 2, 1)
    assert (summary["n_encodings"], summary["n_present"], summary["n_failed_encodings"]) == (13, 8, 3)
    assert [array["n_present"] for array in summary["arrays"]] == [5, 3]
    assert summary["n_bytes"] == sum(map(len, folder_bytes(path).values()))
    assert summary["failures"] == {"camel": "gone"}
    assert summary["fingerprint"]["backbone"] == "tiny"


def test_pickled_and_shared_between_threads(tmp_path: Path) -> None:
    case = pairs_case()
    case.write(tmp_path / "store.zarr")
    copy = pickle.loads(pickle.dumps(open_store(tmp_path / "store.zarr")))
    wanted = copy.samples(range(10))
    with ThreadPoolExecutor(4) as pool:
        orders = [np.random.default_rng(seed).permutation(10) for seed in range(40)]
        for order, found in zip(orders, pool.map(copy.samples, orders), strict=True):
            assert np.array_equal(bits(found), bits(wanted[order]))
    assert copy.fingerprint == case.fingerprint()


def test_more_shards_than_may_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosettle_cache.store._chunks.MAX_OPEN_SHARDS", 2)
    case = frames_case(slot_encodings=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        check_frames(case, open_store(case.write(tmp_path / "store.zarr")))


def test_same_store_twice_is_the_same_bytes(tmp_path: Path) -> None:
    case = pairs_case()
    first = folder_bytes(case.write(tmp_path / "a.zarr"))
    second = folder_bytes(case.write(tmp_path / "b.zarr", slots=[2, 0, 1]))
    assert first == second


def test_slots_that_split_samples_are_refused(tmp_path: Path) -> None:
    case = pairs_case()
    layout = ArrayLayout(Grid(2, 2), 24, 8, 3, 8)
    with pytest.raises(ValueError, match="whole chunks"):
        StoreWriter.create_or_resume(tmp_path / "x", [layout], case.fingerprint(), case.manifest, {})


DTYPES = st.sampled_from(["float16", "float16", "int8"])
CODECS = st.sampled_from(["none", "none", "zstd"])


@st.composite
def pairs_cases(draw: st.DrawFn) -> Callable[[], Case]:
    return partial(
        pairs_case,
        draw(st.integers(1, 5)),
        n_views=draw(st.integers(1, 3)),
        side=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 40)),
        slot_encodings=3 * draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 99)),
        dtype=draw(DTYPES),
        codec=draw(CODECS),
    )


@st.composite
def frames_cases(draw: st.DrawFn) -> Callable[[], Case]:
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 2), st.integers(1, 3))
    return partial(
        frames_case,
        [
            (f"clip{number}", *size)
            for number, size in enumerate(draw(st.lists(sizes, min_size=1, max_size=5)))
        ],
        dim=draw(st.integers(1, 40)),
        slot_encodings=draw(st.integers(1, 7)),
        n_shifted=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 99)),
        dtype=draw(DTYPES),
        codec=draw(CODECS),
    )


@settings(max_examples=25, deadline=None)
@given(pairs_cases() | frames_cases(), st.sets(st.integers(0, 9)), st.sets(st.integers(0, 4)))
def test_direct_reader_and_zarr_return_equal_bytes(
    make_case: Callable[[], Case], numbers: set[int], failed: set[int]
) -> None:
    case = make_case()
    slots = {number for number in numbers if number < case.plan.n_slots}
    failures = {f"clip{number}": "damaged" for number in failed}
    with TemporaryDirectory() as folder:
        path = case.write(Path(folder) / "store.zarr", slots=sorted(slots), failures=failures)
        store = open_store(path)
        oracle = {str(layout.grid): zarr_tokens(path, layout) for layout in store.arrays}
        present = [row for row in store.index.to_pylist() if row["error"] is None]
        planned = [e for index in sorted(slots) for e in case.plan.slot(index).encodings]
        assert len(present) == sum(encoding.video_id not in failures for encoding in planned)
        for layout in store.arrays:
            rows = [row["row"] for row in present if row["array"] == str(layout.grid)]
            given_tokens = case.array(layout.grid)
            assert np.array_equal(bits(oracle[str(layout.grid)][rows]), bits(given_tokens[rows]))
            if layout.dtype == "float16":
                holes = np.delete(oracle[str(layout.grid)], rows, axis=0)
                assert np.isnan(holes.astype(np.float32)).all()
        if store.plan_kind is PlanKind.PAIRS:
            (tokens,) = oracle.values()
            found = store.samples(store.sample_ids)
            assert np.array_equal(bits(found), bits(tokens.reshape(-1, *found.shape[1:])[store.sample_ids]))
            assert 3 * len(store.sample_ids) == len(present)
        else:
            for video_id in store.video_ids:
                assert np.array_equal(bits(store.tokens(video_id)), bits(frames_of(case, video_id)))
