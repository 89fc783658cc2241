"""The built-in clips: same seed, same pixels; masks, parts and joints that agree with the picture."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import loadmat

from cosettle_cache.core.errors import InputError, OutputError
from cosettle_cache.core.settings import cache_folder
from cosettle_cache.videos import build_manifest, open_sequence
from cosettle_cache.videos.masks import read_mask
from cosettle_cache.videos.sprites import SpritesSettings, ensure_sprites, read_settings
from cosettle_cache.videos.sprites.figures import KINDS, Canvas, Piece, move, plain, stretch, turn
from cosettle_cache.videos.sprites.scenes import draw_scene, render

TINY = SpritesSettings(n_train=2, n_val=2, train_frames=3, val_frames=4, height=64, width=96)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return ensure_sprites(tmp_path_factory.mktemp("sprites") / "tiny", TINY)


def pixels(root):
    """Digests of everything but the joints, whose files bear a date."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".mat")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_pixels(tiny, tmp_path):
    again = ensure_sprites(tmp_path / "again", TINY)
    assert pixels(again) == pixels(tiny)
    other = ensure_sprites(tmp_path / "other", replace(TINY, seed=1))
    assert pixels(other)["JPEGImages/64p/val00-figure/00000.jpg"] not in pixels(tiny).values()


def test_builds_a_davis_manifest_of_each_split(tiny):
    val = build_manifest("sprites", tiny, tiny)
    train = build_manifest("sprites", tiny, tiny, split="train")
    assert not val.failures
    assert not train.failures
    assert [(v.video_id, v.n_frames, v.n_objects) for v in val.manifest] == [
        ("val00-figure", 4, 1),
        ("val01-figure-ball", 4, 2),
    ]
    assert [v.n_frames for v in train.manifest] == [3, 3]
    assert {(v.dataset, v.height, v.width) for v in (*val.manifest, *train.manifest)} == {("sprites", 64, 96)}


def test_sequences_open_and_objects_move(tiny):
    for video in build_manifest("sprites", tiny, tiny).manifest:
        sequence = open_sequence(video, tiny)
        first, last = sequence.first_mask(), sequence.mask(video.n_frames - 1)
        assert set(np.unique(first)) == set(range(sequence.n_objects + 1))
        assert (first != last).mean() > 0.01


def test_parts_and_joints_lie_on_the_figure(tiny):
    pairs = [line.split() for line in (tiny / "lists/jhmdb_vallist.txt").read_text().splitlines()]
    assert len(pairs) == 2
    for joints_path, images in pairs:
        name = images.rsplit("/", 1)[-1]
        content = loadmat(tiny / joints_path)
        joints, visible = content["pos_img"], content["visible"].astype(bool)
        assert joints.shape == (2, 15, 4)
        assert visible[:, 0].mean() >= 0.8
        for frame in range(4):
            objects = read_mask(tiny / f"Annotations/64p/{name}/{frame:05d}.png")
            parts = read_mask(tiny / f"Annotations/Category_ids/{name}/{frame:05d}.png")
            assert set(np.unique(parts)) <= {0, 2, 4, 8, 13, 14, 15, 16, 17, 18, 19}
            np.testing.assert_array_equal(parts > 0, objects == 1)
            col, row = np.round(joints[:, visible[:, frame], frame] - 1).astype(int)
            assert (objects[row, col] == 1).all()


def test_lists_name_existing_folders(tiny):
    for path in (tiny / "lists").iterdir():
        for line in path.read_text().splitlines():
            assert all((tiny / part).exists() for part in line.split())


def test_existing_clips_are_kept(tiny):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    assert ensure_sprites(tiny, TINY) == tiny
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


def test_other_clips_and_other_files_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="other sprites clips"):
        ensure_sprites(tiny, replace(TINY, n_val=1))
    (tmp_path / "sprites.json").write_text('{"version": 1, "n_other": 3}')
    with pytest.raises(InputError, match="other sprites clips"):
        read_settings(tmp_path)
    (tmp_path / "sprites.json").unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="something else"):
        ensure_sprites(tmp_path, TINY)


def test_default_place_is_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = ensure_sprites(settings=replace(TINY, n_train=1, n_val=1))
    assert root.parent == cache_folder()
    assert root.name == "sprites-v1"
    assert [path.name for path in root.parent.iterdir()] == ["sprites-v1"]


def test_no_half_made_folder_is_left(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OutputError, match="in the way"):
        ensure_sprites(blocked / "sprites", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_concurrent_makers_agree(tmp_path):
    small = replace(TINY, n_train=1, n_val=1)
    roots = []
    makers = [
        threading.Thread(target=lambda: roots.append(ensure_sprites(tmp_path / "s", small))) for _ in range(4)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert roots == [tmp_path / "s"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert (tmp_path / "s/sprites.json").is_file()


@settings(deadline=None, max_examples=40)
@given(
    angle=st.floats(0, 6.3),
    x=st.floats(-3, 27),
    y=st.floats(-3, 23),
    size=st.floats(2, 12),
    second=st.booleans(),
)
def test_index_map_is_what_covers_most(angle, x, y, size, second):
    """Oracle: in a raster 12 times finer every point belongs to one piece; the most frequent one wins."""
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    place = move(x, y) @ turn(angle) @ stretch(size, size * 0.6)
    pieces = [Piece(square, place, plain((1.0, 0.0, 0.0)), 1)]
    if second:
        other = move(12.0, 10.0) @ turn(0.4) @ stretch(5.0, 5.0)
        pieces.append(Piece(square, other, plain((0.0, 1.0, 0.0)), 2))
    canvas = Canvas(np.zeros((20, 24, 3), np.float32))
    fine = np.zeros((20 * 12, 24 * 12), np.uint8)
    for piece in pieces:
        canvas.paint(piece)
        fine[_inside(piece.placement, fine.shape)] = piece.index
    shares = np.stack([(fine == index).reshape(20, 12, 24, 12).mean((1, 3)) for index in range(3)])
    ordered = np.sort(shares, axis=0)
    # Coverage is counted in finite rasters (outlines come out 1/20 pixel wide on average, corners 1/4).
    clear = ordered[-1] - ordered[-2] > 0.5
    np.testing.assert_array_equal(canvas.indices[clear], shares.argmax(0)[clear])


def _inside(placement, shape):
    row, col = (np.mgrid[: shape[0], : shape[1]] + 0.5) / 12
    points = np.stack([col.ravel(), row.ravel(), np.ones(col.size)])
    return (np.abs((np.linalg.inv(placement) @ points)[:2]).max(0) <= 1).reshape(shape)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_creature_fills_its_mask_with_texture(name):
    scene = draw_scene((name,), (3, 0, 0), 120, 200)
    frame = render(scene, 0.0)
    inside = frame.objects == 1
    assert 0.006 < inside.mean() < 0.5
    empty = render(replace(scene, actors=(), objects=()), 0.0)
    changed = (frame.image != empty.image).any(-1)
    assert (changed & ~inside).mean() < 0.02  # only the soft rim
    assert changed[inside].mean() > 0.99
    assert frame.image[inside].std(0).max() > 15


def test_nearer_actor_covers_the_farther():
    scene = draw_scene(("ball", "ball"), (0, 0, 0), 64, 96)
    together = [replace(actor, start=(0.5, 0.5), end=(0.5, 0.5), bob=0.0) for actor in scene.actors]
    frame = render(replace(scene, actors=tuple(together)), 0.0)
    assert frame.objects[32, 48] == scene.objects[-1]


def test_pictures_are_rgb_jpegs(tiny):
    with Image.open(tiny / "JPEGImages/64p/val00-figure/00000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 64))
