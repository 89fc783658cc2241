"""Kinetics-like and plain folders of real tiny clips: order, ids, classes, and named failures."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cosettle_cache.core.console import SILENT
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import draw_mark
from cosettle_cache.core.types import MediaKind
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.build import check_media
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.manifest import manifest_from_table, manifest_table
from cosettle_cache.videos.masks import frame_stems


def make_frames(folder: Path, n_frames: int = 3, size: tuple[int, int] = (8, 12)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(n_frames):
        Image.fromarray(np.full((*size, 3), index, np.uint8)).save(folder / f"{index}.jpg")


def make_file(path: Path, n_frames: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(n_frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 20 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_kinetics_rows(tmp_path):
    root = tmp_path / "k400"
    make_frames(root / "yoga" / "clip10")
    make_frames(root / "yoga" / "clip2")
    make_file(root / "archery" / "a.b.mp4")
    result = build_manifest("kinetics", root, tmp_path, split="train")
    assert not result.failures
    rows = [(v.video_id, v.media, v.class_name, v.media_kind, v.n_frames) for v in result.manifest]
    assert rows == [
        ("archery/a.b", "k400/archery/a.b.mp4", "archery", MediaKind.FILE, 5),
        ("yoga/clip2", "k400/yoga/clip2", "yoga", MediaKind.FRAMES, 3),
        ("yoga/clip10", "k400/yoga/clip10", "yoga", MediaKind.FRAMES, 3),
    ]
    file, folder = result.manifest.videos[:2]
    assert (file.height, file.width, file.fps) == (16, 32, 10.0)
    assert (folder.height, folder.width, folder.fps) == (8, 12, None)
    assert {(v.dataset, v.split) for v in result.manifest} == {("kinetics", "train")}


def test_kinetics_class_without_clips_is_a_failure(tmp_path):
    make_frames(tmp_path / "yoga" / "a")
    (tmp_path / "archery").mkdir()
    result = build_manifest("kinetics", tmp_path, tmp_path)
    assert [v.video_id for v in result.manifest] == ["yoga/a"]
    assert "holds no frames" in result.failures["archery"]
    make_file(tmp_path / "loose.mp4")
    result = build_manifest("kinetics", tmp_path, tmp_path)
    assert [v.video_id for v in result.manifest] == ["yoga/a"]
    assert "loose.mp4 lies in no class folder" in result.failures["loose.mp4"]


def test_folder_finds_clips_at_any_depth(tmp_path):
    make_file(tmp_path / "clip10.mp4")
    make_file(tmp_path / "clip2.mp4")
    make_frames(tmp_path / "deep" / "er" / "frames")
    Image.new("RGB", (4, 4)).save(tmp_path / "contact_sheet.png")
    (tmp_path / "notes.txt").write_text("about these clips")
    (tmp_path / ".cache").mkdir()
    result = build_manifest("folder", tmp_path, tmp_path)
    assert [v.video_id for v in result.manifest] == ["clip2", "clip10", "deep/er/frames"]
    assert not result.failures
    (note,) = result.notes
    assert note == f"images beside clips are no frames: those in {tmp_path.name} (1) were passed over"


def test_what_systems_and_viewers_leave_is_passed_over_with_one_note(tmp_path):
    make_frames(tmp_path / "clip")
    make_frames(tmp_path / "clip" / "thumbs", size=(2, 3))
    make_frames(tmp_path / "clip" / "@eaDir")
    make_frames(tmp_path / "__MACOSX" / "clip")
    for name in ("._0.jpg", "._1.jpg", "Thumbs.db"):
        (tmp_path / "clip" / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "._clip.mp4").write_bytes(b"\0\5\x16\7")
    result = build_manifest("folder", tmp_path, tmp_path)
    assert [(v.video_id, v.n_frames, v.height) for v in result.manifest] == [("clip", 3, 8)]
    assert not result.failures
    assert result.notes == ("passed over ._* (2), @eaDir (1), Thumbs.db (1), thumbs (1)",)


def test_links_to_folders_around_them_are_not_followed(tmp_path):
    make_frames(tmp_path / "a" / "clip")
    make_frames(tmp_path / "b" / "clip")
    for link, target in (
        ("a/up", ".."),
        ("a/again", ".."),
        ("a/b", "../b"),
        ("b/a", "../a"),
        ("a/self", "self"),
    ):
        (tmp_path / link).symlink_to(target)
    result = build_manifest("folder", tmp_path, tmp_path)
    assert [v.video_id for v in result.manifest] == ["a/b/clip", "a/clip", "b/a/clip", "b/clip"]


def test_names_keep_their_suffix_where_they_would_collide(tmp_path):
    make_file(tmp_path / "a.mp4")
    make_file(tmp_path / "a.mkv")
    make_frames(tmp_path / "b")
    make_file(tmp_path / "b.avi")
    make_file(tmp_path / "c.mp4")
    result = build_manifest("folder", tmp_path, tmp_path)
    assert sorted(v.video_id for v in result.manifest) == ["a.mkv", "a.mp4", "b", "b.avi", "c"]


def test_one_folder_of_frames_is_one_clip(tmp_path):
    make_frames(tmp_path / "mine")
    (video,) = build_manifest("folder", tmp_path / "mine", tmp_path).manifest
    assert (video.video_id, video.media) == ("mine", "mine")


def test_every_bad_clip_is_named(tmp_path):
    make_file(tmp_path / "good.mp4", n_frames=12)
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(b"no video at all" * 10)
    (tmp_path / "empty").mkdir()
    make_frames(tmp_path / "mixed")
    Image.new("RGB", (5, 5)).save(tmp_path / "mixed" / "9.jpg")
    make_frames(tmp_path / "colon:name \\")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / os.fsdecode(b"\xff.mp4")).touch()
    make_frames(tmp_path / "line\nend")
    result = build_manifest("folder", tmp_path, tmp_path)
    assert [v.video_id for v in result.manifest] == ["colon:name \\", "good"]
    reasons = {
        "zero.mp4": "is empty",
        "noise.mp4": "cannot be decoded",
        "empty": "holds no frames",
        "mixed": "mixes frame sizes",
        "pipe.mp4": "is not a file",
        "\\udcff.mp4": "cannot stand in a manifest: it holds control characters, or bytes that are no UTF-8",
        "line\\nend": "cannot stand in a manifest: it holds control characters",
    }
    assert result.failures.keys() == reasons.keys()
    for media, reason in reasons.items():
        assert reason in result.failures[media]


def test_no_good_clip_at_all_is_an_error(tmp_path):
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(InputError, match="no usable clip") as caught:
        build_manifest("folder", tmp_path, tmp_path)
    assert caught.value.details[0].startswith("zero.mp4: ")
    with pytest.raises(InputError, match="not a folder"):
        build_manifest("kinetics", tmp_path / "missing", tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no clips"):
        build_manifest("kinetics", tmp_path / "bare", tmp_path)


def test_rows_survive_a_manifest_file(tmp_path):
    make_file(tmp_path / "a.mp4")
    make_frames(tmp_path / "b")
    manifest = build_manifest("folder", tmp_path, tmp_path, split="train").manifest
    assert manifest_from_table(manifest_table(manifest)) == manifest


@pytest.mark.data
def test_real_kinetics_folder(shared_data):
    root = shared_data("kinetics400_tiny_frames")
    result = build_manifest("kinetics", root, root.parent)
    assert (len(result.manifest), len(result.failures)) == (30, 0)
    assert len({v.class_name for v in result.manifest}) == 2
    assert {v.n_frames for v in result.manifest} == {3}


@pytest.mark.data
def test_real_clips(shared_data, tmp_path):
    source = shared_data("clips/misc")
    for name in ("bird.mkv", "imageio-binaries-newtonscradle.gif"):
        shutil.copy(source / name, tmp_path)
    result = build_manifest("folder", tmp_path, tmp_path)
    assert not result.failures
    assert all(v.n_frames > 1 and v.height > 1 for v in result.manifest)


def test_images_are_videos_of_one_frame(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    make_frames(root / "cats", n_frames=2)
    make_frames(root / "dogs" / "small", n_frames=1, size=(4, 6))
    make_frames(root, n_frames=1)
    (root / "cats" / "0.PNG").write_bytes((root / "cats" / "0.jpg").read_bytes())
    (root / "cats" / "notes.txt").write_text("no image")
    (root / "cats" / "10.jpg").write_bytes(b"no image either")
    (root / "cats" / "thumbs").mkdir()
    shutil.copy(root / "cats" / "1.jpg", root / "cats" / "thumbs" / "1.jpg")
    result = build_manifest("images", root, tmp_path)
    rows = [(v.video_id, v.media, v.class_name, v.n_frames, v.height, v.width) for v in result.manifest]
    assert rows == [
        ("0", "pictures/0.jpg", None, 1, 8, 12),
        ("cats/0.PNG", "pictures/cats/0.PNG", "cats", 1, 8, 12),
        ("cats/0.jpg", "pictures/cats/0.jpg", "cats", 1, 8, 12),
        ("cats/1", "pictures/cats/1.jpg", "cats", 1, 8, 12),
        ("dogs/small/0", "pictures/dogs/small/0.jpg", "small", 1, 4, 6),
    ]
    assert result.failures.keys() == {"pictures/cats/10.jpg"}
    assert result.notes == ("passed over thumbs (1)",)
    assert manifest_from_table(manifest_table(result.manifest)) == result.manifest
    # No folder is listed for an image.
    for module in ("frames", "content", "masks"):
        monkeypatch.setattr(f"cosettle_cache.videos.{module}.frame_names", lambda _: 1 / 0)
    video = result.manifest.videos[3]
    (image,) = iter_frames(video, tmp_path)
    assert image.shape == (8, 12, 3) and abs(int(image.mean()) - 1) <= 1
    assert frame_stems(video, tmp_path) == ("1",)
    assert not check_media(result.manifest, tmp_path, decode=True, progress=SILENT)
    (root / "cats" / "1.jpg").write_bytes((root / "dogs/small/0.jpg").read_bytes())
    (root / "0.jpg").unlink()
    problems = check_media(result.manifest, tmp_path, decode=False, progress=SILENT)
    assert {name: reason.partition("(")[0] for name, reason in problems.items()} == {
        "0": f"{root}/0.jpg does not exist",
        "cats/1": "pictures/cats/1.jpg has another size ",
    }


def test_a_sample_is_the_same_whatever_else_is_there(tmp_path):
    for name in "abcdef":
        make_file(tmp_path / f"{name}.mp4")
    drawn = build_manifest("folder", tmp_path, tmp_path, sample=3, seed=1).manifest
    names = [video.video_id for video in drawn]
    assert names == sorted(sorted("abcdef", key=partial(draw_mark, 1))[:3])
    assert len(build_manifest("folder", tmp_path, tmp_path, sample=9).manifest) == 6
    (tmp_path / f"{min({*'abcdef'}.difference(names))}.mp4").unlink()
    assert build_manifest("folder", tmp_path, tmp_path, sample=3, seed=1).manifest.videos == drawn.videos


def test_only_what_is_drawn_is_read_and_what_fails_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("cosettle_cache.videos.build.share_of_cores", lambda _: 1)
    first, *order = sorted("abcdefgh", key=partial(draw_mark, 1))
    for name in order:
        make_file(tmp_path / f"{name}.mp4")
    (tmp_path / f"{first}.mp4").write_bytes(b"no film")
    (tmp_path / f"{order[-1]}.mp4").write_bytes(b"no film")
    result = build_manifest("folder", tmp_path, tmp_path, sample=2, seed=1)
    assert [video.video_id for video in result.manifest] == sorted(order[:2])
    assert list(result.failures) == [f"{first}.mp4"]
