"""Every task from first labels to files that `score` reads, with equal figures; and what cannot be done."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import part_map, write_davis, write_frames, write_jhmdb, write_mat, write_vip
from PIL import Image
from propagation_cases import propagate_store, single_thread
from store_cases import PATCH, Case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import FramesSettings
from cosettle_cache.core.types import Grid, Manifest
from cosettle_cache.heads.projection import Projection
from cosettle_cache.metrics.rows import mean_scores, read_scores
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.propagation.score import find_problems, score_predictions
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.store.plan import make_plan
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.jhmdb import read_predicted_joints
from cosettle_cache.videos.masks import read_mask, write_mask

GRID, SIZE = Grid(4, 6), "64x96"
#: Of a row's provenance, what only a run of our own knows.
ORIGIN = dict.fromkeys(("backbone", "weights_sha256", "projection_sha256", "versions_json"), "")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@dataclass(frozen=True)
class Place:
    """A tiny benchmark, its store of random tokens, and where results go."""

    task: str
    root: Path
    manifest: Manifest
    store: FeatureStore
    out: Path

    def propagate(self, protocol="cosettle", rules=None, **options):
        chosen = make_protocol(protocol, task=self.task, size=SIZE, top_k=3, **(rules or {}))
        options = {"overlays": "none", "out": self.out, "task": self.task, **options}
        return propagate_store(self.store, self.root, chosen, **options)


def write_data(task: str, root: Path) -> None:
    if task == "vip":
        write_vip(root / "VIP", "videos1", n_frames=3)
        write_vip(root / "VIP", "videos2", n_frames=4)
    elif task == "jhmdb":
        write_jhmdb(root / "JHMDB", "walk/one", n_frames=4, seed=1)
        joints = write_jhmdb(root / "JHMDB", "walk/two", n_frames=5, seed=2)
        joints[:, 3] = -40  # outside the image
        write_mat(root / "JHMDB/joint_positions/walk/two/joint_positions.mat", pos_img=joints)
    else:
        masks = [part_map(index) for index in range(5)]
        masks[0][-3:, -5:] = 255  # void; and the numbers 4 and 13 leave gaps
        write_davis(root / "DAVIS", "gaps", masks)
        write_davis(root / "DAVIS", "short", [part_map(index) for index in range(2)])


@pytest.fixture
def place(request, tmp_path):
    task, root = request.param, tmp_path / "data"
    write_data(task, root)
    manifest = build_manifest(task, root / task.upper(), root).manifest
    plan = make_plan(manifest, FramesSettings(size=SIZE), patch=PATCH, dim=8)
    store = open_store(Case(manifest, plan).write(tmp_path / "t.zarr"))
    return Place(task, root, manifest, store, tmp_path / "out")


def figures(rows):
    return [
        replace(row, protocol="", protocol_json="", provenance=replace(row.provenance, **ORIGIN))
        for row in rows
    ]


@pytest.mark.parametrize("place", ["davis", "vip", "jhmdb"], indirect=True)
@pytest.mark.parametrize("rules", [{}, {"norm_mask": True, "decode_size": "annotation"}], ids=["", "other"])
def test_what_is_written_is_worth_what_is_reported(place, rules):
    projection = Projection(8, seed=1)
    report = place.propagate(rules=rules, projections=[("mine", projection)])
    assert report.failures == {} and report.scores
    for kind in ("raw", "mine"):
        folder = place.out / kind
        ours = [row for row in report.scores if row.tokens == kind]
        named = {row.video_id for row in ours}
        unscored = frozenset(video.video_id for video in place.manifest) - named
        assert find_problems(place.task, place.manifest, place.root, folder, grid=GRID).keys() <= unscored
        scores, failures = score_predictions(
            place.task, place.manifest, place.root, folder, name=kind, leave_out=unscored, grid=GRID
        )
        assert failures == {}
        assert figures(ours) == figures(scores)
        assert mean_scores(ours) == mean_scores(scores)


@pytest.mark.parametrize("place", ["davis"], indirect=True)
def test_objects_keep_their_numbers_and_void_is_nobody(place):
    report = place.propagate()
    assert [(row.video_id, row.object_id) for row in report.scores] == [("gaps", 4), ("gaps", 13)]
    masks = [read_mask(path) for path in sorted((place.out / "raw/gaps").glob("*.png"))]
    assert set(np.unique(masks)) <= {0, 4, 13}
    assert len(list((place.out / "raw/short").glob("*.png"))) == 2


@pytest.mark.parametrize("place", ["vip"], indirect=True)
def test_parts_are_written_as_released(place):
    report = place.propagate(overlays="all")
    assert report.failures == {}
    names = sorted(path.name for path in (place.out / "raw/videos1").iterdir())
    assert names == [f"{number:012d}_mask.png" for number in (1, 26, 50)]
    mask = read_mask(place.out / "raw/videos1" / names[0])
    assert mask.shape == (64, 96)
    assert set(np.unique(mask)) <= {0, 4, 13}
    assert report.scores[0].scored_size == "24x32" and report.scores[0].figures["miou"] > 0
    with Image.open(place.out / "overlays/videos1/raw_00000.png") as still:
        assert still.size == (20 * 32, 20 * 24)


@pytest.mark.parametrize("place", ["jhmdb"], indirect=True)
def test_joints_are_written_by_number_and_by_name(place):
    place.propagate()
    by_number = read_predicted_joints(place.out / "raw/1.dat")
    assert by_number.shape == (2, 15, 5) and by_number.dtype == np.float32
    assert np.array_equal(by_number, np.load(place.out / "raw/walk/two.npy"))
    assert (by_number[:, 3] == -1).all()


@pytest.mark.parametrize("place", ["jhmdb"], indirect=True)
def test_a_protocol_says_how_many_cells_a_joint_is_read_from(place):
    wide = place.propagate("crw", rules={"n_context": 2})
    assert "pck_0_1" in wide.scores[0].figures
    three = np.load(place.out / "raw/walk/one.npy")
    place.propagate("crw", rules={"n_context": 2, "keypoint_top_k": 1}, restart=True)
    one = np.load(place.out / "raw/walk/one.npy")
    assert not np.array_equal(one, three)
    assert np.array_equal(one, one.round())


@pytest.mark.parametrize("place", ["vip"], indirect=True)
def test_videos_annotated_otherwise_are_refused(place):
    with pytest.raises(UsageError, match="annotated otherwise") as caught:
        place.propagate(task="davis")
    assert (caught.value.wanted, caught.value.found) == ("masks", "parts")
    assert not place.out.exists()


RANDOM = ["--backbone", "timm/test_vit", "--weights", "random", "-q"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of two own clips with a first mask each, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        write_frames(tmp_path / "clips" / name, [f"{index}.jpg" for index in range(3)], (64, 96))
        write_mask(tmp_path / f"clips/{name}.png", part_map(0, (64, 96)))
    return tmp_path / "clips"


def propagate(*options):
    return run_command(["propagate", "--task", "masks", *RANDOM, "--out", "o", *map(str, options)])


def test_own_clips_with_a_first_mask_each(own, capsys):
    assert propagate("--data-root", own) == 0
    assert len(list(Path("o/raw").rglob("*.png"))) == 6
    assert Path("o/overlays/cat/raw.mp4").is_file()
    assert read_scores(Path("o/scores.parquet")) == []
    assert "masks-timm-test_vit-native" in next(Path().glob("*.zarr")).name
    # The folder of frames itself, its mask beside it.
    assert propagate("--data-root", own / "dog", "--restart", "--overlays", "none") == 0
    assert [path.name for path in Path("o/raw").iterdir()] == ["dog"]


def halve(path: Path) -> None:
    write_mask(path, read_mask(path)[::2, ::2])


def colour(path: Path) -> None:
    Image.new("RGB", (96, 64), (200, 0, 0)).save(path)


def empty(path: Path) -> None:
    write_mask(path, np.full((64, 96), 255, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (halve, "has another size than its frame (wanted 64x96, found 32x48)"),
        (colour, "does not hold object indices"),
        (empty, "shows no object"),
        (Path.unlink, "has no first mask"),
    ],
)
def test_a_first_mask_that_cannot_be_used(own, capsys, spoil, said):
    spoil(own / "cat.png")
    assert propagate("--data-root", own) == 4
    assert said in capsys.readouterr().err
    assert [path.name for path in Path("o/raw").iterdir()] == ["dog"]


def test_frames_that_are_missing_or_too_few(own, capsys):
    for index in range(3, 6):
        shutil.copy(own / "cat/0.jpg", own / f"cat/{index}.jpg")
    (own / "cat/3.jpg").unlink()
    for name in ("1.jpg", "2.jpg"):
        (own / "dog" / name).unlink()
    assert propagate("--data-root", own) == 4
    said = capsys.readouterr().err
    assert "lacks 1 frames between its first and its last" in said and "none of 3" in said
    assert "dog: the video has nothing to propagate to (wanted at least 2 frames, found 1)" in said


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--set", "top_k=1000"], 2, "top_k asks for more neighbours than a 4x6 grid has"),
        (["--memory-limit", "10kB"], 2, "wanted: at least"),
        (["--memory-limit", "much"], 2, "'much' is not a size"),
        (["--set", "size=60x90"], 3, "--set size=short:480/16"),
        (["--manifest", "none.parquet"], 3, "none.parquet does not exist"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:9"], 2, "exclude each other"),
        (["--protocol", "dino", "--task", "vip"], 2, "task of the dino protocol"),
    ],
)
def test_lines_that_cannot_be_done(own, capsys, options, code, said):
    assert propagate("--data-root", own, *options) == code
    assert said in capsys.readouterr().err


def test_nobody_says_where_own_clips_are(own, monkeypatch, capsys):
    monkeypatch.delenv("COSETTLE_DATA", raising=False)
    assert propagate() == 2
    assert "where are the clips?" in capsys.readouterr().err


def test_joints_without_pos_img_cost_their_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data("jhmdb", tmp_path / "data")
    write_mat(tmp_path / "data/JHMDB/joint_positions/walk/two/joint_positions.mat", other=np.zeros(3))
    line = ["propagate", "--task", "jhmdb", *RANDOM, "--set", f"size={SIZE}", "--data-root", "data"]
    assert run_command([*line, "--out", "o"]) == 4
    assert "has no pos_img" in capsys.readouterr().err
    assert {row.video_id for row in read_scores(Path("o/scores.parquet"))} == {"walk/one"}


@pytest.mark.parametrize("task", ["vip", "jhmdb"])
def test_without_data_the_sprites_serve_every_task(task, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSETTLE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    line = ["propagate", "--task", task, *RANDOM[:-1], "--set", "size=64x96", "--out", "o"]
    assert run_command(line) == 0
    assert "no --data-root given: using the built-in sprites clips" in capsys.readouterr().err
    rows = read_scores(Path("o/scores.parquet"))
    assert len(rows) == 3 and {row.provenance.dataset for row in rows} == {"sprites"}
    store = next(Path().glob("*.zarr"))
    again = ["--features", str(store), "--out", "again", "--overlays", "none"]
    assert run_command([*line[:3], "-q", "--set", "size=64x96", *again]) == 0
    assert figures(read_scores(Path("again/scores.parquet"))) == figures(rows)


def test_a_store_made_for_dino_has_its_red_deviation(tmp_path, monkeypatch, golden, capsys):
    monkeypatch.chdir(tmp_path)
    write_davis(tmp_path / "data/DAVIS", "dog", [part_map(index, (64, 96)) for index in range(3)])
    weights = golden("backbones/mae/base.pth")
    line = ["propagate", "--task", "davis", "--data-root", "data", "--overlays", "none", "-q"]
    made = ["--backbone", "mae", "--weights", str(weights)]
    assert run_command([*line, *made, "--protocol", "dino", "--set", f"size={SIZE}"]) == 0
    (path,) = Path().glob("*.zarr")
    assert open_store(path).encoder["std"] == [0.228, 0.224, 0.225]
    assert "std 0.228 0.224 0.225" in open_store(path).fingerprint.preprocessing
    assert run_command([*line, "--features", str(path), "--set", f"size={SIZE}"]) == 3
    assert "--red-std 0.229" in capsys.readouterr().err


def test_a_store_for_dinov3_is_resampled_as_dinov3_does(tmp_path, monkeypatch, golden, capsys):
    monkeypatch.chdir(tmp_path)
    write_davis(tmp_path / "data/DAVIS", "dog", [part_map(index, (64, 90)) for index in range(3)])
    line = ["propagate", "--task", "davis", "--data-root", "data", "--overlays", "none", "-q"]
    made = ["--backbone", "mae", "--weights", str(golden("backbones/mae/base.pth"))]
    dinov3 = ["--protocol", "dinov3", "--set", "size=short-up:60/16"]
    assert run_command([*line, *made, *dinov3]) == 0
    (path,) = Path().glob("*.zarr")
    store = open_store(path)
    assert (store.fingerprint.plan["resampling"], str(store.arrays[0].grid)) == ("bicubic", "4x6")
    assert "pillow bicubic" in store.fingerprint.preprocessing
    assert run_command([*line, "--features", str(path), "--set", f"size={SIZE}"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "wanted: resampling linear" in said and "found: resampling bicubic" in said
