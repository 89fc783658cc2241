"""The DAVIS layout on small real folders: manifests, masks, and the ways in which annotations go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosettle_cache.core.errors import InputError, MediaError, OutputError, UsageError
from cosettle_cache.core.types import LabelKind, MediaKind, Video
from cosettle_cache.videos import build_manifest, open_sequence
from cosettle_cache.videos.masks import PALETTE, read_mask, write_mask

SIZE = (12, 20)


def make_sequence(
    root: Path, name: str, n_frames: int = 4, resolution: str = "480p", n_objects: int = 2
) -> None:
    frames, masks = (root / kind / resolution / name for kind in ("JPEGImages", "Annotations"))
    for folder in (frames, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(n_frames):
        shade = np.full((*SIZE, 3), 20 * index, np.uint8)
        Image.fromarray(shade).save(frames / f"{index:05d}.jpg")
        write_mask(masks / f"{index:05d}.png", make_mask(n_objects))


def make_mask(n_objects: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    for index in range(1, n_objects + 1):
        mask[:, 2 * index : 2 * index + 2] = index
    return mask


def make_list(root: Path, split: str, text: str) -> None:
    (root / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/2017" / f"{split}.txt").write_text(text)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data" / "DAVIS"
    make_sequence(folder, "dog", n_objects=1)
    make_sequence(folder, "bmx-trees", n_objects=2)
    return folder


def open_one(root: Path, name: str = "bmx-trees"):
    result = build_manifest("davis", root, root.parent)
    (video,) = (video for video in result.manifest if video.video_id == name)
    return open_sequence(video, root.parent)


def bare_row(root: Path, name: str = "bmx-trees", n_frames: int = 4) -> Video:
    return Video(
        name,
        f"DAVIS/JPEGImages/480p/{name}",
        MediaKind.FRAMES,
        n_frames,
        *SIZE,
        labels=f"DAVIS/Annotations/480p/{name}",
        label_kind=LabelKind.MASKS,
    )


def test_rows(root):
    result = build_manifest("davis", root, root.parent)
    assert not result.failures
    video = result.manifest.videos[0]
    expected = replace(bare_row(root), dataset="davis", labelled_frames=4, n_objects=2)
    assert replace(video, content=None, stamp=None) == expected
    assert result.manifest.provenance["root"] == "DAVIS"


@pytest.mark.parametrize("text", ["dog\nbmx-trees\n", "dog\nbmx-trees", "dog\r\n\r\nbmx-trees\r\n"])
def test_list_order_with_and_without_last_newline(root, text):
    make_list(root, "val", text)
    result = build_manifest("davis", root, root.parent)
    assert [video.video_id for video in result.manifest] == ["dog", "bmx-trees"]
    assert {video.split for video in result.manifest} == {"val"}


def test_without_lists_all_folders_in_natural_order(tmp_path):
    for name in ("clip10", "clip2", "clip1"):
        make_sequence(tmp_path, name)
    result = build_manifest("davis", tmp_path, tmp_path)
    assert [video.video_id for video in result.manifest] == ["clip1", "clip2", "clip10"]
    assert {video.split for video in result.manifest} == {""}


def test_unknown_split_names_the_known_ones(root):
    make_list(root, "train", "dog\n")
    with pytest.raises(UsageError, match="no split val") as caught:
        build_manifest("davis", root, root.parent)
    assert caught.value.wanted == "train"


def test_a_split_without_its_list_is_not_everything(root):
    (root / "ImageSets/2016").mkdir(parents=True)
    (root / "ImageSets/2016/val.txt").write_text("dog\n")
    with pytest.raises(UsageError, match="no split val") as caught:
        build_manifest("davis", root, root.parent)
    assert (caught.value.wanted, caught.value.found) == ("ImageSets/2017/SPLIT.txt", "2016/val.txt")


def test_a_mask_with_soft_edges_is_noted(root):
    soft = np.linspace(0, 66, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint8)
    Image.fromarray(soft).save(root / "Annotations/480p/dog/00000.png")
    result = build_manifest("davis", root, root.parent)
    assert "1 first masks have more than 20 objects: dog (66)" in result.notes[0]
    assert build_manifest("davis", root, root.parent, names=["bmx-trees"]).notes == ()


def test_what_to_do_about_masks_is_said(root):
    write_mask(root / "Annotations/480p/dog/00000.png", 255 * make_mask(1))
    (root / "Annotations/480p/bmx-trees/00002.png").unlink()
    make_sequence(root, "good")
    failures = build_manifest("davis", root, root.parent).failures
    assert "write the object as 1" in failures["DAVIS/JPEGImages/480p/dog"]
    assert "as in YouTube-VOS" in failures["DAVIS/JPEGImages/480p/bmx-trees"]


def test_videos_without_a_resolution_are_explained(tmp_path):
    make_sequence(tmp_path, "", resolution="0a1b", n_frames=2)
    with pytest.raises(InputError, match="no single resolution") as caught:
        build_manifest("davis", tmp_path, tmp_path)
    assert "YouTube-VOS" in caught.value.hint


def test_suffixes_in_capitals(root):
    for folder, suffix in (("JPEGImages", ".JPG"), ("Annotations", ".PNG")):
        for path in (root / folder / "480p/dog").iterdir():
            path.rename(path.with_suffix(suffix))
    (video,) = build_manifest("davis", root, root.parent, names=["dog"]).manifest
    assert (video.n_frames, video.labelled_frames) == (4, 4)
    assert open_sequence(video, root.parent).mask(3).max() == 1


def test_listed_but_missing_sequence_is_a_named_failure(root):
    make_list(root, "val", "dog\nghost\n")
    result = build_manifest("davis", root, root.parent)
    assert [video.video_id for video in result.manifest] == ["dog"]
    assert list(result.failures) == ["DAVIS/JPEGImages/480p/ghost"]
    assert "does not exist" in result.failures["DAVIS/JPEGImages/480p/ghost"]


def test_list_cannot_lead_out_of_the_data_root(root):
    make_list(root, "val", "dog\n../../../../secret\n")
    result = build_manifest("davis", root, root.parent)
    (reason,) = result.failures.values()
    assert "cannot stand in a manifest" in reason


def test_other_resolution_folder_is_found(tmp_path):
    make_sequence(tmp_path, "dog", resolution="240p")
    (video,) = build_manifest("davis", tmp_path, tmp_path).manifest
    assert video.media == "JPEGImages/240p/dog"
    make_sequence(tmp_path, "dog", resolution="Full-Resolution")
    with pytest.raises(InputError, match="single resolution") as caught:
        build_manifest("davis", tmp_path, tmp_path)
    assert caught.value.found == "240p, Full-Resolution"
    (video,) = build_manifest("davis", tmp_path, tmp_path, resolution="Full-Resolution").manifest
    assert video.labels == "Annotations/Full-Resolution/dog"
    make_sequence(tmp_path, "dog", resolution="480p")
    (video,) = build_manifest("davis", tmp_path, tmp_path).manifest
    assert video.media == "JPEGImages/480p/dog"


def test_sequence_without_annotations_is_a_row_without_labels(root):
    (frames := root / "JPEGImages/480p/plain").mkdir()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(frames / "00000.jpg")
    result = build_manifest("davis", root, root.parent)
    assert result.notes == ("1 of 3 videos have no labels: plain",)
    video = result.manifest.videos[-1]
    assert (video.video_id, video.labels, video.label_kind, video.n_objects) == ("plain", None, None, 0)
    with pytest.raises(MediaError, match="no labels"):
        open_sequence(video, root.parent)


def test_folder_outside_the_data_root_is_refused(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match="outside the data root"):
        build_manifest("davis", root, tmp_path / "elsewhere")


def test_linked_folder_keeps_its_place_under_the_data_root(root, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "davis").symlink_to(root)
    result = build_manifest("davis", tmp_path / "links" / "davis", tmp_path / "links")
    assert result.manifest.videos[0].media == "davis/JPEGImages/480p/bmx-trees"


def test_sequence_reads_masks(root):
    sequence = open_one(root)
    assert sequence.frame_names == ("00000", "00001", "00002", "00003")
    assert sequence.n_objects == 2
    np.testing.assert_array_equal(sequence.first_mask(), make_mask(2))
    np.testing.assert_array_equal(sequence.mask(3), make_mask(2))


def test_void_is_background_and_no_object(root):
    mask = make_mask(2)
    mask[0] = 255
    write_mask(root / "Annotations/480p/bmx-trees/00000.png", mask)
    sequence = open_one(root)
    assert sequence.n_objects == 2
    assert (sequence.first_mask()[0] == 0).all()


def test_first_annotation_alone_is_enough(root):
    for index in (1, 2, 3):
        (root / f"Annotations/480p/bmx-trees/{index:05d}.png").unlink()
    sequence = open_one(root)
    assert sequence.video.labelled_frames == 1
    assert sequence.mask(0) is not None
    assert sequence.mask(2) is None


def test_frame_range_of_a_row(root):
    make_sequence(root, "long", n_frames=12)
    write_mask(root / "Annotations/480p/long/00009.png", make_mask(1))
    video = replace(bare_row(root, "long", n_frames=3), first_frame=9)
    sequence = open_sequence(video, root.parent)
    assert sequence.frame_names == ("00009", "00010", "00011")
    assert sequence.n_objects == 1


def test_missing_first_annotation(root):
    (root / "Annotations/480p/bmx-trees/00000.png").unlink()
    with pytest.raises(MediaError, match="first frame of bmx-trees is missing") as caught:
        open_sequence(bare_row(root), root.parent)
    assert caught.value.wanted.endswith("00000.png")
    assert "names of their frames" in caught.value.hint
    failures = build_manifest("davis", root, root.parent).failures
    assert list(failures) == ["DAVIS/JPEGImages/480p/bmx-trees"]


def test_missing_annotations_are_all_listed(root):
    for index in (1, 3):
        (root / f"Annotations/480p/bmx-trees/{index:05d}.png").unlink()
    with pytest.raises(MediaError, match=r"lacks 2 of 4 annotations: 00001.png, 00003.png"):
        open_sequence(bare_row(root), root.parent)


def test_annotation_of_another_size(root):
    write_mask(root / "Annotations/480p/bmx-trees/00002.png", np.zeros((6, 10), np.uint8))
    with pytest.raises(MediaError, match=r"00002\.png has another size") as caught:
        open_sequence(bare_row(root), root.parent)
    assert (caught.value.wanted, caught.value.found) == ("12x20", "6x10")


def test_object_that_the_first_annotation_lacks(root):
    write_mask(root / "Annotations/480p/bmx-trees/00002.png", make_mask(4))
    sequence = open_one(root)
    with pytest.raises(MediaError, match=r"00002\.png has objects") as caught:
        sequence.mask(2)
    assert (caught.value.wanted, caught.value.found) == ("0, 1, 2", "3, 4")


def test_first_annotation_without_object_hints_at_masks_of_two_values(root):
    write_mask(root / "Annotations/480p/bmx-trees/00000.png", make_mask(1) * 255)
    with pytest.raises(MediaError, match="shows no object") as caught:
        open_sequence(bare_row(root), root.parent)
    assert "255" in caught.value.hint


def test_truncated_annotation(root):
    path = root / "Annotations/480p/bmx-trees/00000.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MediaError, match=r"00000\.png cannot be decoded"):
        open_sequence(bare_row(root), root.parent)
    failures = build_manifest("davis", root, root.parent).failures
    assert "cannot be decoded" in failures["DAVIS/JPEGImages/480p/bmx-trees"]


def test_fewer_frames_than_the_row_says(root):
    with pytest.raises(MediaError, match="ends early") as caught:
        open_sequence(bare_row(root, n_frames=7), root.parent)
    assert (caught.value.wanted, caught.value.found) == ("7 frames", "4 frames")


def test_annotations_of_a_video_file_are_named_by_number(root):
    video = replace(bare_row(root), media="DAVIS/clip.mp4", media_kind=MediaKind.FILE)
    assert open_sequence(video, root.parent).frame_names == ("00000", "00001", "00002", "00003")


def test_masks_survive_writing(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_mask(tmp_path / "a.png", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == PALETTE.ravel().tolist()
    write_mask(tmp_path / "b.png", np.zeros((3, 5), np.uint8))
    assert (tmp_path / "b.png").read_bytes()[24] == 8  # bits per pixel, whatever the indices


def test_palette_is_the_usual_one():
    assert PALETTE[[0, 1, 2, 3, 4, 8, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [64, 0, 0],
        [224, 224, 192],
    ]
    assert len(np.unique(PALETTE, axis=0)) == 256


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_masks_of_colours_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="does not hold object indices") as caught:
        read_mask(tmp_path / "a.png")
    assert mode in caught.value.found


def test_grey_masks(tmp_path):
    Image.fromarray(make_mask(2)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "grey.png"), make_mask(2))
    Image.fromarray(make_mask(1).astype(bool)).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png"), make_mask(1))


def test_small_palettes_keep_their_indices(tmp_path):
    image = Image.fromarray(make_mask(3))
    image.putpalette(PALETTE[:4].tobytes())
    image.save(tmp_path / "a.png", bits=2)
    assert (tmp_path / "a.png").read_bytes()[24] == 2
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), make_mask(3))


def test_grey_of_few_bits_would_be_stretched_and_is_refused(tmp_path):
    data = _grey_png(bits=4, rows=[bytes([0x01, 0x23])] * 2)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match="does not hold object indices"):
        read_mask(tmp_path / "a.png")


def _grey_png(bits: int, rows: list[bytes]) -> bytes:
    """Write a greyscale PNG by hand: Pillow reads such files but does not write them."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_missing_and_empty_masks(tmp_path):
    with pytest.raises(MediaError, match="does not exist"):
        read_mask(tmp_path / "a.png")
    (tmp_path / "a.png").touch()
    with pytest.raises(MediaError, match="empty"):
        read_mask(tmp_path / "a.png")


def test_mask_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="folder does not exist"):
        write_mask(tmp_path / "missing" / "a.png", make_mask(1))


def test_one_builder_for_every_layout(root):
    assert (
        build_manifest("davis", root, root.parent).manifest.videos
        == build_manifest("davis", root, root.parent).manifest.videos
    )
    with pytest.raises(UsageError, match="no dataset layout ytvos"):
        build_manifest("ytvos", root, root.parent)


@pytest.mark.data
def test_real_sequences(shared_data):
    root = shared_data("DAVIS")
    result = build_manifest("davis", root, root.parent)
    assert not result.failures
    found = {
        video.video_id: (video.n_frames, video.height, video.width, video.n_objects)
        for video in result.manifest
    }
    assert found["bmx-trees"] == (80, 480, 854, 2)
    assert found["libby"] == (49, 480, 854, 1)
    assert all(video.labelled_frames == video.n_frames for video in result.manifest)


@pytest.mark.data
def test_real_palette_agrees_on_the_objects(shared_data):
    with Image.open(shared_data("DAVIS/Annotations/480p/bmx-trees/00000.png")) as image:
        assert image.getpalette()[:24] == PALETTE[:8].ravel().tolist()


@pytest.mark.data
def test_reading_leaves_the_data_alone(shared_data):
    root = shared_data("DAVIS-240p")
    before = sorted(root.rglob("*"))
    (video,) = build_manifest("davis", root, root.parent).manifest
    assert (video.media, video.n_objects) == ("DAVIS-240p/JPEGImages/240p/dogs-jump", 3)
    assert sorted(root.rglob("*")) == before
