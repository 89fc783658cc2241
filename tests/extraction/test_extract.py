"""Stage one on real files with a tiny seeded encoder: parity, resume, failures, full disks."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
import pytest
import torch
from extract_cases import make_clips, manifest_of, prepared, tree
from PIL import Image
from pretend_cuda import Device
from safetensors.torch import load_file

from cosettle_cache.cli import run_command
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import FingerprintError, UsageError
from cosettle_cache.core.settings import FramesSettings, PairsSettings, package_versions
from cosettle_cache.core.types import Encoding, Grid, Manifest, PlanKind, Role
from cosettle_cache.encoders import Backbone, load_backbone
from cosettle_cache.encoders.registry import BACKBONES, IMAGENET_MEAN, IMAGENET_STD, Architecture
from cosettle_cache.extraction import run as extraction
from cosettle_cache.extraction.images import Views
from cosettle_cache.extraction.jobs import PlanSummary, note_plan
from cosettle_cache.extraction.pipeline import N_BUFFERS
from cosettle_cache.extraction.run import ExtractReport, extract, make_fingerprint
from cosettle_cache.store import FeatureStore, StoreWriter, open_store
from cosettle_cache.store.plan import Plan, make_plan
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.frames import FrameReader, iter_frames, resolve_size
from cosettle_cache.videos.manifest import write_manifest

PAIRS = PairsSettings(n_views=2, size=64)
FRAMES = FramesSettings(size="48x64", n_shifted=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("timm/test_vit", weights="random")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short clips, one of them portrait."""
    return make_clips(tmp_path_factory.mktemp("extract") / "clips", 6)


@pytest.fixture
def own_clips(clips: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in clips.rglob("*.jpg"):
        target = tmp_path / "clips" / path.relative_to(clips)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "clips"


def plan_of(manifest: Manifest, settings: PairsSettings | FramesSettings, slot: int = 12) -> Plan:
    return make_plan(manifest, settings, patch=16, dim=64, slot_encodings=slot)


def run(
    root: Path,
    out: Path,
    backbone: Backbone,
    settings: PairsSettings | FramesSettings = PAIRS,
    manifest: Manifest | None = None,
    stop: Event | None = None,
    note: Callable[[str], object] = print,
    retry_failed: bool = False,
) -> ExtractReport:
    manifest = manifest or manifest_of(root)
    plan = plan_of(manifest, settings)
    with closing(writer_of(plan, manifest, out, backbone)) as writer:
        return extract(
            plan,
            manifest,
            root,
            backbone,
            writer,
            batch_size=5,
            retry_failed=retry_failed,
            stop=stop,
            note=note,
        )


def writer_of(plan: Plan, manifest: Manifest, out: Path, backbone: Backbone) -> StoreWriter:
    fingerprint = make_fingerprint(backbone, plan, manifest)
    return StoreWriter.create_or_resume(out, plan.arrays, fingerprint, manifest, {"name": backbone.name})


def one_by_one(root: Path, store: FeatureStore, plan: Plan, backbone: Backbone, slot: int) -> torch.Tensor:
    """The oracle: decode, prepare and encode each encoding of a slot alone."""
    videos = {video.video_id: video for video in store.manifest}
    tokens = []
    for encoding in plan.slot(slot).encodings:
        video = videos[encoding.video_id]
        views = Views(plan.kind, *plan.recipe.image_size(video), backbone.mean, backbone.std)
        view = prepared(views, next(iter_frames(video, root, [encoding.frame])), encoding)
        tokens.append(backbone.encode(view[None], encoding.shift)[0])
    return torch.stack(tokens)


def test_pairs_equal_the_encoder_one_by_one(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    report = run(clips, tmp_path / "s.zarr", backbone)
    assert (report.failures, report.n_encodings, report.interrupted) == ({}, 6 * 2 * 3, False)
    store = open_store(tmp_path / "s.zarr")
    plan = plan_of(store.manifest, PAIRS)
    stored = np.concatenate(list(store.samples(store.sample_ids)))
    wanted = torch.cat([one_by_one(clips, store, plan, backbone, i) for i in range(plan.n_slots)])
    assert np.abs(stored - wanted.numpy()).max() < 5e-3


def test_frames_equal_the_encoder_one_by_one(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    run(clips, tmp_path / "s.zarr", backbone, FRAMES)
    store = open_store(tmp_path / "s.zarr")
    assert len(store.video_ids) == 6
    plan = plan_of(store.manifest, FRAMES)
    wanted = one_by_one(clips, store, plan, backbone, 0)[:9]
    assert np.abs(store.tokens("clip0") - wanted.numpy()).max() < 5e-3
    assert [frame.shape for frame in store.iter_tokens("clip3")] == [(3, 4, 64)] * 9


def test_the_shift_moves_tokens(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    run(clips, tmp_path / "s.zarr", backbone)
    store = open_store(tmp_path / "s.zarr")
    plain, _, shifted = store.samples(store.sample_ids[:1])[0].astype(np.float32)
    assert np.abs(plain - shifted).mean() > 1e-3


def test_a_stopped_run_goes_on_to_the_same_bytes(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    run(clips, tmp_path / "straight.zarr", backbone)
    stop = Event()
    stop.set()
    first = run(clips, tmp_path / "stopped.zarr", backbone, stop=stop)
    assert (first.n_slots, first.interrupted) == (1, True)
    assert open_store(tmp_path / "stopped.zarr").slot_states()["done"] == 1
    second = run(clips, tmp_path / "stopped.zarr", backbone)
    assert (second.n_slots_before, second.interrupted) == (1, False)
    assert tree(tmp_path / "straight.zarr") == tree(tmp_path / "stopped.zarr")
    third = run(clips, tmp_path / "stopped.zarr", backbone)
    assert (third.n_slots, third.n_encodings) == (0, 0)


def test_two_extractions_at_once_share_the_slots(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    run(clips, tmp_path / "straight.zarr", backbone)
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(run, clips, tmp_path / "shared.zarr", backbone) for _ in range(3)]
        reports = [future.result() for future in runs]
    plan = plan_of(manifest_of(clips), PAIRS)
    assert sum(report.n_slots for report in reports) == plan.n_slots
    assert sum(report.n_encodings for report in reports) == plan.n_encodings
    assert not any(report.interrupted for report in reports)
    for report in reports:
        assert report.n_slots_before + report.n_slots_elsewhere + report.n_slots == plan.n_slots
    assert tree(tmp_path / "straight.zarr") == tree(tmp_path / "shared.zarr")


@pytest.mark.parametrize("ending", ["released", "committed", "stopped"])
def test_a_held_slot_is_waited_for(clips: Path, tmp_path: Path, backbone: Backbone, ending: str) -> None:
    run(clips, tmp_path / "straight.zarr", backbone)
    manifest, out = manifest_of(clips), tmp_path / "held.zarr"
    plan = plan_of(manifest, PAIRS)
    notes: list[str] = []
    stop, noted = Event(), Event()

    def note(text: str) -> None:
        notes.append(text)
        noted.set()

    with ThreadPoolExecutor(1) as threads, closing(writer_of(plan, manifest, out, backbone)) as holder:
        assert holder.claim(1)
        future = threads.submit(run, clips, out, backbone, stop=stop, note=note)
        assert noted.wait(600)
        if ending == "stopped":
            stop.set()
            future.result(600)
        elif ending == "committed":
            shard = holder.new_shard(plan.slot(1))
            samples = open_store(tmp_path / "straight.zarr").samples(range(4, 8))
            shard.tokens[:] = samples.reshape(shard.tokens.shape)
            holder.commit(plan.slot(1), shard, {})
    report = future.result()
    wanted = {"released": (0, 0), "committed": (1, 0), "stopped": (0, 1)}[ending]
    assert (report.n_slots_elsewhere, int(report.interrupted)) == wanted
    assert report.n_slots == plan.n_slots - sum(wanted)
    assert len(notes) == 1
    if ending != "stopped":
        assert tree(tmp_path / "straight.zarr") == tree(out)


def test_an_interrupted_extraction_gives_its_claims_back(
    clips: Path, tmp_path: Path, backbone: Backbone
) -> None:
    manifest = manifest_of(clips)
    plan = plan_of(manifest, PAIRS)
    stop = Event()
    stop.set()
    with closing(writer_of(plan, manifest, tmp_path / "s.zarr", backbone)) as writer:
        extract(plan, manifest, clips, backbone, writer, batch_size=5, stop=stop)
        assert all(writer.claim(index) for index in writer.todo())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def resize(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path)


@pytest.mark.parametrize("damage", [truncate, empty, resize, Path.unlink])
def test_a_bad_video_is_named_and_costs_only_itself(
    own_clips: Path, tmp_path: Path, backbone: Backbone, damage: Callable[[Path], None]
) -> None:
    manifest = manifest_of(own_clips)
    for path in (own_clips / "clip2").iterdir():
        if path.name != "0.jpg":
            damage(path)
    report = run(own_clips, tmp_path / "s.zarr", backbone, FRAMES, manifest)
    assert list(report.failures) == ["clip2"]
    assert report.failures["clip2"].startswith("clip2")
    store = open_store(tmp_path / "s.zarr")
    assert "clip2" not in store.video_ids
    assert len(store.video_ids) == 5
    assert "clip2" in store.failures
    assert store.slot_states()["failed"] > 0
    assert np.isfinite(store.tokens("clip4")).all()


def test_overflow_is_a_failure_not_an_infinity(clips: Path, tmp_path: Path) -> None:
    loud = load_backbone("timm/test_vit", weights="random", seed=1)
    for parameter in loud._body.vit.norm.parameters():
        parameter.data.mul_(1e6).add_(1e6)
    report = run(clips, tmp_path / "s.zarr", loud)
    assert set(report.failures) == {f"clip{i}" for i in range(6)}
    assert "float16" in report.failures["clip0"]
    assert len(open_store(tmp_path / "s.zarr").sample_ids) == 0


def test_other_settings_never_resume(clips: Path, tmp_path: Path, backbone: Backbone) -> None:
    run(clips, tmp_path / "s.zarr", backbone)
    with pytest.raises(FingerprintError) as caught:
        run(clips, tmp_path / "s.zarr", backbone, PairsSettings(n_views=2, size=64, seed=5))
    assert any("plan.seed" in line for line in caught.value.details)
    with pytest.raises(FingerprintError) as caught:
        run(clips, tmp_path / "s.zarr", load_backbone("timm/test_vit", weights="random", seed=7))
    assert any("weights_sha256" in line for line in caught.value.details)


def test_a_store_belongs_to_one_kind_of_device(
    clips: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(clips, tmp_path / "s.zarr", backbone)
    assert open_store(tmp_path / "s.zarr").fingerprint.versions["device"] == "cpu"
    # A store of version 0.2 does not say where it was made, and is gone on with.
    before = {"versions": package_versions()}
    monkeypatch.setattr(extraction, "device_versions", lambda device: {})
    run(clips, tmp_path / "old.zarr", backbone)
    assert open_store(tmp_path / "old.zarr").fingerprint.to_json().items() >= before.items()
    monkeypatch.setattr(extraction, "device_versions", lambda device: {"device": "cuda 13.0"})
    assert run(clips, tmp_path / "old.zarr", backbone).n_slots == 0
    with pytest.raises(FingerprintError) as caught:
        run(clips, tmp_path / "s.zarr", backbone)
    assert caught.value.details == ("versions.device: wanted cuda 13.0, found cpu",)


def stored_samples(path: Path) -> np.ndarray:
    store = open_store(path)
    return np.concatenate(list(store.samples(store.sample_ids))).astype(np.float32)


@pytest.mark.parametrize("name", ["timm/test_vit", "ijepa_b"])
def test_on_a_gpu_the_host_waits_once_a_batch(
    clips: Path, tmp_path: Path, cuda: Device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "ijepa_b":  # made small: its plain tokens are those before the last norm
        size = Architecture(width=64, depth=1, heads=2, patch=16, grid=Grid(4, 4), hidden=128)
        monkeypatch.setitem(BACKBONES, name, replace(BACKBONES[name], architecture=size))
    run(clips, tmp_path / "cpu.zarr", load_backbone(name, weights="random"))
    there = load_backbone(name, weights="random", device="cuda")
    cuda.clear()
    report = run(clips, tmp_path / "cuda.zarr", there)
    n_batches = 3 * 3  # slots of 12 in batches of 4
    assert report.n_encodings == 36 and not report.failures
    assert cuda.at("extraction/pipeline.py").popitem()[1] == n_batches, cuda.report()
    # Besides, what positions need of a grid, once.
    assert cuda.waits <= n_batches + 3, cuda.report()
    wanted, found = (stored_samples(tmp_path / f"{kind}.zarr") for kind in ("cpu", "cuda"))
    assert np.abs(wanted - found).max() <= 2e-3 * np.abs(wanted).max()


def limit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a backbone run out of memory above a number of images; return the sizes that it was given."""
    asked, encode_views = list[int](), backbone.encode_views

    def encode(images: torch.Tensor, views: Any) -> torch.Tensor:
        asked.append(len(views))
        if len(views) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_views(images, views)

    monkeypatch.setattr(backbone, "encode_views", encode)
    return asked


def test_too_little_memory_halves_the_batch(
    clips: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(clips, tmp_path / "whole.zarr", backbone)
    asked, notes = limit(backbone, monkeypatch, 2), list[str]()
    assert run(clips, tmp_path / "halves.zarr", backbone, note=notes.append).n_encodings == 36
    assert asked == [4, *[2] * 18]
    assert notes == ["cpu has no memory for 4 images at a time: 2 from here on (--batch 2 begins with that)"]
    wanted, found = (stored_samples(tmp_path / f"{kind}.zarr") for kind in ("whole", "halves"))
    assert np.abs(wanted - found).max() <= 2e-3 * np.abs(wanted).max()
    limit(backbone, monkeypatch, 0)
    with pytest.raises(UsageError, match="cpu has no memory for one image of 64x64 pixels"):
        run(clips, tmp_path / "none.zarr", backbone)


def test_a_video_of_several_slots_and_batches_is_decoded_once(tmp_path: Path, backbone: Backbone) -> None:
    """More threads than it has tasks, fewer buffers than a task fills."""
    frames = np.random.default_rng(0).integers(0, 255, (70, 32, 32, 3), np.uint8)
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=32, height=32)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    decoded, plain = list[int](), FrameReader.read

    def read(reader: FrameReader, indices: Sequence[int]) -> Iterator[Any]:
        for index, image in zip(indices, plain(reader, indices), strict=True):
            decoded.append(index)
            yield image

    manifest = build_manifest("folder", tmp_path, tmp_path).manifest
    plan = make_plan(manifest, FramesSettings(size="32x32"), patch=16, dim=64, slot_encodings=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameReader, "read", read)
        with closing(writer_of(plan, manifest, tmp_path / "s.zarr", backbone)) as writer:
            extract(plan, manifest, tmp_path, backbone, writer, batch_size=4, decode_threads=3)
    assert decoded == list(range(70))
    store = open_store(tmp_path / "s.zarr")
    wanted = one_by_one(tmp_path, store, plan, backbone, 1)
    assert np.abs(store.tokens("v")[30:60] - wanted.numpy()).max() < 5e-3


def test_a_frame_may_be_in_more_batches_than_there_are_buffers(
    clips: Path, tmp_path: Path, backbone: Backbone
) -> None:
    manifest = manifest_of(clips)
    plan = make_plan(manifest, PairsSettings(n_views=20, size=64), patch=16, dim=64, slot_encodings=60)
    most = max(Counter(item.frame for item in plan.slot(0).encodings).values())
    assert most > 2 * N_BUFFERS
    with closing(writer_of(plan, manifest, tmp_path / "s.zarr", backbone)) as writer:
        report = extract(plan, manifest, clips, backbone, writer, batch_size=2)
    assert report.n_encodings == plan.n_encodings


def command(clips: Path, out: Path) -> list[str]:
    words = "extract --backbone timm/test_vit --weights random --views 2 --size 64 --slot-encodings 6 --quiet"
    places = ["--manifest", str(clips.parent / "m.parquet"), "--data-root", str(clips), "--out", str(out)]
    return [*words.split(), "--batch", "2", *places]


def other_bytes(path: Path) -> None:
    """Replace a frame by another picture in a file of the same size."""
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
            other := path.with_suffix(".new"), "JPEG", quality=20
        )
    path.write_bytes(other.read_bytes().ljust(path.stat().st_size, b"\0"))
    other.unlink()


def test_other_media_never_resume(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same names and sizes: times tell, or bytes with --verify-media. Copies are the same media."""
    listed = str(tmp_path / "m.parquet")
    build = ["manifest", "build", "folder", "--data-root", str(own_clips), "--out", listed]
    words = command(own_clips, tmp_path / "s.zarr")
    assert run_command(build) == run_command(words) == 0
    before = tree(tmp_path / "s.zarr")
    copies = tmp_path / "copy"
    for path in own_clips.rglob("*.jpg"):
        (copies / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copies / path.parent.name / path.name).write_bytes(path.read_bytes())
    assert run_command([*words, "--data-root", str(copies)]) == 0

    frame = own_clips / "clip1" / "4.jpg"
    times = frame.stat().st_atime_ns, frame.stat().st_mtime_ns
    other_bytes(frame)
    assert run_command(words) == 3
    said = capsys.readouterr().err
    assert "warning: the manifest was made from other media of clip1 than" in said
    assert "s.zarr was made from other media of clip1 than" in said
    assert run_command(["manifest", "check", listed, "--data-root", str(own_clips)]) == 4
    assert "clip1: clip1 has changed" in capsys.readouterr().err
    os.utime(frame, ns=times)
    assert run_command(words) == 0  # as documented
    assert run_command([*words, "--verify-media"]) == 3
    assert [run_command(build), run_command(words)] == [0, 3]
    assert tree(tmp_path / "s.zarr") == before


def test_stores_and_manifests_without_contents_are_used(own_clips: Path, tmp_path: Path) -> None:
    bare = Manifest(tuple(replace(video, content=None, stamp=None) for video in manifest_of(own_clips)))
    write_manifest(tmp_path / "m.parquet", bare)
    words = command(own_clips, tmp_path / "s.zarr")
    assert run_command(words) == 0
    other_bytes(own_clips / "clip1" / "4.jpg")
    assert run_command(words) == 0  # another time, and nobody knows the bytes
    assert {video.content for video in open_store(tmp_path / "s.zarr").manifest} == {None}
    (own_clips / "clip1" / "4.jpg").write_bytes((own_clips / "clip2" / "5.jpg").read_bytes())
    assert run_command(words) == 3


def test_a_mended_video_is_encoded_again(
    own_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [own_clips / "clip1" / f"{number}.jpg" for number in range(9)]
    whole = [path.read_bytes() for path in frames]
    for path in frames:
        truncate(path)  # its header is whole, and says the size
    write_manifest(tmp_path / "m.parquet", manifest_of(own_clips))
    words = command(own_clips, tmp_path / "s.zarr")
    assert run_command(words) == 4
    for path, data in zip(frames, whole, strict=True):
        path.write_bytes(data)
    write_manifest(tmp_path / "m.parquet", manifest_of(own_clips))
    assert [run_command(words), run_command([*words, "--retry-failed"]), run_command(words)] == [4, 0, 0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_pairs_plan_is_extracted_in_half_precision(
    clips: Path, tmp_path: Path, backbone: Backbone, precision: str
) -> None:
    """Batches of it mix plain and shifted views."""
    write_manifest(clips.parent / "m.parquet", manifest_of(clips))
    assert run_command([*command(clips, tmp_path / "half.zarr"), "--precision", precision]) == 0
    run(clips, tmp_path / "whole.zarr", backbone)
    stores = [open_store(tmp_path / f"{name}.zarr") for name in ("half", "whole")]
    half, whole = (np.concatenate(list(store.samples(store.sample_ids))) for store in stores)
    assert np.abs(half - whole).max() <= 0.02 * np.abs(whole).max()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_nothing(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(clips.parent / "m.parquet", manifest_of(clips))
    assert run_command(command(clips, tmp_path / "straight.zarr")) == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        assert run_command(command(clips, disk / "s.zarr")) == 3
        assert "no space left on the device" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert run_command(command(clips, disk / "s.zarr")) == 0
        assert tree(disk / "s.zarr") == tree(tmp_path / "straight.zarr")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_store_that_will_not_fit_is_said_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s.zarr")
    small = PlanSummary("mae_b", "pairs", 1, 3, ("14x14",), "float16", "none", 1, (3,), 10**12, 10**9, out)
    note_plan(small, Talk(quiet=True))
    assert "will not fit: 1.00 TB wanted, 1.0 GB free" in capsys.readouterr().err
    note_plan(replace(small, bytes_free=10**13), Talk(quiet=True))
    note_plan(replace(small, out=str(tmp_path)), Talk(quiet=True))
    assert not capsys.readouterr().err


def test_bicubic_frames_are_dinov3s(golden: Callable[[str], Path], golden_json: Callable[[str], Any]) -> None:
    arrays = load_file(golden("propagation/dinov3_resize.safetensors"))
    for number in range(3):
        image, wanted = arrays[f"image_{number}"].numpy(), arrays[f"pixels_{number}"]
        rule = golden_json("propagation/dinov3.json")[f"resize_{number}"]
        size = resolve_size(f"short-up:{rule['short_side']}/{rule['multiple']}", *image.shape[:2])
        assert size == tuple(wanted.shape[1:])
        views = Views(PlanKind.FRAMES, *size, IMAGENET_MEAN, IMAGENET_STD, "bicubic")
        view = prepared(views, image, Encoding("clip", 0, 0, Role.PLAIN))
        assert (view - wanted).abs().max() <= 2e-3


def test_layers_are_stores_of_their_own_made_in_one_pass(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest("clips.parquet", manifest_of(clips))
    line = ["extract", "--manifest", "clips.parquet", "--data-root", str(clips), "--weights", "random", "-q"]
    line += ["--plan", "frames", "--size", "48x64", "--slot-encodings", "5", "--device", "cpu"]
    several = [*line, "--backbone", "timm/test_vit", "--layers", "0,2", "--norm", "each", "--out", "s.zarr"]
    assert run_command(several) == 0
    assert sorted(path.name for path in tmp_path.glob("*.zarr")) == ["s-layer0.zarr", "s-layer2.zarr"]
    assert run_command([*line, "--backbone", "timm/test_vit@2:each", "--out", "alone.zarr"]) == 0
    first, both, alone = (open_store(f"{name}.zarr") for name in ("s-layer0", "s-layer2", "alone"))
    assert both.fingerprint == alone.fingerprint
    assert both.fingerprint.backbone == "timm/test_vit@2:each"
    for video_id in alone.video_ids:
        assert np.allclose(both.tokens(video_id), alone.tokens(video_id), atol=2e-3)
        assert not np.allclose(first.tokens(video_id), alone.tokens(video_id), atol=1e-2)
    before = tree(Path("s-layer0.zarr"))
    lost = next(Path("s-layer2.zarr/index").rglob("*.parquet"))
    lost.unlink()
    assert run_command(several) == 0
    assert lost.exists() and tree(Path("s-layer0.zarr")) == before
    assert run_command([*line, "--backbone", "timm/test_vit", "--layers", "9", "--out", "t.zarr"]) == 2
    assert "wanted: layers 0 to" in capsys.readouterr().err
