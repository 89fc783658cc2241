"""Tasks on single tokens: made-up VOC and SPair-71k folders against plain loops over all pairs of tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosettle_cache.analysis.probe.dense import _choose
from cosettle_cache.cli import run_command
from cosettle_cache.core.files import make_folder
from cosettle_cache.core.tables import read_table
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.store import FeatureStore, open_store
from cosettle_cache.videos.masks import write_mask

PATCH, HEIGHT, WIDTH = 16, 96, 64
#: The last of VOC's 21 among them.
CLASSES = (0, 7, 19, 20)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_image(path: Path, size: tuple[int, int], draw: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = draw.integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)


def extract(layout: str, folder: str, size: str = f"{HEIGHT}x{WIDTH}") -> FeatureStore:
    build = ["manifest", "build", layout, folder, "--data-root", ".", "--out", "m.parquet"]
    assert run_command([*build, "-q"]) == 0
    words = [
        "extract",
        "--manifest",
        "m.parquet",
        "--data-root",
        ".",
        "--plan",
        "frames",
        "--size",
        size,
        "-q",
    ]
    assert run_command([*words, "--backbone", "timm/test_vit", "--weights", "random", "--out", "s.zarr"]) == 0
    store = open_store("s.zarr")
    folder_of_head = make_folder(Path("runs/mine"))
    head = Projection(store.arrays[0].n_channels, "linear", seed=3)
    save_projection(folder_of_head / "projection.safetensors", head, {})
    return store


def probe(*options: object) -> int:
    head = ["--projection", "runs/mine/projection.safetensors"]
    return run_command(["probe", "--features", "s.zarr", "--out", "out", "-q", *head, *map(str, options)])


def figures(task: str, tokens: str) -> Mapping[str, object]:
    return json.loads(Path("out/summary.json").read_text())["figures"][task][tokens]


def unit(store: FeatureStore, name: str) -> np.ndarray:
    tokens = store.tokens(name)[0].astype(np.float64)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    return tokens / np.linalg.norm(tokens, axis=1, keepdims=True)


def make_voc(root: Path) -> dict[str, np.ndarray]:
    draw, masks = np.random.default_rng(0), {}
    for number in range(7):
        name, size = f"2007_{number:06d}", (60 + 8 * number, 120 - 9 * number)
        write_image(root / f"JPEGImages/{name}.jpg", size, draw)
        mask = (
            draw.choice(CLASSES, (3, 3)).astype(np.uint8).repeat(size[0], 0)[::3].repeat(size[1], 1)[:, ::3]
        )
        mask[:3] = mask[:, -5:] = 255
        masks[name] = mask
        make_folder(root / "SegmentationClass")
        write_mask(root / f"SegmentationClass/{name}.png", mask)
    lists = make_folder(root / "ImageSets/Segmentation")
    (lists / "train.txt").write_text("".join(f"{name}\n" for name in list(masks)[:4]))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in list(masks)[4:]))
    return masks


def bilinear(n_cells: int) -> np.ndarray:
    """Return the weights of cells in `PATCH` times as many pixels: between middles, constant beyond them."""
    weights = np.zeros((n_cells * PATCH, n_cells))
    for pixel in range(len(weights)):
        place = min(max((pixel + 0.5) / PATCH - 0.5, 0), n_cells - 1)
        low = int(place)
        weights[pixel, low] += 1 - (place - low)
        weights[pixel, min(low + 1, n_cells - 1)] += place - low
    return weights


def dense_overlaps(store: FeatureStore, masks: Mapping[str, np.ndarray], k: int = 30) -> dict[int, float]:
    """Return the intersection over union of every class, by the definition and over all pairs of tokens."""
    rows, cols = HEIGHT // PATCH, WIDTH // PATCH
    large = {}
    for name, mask in masks.items():
        row = [int((number + 0.5) * mask.shape[0] / HEIGHT) for number in range(HEIGHT)]
        col = [int((number + 0.5) * mask.shape[1] / WIDTH) for number in range(WIDTH)]
        large[name] = mask[row][:, col]
    shares = []
    for name in list(masks)[:4]:
        mask = np.where(large[name] == 255, 0, large[name])
        patches = mask.reshape(rows, PATCH, cols, PATCH).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
        shares.append(np.stack([(patches == number).mean(1) for number in CLASSES], axis=1))
    memory, known = np.concatenate([unit(store, name) for name in list(masks)[:4]]), np.concatenate(shares)
    said, truth = [], []
    for name in list(masks)[4:]:
        cosines = unit(store, name) @ memory.T
        soft = np.zeros((len(cosines), 4))
        for token, row_of in enumerate(cosines):
            near = np.argsort(-row_of, kind="stable")[:k]
            weights = np.exp(row_of[near] / 0.02)
            soft[token] = weights @ known[near] / weights.sum()
        maps = soft.reshape(rows, cols, 4)
        pixels = np.einsum("yr,rcn,xc->yxn", bilinear(rows), maps, bilinear(cols)).argmax(-1)
        pixels = np.array(CLASSES)[pixels]
        said.append(pixels[large[name] != 255])
        truth.append(large[name][large[name] != 255])
    found, right = np.concatenate(said), np.concatenate(truth)
    return {
        number: ((found == number) & (right == number)).sum() / ((found == number) | (right == number)).sum()
        for number in CLASSES
    }


def test_segmentation_is_that_of_all_pairs_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    masks = make_voc(Path("VOC"))
    store = extract("voc", "VOC")
    videos = {video.video_id: video for video in store.manifest}
    assert [videos[name].split for name in masks] == ["train"] * 4 + ["val"] * 3
    assert {video.media_kind for video in store.manifest} == {"image"}
    assert probe("--task", "segmentation", "--data-root", ".") == 0
    expected = dense_overlaps(store, masks)
    found = figures("segmentation", "raw")
    assert found["miou"]["value"] == pytest.approx(np.mean(list(expected.values())), abs=5e-4)
    of_classes = {int(name): case["miou"]["value"] for name, case in found["cases"].items()}
    assert of_classes == pytest.approx(expected, abs=5e-4)
    assert figures("segmentation", "mine")["miou"]["value"] != found["miou"]["value"]
    answers = read_table(Path("out/answers.parquet")).to_pylist()
    assert [row["video_id"] for row in answers] == list(masks)[4:] * 2
    # A memory of 40 tokens is 10 of each image; who searches does not matter.
    seen = []
    for search in ("faiss", "torch"):
        options = ("--memory", 40, "--memory-seed", 1, "--k", 3, "--search", search)
        assert probe("--task", "segmentation", "--data-root", ".", *options) == 0
        protocol = json.loads(Path("out/summary.json").read_text())["protocols"]["segmentation"]
        assert (protocol["memory"], protocol["neighbors"], protocol["memory_seed"]) == (40, 3, 1)
        seen.append(figures("segmentation", "raw"))
    assert seen[0] == seen[1] != found
    capsys.readouterr()
    # An image whose mask is of another size, or gone, is named, and the others are asked about.
    write_mask(Path("VOC/SegmentationClass/2007_000006.png"), np.zeros((5, 5), np.uint8))
    assert probe("--task", "segmentation", "--data-root", ".") == 4
    assert "2007_000006.png has another size than its image" in capsys.readouterr().err
    assert figures("segmentation", "raw")["miou"]["videos"] == 2
    assert probe("--task", "segmentation") == 2
    assert "--data-root" in capsys.readouterr().err


def test_rare_classes_are_remembered_first() -> None:
    shares = np.zeros((20, 2), np.float32)
    shares[:, 0], shares[7] = 1, [0, 1]
    draws = [_choose(shares, 3, np.random.default_rng(seed)) for seed in range(20)]
    # Its score is at most 1, that of another is even up to 19.
    assert sum(7 in chosen for chosen in draws) >= 18
    assert {len(chosen) for chosen in draws} == {3}
    assert draws[0].tolist() == _choose(shares, 3, np.random.default_rng(0)).tolist() != draws[1].tolist()


def test_segmentation_needs_images_of_both_parts(capsys: pytest.CaptureFixture[str]) -> None:
    make_voc(Path("VOC"))
    assert run_command(["manifest", "build", "voc", "VOC", "--split", "test", "-q"]) == 3
    assert "test.txt does not exist" in capsys.readouterr().err
    Path("VOC/SegmentationClass/2007_000002.png").unlink()
    extract("voc", "VOC")
    assert probe("--task", "segmentation", "--data-root", ".") == 4
    assert "2007_000002: no mask" in capsys.readouterr().err
    Path("VOC/ImageSets/Segmentation/train.txt").write_text("2007_000002\n")
    shutil.rmtree("s.zarr")
    extract("voc", "VOC")
    assert probe("--task", "segmentation", "--data-root", ".") == 3
    said = capsys.readouterr().err
    assert "has no images with classes of pixels to learn from" in said
    assert "2007_000002: no mask" in said


def write_pair(root: Path, name: str, images: tuple[str, str], points: list[list[list[int]]]) -> None:
    names = [Path(image) for image in images]
    document = {
        "category": str(names[0].parent),
        "src_imname": names[0].name,
        "trg_imname": names[1].name,
        "src_kps": points[0],
        "trg_kps": points[1],
        "trg_bndbox": [10, 20, 60, 270],
    }
    path = make_folder(root / "PairAnnotation/test") / f"{name}.json"
    path.write_text(json.dumps(document))


def make_spair(root: Path) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Write five images, five pairs of which one has no key points, and return the good ones."""
    draw, sizes = np.random.default_rng(1), {}
    for number, name in enumerate(("cat/1", "cat/2", "cat/3", "dog/1", "dog/2")):
        sizes[name] = (80 + 10 * number, 110 - 5 * number)
        write_image(root / f"JPEGImages/{name}.jpg", sizes[name], draw)
    pairs = {}
    for images in (("cat/1", "cat/2"), ("cat/2", "cat/1"), ("cat/3", "cat/2"), ("dog/1", "dog/2")):
        name = f"{len(pairs):06d}-{images[0][4:]}-{images[1][4:]}:{images[0][:3]}"
        limits = [(sizes[image][1], sizes[image][0]) for image in images]
        points = np.stack([draw.integers(0, limit, (12 - 2 * len(pairs), 2)) for limit in limits])
        points[0, 0] = limits[0]  # as a point at the very edge is written
        pairs[name] = (images, points)
        write_pair(root, name, (f"{images[0]}.jpg", f"{images[1]}.jpg"), points.tolist())
    return pairs


def dense_distances(
    store: FeatureStore, images: tuple[str, str], points: np.ndarray, side: float
) -> list[float]:
    """Return how far from each target point the token nearest to the source point's lies, in sides."""
    rows, cols = HEIGHT // PATCH, WIDTH // PATCH
    videos = {video.video_id: video for video in store.manifest}
    (source, target), found = (videos[name] for name in images), []
    for (x, y), (true_x, true_y) in zip(*points, strict=True):
        row, col = min(int(y * rows / source.height), rows - 1), min(int(x * cols / source.width), cols - 1)
        cosines = unit(store, images[1]) @ unit(store, images[0])[row * cols + col]
        best = int(cosines.argmax())
        place = ((best % cols + 0.5) * target.width / cols, (best // cols + 0.5) * target.height / rows)
        found.append(np.hypot(place[0] - true_x, place[1] - true_y) / side)
    return found


def test_key_points_are_those_of_all_pairs_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    root, side = Path("SPair-71k"), 250
    pairs = make_spair(root)
    store = extract("spair", "SPair-71k")
    classes = [(video.video_id, video.class_name) for video in store.manifest]
    assert classes == [(name, name[:3]) for name in ("cat/1", "cat/2", "cat/3", "dog/1", "dog/2")]
    assert probe("--task", "spair", "--labels", root) == 0
    away = {name: np.array(dense_distances(store, *pair, side)) for name, pair in pairs.items()}
    near = {name: (found <= 0.1).mean() for name, found in away.items()}
    recalls = {
        category: (np.concatenate([away[name] for name in pairs if name.endswith(category)]) < 0.1).mean()
        for category in ("cat", "dog")
    }
    found = figures("spair", "raw")
    assert found["recall"]["value"] == pytest.approx(np.mean(list(recalls.values())))
    assert found["pck"]["value"] == pytest.approx(np.mean(list(near.values())))
    assert 0 < found["recall"]["value"] != found["pck"]["value"]
    assert {name: case["recall"]["value"] for name, case in found["cases"].items()} == pytest.approx(recalls)
    answers = read_table(Path("out/answers.parquet")).to_pylist()
    of_raw = {row["video_id"]: row["value"] for row in answers if row["tokens"] == "raw"}
    assert of_raw == pytest.approx(near) and len(answers) == 2 * len(pairs)
    assert "spair: percent, 4 pairs of images, 2 classes" in capsys.readouterr().out


def test_bad_image_pairs_are_named_and_the_others_counted(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path("SPair-71k")
    good = next(iter(make_spair(root)))
    extract("spair", "SPair-71k", "32x32")
    write_pair(root, "empty", ("cat/1.jpg", "cat/2.jpg"), [[], []])
    write_pair(root, "uneven", ("cat/1.jpg", "cat/2.jpg"), [[[1, 2]], []])
    write_pair(root, "absent", ("cat/1.jpg", "cat/9.jpg"), [[[1, 2]], [[3, 4]]])
    (root / "PairAnnotation/test/strange.json").write_text('{"category": "cat", "src_kps": "x"}')
    assert probe("--task", "spair", "--labels", root) == 4
    said = capsys.readouterr().err
    for reason in (
        "the image pair empty has no key points in common",
        "the image pair uneven has no key points in common",
        "absent: the store has no image cat/9.jpg",
        "strange.json is no image pair",
    ):
        assert reason in said
    assert figures("spair", "raw")["pck"]["videos"] == 4
    # The list of the data set says which pairs there are.
    (make_folder(root / "Layout/large") / "test.txt").write_text(f"{good}\n")
    assert probe("--task", "spair", "--labels", root) == 0
    assert figures("spair", "raw")["pck"]["videos"] == 1
    (root / "Layout/large/test.txt").write_text("empty\n")
    assert probe("--task", "spair", "--labels", root) == 3
    assert "no pair of images that can be used" in capsys.readouterr().err
    assert probe("--task", "spair", "--labels", root, "--split", "val") == 3
    assert "val does not exist" in capsys.readouterr().err
    assert probe("--task", "spair") == 2
    assert "spair needs pairs" in capsys.readouterr().err
