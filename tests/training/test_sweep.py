"""Sweeps, automatic weights, accumulation, precision, validation: what one stream teaches many learners."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pretend_cuda import Device
from test_train import SMALL, After, make_store

import cosettle_cache.pictures.charts as charts_module
import cosettle_cache.training.learner as learner_module
from cosettle_cache.core.errors import CheckpointError, FingerprintError, InputError, UsageError
from cosettle_cache.heads import projection
from cosettle_cache.heads.projection import Projection, load_projection
from cosettle_cache.store import open_store
from cosettle_cache.training.batches import Batch, Portion, Step
from cosettle_cache.training.learner import Learner, Trainer, token_distances
from cosettle_cache.training.log import (
    comparison,
    read_checkpoint,
    read_figures,
    read_validation,
    write_checkpoint,
)
from cosettle_cache.training.losses import transfer_loss
from cosettle_cache.training.plan import SWEEPABLE, Axis, make_members, make_train_plan, parse_axis
from cosettle_cache.training.run import train

AXES = (Axis("temperature", (0.1,)), Axis("head", ("linear", "mlp2")))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and, in `run`, a sweep over two combinations that nothing interrupted."""
    folder = tmp_path_factory.mktemp("swept")
    train(make_store(folder, n_videos=20), replace(SMALL, validation=0.3), folder / "run", sweep=AXES)
    return folder


def make_batch(n: int = 6, dim: int = 8, seed: int = 0) -> Batch:
    samples = torch.randn(n, 3, 4, 4, dim, generator=torch.Generator().manual_seed(seed)).half()
    step = Step(3, 1, 1.5, False, np.arange(n))
    return Batch(Portion(step, step.ids, True), samples)


def test_members_are_all_combinations() -> None:
    axes = [parse_axis("separability-weight=1, auto"), parse_axis("head=linear,mlp2,affine")]
    members = make_members(SMALL, axes)
    assert [member.name for member in members][:2] == [
        "separability_weight=1,head=linear",
        "separability_weight=1,head=mlp2",
    ]
    assert len({member.settings for member in members}) == 6
    assert members[3].settings == replace(SMALL, separability_weight="auto", head="linear")
    (alone,) = make_members(SMALL, [])
    assert (alone.name, alone.settings) == ("", SMALL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature=1,2", "did you mean temperature?"),
        ("batch_size=1,2", "cannot be swept"),
        ("seed=1,2", "cannot be swept"),
        ("validation=0.1,0.2", "cannot be swept"),
        ("window=2,two", "window cannot be 'two'"),
        ("window=", "window cannot be ''"),
        ("window=2,2", "names a value twice"),
        ("flying", "unknown setting"),
    ],
)
def test_axes_that_mean_nothing(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_axis(text)
    assert said in " ".join(raised.value.lines())
    with pytest.raises(UsageError, match="swept twice"):
        make_members(SMALL, [AXES[0], AXES[0]])


def test_every_member_equals_its_single_run(swept: Path, tmp_path: Path) -> None:
    store = open_store(swept / "store.zarr")
    for member in make_members(replace(SMALL, validation=0.3), AXES):
        train(store, member.settings, tmp_path / member.name)
        alone = load_projection(tmp_path / member.name / "projection.safetensors")
        together = load_projection(swept / "run" / member.name / "projection.safetensors")
        assert alone.head == together.head == member.settings.head
        for name, tensor in alone.state_dict().items():
            assert (tensor - together.state_dict()[name]).abs().max() <= 1e-5, name
        for log in ("metrics.jsonl", "validation.jsonl"):
            wanted, found = ((folder / member.name / log) for folder in (tmp_path, swept / "run"))
            assert wanted.read_bytes() == found.read_bytes()


def test_tensorboard_sees_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store, stop = make_store(tmp_path, n_videos=20), threading.Event()
    run = replace(SMALL, validation=0.2)
    train(store, run, tmp_path / "run", progress=After(5, stop.set), stop=stop)
    train(store, run, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    figures = read_figures(tmp_path / "run" / "metrics.jsonl")
    scalars = events.Scalars("train/total")
    assert [item.step for item in scalars] == [item.step for item in figures]
    assert scalars[-1].value == pytest.approx(figures[-1].total, rel=1e-6)
    assert len(events.Scalars("validation/margin")) == 3


def test_a_sweep_leaves_a_comparison(swept: Path) -> None:
    run = swept / "run"
    table = pq.read_table(run / "curves.parquet")
    assert len(table) == 2 * len(read_figures(run / "temperature=0.1,head=mlp2" / "metrics.jsonl"))
    assert set(table["member"].to_pylist()) == {member.name for member in make_members(SMALL, AXES)}
    document = json.loads((run / "sweep.json").read_text())
    assert len(document["rows"]) == 2 and document["header"][-1] == "held-out margin"
    margins = [float(row[-1]) for row in document["rows"]]
    assert margins == sorted(margins, reverse=True)
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1000


@pytest.mark.parametrize("n_steps", [1, 4])
def test_an_interrupted_sweep_ends_with_the_same_bits(swept: Path, tmp_path: Path, n_steps: int) -> None:
    store, run, stop = open_store(swept / "store.zarr"), replace(SMALL, validation=0.3), threading.Event()
    report = train(store, run, tmp_path, sweep=AXES, progress=After(n_steps, stop.set), stop=stop)
    assert report.interrupted and report.steps == n_steps
    with pytest.raises(FingerprintError, match="other settings"):
        train(store, run, tmp_path, sweep=AXES[1:])
    train(store, run, tmp_path, sweep=AXES)
    for member in make_members(run, AXES):
        for name in ("projection.safetensors", "metrics.jsonl", "validation.jsonl"):
            wanted, found = (folder / member.name / name for folder in (swept / "run", tmp_path))
            assert wanted.read_bytes() == found.read_bytes(), name


def test_a_member_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    store, axes = make_store(tmp_path), [Axis("base_lr", (0.3, 1e38))]
    stop = threading.Event()
    train(store, SMALL, tmp_path / "run", sweep=axes, progress=After(4, stop.set), stop=stop)
    report = train(store, SMALL, tmp_path / "run", sweep=axes)
    (bad,) = report.diverged
    assert bad.name == "base_lr=1e+38" and not bad.projection_sha256
    assert not (bad.folder / "projection.safetensors").exists()
    single = train(store, SMALL, tmp_path / "single")
    assert report.members[0].projection_sha256 == single.projection_sha256
    _, rows = comparison(report.members)
    assert rows[1][1].startswith("diverged at step")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_on_a_gpu_the_host_waits_once_a_step(
    tmp_path: Path, cuda: Device, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    for name in ("curves_chart", "save_chart"):  # they take longer than all the rest
        monkeypatch.setattr(charts_module, name, lambda *_: None)
    store = make_store(tmp_path, n_videos=20)
    run = replace(SMALL, validation=0.3, accumulate=2, epochs=2)
    cpu = train(store, run, tmp_path / "cpu", sweep=AXES)
    run, stop = replace(run, precision=precision), threading.Event()
    whole = train(store, run, tmp_path / "cuda", sweep=AXES, device="cuda")
    # One wait for figures a step, and one an epoch for those of the clips held out.
    assert sum(cuda.at("training/learner.py").values()) == whole.steps + run.epochs, cuda.report()
    # The thread that reads waits until a buffer was copied, and nobody else there.
    assert sum(cuda.at("training/batches.py").values()) <= 2 * whole.steps
    for here, there in zip(cpu.members, whole.members, strict=True):
        assert there.last.total == pytest.approx(here.last.total, rel=1e-4 if precision != "bf16" else 1e-2)
        assert there.last_validation.margin == pytest.approx(here.last_validation.margin, rel=2e-2)
        assert there.first.step == 0 and there.last.step == whole.steps - 1
    stopped = train(
        store, run, tmp_path / "2", sweep=AXES, device="cuda", progress=After(2, stop.set), stop=stop
    )
    assert stopped.interrupted and stopped.steps == 3  # the second step's figures came with the third
    resumed = train(store, run, tmp_path / "2", sweep=AXES, device="cuda")
    assert [m.projection_sha256 for m in resumed.members] == [m.projection_sha256 for m in whole.members]


def test_on_a_gpu_the_heads_of_a_sweep_share_a_product(cuda: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "WIDE_HEADS", 2)
    members = [("linear", 0.02), ("mlp2", "auto"), ("affine", 1.0)]
    settings = [replace(SMALL, head=head, separability_weight=weight) for head, weight in members]
    here, there = (
        [Learner(Projection(8, a.head, seed=1).to(d), a) for a in settings] for d in ("cpu", "cuda")
    )
    wanted = [Trainer([learner]).feed(make_batch())[0].figures[0] for learner in here]
    alone, one_map = list[Any](), projection._map
    monkeypatch.setattr(projection, "_map", lambda *args: alone.append(args) or one_map(*args))
    trainer = Trainer(there)
    trainer.feed(make_batch())
    assert len(alone) == 1  # the second map of mlp2
    for a, b in zip(wanted, trainer.flush()[0].figures, strict=True):
        assert b.total == pytest.approx(a.total, rel=1e-5)
        assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-5)
    for a, b in zip(here, there, strict=True):
        for p, q in zip(a.projection.parameters(), b.projection.parameters(), strict=True):
            assert (p.grad - q.grad.cpu()).abs().max() <= 1e-5 * p.grad.abs().max()


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_gpu_stops_a_member_that_diverges_by_itself(cuda: Device, precision: str) -> None:
    settings = replace(SMALL, precision=precision)
    learners = [Learner(Projection(8, seed=seed).to("cuda"), settings) for seed in range(2)]
    trainer, before = Trainer(learners), []
    for number in range(4):
        batch = make_batch(seed=number)
        step = replace(batch.portion.step, number=number)
        if number == 1:
            batch.samples.fill_(math.nan)
        before.append([item.cpu() for item in learners[0].projection.parameters()])
        finished = trainer.feed(replace(batch, portion=replace(batch.portion, step=step)))
        if number == 2:
            break  # step 1 was read just now; until then step 2 was on its way
    after = [item.cpu() for item in learners[0].projection.parameters()]
    assert finished[0].step.number == 1 and finished[0].figures == [None, None]
    assert [learner.diverged_at for learner in learners] == [1, 1]
    # In fp16 the first steps lower the scale.
    assert precision == "fp16" or not all(map(torch.equal, before[0], before[1]))
    assert all(map(torch.equal, before[1], after))
    assert trainer.flush()[0].figures == [None, None]


def test_a_process_that_set_other_products_trains_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    wanted = train(store, SMALL, tmp_path / "run")
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16, where the CPU has it
        assert train(store, SMALL, tmp_path / "medium").projection_sha256 == wanted.projection_sha256
    finally:
        torch.set_float32_matmul_precision("highest")


def test_auto_weight_keeps_the_ratio_of_gradients() -> None:
    batch = make_batch()
    run = replace(SMALL, separability_weight="auto", gradient_ratio=0.5)
    (found,) = Trainer([Learner(Projection(8, init="pytorch"), run)]).feed(batch)[0].figures
    projection = Projection(8, init="pytorch")
    terms = transfer_loss(projection, batch.samples.float())
    lengths = []
    for loss in (terms.cycle, terms.separability):
        gradients = torch.autograd.grad(loss, list(projection.parameters()), retain_graph=True)
        lengths.append(torch.cat([item.flatten() for item in gradients]).norm().item())
    assert found.separability_weight == pytest.approx(0.5 * lengths[0] / lengths[1], rel=1e-4)
    assert found.total == pytest.approx(
        found.cycle + found.separability_weight * found.separability, rel=1e-5
    )
    fixed = Learner(
        Projection(8, init="pytorch"), replace(SMALL, separability_weight=found.separability_weight)
    )
    (again,) = Trainer([fixed]).feed(batch)[0].figures
    assert again.gradient_norm == pytest.approx(found.gradient_norm, rel=1e-4)


def test_gradients_are_clipped() -> None:
    learner = Learner(Projection(8, init="pytorch"), replace(SMALL, clip_gradient=0.01))
    (figures,) = Trainer([learner]).feed(make_batch())[0].figures
    length = torch.cat([item.grad.flatten() for item in learner.projection.parameters()]).norm().item()
    assert figures.gradient_norm > 0.01 and length == pytest.approx(0.01, rel=1e-3)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    whole = train(store, replace(SMALL, batch_size=8), tmp_path / "whole")
    parts = train(store, replace(SMALL, batch_size=2, accumulate=4), tmp_path / "parts")
    assert (whole.steps, whole.last.lr) == (parts.steps, parts.last.lr)
    wanted, found = (load_projection(r.folder / "projection.safetensors") for r in (whole, parts))
    for name, tensor in wanted.state_dict().items():
        assert (tensor - found.state_dict()[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_parameters_in_float32(tmp_path: Path, precision: str) -> None:
    store = make_store(tmp_path)
    wanted = train(store, SMALL, tmp_path / "float32")
    run, stop = replace(SMALL, precision=precision), threading.Event()
    whole = train(store, run, tmp_path / "whole")
    train(store, run, tmp_path / "broken", progress=After(3, stop.set), stop=stop)
    resumed = train(store, run, tmp_path / "broken")
    assert resumed.projection_sha256 == whole.projection_sha256 != wanted.projection_sha256
    assert whole.first.cycle == pytest.approx(wanted.first.cycle, rel=0.03)
    assert whole.last.cycle < whole.first.cycle
    states = read_checkpoint(tmp_path / "whole" / "checkpoint.pt").learners
    assert all(tensor.dtype == torch.float32 for tensor in states[0]["projection"].values())


def test_held_out_clips_do_not_touch_the_others(tmp_path: Path) -> None:
    store = make_store(tmp_path, n_videos=30)
    run = replace(SMALL, validation=0.3)
    plan = make_train_plan(store, run)
    report = train(store, run, tmp_path / "run")
    figures = read_validation(tmp_path / "run" / "validation.jsonl")
    assert 2 <= plan.n_held_out <= 18 and [item.epoch for item in figures] == [0, 1, 2]
    assert plan.n_samples <= 3 * (30 - plan.n_held_out)
    assert report.members[0].last_validation == figures[-1]
    for item in figures:
        assert item.margin == pytest.approx(item.inter_distance - 0.3 * item.intra_distance)
        assert 0 < item.intra_distance < item.inter_distance < 1


@given(n=st.integers(1, 6), seed=st.integers(0, 99))
def test_token_distances_are_means_over_pairs(n: int, seed: int) -> None:
    tokens = torch.randn(n, 3, 2, 2, 5, generator=torch.Generator().manual_seed(seed))
    between, within = token_distances(tokens)
    unit = (tokens / tokens.norm(dim=-1, keepdim=True)).reshape(n, 3, 4, 5)
    pairs = [(unit[a, 0] - unit[b, 0]).norm(dim=-1) / 2 for a in range(n) for b in range(a)]
    assert between.item() == pytest.approx(torch.stack(pairs).mean().item() if pairs else 0.0, rel=1e-4)
    assert within.item() == pytest.approx((unit[:, 0] - unit[:, 1]).norm(dim=-1).mean().item() / 2, rel=1e-4)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    store, stop = make_store(tmp_path), threading.Event()
    train(store, SMALL, tmp_path / "run", progress=After(2, stop.set), stop=stop)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = read_checkpoint(path)
    wide = {**whole.learners[0], "projection": Projection(32).state_dict()}
    write_checkpoint(path, replace(whole, learners=[wide]))
    with pytest.raises(CheckpointError, match="does not fit"):
        train(store, SMALL, tmp_path / "run")
    gone = {name: tensor * math.nan for name, tensor in whole.learners[0]["projection"].items()}
    write_checkpoint(path, replace(whole, learners=[{**whole.learners[0], "projection": gone}]))
    with pytest.raises(CheckpointError, match="not finite"):
        train(store, SMALL, tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"order": "sorted"},
        {"precision": "fp8"},
        {"validation": 1.5},
        {"palindrome": 1},
        {"palindrome": 3},
        {"temperature": 0.0},
        {"reduction": "sum"},
        {"head": "spectral"},
        {"base_lr": -1e-3},
        {"weight_decay": math.nan},
        {"separability_weight": math.inf},
        {"beta2": 1.0},
    ],
)
def test_stream_settings_that_cannot_train(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_train_plan(make_store(tmp_path), replace(SMALL, **change))


def test_a_cpu_has_no_tf32(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only GPUs have TF32"):
        train(make_store(tmp_path), replace(SMALL, precision="tf32"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_clip_held_out(tmp_path: Path) -> None:
    report = train(make_store(tmp_path), replace(SMALL, validation=1e-9), tmp_path / "run")
    assert "holds out 0 clips" in " ".join(report.warnings) and report.members[0].last_validation is None


def test_walks_that_never_return_have_finite_figures() -> None:
    batch = make_batch()
    batch.samples[:, 2] = -batch.samples[:, 0]  # walks end as far from their start as can be
    learner = Learner(Projection(8, init="pytorch"), replace(SMALL, temperature=1e-4, window=1))
    (figures,) = Trainer([learner]).feed(batch)[0].figures
    assert learner.diverged_at is None and math.isfinite(figures.identity_cosine)


def test_all_clips_held_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every clip"):
        make_train_plan(make_store(tmp_path, n_videos=2), replace(SMALL, validation=0.9999))


def test_all_settings_but_those_of_the_stream_can_be_swept() -> None:
    assert {"head", "regularizer", "temperature", "separability_weight", "window", "base_lr"} < set(SWEEPABLE)
