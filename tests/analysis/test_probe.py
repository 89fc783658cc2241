"""Tasks on frozen vectors: what is planted in the tokens is found, nothing else, and bad input is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from probe_cases import DIM, labelled_case, write_frame_labels
from store_cases import frames_case, pairs_case

from cosettle_cache.analysis.pooling import pool_frames
from cosettle_cache.analysis.probe import TASKS
from cosettle_cache.analysis.probe.linear import ask_folds, stratified_folds
from cosettle_cache.analysis.probe.run import MEASURES
from cosettle_cache.analysis.probe.videos import spread
from cosettle_cache.cli import run_command
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.tables import read_table
from cosettle_cache.core.types import Manifest
from cosettle_cache.heads.kinds import make_kinds
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.store import open_store
from cosettle_cache.videos.manifest import write_manifest

SIZES = {"jump": 6, "run": 6, "sit": 6}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def probe(*options: object) -> int:
    return run_command(["probe", "--features", "s.zarr", "--out", "out", "-q", *map(str, options)])


def scores() -> dict[tuple[str, str, str, str], SimpleNamespace]:
    rows = [SimpleNamespace(**row) for row in read_table(Path("out/scores.parquet")).to_pylist()]
    return {(row.task, row.tokens, row.case, row.metric): row for row in rows}


def test_all_tasks_find_what_is_planted() -> None:
    labelled_case(SIZES).write(Path("s.zarr"))
    for name, head in (("mine", "affine"), ("same", "spectral")):
        folder = make_folder(Path("runs") / name)
        save_projection(folder / "projection.safetensors", Projection(DIM, head), {})
    heads = [
        part for name in ("mine", "same") for part in ("--projection", f"runs/{name}/projection.safetensors")
    ]
    assert probe(*heads, "--seeds", 1, "--folds", 3) == 0
    rows = scores()
    assert {row.tokens for row in rows.values()} == {"raw", "mine", "same"}
    for task, metric in (
        ("retrieval", "map"),
        ("knn", "accuracy"),
        ("linear", "accuracy"),
        ("order", "accuracy"),
    ):
        assert rows[task, "raw", "", metric].value > 0.9
        # The head of one name is the identity (a spectral one as it starts).
        assert rows[task, "same", "", metric].value == pytest.approx(rows[task, "raw", "", metric].value)
    assert rows["linear", "raw", "", "accuracy"].std is not None
    assert {case for task, _, case, _ in rows if task == "order"} == {"", *SIZES}
    row = rows["retrieval", "mine", "", "recall_at_1"]
    assert (row.n_videos, row.n_classes, row.dataset, row.backbone) == (18, 3, "made", "tiny")
    assert len(row.projection_sha256) == len(row.manifest_digest) == len(row.labels_digest) == 64
    assert "scikit-learn" in row.versions_json and json.loads(row.protocol_json)["similarity"] == "cosine"
    answers = read_table(Path("out/answers.parquet")).to_pylist()
    assert len(answers) == 3 * 3 * 18
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["complete"] and summary["figures"]["linear"]["raw"]["accuracy"]["videos"] == 18


def test_nothing_is_found_where_nothing_is() -> None:
    # No centre, no drift: noise alone. Chance is 1/3 for classes and 1/2 for the order.
    case = labelled_case(
        SIZES, drift=0, noise=1, frame_classes={f"{n}/{i}": [0] * 6 for n in SIZES for i in range(6)}
    )
    case.write(Path("s.zarr"))
    assert probe("--folds", 3, "--seeds", 2) == 0
    rows = scores()
    assert rows["linear", "raw", "", "accuracy"].value < 0.7
    assert rows["order", "raw", "", "accuracy"].value < 0.8


def test_vectors_are_means_over_tokens_and_frames() -> None:
    store = open_store(labelled_case({"a": 2, "b": 2}).write(Path("s.zarr")))
    head = Projection(DIM, "linear", seed=3)
    kinds = make_kinds([("mine", head)], DIM)
    frames = pool_frames(store, kinds, "a/1")
    tokens = store.tokens("a/1").astype(np.float64)
    assert frames.shape == (2, 6, DIM)
    np.testing.assert_allclose(frames[0], tokens.mean((1, 2)), atol=1e-6)
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = pool_frames(store, kinds, "a/1", unit=True)
    np.testing.assert_allclose(unit[0], (tokens / lengths).mean((1, 2)), atol=1e-6)


def test_no_group_and_no_class_is_torn_apart() -> None:
    kinds = np.repeat([0, 1], 10)
    videos = np.tile(np.arange(10), 2)
    folds = stratified_folds(kinds, 5, 3, groups=videos)
    assert len(folds) == 15
    for fold in folds:
        assert not set(videos[fold.train]) & set(videos[fold.test])
        assert kinds[fold.test].mean() == kinds[fold.train].mean() == 0.5
    one_seed = np.concatenate([fold.test for fold in folds[:5]])
    assert sorted(one_seed) == list(range(20))


def test_standardisation_is_learned_inside_the_fold() -> None:
    # The test rows alone are scaled: had they been seen, the probe's threshold would have moved.
    vectors = np.array([[0.0], [1.0], [0.0], [1.0], [5.0], [6.0]])
    labels = np.array([0, 1, 0, 1, 1, 1])
    folds = [type(stratified_folds(labels[:4], 2, 1)[0])(np.arange(4), np.array([4, 5]))]
    (answer,) = ask_folds(vectors, labels, folds, [1.0])
    assert answer.predicted.tolist() == [1, 1]
    assert answer.converged


def test_places_of_frames_look_the_same_from_both_ends() -> None:
    for n_frames in range(2, 40):
        for n_wanted in range(2, min(n_frames, 9) + 1):
            places = spread(n_frames, n_wanted)
            assert (np.diff(places) > 0).all()
            assert (places[::-1] == n_frames - 1 - places).all() or n_frames % 2 == 0
            assert (places[0], places[-1]) == (0, n_frames - 1)


def test_official_splits_and_pairs_of_classes() -> None:
    labelled_case(SIZES, splits=("train", "test")).write(Path("s.zarr"))
    assert (
        probe("--official", "--task", "knn", "--task", "linear", "--task", "order", "--pair", "run,sit") == 0
    )
    rows = scores()
    assert rows["knn", "raw", "", "accuracy"].n_videos == 9
    assert json.loads(rows["knn", "raw", "", "accuracy"].protocol_json)["neighbors"] == 9
    assert rows["linear", "raw", "", "accuracy"].std is None
    assert rows["order", "raw", "run / sit", "accuracy"].value == 1
    assert probe("--split", "test", "--task", "retrieval") == 0
    assert scores()["retrieval", "raw", "", "map"].n_videos == 9


def test_classes_from_another_manifest() -> None:
    case = labelled_case({None: 8})
    case.write(Path("s.zarr"))
    named = labelled_case({"x": 4, "y": 4}).manifest.videos
    videos = tuple(
        type(video)(**{**{f: getattr(video, f) for f in video.__slots__}, "class_name": other.class_name})
        for video, other in zip(case.manifest, named, strict=True)
    )
    write_manifest(Path("classes.parquet"), Manifest(videos))
    assert probe("--task", "linear", "--folds", 2) == 3
    assert probe("--task", "linear", "--folds", 2, "--manifest", "classes.parquet") == 0
    assert scores()["linear", "raw", "", "accuracy"].n_classes == 2


def test_every_task_of_the_table_can_be_measured() -> None:
    for name, task in TASKS.items():
        assert task.name == name and task.help and task.metrics
        assert callable(MEASURES[name])


BAD: list[tuple[Mapping[str | None, int], list[object], int, str]] = [
    ({"a": 6}, ["--task", "linear"], 3, "all 6 videos are of one"),
    ({None: 6}, [], 3, "has a class"),
    ({"a": 1, "b": 1}, ["--task", "retrieval"], 3, "second video"),
    ({"a": 6, "b": 3}, ["--task", "linear"], 3, "1 of 2 classes have fewer videos than there are folds"),
    ({"a": 6, "b": 3}, ["--task", "order"], 3, "found:  3 of b"),
    ({"a": 6, "b": 6}, ["--official"], 3, "no official split"),
    ({"a": 6, "b": 6}, ["--split", "val"], 3, "no video is of the split val"),
    ({"a": 6, "b": 6}, ["--task", "order", "--frames", 9], 3, "too few frames"),
    ({"a": 6, "b": 6}, ["--task", "order", "--pair", "a,c"], 3, "there is no class c"),
    ({"a": 6, "b": 6}, ["--pair", "a"], 2, "no pair of classes"),
    ({"a": 6, "b": 6}, ["--folds", 1, "--task", "linear"], 2, "nothing to cross-validate"),
    ({"a": 6, "b": 6}, ["--c", 0], 2, "positive"),
    ({"a": 6, "b": 6}, ["--min-videos", 7], 3, "no class has 7 videos"),
    ({"a": 6, "b": 6}, ["--task", "segments"], 2, "needs frame labels"),
    ({"a": 6, "b": 6}, ["--labels", "nowhere"], 3, "holds no frame labels"),
]


@pytest.mark.parametrize(("sizes", "options", "code", "words"), BAD)
def test_bad_input_is_refused_before_anything_is_read(
    sizes: Mapping[str | None, int],
    options: list[object],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labelled_case(sizes).write(Path("s.zarr"))
    assert probe(*options, "--dry-run") == code
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


def test_lonely_and_unlabelled_videos_are_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    labelled_case({"a": 4, "b": 4, "c": 1, None: 2}).write(Path("s.zarr"))
    assert probe("--task", "retrieval") == 0
    assert scores()["retrieval", "raw", "", "map"].n_videos == 8
    assert "2 videos are left out" in capsys.readouterr().err
    assert probe("--min-videos", 4, "--folds", 4, "--seeds", 1) == 0
    left_out = json.loads(Path("out/summary.json").read_text())["left_out"]
    assert left_out == {
        "None/0": "it has no class",
        "None/1": "it has no class",
        "c/0": "its class c has 1 videos",
    }


def test_a_pairs_store_and_a_projection_of_another_width(capsys: pytest.CaptureFixture[str]) -> None:
    pairs_case().write(Path("s.zarr"))
    assert probe() == 3
    assert "--plan frames" in capsys.readouterr().err
    frames_case(dim=DIM).write(Path("t.zarr"))
    labelled_case(SIZES).write(Path("u.zarr"))
    save_projection(Path("p.safetensors"), Projection(DIM + 2, "linear"), {})
    assert run_command(["probe", "--features", "u.zarr", "--projection", "p.safetensors"]) == 3
    assert "of another width" in capsys.readouterr().err


def test_a_video_that_is_not_there_makes_the_run_unclean(capsys: pytest.CaptureFixture[str]) -> None:
    case = labelled_case(SIZES)
    case.write(Path("s.zarr"), slots=range(1, case.plan.n_slots))
    assert probe("--folds", 3, "--seeds", 1, "--task", "linear", "--json") == 4
    talk = capsys.readouterr()
    assert "jump/0: not extracted yet" in talk.err
    document = json.loads(talk.out)
    assert not document["complete"] and set(document["failures"]) == {"jump/0"}
    assert scores()["linear", "raw", "", "accuracy"].n_videos == 17


TRUTH = {f"v{number}": [number % 3] * 6 + [(number + 1) % 3] * 6 for number in range(9)}


def write_segments_store(every: int) -> None:
    frame_classes = {f"all/{number}": lines for number, lines in enumerate(TRUTH.values())}
    labelled_case({"all": 9}, n_frames=12, every=every, frame_classes=frame_classes, drift=0).write(
        Path("s.zarr")
    )
    names = ["pour", "stir", "SIL"]
    truth = {f"all_{name[1:]}": [names[number] for number in lines] for name, lines in TRUTH.items()}
    videos = list(truth)
    write_frame_labels(Path("labels"), truth, videos[:6], videos[6:])


@pytest.mark.parametrize("every", [1, 2, 5])
def test_segments_are_found_at_the_rate_of_the_labels(every: int) -> None:
    write_segments_store(every)
    assert probe("--labels", "labels") == 0
    rows = scores()
    # With one frame in five the boundary at 6 is seen at 10: 4 of 12 frames are late, the others are right.
    expected = {1: 1, 2: 1, 5: 8 / 12}[every]
    assert rows["segments", "raw", "", "accuracy"].value == pytest.approx(expected)
    assert rows["segments", "raw", "", "edit"].value == 1
    assert rows["segments", "raw", "", "f1_25"].value == 1
    protocol = json.loads(rows["segments", "raw", "", "accuracy"].protocol_json)
    assert (protocol["training_videos"], protocol["every"]) == (6, every)
    assert protocol["training_frames"] == 6 * -(-12 // every)


def test_bad_frame_labels(capsys: pytest.CaptureFixture[str]) -> None:
    write_segments_store(1)
    assert probe("--labels", "labels", "--bundle", "split7") == 3
    assert "train.split7.bundle does not exist" in capsys.readouterr().err
    assert probe("--labels", "labels", "--background", "SIL") == 0
    assert scores()["segments", "raw", "", "foreground_accuracy"].value == 1
    assert probe("--labels", "labels", "--background", "boil") == 3
    path = Path("labels/groundTruth/all_0.txt")
    path.write_text("pour\n" * 30)
    assert probe("--labels", "labels") == 3
    assert "another frame rate" in capsys.readouterr().err
    path.write_text("fry\n" * 12)
    assert probe("--labels", "labels") == 3
    assert "found:  fry" in capsys.readouterr().err
    mapping = Path("labels/mapping.txt")
    mapping.write_text(mapping.read_text().replace("0 ", "1000000000000 ", 1))
    assert probe("--labels", "labels") == 3
    assert "mapping.txt is malformed" in capsys.readouterr().err
    mapping.write_text(mapping.read_text().replace("1000000000000 ", "0 "))
    path.unlink()
    assert probe("--labels", "labels") == 3
    assert "all/0 has no frame labels" in capsys.readouterr().err


@pytest.mark.data
def test_real_clips_tell_their_classes(shared_data, tmp_path: Path) -> None:
    weights = shared_data("weights/vit_tiny_patch16_224_in1k.safetensors")
    root = shared_data("kinetics400_tiny_frames").parent
    build = ["manifest", "build", "kinetics", "kinetics400_tiny_frames", "--data-root", str(root)]
    assert run_command([*build, "--out", "k.parquet"]) == 0
    extract = ["extract", "--backbone", "timm/vit_tiny_patch16_224", "--weights", str(weights), "-q"]
    extract += ["--manifest", "k.parquet", "--data-root", str(root), "--out", "s.zarr"]
    assert run_command([*extract, "--plan", "frames", "--size", "160x160", "--every", "2"]) == 0
    assert probe("--task", "retrieval", "--task", "linear", "--seeds", 1) == 0
    rows = scores()
    assert rows["linear", "raw", "", "accuracy"].value > 0.7
    assert rows["retrieval", "raw", "", "recall_at_1"].value > 0.7


def test_probe_writes_to_folders_of_its_own_only(capsys: pytest.CaptureFixture[str]) -> None:
    labelled_case(SIZES).write(Path("s.zarr"))
    make_folder(Path("out"))
    Path("out/scores.parquet").write_text("mine")
    assert probe() == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["scores.parquet"]
    assert Path("out/scores.parquet").read_text() == "mine"
    assert probe("--out", "s3://bucket/out") == 2
    assert "is a URL" in capsys.readouterr().err
    assert not Path("s3:").exists()
