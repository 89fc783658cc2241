"""From true tracks to score rows: exact tracks of the sprites, TAP-Vid's pickles, the command as typed."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from store_cases import PATCH, Case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.settings import FramesSettings, SpritesSettings, TrackSettings
from cosettle_cache.core.types import MediaKind, Video
from cosettle_cache.metrics.rows import read_scores
from cosettle_cache.propagation.track import track_store
from cosettle_cache.store import open_store
from cosettle_cache.store.plan import make_plan
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.manifest import write_manifest
from cosettle_cache.videos.queries import open_tracks
from cosettle_cache.videos.sprites.scenes import render
from cosettle_cache.videos.sprites.tracks import POINTS_PER_OBJECT, scene_tracks, sprites_tracks
from cosettle_cache.videos.sprites.write import draw_scene, plan_split
from cosettle_cache.videos.tapvid import read_shares, read_tapvid, unpack_tapvid

TINY = SpritesSettings(n_train=1, n_val=2, train_frames=2, val_frames=6, height=120, width=160)
NAME = "val01-figure-ball"


def bilinear(image: np.ndarray, point: np.ndarray) -> np.ndarray:
    (x, y), (low_x, low_y) = point - 0.5, np.floor(point - 0.5).astype(int)
    right, down = x - low_x, y - low_y
    window = image[low_y : low_y + 2, low_x : low_x + 2].astype(float)
    return (window * np.outer([1 - down, down], [1 - right, right])[..., None]).sum((0, 1))


def test_sprites_tracks_keep_to_what_they_were_chosen_on() -> None:
    plan = plan_split("val", TINY)[1]
    scene = draw_scene(plan.cast, plan.seed, TINY.height, TINY.width)
    frames = [render(scene, moment) for moment in plan.moments]
    tracks = sprites_tracks(NAME, TINY)
    assert tracks.points.shape == (3 * POINTS_PER_OBJECT, TINY.val_frames, 2)
    assert tracks.visible[:, 0].sum() >= len(tracks.points) // 2
    assert not tracks.visible.all()
    owners = np.repeat(range(3), POINTS_PER_OBJECT)
    agree, shades = [], []
    for owner, points, visible in zip(owners, tracks.points, tracks.visible, strict=True):
        seen = np.flatnonzero(visible)
        assert (points[seen] >= 0).all()
        assert (points[seen] < (TINY.width, TINY.height)).all()
        agree += [frames[t].objects[int(points[t][1]), int(points[t][0])] == owner for t in seen]
        inner = [t for t in seen if (points[t] > 1).all() and (points[t] < (158, 118)).all()]
        if owner == 0 and inner:
            colours = np.stack([bilinear(frames[t].image, points[t]) for t in inner])
            shades.append(np.abs(colours - colours[0]).mean())
    # Only a pixel on a rim may belong to a neighbour; the background's colours travel unchanged.
    assert np.mean(agree) > 0.97
    assert np.median(shades) < 3


def test_sprites_tracks_hide_behind_others_and_come_again() -> None:
    """A ball passes in front of another that stands still: its points hide and show again."""
    scene = draw_scene(("ball", "ball"), (0, 0, 0), 96, 192)
    still = replace(scene.actors[0], start=(0.5, 0.5), end=(0.5, 0.5), bob=0.0, turns=0.0, tilt=0.0)
    passing = replace(scene.actors[1], start=(0.1, 0.5), end=(0.9, 0.5), bob=0.0)
    scene = replace(scene, actors=(still, passing))
    tracks = scene_tracks(scene, [index / 8 for index in range(9)], np.random.default_rng(0))
    first = scene.objects[0]
    points = slice(POINTS_PER_OBJECT * first, POINTS_PER_OBJECT * (first + 1))
    assert tracks.visible[points, 0].all()
    assert tracks.visible[points, 8].all()
    assert tracks.visible[points, 4].mean() < 0.3
    spread = np.ptp(tracks.points[points], axis=1)
    assert spread.max() < 0.25 * 96 * 0.3  # it only grows a little


def test_equal_settings_give_equal_tracks() -> None:
    first, again, other = (sprites_tracks(NAME, item) for item in (TINY, TINY, replace(TINY, seed=1)))
    np.testing.assert_array_equal(first.points, again.points)
    np.testing.assert_array_equal(first.visible, again.visible)
    assert np.abs(first.points - other.points).max() > 1


def clip(n_frames: int = 4, n_points: int = 3) -> dict[str, np.ndarray]:
    """Dark frames and a bright patch that walks right, one patch a frame; a point on it, others elsewhere."""
    video = np.full((n_frames, 4 * PATCH, 6 * PATCH, 3), 40, np.uint8)
    points = np.full((n_points, n_frames, 2), 0.1, np.float32)
    for index in range(n_frames):
        video[index, PATCH : 2 * PATCH, PATCH * index : PATCH * (index + 1)] = 220
        points[0, index] = ((index + 0.5) / 6, 1.5 / 4)
    occluded = np.zeros((n_points, n_frames), bool)
    occluded[1, 2:] = True
    occluded[2, 0] = True
    return {"video": video, "points": points, "occluded": occluded}


def dump(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("layout", ["dictionary", "list", "jpeg"])
def test_tapvid_pickles_unpack_to_a_data_root(tmp_path: Path, layout: str, protocol: int) -> None:
    one = clip()
    if layout == "jpeg":
        one["video"] = [jpeg(frame) for frame in one["video"]]
    content = [one, clip(5)] if layout == "list" else {"goat": one, "paragliding": clip(5)}
    clips = read_tapvid(dump(tmp_path / "tapvid.pkl", content, protocol))
    unpack_tapvid(clips, tmp_path / "data")
    built = build_manifest("tapvid", tmp_path / "data", tmp_path)
    assert not built.failures
    names = ["00000", "00001"] if layout == "list" else ["goat", "paragliding"]
    assert [(video.video_id, video.n_frames, video.n_objects) for video in built.manifest] == [
        (names[0], 4, 3),
        (names[1], 5, 3),
    ]
    write_manifest(tmp_path / "t.parquet", built.manifest)
    assert run("manifest", "check", tmp_path / "t.parquet", "--data-root", tmp_path, "--decode") == 0
    tracks = open_tracks(built.manifest.videos[0], tmp_path)
    np.testing.assert_allclose(tracks.points[0, 1], [1.5 * PATCH, 1.5 * PATCH], rtol=1e-6)
    np.testing.assert_array_equal(tracks.visible, ~clip()["occluded"])
    with Image.open(next((tmp_path / "data/frames" / names[0]).iterdir())) as image:
        assert image.size == (6 * PATCH, 4 * PATCH)


def jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "jpeg")
    return buffer.getvalue()


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_malicious_pickle_executes_nothing(tmp_path: Path, protocol: int) -> None:
    evil = {"goat": clip(), "trap": Malice(tmp_path / "executed")}
    path = dump(tmp_path / "evil.pkl", evil, protocol)
    with pytest.raises(MediaError, match="no pickle of TAP-Vid") as caught:
        read_tapvid(path)
    assert "no part of an array" in str(caught.value.found)
    assert not (tmp_path / "executed").exists()
    pickle.loads(path.read_bytes())  # the trap is a real one
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"points": None}, "no arrays"),
        ({"points": np.zeros((3, 4), np.float32)}, "points of float32"),
        ({"points": 300 * np.ones((3, 4, 2))}, "no shares of an image"),
        ({"occluded": np.zeros((3, 5), bool)}, "beside points"),
        ({"occluded": np.ones((3, 4), bool)}, "no visible point"),
        ({"video": np.zeros((5, 8, 8, 3), np.uint8)}, "5 frames and tracks of 4"),
        ({"video": np.zeros((4, 8, 8, 3))}, "a video of float64"),
        ({"video": [b"text"] * 4}, "a video of list"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, change: dict[str, object], found: str) -> None:
    path = dump(tmp_path / "other.pkl", {"goat": {**clip(), **change}})
    with pytest.raises(MediaError, match="clip goat") as caught:
        read_tapvid(path)
    assert found in str(caught.value.found)


@pytest.mark.parametrize("content", [[], {}, 3, [1, 2], {"goat": {"video": 1}}, {"../goat": clip()}, b"text"])
def test_no_clips_and_unsafe_names_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(MediaError):
        read_tapvid(dump(tmp_path / "other.pkl", content))


@pytest.mark.parametrize(
    "content",
    [
        b"})" + b"2\x86" * 60 + b"K\x01s.",  # tuples within tuples as a key, whose hash takes 2**60 steps
        b"}()" + b"2\x86" * 60 + b"K\x01u.",
        b"()" + b"2\x86" * 60 + b"K\x01d.",
        b"\x8f()" + b"2\x86" * 60 + b"\x90.",
        b"()" + b"2\x86" * 60 + b"\x91.",
    ],
)
def test_pickles_that_would_take_for_ever_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.pkl").write_bytes(b"\x80\x04" + content)
    with pytest.raises(MediaError, match=r"t\.pkl is no pickle of TAP-Vid"):
        read_tapvid(tmp_path / "t.pkl")


def test_a_video_of_lists_within_lists_is_no_video(tmp_path: Path) -> None:
    video: list[object] = []
    for _ in range(60):
        video = [video, video]
    with pytest.raises(MediaError, match="clip goat") as caught:
        read_tapvid(dump(tmp_path / "t.pkl", {"goat": {**clip(), "video": video}}))
    assert "a video of list" in str(caught.value.found)


def test_one_bad_clip_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dump(tmp_path / "t.pkl", {"goat": clip(), "bad": {**clip(), "occluded": np.ones((3, 4), bool)}})
    assert run("manifest", "unpack", path, tmp_path / "data") == 4
    assert "left out bad: no visible point" in capsys.readouterr().err
    assert [item.name for item in (tmp_path / "data/tracks").iterdir()] == ["goat.npz"]


def test_two_keys_that_are_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="two clips of one name"):
        read_tapvid(dump(tmp_path / "t.pkl", {1: clip(), "1": clip()}))


def test_tracks_that_claim_terabytes_or_are_no_arrays_are_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (10**13, 4, 2)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(tmp_path / "goat.npz", "w") as archive:
        archive.writestr("points.npy", header.getvalue())
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as archive:
        archive.writestr("points", b"no array")
        archive.writestr("occluded", b"no array")
    video = Video("goat", "goat", MediaKind.FRAMES, 4, 64, 96)
    for name in ("goat.npz", "bytes.npz"):
        with pytest.raises(MediaError, match="holds no tracks"):
            read_shares(tmp_path / name, video)


class ColourCase(Case):
    """Tokens that tell bright from dark patches and dark ones by their place."""

    def slot_tokens(self, slot):
        grid = slot.grid
        tokens = np.zeros((len(slot.encodings), grid.rows, grid.cols, 25), np.float16)
        for number, encoding in enumerate(slot.encodings):
            tokens[number].reshape(-1, 25)[:, 1:] = np.eye(24)
            tokens[number, 1, encoding.frame] = np.eye(25)[0]
        return tokens


@pytest.fixture(scope="module")
def tapvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with two clips, its manifest and its store."""
    root = tmp_path_factory.mktemp("tapvid")
    unpack_tapvid(read_tapvid(dump(root / "t.pkl", {"goat": clip(), "one": clip(5)})), root)
    manifest = build_manifest("tapvid", root, root).manifest
    plan = make_plan(manifest, FramesSettings(size="native"), patch=PATCH, dim=25)
    ColourCase(manifest, plan).write(root / "store.zarr")
    return root


def run(*arguments: object) -> int:
    return run_command([str(argument) for argument in arguments])


def track(tapvid: Path, out: Path, *more: object) -> int:
    return run("track", "--features", tapvid / "store.zarr", "--data-root", tapvid, "--out", out, *more)


def test_the_command_finds_scores_and_keeps(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--task", "tapvid", "--query-mode", "strided", "--query-stride", 2, "--radius", 0)
    assert track(tapvid, tmp_path, *options, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    scores = read_scores(tmp_path / "scores.parquet")
    assert [score.video_id for score in scores] == ["goat", "one"]
    assert document["means"]["raw"]["aj"] == pytest.approx(np.mean([score.figures["aj"] for score in scores]))
    digests = [json.loads(score.counts_json)["truth_sha256"] for score in scores]
    assert len(set(digests)) == 2
    assert all(score.provenance.manifest_digest and score.provenance.weights_sha256 for score in scores)
    assert all(score.protocol_json for score in scores)
    rows = pq.read_table(tmp_path / "tracks.parquet").to_pylist()
    walking = [row for row in rows if row["track"] == 0]
    # Its token is alone in its kind: it is found in every frame, before and after the query.
    assert len(walking) == 2 * 4 + 3 * 5
    for row in walking:
        assert row["visible"]
        assert (row["x"], row["y"]) == pytest.approx((row["true_x"], row["true_y"]), abs=1e-3)
    assert (tmp_path / "pictures/goat/raw.mp4").stat().st_size > 500
    assert not (tmp_path / "pictures/one").exists()


def test_tracks_do_not_depend_on_how_many_query_frames_fit_into_memory(tapvid: Path, tmp_path: Path) -> None:
    store, asked = open_store(tapvid / "store.zarr"), TrackSettings(query_mode="strided", query_stride=1)
    for name, limit in (("few", 1), ("all", 10**9)):
        out = tmp_path / name
        track_store(store, tapvid, asked, out, task="tapvid", pictures="none", memory_bytes=limit)
    few, whole = (pq.read_table(tmp_path / name / "tracks.parquet") for name in ("few", "all"))
    assert few.equals(whole)


def test_own_points_are_tracked_without_scores(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = tmp_path / "points.csv"
    points.write_text("video_id,frame,x,y\ngoat,2,40,24\n")
    assert track(tapvid, tmp_path / "out", "--queries", points, "--radius", 0, "--pictures", "none") == 0
    rows = pq.read_table(tmp_path / "out/tracks.parquet").to_pylist()
    assert [row["frame"] for row in rows] == [0, 1, 2, 3]
    assert [row["x"] for row in rows] == pytest.approx([8, 24, 40, 56])
    assert all(row["true_x"] is None for row in rows)
    assert not (tmp_path / "out/scores.parquet").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("goat,9,1,1", "beyond goat"),
        ("goat,-1,1,1", "beyond goat"),
        ("goat,0,96.5,1", "outside goat"),
        ("goat,0,1,nan", "outside goat"),
        ("cat,0,1,1", "no video of the store"),
        ("goat,,1,1", "no point"),
        ("", "lists no points"),
    ],
)
def test_points_that_are_nowhere_are_named(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, words: str
) -> None:
    points = tmp_path / "points.csv"
    points.write_text(f"video_id,frame,x,y\n{lines}\n")
    assert track(tapvid, tmp_path / "out", "--queries", points) == 3
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_requests_have_one_sentence(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, words in (
        ([], 2, "which points?"),
        (["--task", "tapvid", "--queries", "x.csv"], 2, "which points?"),
        (["--task", "sprites"], 2, "holds no sprites"),
        (["--queries", tmp_path / "none.csv"], 3, "does not exist"),
        (["--task", "tapvid", "--device", "cuda:9"], 2, "cuda:9 is not there"),
        (["--task", "tapvid", "--temperature", 0], 2, "temperature must be positive"),
        (["--task", "tapvid", "--projection", tmp_path / "none.safetensors"], 3, "does not exist"),
    ):
        assert track(tapvid, tmp_path / "out", *arguments) == code
        assert words in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert track(tapvid, tmp_path / "file", "--task", "tapvid") == 3
    assert "in the way" in capsys.readouterr().err


def test_a_store_of_training_pairs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Path(__file__).parents[1] / "stores/v2/pairs"
    for asked in (["--task", "sprites"], ["--task", "tapvid", "--dry-run"]):
        assert run("track", "--features", pairs, "--out", tmp_path / "out", *asked) == 3
        said = capsys.readouterr().err
        assert (
            "points cannot be tracked" in said and "a frames plan" in said and "extract --plan frames" in said
        )
    assert not (tmp_path / "out").exists()


def test_a_video_that_cannot_be_tracked_is_named_and_the_others_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = {"one": clip(1), "good": clip(), "lost": clip()}
    clips["one"]["occluded"][:] = False
    unpack_tapvid(clips, tmp_path)
    manifest = build_manifest("tapvid", tmp_path, tmp_path).manifest
    plan = make_plan(manifest, FramesSettings(size="native"), patch=PATCH, dim=25)
    ColourCase(manifest, plan).write(tmp_path / "store.zarr")
    (tmp_path / "tracks/lost.npz").unlink()
    assert track(tmp_path, tmp_path / "out", "--task", "tapvid") == 4
    told = capsys.readouterr().err
    assert "one: one has one frame" in told
    assert "lost.npz does not exist" in told
    assert [score.video_id for score in read_scores(tmp_path / "out/scores.parquet")] == ["good"]


def test_a_folder_of_another_origin_is_left_as_it_is(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name, code in (("scores.parquet", 2), ("tracks.parquet", 3)):
        (tmp_path / "out" / name).write_text("the user's own")
        assert track(tapvid, tmp_path / "out", "--task", "tapvid") == code
        assert name in capsys.readouterr().err
        assert {path.read_text() for path in (tmp_path / "out").iterdir()} == {"the user's own"}
    # Version 0.1 left no mark.
    assert track(tapvid, tmp_path / "old", "--task", "tapvid", "--pictures", "none") == 0
    (tmp_path / "old/.cosettle-cache.json").unlink()
    assert track(tapvid, tmp_path / "old", "--task", "tapvid", "--pictures", "none") == 0


def test_a_dry_run_writes_nothing_and_says_what_it_would_do(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert track(tapvid, tmp_path / "out", "--task", "tapvid", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["videos"] == 2
    assert not (tmp_path / "out").exists()


def test_unpacking_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dump(tmp_path / "t.pkl", {"goat": clip()})
    assert run("manifest", "unpack", path, tmp_path / "data", "--dry-run") == 0
    assert not (tmp_path / "data").exists()
    assert run("manifest", "unpack", path, tmp_path / "data", "--json") == 0
    assert '"points": 3' in capsys.readouterr().out
    assert run("manifest", "unpack", path, tmp_path / "data") == 3
    assert "holds something already" in capsys.readouterr().err
    assert run("manifest", "build", "tapvid", path, "--data-root", tmp_path) == 3
    assert "manifest unpack" in capsys.readouterr().err


def test_without_a_store_one_is_made_on_the_way(
    tapvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = ("--backbone", "timm/test_vit", "--weights", "random", "--size", "64x96")
    arguments = ("track", "--task", "tapvid", "--data-root", tapvid, *encoder, "--pictures", "none")
    assert run(*arguments, "--dry-run") == 0
    assert json.loads(capsys.readouterr().out)["videos"] == 2
    assert not list(tmp_path.iterdir())
    assert run(*arguments) == 0
    assert "no --features given" in capsys.readouterr().err
    (store,) = tmp_path.glob("tapvid-*.zarr")
    made = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert run(*arguments, "--query-mode", "strided") == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    (scores,) = (tmp_path / "runs").glob("track-tapvid-*/scores.parquet")
    assert all(0 <= score.figures["oa"] <= 1 for score in read_scores(scores))
    assert run("track", "--queries", tmp_path / "none.csv") == 2
    assert "--features STORE" in capsys.readouterr().err
