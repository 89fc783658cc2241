"""Valid files of every kind that is read, by the project's own writers, and longer ways of reading them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import torch
from benchmark_cases import (
    make_joints,
    part_map,
    write_davis,
    write_frames,
    write_jhmdb,
    write_mat,
    write_vip,
)
from PIL import Image
from probe_cases import labelled_case, write_frame_labels
from propagation_cases import make_squares, square_mask
from pyarrow.csv import read_csv
from report_cases import SCORE, write_analysis_table, write_journal
from safetensors.torch import save_file
from scipy.io import savemat
from store_cases import frames_case, make_manifest, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.files import own_folder
from cosettle_cache.core.settings import SpritesSettings, digest
from cosettle_cache.core.tables import encode_parquet
from cosettle_cache.core.types import Grid, MediaKind, Video
from cosettle_cache.encoders.load import make_vit
from cosettle_cache.encoders.registry import FAMILIES, Architecture
from cosettle_cache.heads.projection import (
    Projection,
    describe_projection,
    export_projection,
    load_projection,
    save_projection,
)
from cosettle_cache.metrics.rows import J_AND_F_FIGURES, write_rows, write_scores
from cosettle_cache.propagation.context import ContextSearch
from cosettle_cache.propagation.folder import RunFolder
from cosettle_cache.propagation.neighbor_files import neighbor_writer, neighbors_key
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.report.page import chart
from cosettle_cache.report.runs import read_runs
from cosettle_cache.store import open_store, verify_store
from cosettle_cache.store.index import seal
from cosettle_cache.training.log import Checkpoint, write_checkpoint
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.frame_labels import open_frame_labels
from cosettle_cache.videos.frames import iter_frames, probe
from cosettle_cache.videos.jhmdb import write_predicted_joints
from cosettle_cache.videos.manifest import write_manifest
from cosettle_cache.videos.masks import write_mask
from cosettle_cache.videos.tapvid import unpack_tapvid

#: Videos of the manifests, queries, tracks and lists here.
CLIP = Video("clip", "clip", MediaKind.FRAMES, 4, 64, 96)
VIDEOS = make_manifest([("clip", 4, 4, 6), ("other", 5, 4, 6)])
PROTOCOL = make_protocol(top_k=3, n_context=2)
KEY = neighbors_key(PROTOCOL, video_id="clip", tokens="raw", content="1", n_frames=4, grid=Grid(3, 5))

#: What `make_squares_run` has done, with @ for the folder.
PROPAGATE = (
    "propagate --task davis --features @/squares.zarr --data-root @/data --out @/masks --overlays none -q "
    "--save-neighbors @/neighbors --set top_k=1 --set size=native --projection @/head.safetensors"
)
TRAIN = "train --features @/pairs.zarr --out @/trained --epochs 1 --batch 2 -q"


def texts(folder: Path, *lines: str) -> None:
    for number, line in enumerate(lines):
        (folder / f"{number}.txt").write_text(line)


def make_recipe(folder: Path) -> None:
    recipe = """title = "one"
about = "a recipe"
[[step]]
command = "manifest build"
arguments = ["folder", "clips"]
out = "x.parquet"
quiet = true
[[step]]
command = "train"
features = ["a.zarr", "b.zarr"]
base_lr = 0.5
[expect]
summary = "SUMMARY"
[expect.raw]
j_mean = { value = 0.5, tolerance = 0.02 }
"""
    (folder / "recipe.toml").write_text(recipe.replace("SUMMARY", str(folder / "summary.json")))
    (folder / "summary.json").write_text('{"complete": true, "means": {"raw": {"j_mean": 0.5}}}')


def make_tables(folder: Path) -> None:
    videos = replace(VIDEOS, videos=tuple(replace(v, fps=12.5, class_name="run") for v in VIDEOS))
    for suffix in ("parquet", "csv"):
        write_manifest(folder / f"manifest.{suffix}", videos)


def make_lists(folder: Path) -> None:
    make_tables(folder)
    pair = "/home/x/VIP/Images/videos1 /home/x/VIP/Annotations/Category_ids/videos1\n"
    texts(folder, "bear\nthe dog\ncamel\n", pair, "Rename_Images/walk/one walk/one.mat\n")


def make_queries(folder: Path) -> None:
    rows = "video_id,frame,x,y\nclip,0,1.5,2\nclip,3,90,60.5\nother,4,0,0\n"
    (folder / "points.csv").write_text(rows)
    (folder / "points.parquet").write_bytes(encode_parquet(read_csv(folder / "points.csv")))


def tracks(n_frames: int) -> dict[str, np.ndarray]:
    video = np.full((n_frames, 64, 96, 3), 40, np.uint8)
    points = np.full((3, n_frames, 2), 0.25, np.float32)
    return {"video": video, "points": points, "occluded": np.eye(3, n_frames) > 0}


def make_pickles(folder: Path) -> None:
    clip = tracks(2)
    (buffer := io.BytesIO()).name = "frame.jpg"
    Image.fromarray(clip["video"][0]).save(buffer)
    small = {**tracks(2), "video": [buffer.getvalue()] * 2}
    for protocol in (2, 4, 5):
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps({"goat": small, "car": small}, protocol))
    (folder / "list.pkl").write_bytes(pickle.dumps([clip, small], 4))


def make_joint_files(folder: Path) -> None:
    joints = make_joints(3)
    write_mat(folder / "v5.mat", pos_img=joints, scale=np.ones(3))
    write_mat(folder / "cells.mat", names=np.array(["a", joints], dtype=object), pos_img=joints)
    savemat(folder / "packed.mat", {"pos_img": joints, "scale": np.ones(3)}, do_compression=True)
    with h5py.File(folder / "v73.mat", "w", userblock_size=512) as file:
        file["pos_img"] = joints.T
        file.create_dataset("packed", data=joints.T, chunks=True, compression="gzip")
    with (folder / "v73.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(128))


def make_predictions(folder: Path) -> None:
    points = make_joints(3).astype(np.float32)
    write_predicted_joints(folder / "0.dat", points)
    np.save(folder / "1.npy", points)


def make_shares(folder: Path) -> None:
    unpack_tapvid({"clip": tracks(4)}, folder)
    shutil.rmtree(folder / "frames")


def make_film(codec: str, name: str, pix_fmt: str = "yuv420p") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
            stream.codec_context.thread_count = 1
            for number in range(6):
                picture = np.full((48, 64, 3), 20 * number, np.uint8)
                picture[number : number + 20, 2 * number : 2 * number + 20] = 200
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    return make


def make_images(folder: Path) -> None:
    colours = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "avif"):
        (folder / suffix).mkdir()
        Image.fromarray(colours).save(folder / suffix / f"0.{suffix}", exif=exif)
    (folder / "grey").mkdir()
    Image.fromarray(colours[:, :, 0].astype(np.uint16) * 256).save(folder / "grey/0.png")
    (folder / "palette").mkdir()
    write_mask(folder / "palette/0.png", part_map())
    (folder / "packed").mkdir()
    Image.fromarray(colours).save(folder / "packed/0.tif", compression="tiff_lzw")


def make_weights(folder: Path) -> None:
    torch.manual_seed(0)
    vit = make_vit(FAMILIES["dino"], Architecture(64, 1, 1, 16, Grid(2, 2), 64))
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    state["pos_embed"] = torch.randn(1, 5, 64)
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, folder / "new.pt")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "weights.safetensors")
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    shards = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "weights.safetensors")}
    (folder / "weights.safetensors.index.json").write_text(json.dumps(shards))
    archive = torch.nn.Module()
    for name, tensor in state.items():
        archive.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
    torch.jit.script(archive).save(folder / "scripted.pt")


def make_projections(folder: Path) -> None:
    save_projection(folder / "own.safetensors", Projection(8, "linear"), {"backbone": "tiny"})
    export_projection(folder / "own.safetensors", folder / "theirs.pth")


def make_training(folder: Path) -> None:
    states = [{"head": Projection(4).state_dict(), "step": 3, "optimiser": {"state": {}, "groups": [1.0]}}]
    write_checkpoint(folder / "checkpoint.pt", Checkpoint(3, {"settings.seed": "0"}, [(10, 0)], states))


def make_run(folder: Path) -> None:
    write_journal(folder / "run", 12)
    write_analysis_table(folder / "run")
    scores = [replace(SCORE, figures=dict.fromkeys(J_AND_F_FIGURES, 0.5)), SCORE]
    write_scores(folder / "run", [replace(scores[0], video_id=name) for name in ("dog", "cat")])
    write_rows(folder / "run/table.csv", scores)
    (folder / "run/train.json").write_text('{"steps": 3, "members": [{"name": "", "last": {"total": 1.0}}]}')
    drawn = '<svg xmlns="http://www.w3.org/2000/svg"><g style="fill: red"><path id="a" d="M0 0"/></g></svg>'
    (folder / "run/scores.svg").write_text(drawn)


def make_marks(folder: Path) -> None:
    run = RunFolder(folder)
    run.begin({"task": "davis", "protocol": {"name": "cosettle"}}, ["raw", "mine"], False)
    (folder / "raw.png").write_bytes(b"x")
    scores = [replace(SCORE, figures=dict.fromkeys(J_AND_F_FIGURES, 0.5))]
    run.finish(CLIP, folder, [folder / "raw.png"], scores)


def make_neighbors(folder: Path) -> None:
    tokens = torch.randn(4, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    search = ContextSearch(Grid(3, 5), 8, PROTOCOL, device=torch.device("cpu"))
    with neighbor_writer(folder / "clip.parquet", KEY) as write:
        for found in filter(None, map(search.step, tokens)):
            write(found)


def make_owned(folder: Path) -> None:
    with own_folder(folder / "run", "train"):
        pass


def make_labels(folder: Path) -> None:
    write_frame_labels(folder / "labels", {"clip": ["a", "b"]}, ["clip"], ["clip"])


def make_pairs(folder: Path) -> None:
    points = {"src_kps": [[1, 2]], "trg_kps": [[3, 4]], "trg_bndbox": [1, 2, 30, 40]}
    document = {"category": "cat", "src_imname": "1.jpg", "trg_imname": "2.jpg", **points}
    (folder / "PairAnnotation/test").mkdir(parents=True)
    (folder / "PairAnnotation/test/1.json").write_text(json.dumps(document))


def make_store(folder: Path) -> None:
    frames_case(dim=4).write(folder / "frames.zarr")
    pairs_case(2, dim=4, dtype="int8", codec="zstd").write(folder / "pairs.zarr")


def make_benchmarks(folder: Path) -> None:
    """Data of every layout, and predictions."""
    masks = [square_mask(4, 6, index).repeat(8, 0).repeat(8, 1) for index in range(4)]
    write_davis(folder / "davis", "dog", masks)
    (folder / "davis/ImageSets/2017").mkdir(parents=True)
    (folder / "davis/ImageSets/2017/val.txt").write_text("dog\n")
    write_vip(folder / "vip")
    (folder / "vip/lists").mkdir()
    (folder / "vip/lists/val_videos.txt").write_text("videos1\n")
    write_jhmdb(folder / "jhmdb")
    (folder / "jhmdb/jhmdb_vallist.txt").write_text(
        "Rename_Images/walk/one joint_positions/walk/one/joint_positions.mat\n"
    )
    unpack_tapvid({"clip": tracks(3)}, folder / "tapvid")
    write_frames(folder / "ucf/UCF-101/Run/v_Run_g01", ["1.jpg", "2.jpg"])
    (folder / "ucf/ucfTrainTestlist").mkdir()
    for part in ("train", "test"):
        (folder / f"ucf/ucfTrainTestlist/{part}list01.txt").write_text("Run/v_Run_g01.avi 1\n")
    write_manifest(folder / "davis.csv", build_manifest("davis", folder / "davis", folder).manifest)
    for index, mask in enumerate(masks):
        (folder / "results/dog").mkdir(parents=True, exist_ok=True)
        write_mask(folder / f"results/dog/{index:05d}.png", mask)
        (folder / "maps/videos1").mkdir(parents=True, exist_ok=True)
    for path in (folder / "vip/Annotations/Category_ids/videos1").iterdir():
        shutil.copy(path, folder / "maps/videos1")
    (folder / "joints/walk").mkdir(parents=True)
    write_predicted_joints(folder / "joints/0.dat", make_joints(4).astype(np.float32) / 2)


def make_squares_run(folder: Path) -> None:
    """A run of propagate, with its store and data; a training on samples; points to track."""
    make_squares(folder / "data", ("left",), n_frames=3).write(folder / "squares.zarr")
    pairs_case(4, dim=4).write(folder / "pairs.zarr")
    (folder / "points.csv").write_text("video_id,frame,x,y\nleft,0,10,20\n")
    save_projection(
        folder / "head.safetensors", Projection(3), {"backbone": "tiny", "weights_sha256": "0" * 64}
    )
    for line in (PROPAGATE, TRAIN):
        assert run_command(line.replace("@", str(folder)).split()) == 0


def make_options(*lines: str) -> Callable[[Path], None]:
    """Data for command lines of which `lines` are the last words, a file each."""

    def make(folder: Path) -> None:
        make_benchmarks(folder)
        pairs_case(4, dim=4).write(folder / "pairs.zarr")
        labelled_case({"a": 5, "b": 5}).write(folder / "frames.zarr")
        texts(folder, *lines)

    return make


def make_extraction(folder: Path) -> None:
    make_benchmarks(folder)
    make_weights(folder)


def make_sprites(folder: Path) -> None:
    (folder / "sprites.json").write_text(json.dumps({"version": 1, **asdict(SpritesSettings())}))


def read_media(folder: Path, path: Path) -> None:
    media = path if path.suffix in (".mp4", ".mkv", ".avi", ".gif", ".webm", ".ts") else path.parent
    info = probe(media)
    video = Video("v", str(media.relative_to(folder)), info.kind, info.n_frames, info.height, info.width)
    for _ in iter_frames(video, folder):
        pass


def read_projection(folder: Path, path: Path) -> None:
    describe_projection(path)
    load_projection(path, dim=8)(torch.zeros(2, 8))


def read_run(folder: Path, path: Path) -> None:
    if path.suffix == ".svg":
        chart(path, lambda _: None, "chart", "a chart")
    read_runs({"run": folder / "run"})


def read_marks(folder: Path, path: Path) -> None:
    run = RunFolder(folder)
    run.settings()
    run.finished(CLIP, folder)


def read_owned(folder: Path, path: Path) -> None:
    with own_folder(folder / "run", "train"):
        pass


def read_labels(folder: Path, path: Path) -> None:
    labels = open_frame_labels(folder / "labels")
    labels.read("clip")
    labels.bundle("train", "split1")


def forge_store(path: Path) -> None:
    """Make digest and seals of damaged metadata right again, so that its content is looked at."""
    with suppress(Exception):
        if path.suffix == ".parquet":
            path.write_bytes(seal(pq.read_table(path)))
        elif path.parent.suffix == ".zarr":
            document = json.loads(path.read_bytes())
            header = document["attributes"]["cosettle_cache"]
            header["digest"] = digest({key: value for key, value in header.items() if key != "digest"})
            path.write_text(json.dumps(document))


def read_store(folder: Path, path: Path) -> None:
    where = folder / path.relative_to(folder).parts[0]
    with suppress(CosettleError):
        store = open_store(where)
        _ = store.manifest, store.index, store.failures, store.complete, store.n_bytes
        for video_id in store.video_ids if store.plan_kind == "frames" else ():
            store.tokens(video_id)
            store.content_digest(video_id)
        if store.plan_kind == "pairs":
            store.samples(store.sample_ids)
    verify_store(where)
