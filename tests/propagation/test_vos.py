"""Data sets with objects that appear later and frames without a mask, against a dense oracle; DAVIS-2016."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_cases import write_masks
from PIL import Image
from propagation_cases import dense_oracle

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import Grid
from cosettle_cache.metrics import davis_j_and_f
from cosettle_cache.metrics.rows import read_scores
from cosettle_cache.propagation.labels import decode_classes, encode_mask_nearest
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import open_store
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.manifest import write_manifest
from cosettle_cache.videos.masks import read_mask, write_mask

SIZE, STEP, N_FRAMES = (64, 96), 5, 9
RULE = ["--set", "size=64x96", "--set", "label_encoding=nearest", "--set", "top_k=3", "--set", "radius=3"]


def box(mask: np.ndarray, number: int, row: int, col: int) -> None:
    mask[row : row + 24, col : col + 24] = number


def truth(index: int) -> np.ndarray:
    """Object 2 from the first frame on, object 1 from frame 2 on."""
    mask = np.zeros(SIZE, np.uint8)
    box(mask, 2, 4, 4 + 4 * index)
    if index >= 2:
        box(mask, 1, 36, 60 - 4 * index)
    return mask


def write_frames(folder: Path, names: list[str]) -> None:
    """Write textures that move, so that no two tokens are equally near."""
    folder.mkdir(parents=True)
    texture = np.random.default_rng(0).integers(0, 255, (SIZE[0], 2 * SIZE[1], 3), np.uint8)
    for index, name in enumerate(names):
        Image.fromarray(texture[:, 5 * index : 5 * index + SIZE[1]]).save(folder / name)


def write_vos(root: Path, annotated: list[int], meta: dict[str, list[str]] | None = None) -> list[str]:
    """Write one video; frames are numbered in fives, as YouTube-VOS has them."""
    stems = [f"{STEP * index:05d}" for index in range(N_FRAMES)]
    write_frames(root / "JPEGImages/cat", [f"{stem}.jpg" for stem in stems])
    (root / "Annotations/cat").mkdir(parents=True)
    for index in annotated:
        write_mask(root / f"Annotations/cat/{stems[index]}.png", truth(index))
    frames = meta or {"2": [stems[0]], "1": [stems[2]]}
    objects = {number: {"category": "cat", "frames": named} for number, named in frames.items()}
    (root / "meta.json").write_text(json.dumps({"videos": {"cat": {"objects": objects}}}))
    return stems


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden):
    monkeypatch.chdir(tmp_path)
    encoder = ["--backbone", "mae", "--weights", str(golden("backbones/mae/base.pth")), "--device", "cpu"]

    def propagate(dataset: str, root: str, *options: str) -> int:
        manifest = build_manifest(dataset, Path("data") / root, Path("data")).manifest
        write_manifest("m.parquet", manifest)
        line = ["propagate", "--task", "davis", "--manifest", "m.parquet", "--data-root", "data", "-q"]
        return run_command([*line, *encoder, "--overlays", "none", "--out", "run", *RULE, *options])

    return propagate


@pytest.mark.parametrize("later", ["inject", "ignore"])
def test_objects_that_appear_later(run, tmp_path: Path, later: str) -> None:
    stems = write_vos(tmp_path / "data/YouTube-VOS/valid", [0, 2, 4, 6, 8])
    assert run("youtube-vos", "YouTube-VOS", "--set", f"later_objects={later}") == 0
    (path,) = tmp_path.glob("*.zarr")
    tokens = torch.from_numpy(open_store(path).tokens("cat")).float()
    settings = {"size": "64x96", "label_encoding": "nearest", "top_k": 3, "radius": 3.0}
    protocol = make_protocol(**settings, later_objects=later)
    ids = [0, 1, 2] if later == "inject" else [0, 2]
    first = one_hot(truth(0), ids)
    new = one_hot(np.where(truth(2) == 1, truth(2), 0), [0, 1, 2]) * torch.tensor([0, 1, 0])
    maps, is_open = dense_oracle(tokens, first, protocol, {2: new} if later == "inject" else {})
    assert not is_open
    for index, (stem, label_map) in enumerate(zip(stems, maps, strict=True)):
        wanted = np.array(ids, np.uint8)[decode_classes(label_map, SIZE).numpy()]
        if index == 2 and later == "inject":
            wanted = np.where(truth(2) == 1, np.uint8(1), wanted)
        assert np.array_equal(read_mask(f"run/raw/cat/{stem}.png"), wanted), index
    rows = {row.object_id: row for row in read_scores(Path("run/scores.parquet"))}
    assert set(rows) == set(ids) - {0}
    annotated = [0, 2, 4, 6, 8]
    masks = np.stack([read_mask(f"run/raw/cat/{stems[index]}.png") for index in annotated])
    true = np.stack([np.where(np.isin(truth(index), ids), truth(index), 0) for index in annotated])
    assert rows[2].figures["jf_mean"] == pytest.approx(by_object(true, masks)[2])
    if later == "inject":  # scored after the frame in which it is given
        assert rows[1].figures["jf_mean"] == pytest.approx(by_object(true[1:], masks[1:])[1])
    assert json.loads(rows[2].protocol_json)["later_objects"] == later
    assert json.loads(rows[2].counts_json) == {"category": "cat"}
    line = ["score", "--task", "davis", "--manifest", "m.parquet", "--data-root", "data", "-q"]
    if later == "inject":
        assert run_command([*line, "--predictions", "run/raw", "--out", "again.parquet"]) == 0
        again = {row.object_id: row.figures for row in read_scores(Path("again.parquet"))}
        assert again == {number: row.figures for number, row in rows.items()}


def one_hot(mask: np.ndarray, ids: list[int]) -> torch.Tensor:
    labels = encode_mask_nearest(mask, Grid(4, 6))
    found = torch.zeros(4, 6, len(ids))
    for place, number in enumerate(labels.object_ids):
        if number in ids:
            found[..., ids.index(number)] = labels.label_map[..., place]
    return found


def by_object(true: np.ndarray, masks: np.ndarray) -> dict[int, float]:
    return {score.object_id: score.jf_mean for score in davis_j_and_f(true, masks)}


@pytest.mark.parametrize("number", [1, 7])  # the first annotation has object 2 alone
def test_an_object_that_appears_later_fails_by_default(run, tmp_path: Path, capsys, number: int) -> None:
    write_vos(tmp_path / "data/MOSE/train", list(range(N_FRAMES)))
    mask = truth(3)
    mask[mask == 1] = number
    write_mask(tmp_path / "data/MOSE/train/Annotations/cat/00015.png", mask)
    assert run("mose", "MOSE") == 4
    assert "objects that the first annotation lacks" in capsys.readouterr().err


@pytest.mark.parametrize("given", [(2, 1), (2, 1, 7)])
def test_masks_that_give_objects_are_written_and_not_scored(run, tmp_path: Path, given) -> None:
    places = range(0, 2 * len(given), 2)
    stems = write_vos(tmp_path / "data/YouTube-VOS/valid", list(places))
    for place, number in zip(places, given, strict=True):
        mask = np.where(truth(0) == 2, np.uint8(number), np.uint8(0))
        write_mask(tmp_path / f"data/YouTube-VOS/valid/Annotations/cat/{stems[place]}.png", mask)
    assert run("youtube-vos", "YouTube-VOS", "--set", "later_objects=inject") == 0
    assert len(list(Path("run/raw/cat").iterdir())) == len(stems)
    assert not [row for row in read_scores(Path("run/scores.parquet")) if row.figures]


def test_a_video_begins_at_its_first_mask(tmp_path: Path) -> None:
    write_vos(tmp_path / "valid", [1, 3], {"2": ["00005"]})
    (video,) = build_manifest("youtube-vos", tmp_path, tmp_path).manifest
    assert (video.first_frame, video.n_frames, video.labelled_frames) == (1, N_FRAMES - 1, 2)


def test_a_meta_file_that_names_a_missing_frame(tmp_path: Path) -> None:
    write_vos(tmp_path / "valid", [0], {"2": ["00000", "00007"]})
    with pytest.raises(InputError) as caught:
        build_manifest("youtube-vos", tmp_path, tmp_path)
    assert "names 1 frames of cat that are not there: 00007" in caught.value.details[0]
    (tmp_path / "valid/meta.json").write_text("[1]")
    with pytest.raises(InputError, match="is no list of objects"):
        build_manifest("youtube-vos", tmp_path, tmp_path)


@pytest.mark.parametrize("lists", ["480p", "2016", ""])
def test_davis_2016_has_one_object(run, tmp_path: Path, lists: str) -> None:
    root = tmp_path / "data/DAVIS-2016"
    for name in ("cat", "dog"):
        write_frames(root / f"JPEGImages/480p/{name}", [f"{index:05d}.jpg" for index in range(4)])
        write_masks(root / f"Annotations/480p/{name}", [truth(0).clip(0, 1) * 255] * 4)
    if lists:
        (root / "ImageSets" / lists).mkdir(parents=True)
        pairs = [f"/JPEGImages/480p/cat/{i:05d}.jpg /Annotations/480p/cat/{i:05d}.png" for i in range(4)]
        (root / f"ImageSets/{lists}/val.txt").write_text("\n".join(pairs if lists == "480p" else ["cat"]))
    assert run("davis2016", "DAVIS-2016") == 0
    rows = read_scores(Path("run/scores.parquet"))
    assert [(row.video_id, row.object_id) for row in rows] == [("cat", 1), ("dog", 1)][: 1 if lists else 2]
    assert set(np.unique(read_mask("run/raw/cat/00002.png"))) <= {0, 1}


def test_categories_that_were_trained_on_are_a_figure_of_their_own(run, tmp_path: Path) -> None:
    write_vos(tmp_path / "data/YouTube-VOS/valid", list(range(N_FRAMES)))
    meta = tmp_path / "data/YouTube-VOS/valid/meta.json"
    document = json.loads(meta.read_text())
    document["videos"]["cat"]["objects"]["1"]["category"] = "ape"
    meta.write_text(json.dumps(document))
    document["videos"]["cat"]["objects"].pop("1")
    (tmp_path / "data/YouTube-VOS/train").mkdir()
    (tmp_path / "data/YouTube-VOS/train/meta.json").write_text(json.dumps(document))
    assert run("youtube-vos", "YouTube-VOS", "--set", "later_objects=inject") == 0
    rows = {row.object_id: row.figures for row in read_scores(Path("run/scores.parquet"))}
    figures = json.loads(Path("run/summary.json").read_text())["means"]["raw"]
    four = [rows[number][f"{letter}_mean"] for number in (2, 1) for letter in "jf"]
    assert [figures[name] for name in ("j_seen", "f_seen", "j_unseen", "f_unseen")] == pytest.approx(four)
    assert figures["overall"] == pytest.approx(sum(four) / 4)


def test_a_sample_is_drawn_by_the_names_alone(tmp_path: Path, capsys) -> None:
    for number in range(6):
        write_vos(tmp_path / f"{number}", [0])
        (tmp_path / f"{number}/JPEGImages/cat").rename(folder(tmp_path, "JPEGImages") / f"cat{number}")
        (tmp_path / f"{number}/Annotations/cat").rename(folder(tmp_path, "Annotations") / f"cat{number}")
    drawn = build_manifest("mose", tmp_path, tmp_path, sample=3).manifest
    marks = {f"cat{n}": hashlib.sha256(f"0\0cat{n}".encode()).digest() for n in range(6)}
    assert {video.video_id for video in drawn} == set(sorted(marks, key=marks.__getitem__)[:3])
    (tmp_path / "train/JPEGImages/cat0").rename(tmp_path / "away")
    left = build_manifest("mose", tmp_path, tmp_path, sample=6).manifest
    assert [video.video_id for video in left] == [f"cat{n}" for n in range(1, 6)]
    assert run_command(["manifest", "build", "folder", str(tmp_path), "--resolution", "480p"]) == 2
    assert "the layout folder has no resolution" in capsys.readouterr().err


def folder(root: Path, name: str) -> Path:
    (root / "train" / name).mkdir(parents=True, exist_ok=True)
    return root / "train" / name
