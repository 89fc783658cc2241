"""Plans are pure: every frame once, any slot anywhere, the released sampling rules."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import Manifest, MediaKind, Role, Video
from cosettle_cache.store.plan import choose_crop, choose_pair, make_plan
from cosettle_cache.videos.frames import resolve_size


def make_manifest(lengths: list[int], sizes: list[tuple[int, int]]) -> Manifest:
    videos = (
        Video(f"v{i}", f"v{i}", MediaKind.FRAMES, length, *sizes[i % len(sizes)])
        for i, length in enumerate(lengths)
    )
    return Manifest(tuple(videos))


uniform = st.floats(min_value=0, max_value=1, exclude_max=True)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(0, 2), st.integers(1, 17))
def test_frames_plan_covers_every_kept_frame_once(
    n_frames: list[int], every: int, n_shifted: int, slot: int
) -> None:
    manifest = make_manifest(n_frames, [(32, 48), (48, 32), (32, 48)])
    plan = make_plan(
        manifest, FramesSettings("native", every, n_shifted), patch=16, dim=4, slot_encodings=slot
    )
    seen = Counter((e.video_id, e.frame, e.view) for i in range(plan.n_slots) for e in plan.slot(i).encodings)
    wanted = {
        (video.video_id, frame, view)
        for video in manifest
        for frame in range(0, video.n_frames, every)
        for view in range(1 + n_shifted)
    }
    assert set(seen) == wanted
    assert set(seen.values()) == {1}
    assert plan.n_encodings == len(wanted)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 4), st.integers(1, 50))
def test_pairs_plan_is_whole_samples_in_whole_slots(n_frames: list[int], n_views: int, slot: int) -> None:
    manifest = make_manifest(n_frames, [(100, 140)])
    plan = make_plan(manifest, PairsSettings(n_views=n_views), patch=16, dim=4, slot_encodings=slot)
    encodings = [e for i in range(plan.n_slots) for e in plan.slot(i).encodings]
    assert len(encodings) == len(n_frames) * n_views * 3
    for a, b, shifted in zip(encodings[::3], encodings[1::3], encodings[2::3], strict=True):
        assert (a.role, b.role, shifted.role) == (Role.A, Role.B, Role.SHIFTED)
        assert a.crop == b.crop == shifted.crop
        assert a.flip == b.flip == shifted.flip
        assert a.frame == shifted.frame
        assert a.shift is None
        assert b.shift is None
        assert shifted.shift is not None
        assert min(shifted.shift.row, shifted.shift.col) >= 0
        assert max(shifted.shift.row, shifted.shift.col) <= 140  # 11 * 14 - 14


def test_slots_do_not_depend_on_each_other() -> None:
    manifest = make_manifest([20, 7, 33], [(480, 854), (480, 910)])
    plan = make_plan(manifest, FramesSettings(), patch=16, dim=8, slot_encodings=7)
    again = make_plan(manifest, FramesSettings(), patch=16, dim=8, slot_encodings=7)
    assert [plan.slot(i) for i in reversed(range(plan.n_slots))][::-1] == [
        again.slot(i) for i in range(plan.n_slots)
    ]
    assert [plan.slot_length(i) for i in range(plan.n_slots)] == [
        len(plan.slot(i).encodings) for i in range(plan.n_slots)
    ]
    with pytest.raises(IndexError):
        plan.slot(plan.n_slots)


def test_another_seed_is_another_plan() -> None:
    manifest = make_manifest([20] * 4, [(100, 100)])
    first, second = (
        make_plan(manifest, PairsSettings(seed=seed), patch=16, dim=8).slot(0) for seed in (0, 1)
    )
    assert first != second


@given(st.integers(1, 60), st.floats(0, 1), uniform, uniform)
def test_pairs_of_any_gap_are_frames_of_the_clip(
    n_frames: int, gap: float, first: float, second: float
) -> None:
    assert all(0 <= frame < n_frames for frame in choose_pair(n_frames, gap, first, second))


@given(st.integers(1, 300), uniform, uniform)
def test_pairs_keep_the_released_gap(n_frames: int, first: float, second: float) -> None:
    a, b = choose_pair(n_frames, 0.15, first, second)
    assert 0 <= min(a, b) <= max(a, b) < n_frames
    if n_frames >= 7:
        assert b - a == int(0.15 * n_frames + 1e-9)
        assert a >= 1


@pytest.mark.parametrize(("n_frames", "gap", "last"), [(20, 3, 16), (40, 6, 33)])
def test_pairs_of_the_papers_clips(n_frames: int, gap: int, last: int) -> None:
    # 20 frames at 2 fps: t1 in 1..16, t2 = t1 + 3; 40 frames: gap 6, t1 in 1..33.
    assert choose_pair(n_frames, 0.15, 0.0, 0.0) == (1, 1 + gap)
    assert choose_pair(n_frames, 0.15, 0.999999, 0.0) == (last, last + gap)


@given(st.tuples(uniform, uniform, uniform, uniform))
def test_crops_stay_inside_and_keep_their_area(draw: tuple[float, float, float, float]) -> None:
    crop = choose_crop(PairsSettings(), draw)
    assert crop.top >= 0
    assert crop.left >= 0
    assert crop.top + crop.height <= 224
    assert crop.left + crop.width <= 224
    assert 0.42 <= crop.height * crop.width / 224**2 <= 1.0


@pytest.mark.parametrize(
    ("rule", "height", "width", "wanted"),
    [
        ("480x880", 480, 854, (480, 880)),
        ("native", 480, 854, (480, 854)),
        ("short:480/64", 480, 854, (480, 832)),
        ("short:480/64", 480, 910, (480, 896)),
        ("short:480/64", 480, 1152, (480, 1152)),
        ("short:480/64", 854, 480, (832, 480)),
        ("long:880/64", 720, 1280, (448, 880)),
        ("long:880/64", 1280, 720, (880, 448)),
        ("short-up:960/16", 480, 854, (960, 1712)),
        ("short-up:960/16", 854, 480, (1712, 960)),
        ("short-up:950/16", 100, 100, (960, 960)),
        ("short-up:480/14", 480, 854, (490, 882)),  # the notebook's: the long side follows the rounded one
        ("dinov3-s", 480, 854, (480, 864)),
        ("dinov3-m", 480, 854, (960, 1712)),
        ("dinov3-l", 1080, 1920, (1440, 2560)),
    ],
)
def test_size_rules(rule: str, height: int, width: int, wanted: tuple[int, int]) -> None:
    assert resolve_size(rule, height, width) == wanted


def test_dinov3s_sizes_depend_on_the_patch() -> None:
    assert [resolve_size(f"dinov3-{size}", 480, 854, 14) for size in "sml"] == [
        (420, 756),
        (840, 1498),
        (1260, 2254),
    ]


@pytest.mark.parametrize("rule", ["", "480", "480x", "axb", "wide:480/64", "0x16", "short:480x64"])
def test_nonsense_sizes_are_usage_errors(rule: str) -> None:
    with pytest.raises(UsageError):
        resolve_size(rule, 480, 854)


def test_a_size_off_the_patch_names_the_next_ones() -> None:
    with pytest.raises(InputError) as caught:
        make_plan(make_manifest([3], [(480, 854)]), FramesSettings(size="native"), patch=16, dim=8)
    assert caught.value.found == "480x854"
    assert caught.value.hint == "--size 480x848"


def test_default_slots_hold_whole_clips_near_the_target_size() -> None:
    manifest = make_manifest([20] * 100, [(240, 320)])
    (layout,) = make_plan(manifest, PairsSettings(), patch=16, dim=768).arrays
    assert layout.slot_encodings % 15 == 0
    assert 0.8 * 2**26 < layout.slot_encodings * layout.encoding_bytes <= 2**26
