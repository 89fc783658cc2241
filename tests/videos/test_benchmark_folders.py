"""VIP, JHMDB and one's own clips on small real folders: rows, labels, and the ways in which they go wrong."""

from __future__ import annotations

import io
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
from benchmark_cases import (
    N_JOINTS,
    SIZE,
    make_joints,
    part_map,
    write_frames,
    write_jhmdb,
    write_mat,
    write_vip,
)
from PIL import Image
from scipy.io import loadmat, savemat

from cosettle_cache.core.errors import InputError, MediaError, UsageError
from cosettle_cache.core.types import LabelKind
from cosettle_cache.videos import build_manifest, open_joints, open_parts, open_sequence
from cosettle_cache.videos.jhmdb import read_joints, read_predicted_joints, write_predicted_joints
from cosettle_cache.videos.masks import write_mask
from cosettle_cache.videos.safe_pickle import ArrayUnpickler
from cosettle_cache.videos.sprites import SpritesSettings, ensure_sprites


def only_failure(result):
    (reason,) = result.failures.values()
    return reason


# VIP


@pytest.mark.parametrize("labels", ["Annotations", "."])
def test_vip_rows_in_both_archives(tmp_path, labels):
    for name in ("videos10", "videos2"):
        write_vip(tmp_path / "VIP", name, labels=labels)
    result = build_manifest("vip", tmp_path / "VIP", tmp_path)
    assert not result.failures
    assert [video.video_id for video in result.manifest] == ["videos2", "videos10"]
    video = result.manifest.videos[0]
    assert (video.n_frames, video.height, video.width, video.label_kind) == (3, *SIZE, LabelKind.PARTS)
    assert (video.n_objects, video.labelled_frames, video.split) == (2, 3, "")
    sequence = open_parts(video, tmp_path)
    assert sequence.first_classes == (4, 13)
    assert np.array_equal(sequence.mask(2), part_map(2))


def test_vip_list_orders_the_clips(tmp_path):
    for name in ("videos1", "videos2", "videos3"):
        write_vip(tmp_path, name)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/val_videos.txt").write_text("videos3\nvideos1\n")
    manifest = build_manifest("vip", tmp_path, tmp_path).manifest
    assert [(video.video_id, video.split) for video in manifest] == [("videos3", "val"), ("videos1", "val")]
    # The released scripts' lists are pairs of paths, from wherever their author kept the data.
    (tmp_path / "lists/val_videos.txt").write_text(
        "/home/me/VIP_Fine/Images/videos2 /home/me/VIP_Fine/Annotations/Category_ids/videos2\n"
    )
    (video,) = build_manifest("vip", tmp_path, tmp_path).manifest
    assert (video.video_id, video.media) == ("videos2", "Images/videos2")


def test_vip_frame_without_annotation_and_annotation_without_part(tmp_path):
    write_vip(tmp_path)
    labels = tmp_path / "Annotations/Category_ids/videos1"
    (labels / "000000000026.png").unlink()
    assert "lacks 1 of 3 annotations: 000000000026.png" in _reason(tmp_path)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(labels / "000000000026.png")
    Image.fromarray(np.full(SIZE, 77, np.uint8)).save(labels / "000000000001.png")
    assert "shows no part" in _reason(tmp_path)


def _reason(root, layout="vip"):
    with pytest.raises(InputError, match="no usable clip") as caught:
        build_manifest(layout, root, root)
    return caught.value.details[0]


def test_vip_classes_that_appear_later_and_values_that_are_none(tmp_path):
    write_vip(tmp_path)
    labels = tmp_path / "Annotations/Category_ids/videos1"
    late = part_map()
    late[-1], late[0] = 19, 255
    Image.fromarray(late).save(labels / "000000000026.png")
    Image.fromarray(late).save(labels / "000000000001.png")
    (video,) = build_manifest("vip", tmp_path, tmp_path).manifest
    sequence = open_parts(video, tmp_path)
    assert (sequence.first_mask()[0] == 0).all()
    assert (sequence.mask(1)[0] == 255).all()
    assert sequence.first_classes == (4, 13, 19)


@pytest.mark.data
def test_real_vip(shared_data):
    root = shared_data("VIP")
    (video,) = build_manifest("vip", root, root.parent).manifest
    assert (video.video_id, video.n_frames, video.n_objects, video.split) == ("videos1", 40, 10, "val")


@pytest.mark.parametrize(
    ("name", "write", "lists"),
    [
        ("vip", write_vip, ["lists/val_videos.txt", "vip_trainlist.txt"]),
        ("jhmdb", write_jhmdb, ["jhmdb_vallist.txt", "lists/jhmdb_trainlist.txt"]),
    ],
)
def test_a_split_without_its_list_is_refused(tmp_path, name, write, lists):
    write(tmp_path)
    assert len(build_manifest(name, tmp_path, tmp_path).manifest) == 1
    with pytest.raises(UsageError, match="has no split test"):
        build_manifest(name, tmp_path, tmp_path, split="test")
    (tmp_path / "lists").mkdir()
    for path in lists:
        (tmp_path / path).write_text("walk/one\n")
    with pytest.raises(UsageError, match="has no split test") as caught:
        build_manifest(name, tmp_path, tmp_path, split="test")
    assert caught.value.wanted == "val, train"


# JHMDB


def test_jhmdb_rows_and_joints(tmp_path):
    joints = write_jhmdb(tmp_path / "JHMDB")
    (video,) = build_manifest("jhmdb", tmp_path / "JHMDB", tmp_path).manifest
    assert (video.video_id, video.class_name, video.label_kind) == ("walk/one", "walk", LabelKind.KEYPOINTS)
    assert (video.n_frames, video.labelled_frames, video.n_objects) == (4, 4, N_JOINTS)
    np.testing.assert_allclose(open_joints(video, tmp_path).joints, joints - 1)


@pytest.mark.parametrize("order", [0, 1])
def test_jhmdb_lists_in_either_order_of_columns(tmp_path, order):
    for name in ("walk/one", "run/two", "walk/three"):
        write_jhmdb(tmp_path, name)
    lines = [
        [f"/data/JHMDB/joint_positions/{name}/joint_positions.mat", f"/data/JHMDB/Rename_Images/{name}"]
        for name in ("walk/three", "run/two")
    ]
    text = "".join(" ".join(line[:: -1 if order else 1]) + "\n" for line in lines)
    (tmp_path / "jhmdb_vallist.txt").write_text(text)
    manifest = build_manifest("jhmdb", tmp_path, tmp_path).manifest
    assert [video.video_id for video in manifest] == ["walk/three", "run/two"]
    names = [
        video.video_id for video in build_manifest("jhmdb", tmp_path, tmp_path, names=["walk/one"]).manifest
    ]
    assert names == ["walk/one"]


def test_joints_outside_the_image_are_kept(tmp_path):
    joints = write_jhmdb(tmp_path)
    joints[:, 0] = -50
    write_mat(tmp_path / "joint_positions/walk/one/joint_positions.mat", pos_img=joints)
    (video,) = build_manifest("jhmdb", tmp_path, tmp_path).manifest
    assert (open_joints(video, tmp_path).joints[:, 0] == -51).all()


def test_a_clip_of_one_frame(tmp_path):
    write_jhmdb(tmp_path, n_frames=1)
    path = tmp_path / "joint_positions/walk/one/joint_positions.mat"
    write_mat(path, pos_img=np.ones((2, N_JOINTS)))  # MATLAB drops the last axis
    assert read_joints(path).shape == (2, N_JOINTS, 1)
    (video,) = build_manifest("jhmdb", tmp_path, tmp_path).manifest
    assert video.labelled_frames == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"pos_world": np.zeros((2, 15, 4))}, "has no pos_img.*pos_world"),
        ({"pos_img": np.zeros((2, 14, 4))}, "2 x 14 x 4"),
        ({"pos_img": np.full((2, 15, 4), np.nan)}, "joints that are nowhere"),
        ({"pos_img": np.zeros((2, 15, 5))}, "fewer frames than joints.*wanted 5 frames, found 4 frames"),
    ],
)
def test_bad_joints_are_named(tmp_path, content, said):
    write_jhmdb(tmp_path)
    write_mat(tmp_path / "joint_positions/walk/one/joint_positions.mat", **content)
    import re

    assert re.search(said, _reason(tmp_path, "jhmdb"))


@pytest.mark.parametrize("content", [b"", b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + bytes(600), b"hello"])
def test_unreadable_joints_are_named(tmp_path, content):
    path = tmp_path / "joint_positions.mat"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="not a readable MATLAB file"):
        read_joints(path)
    with pytest.raises(MediaError, match="does not exist"):
        read_joints(tmp_path / "none.mat")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["f8", "f4", "i2", "u1"])
def test_joints_are_read_as_scipy_reads_them(tmp_path, kind, packed):
    joints = (10 * make_joints(3)).astype(kind)
    other = {"scale": np.ones(3), "n": np.uint8(3), "cells": np.array(["a", joints], dtype=object)}
    savemat(tmp_path / "j.mat", other | {"pos_img": joints, "text": "abc"}, do_compression=packed)
    np.testing.assert_array_equal(
        read_joints(tmp_path / "j.mat"), loadmat(tmp_path / "j.mat")["pos_img"] - 1.0
    )


@pytest.mark.parametrize("kind", [0, 8, 10, 11, 14, 255])
def test_numbers_of_an_impossible_kind_are_refused(tmp_path, kind):
    """SciPy's reader takes 11 for the place of a type and ends the process."""
    write_mat(tmp_path / "j.mat", pos_img=make_joints(3))
    data = (tmp_path / "j.mat").read_bytes()
    at = data.index(b"pos_img\0") + 8
    (tmp_path / "j.mat").write_bytes(data[:at] + bytes([kind]) + data[at + 1 :])
    with pytest.raises(MediaError, match=r"j\.mat is not a readable MATLAB file"):
        read_joints(tmp_path / "j.mat")


def test_a_frame_missing_in_the_middle_is_named(tmp_path):
    write_jhmdb(tmp_path, n_frames=6)
    (tmp_path / "Rename_Images/walk/one/00003.png").unlink()
    assert "lacks 1 frames between" in _reason(tmp_path, "jhmdb")
    assert "none of 3" in _reason(tmp_path, "jhmdb")


def test_predicted_joints_survive_and_strangers_are_refused(tmp_path):
    points = np.random.default_rng(0).random((2, 15, 3), np.float32)
    write_predicted_joints(tmp_path / "0.dat", points)
    points.dump(tmp_path / "1.dat")  # as the released script does
    np.save(tmp_path / "2.npy", points)
    for name in ("0.dat", "1.dat", "2.npy"):
        assert np.array_equal(read_predicted_joints(tmp_path / name), points)
    assert np.array_equal(np.load(tmp_path / "0.dat", allow_pickle=True), points)


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "0.dat").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(MediaError, match="does not hold an array") as caught:
        read_predicted_joints(tmp_path / "0.dat")
    assert "no part of an array" in caught.value.found
    assert not (tmp_path / "touched").exists()
    (tmp_path / "1.dat").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(MediaError, match="does not hold joints"):
        read_predicted_joints(tmp_path / "1.dat")


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


MAKE_ARRAY = name("numpy.core.multiarray", "_reconstruct")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_arrays_are_read_as_they_are(protocol):
    values = [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([b"a", b"bc"], object),
        np.float32(1.5),
    ]
    loaded = ArrayUnpickler(io.BytesIO(pickle.dumps({"values": values}, protocol))).load()["values"]
    for value, again in zip(values, loaded, strict=True):
        assert again.dtype == value.dtype and np.array_equal(again, value)


@pytest.mark.parametrize(
    "opcodes",
    [
        # numpy.ndarray(shape, dtype, buffer): an object dtype over bytes would call what they point to.
        name("numpy", "ndarray") + b"(K\x01\x85X\x01\x00\x00\x00OC\x08AAAAAAAAtR",
        name("numpy", "ndarray") + b"K\x08\x85\x81",
        # Without a state the array would show the heap.
        name("numpy.core.multiarray", "_reconstruct")
        + b"("
        + name("numpy", "ndarray")
        + b"K\x08\x85C\x01btR",
        name("numpy", "dtype") + b"}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb",
        name("numpy", "dtype"),
        name("posix", "system") + b"X\x02\x00\x00\x00id\x85R",
    ],
)
def test_crafted_calls_are_refused(opcodes):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        ArrayUnpickler(io.BytesIO(b"\x80\x03" + opcodes + b".")).load()


@pytest.mark.parametrize("opcode", [pickle.BINBYTES8, pickle.BYTEARRAY8, pickle.BINUNICODE8, pickle.FRAME])
def test_bytes_that_a_pickle_only_claims_take_no_memory(tmp_path, opcode):
    path = tmp_path / "claims.pkl"
    path.write_bytes(b"\x80\x05" + opcode + (2**31).to_bytes(8, "little") + b"abc.")
    tracemalloc.start()
    try:
        with path.open("rb") as file, pytest.raises((pickle.UnpicklingError, EOFError, IndexError)):
            ArrayUnpickler(file).load()
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "kind"), [((3,), "<f8"), ((1,), "<f8"), ((2**70,), "<f8"), ((2,), "O"), ((2,), "V8")]
)
def test_arrays_of_other_bytes_than_their_shape_needs_are_refused(shape, kind):
    array = np.zeros(2)
    content = pickle.dumps(array, 2)
    changed = _Parts(array, shape, np.dtype(kind))
    assert ArrayUnpickler(io.BytesIO(content)).load().shape == (2,)
    with pytest.raises(pickle.UnpicklingError, match="it holds an array"):
        ArrayUnpickler(io.BytesIO(pickle.dumps(changed, 2))).load()


class _Parts:
    """An array whose state says another shape and type than it has."""

    def __init__(self, array, shape, dtype):
        maker, arguments, state = array.__reduce__()
        self.said = (maker, arguments, (state[0], shape, dtype, False, state[4]))

    def __reduce__(self):
        return self.said


def test_joints_of_matlab_7_3(tmp_path):
    h5py = pytest.importorskip("h5py")
    joints = write_jhmdb(tmp_path)
    path = tmp_path / "joint_positions/walk/one/joint_positions.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["pos_img"] = joints.T
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(128))
    np.testing.assert_allclose(read_joints(path), joints - 1)


@pytest.mark.data
def test_real_jhmdb(shared_data):
    root = shared_data("JHMDB")
    (video,) = build_manifest("jhmdb", root, root.parent).manifest
    assert (video.n_frames, video.height, video.width, video.labelled_frames) == (40, 240, 320, 40)
    assert open_joints(video, root.parent).joints[0].min() == pytest.approx(132.108)


def test_the_sprites_have_parts_and_joints(tmp_path):
    settings = SpritesSettings(n_train=1, n_val=2, train_frames=2, val_frames=3, height=64, width=96)
    root = ensure_sprites(tmp_path / "sprites", settings)
    for layout, kind in (("vip", LabelKind.PARTS), ("jhmdb", LabelKind.KEYPOINTS)):
        manifest = build_manifest(layout, root, root).manifest
        assert [video.video_id for video in manifest] == ["val00-figure", "val01-figure-ball"]
        assert {(video.label_kind, video.labelled_frames) for video in manifest} == {(kind, 3)}


# One's own clips


def test_clips_with_masks_beside_them(tmp_path):
    root = tmp_path / "mine"
    write_frames(root / "dog", ["1.jpg", "2.jpg", "10.jpg"][:2])
    write_mask(root / "dog.png", part_map())
    write_frames(root / "cat", ["1.jpg"])
    result = build_manifest("masks", root, tmp_path)
    (video,) = result.manifest
    assert (video.media, video.labels, video.labelled_frames) == ("mine/dog", "mine/dog.png", 1)
    assert "cat has no first mask" in only_failure(result)
    sequence = open_sequence(video, tmp_path)
    assert np.array_equal(sequence.first_mask(), part_map())
    assert sequence.mask(1) is None
    assert sequence.labelled == {0}


def test_a_single_clip_and_a_mask_anywhere_below_the_data_root(tmp_path):
    write_frames(tmp_path / "clip", ["a1.jpg", "a2.jpg"])
    write_mask(tmp_path / "first.png", part_map())
    (video,) = build_manifest("masks", tmp_path / "clip", tmp_path, mask=tmp_path / "first.png").manifest
    assert (video.video_id, video.labels, video.n_objects) == ("clip", "first.png", 13)
    shutil.move(tmp_path / "first.png", tmp_path / "clip.png")
    (video,) = build_manifest("masks", tmp_path / "clip", tmp_path).manifest
    assert video.labels == "clip.png"


def _rgb(path):
    Image.new("RGB", SIZE[::-1]).save(path)


def _half_size(path):
    write_mask(path, np.ones((12, 16), np.uint8))


def _two_values(path):
    write_mask(path, np.full(SIZE, 255, np.uint8))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_rgb, "does not hold object indices"),
        (_half_size, "another size than its frame (wanted 24x32, found 12x16)"),
        (_two_values, "shows no object"),
    ],
)
def test_bad_first_masks_are_named(tmp_path, write, said):
    write_frames(tmp_path / "clip", ["a1.jpg", "a2.jpg"])
    write(tmp_path / "clip.png")
    assert said in _reason(tmp_path, "masks")


def test_a_gap_between_frames_is_named_and_any_step_is_none(tmp_path):
    write_frames(tmp_path / "clip", ["5.jpg", "10.jpg", "15.jpg"])
    write_mask(tmp_path / "clip.png", part_map())
    assert len(build_manifest("masks", tmp_path, tmp_path).manifest) == 1
    write_frames(tmp_path / "clip", ["25.jpg"])
    assert "lacks 1 frames between its first and its last" in _reason(tmp_path, "masks")


def test_names_restrict_and_order_every_layout(tmp_path):
    for name in ("yoga/a_000001", "yoga/b_000002", "golf/c_000003"):
        write_frames(tmp_path / name, ["1.jpg"])
    result = build_manifest("kinetics", tmp_path, tmp_path, names=["c_000003", "yoga/a_000001", "d_000004"])
    assert [video.video_id for video in result.manifest] == ["golf/c_000003", "yoga/a_000001"]
    assert list(result.failures) == ["d_000004"]
    (video,) = build_manifest("folder", tmp_path, tmp_path, names=["yoga/b_000002"]).manifest
    assert video.media == "yoga/b_000002"
