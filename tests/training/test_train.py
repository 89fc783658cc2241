"""Training: the released run step by step, resume to the bit, feeding, and what a store can get wrong."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from store_cases import Case, frames_case, pairs_case
from test_losses import golden_head

import cosettle_cache.training.run as run_module
from cosettle_cache.core.errors import CheckpointError, FingerprintError, InputError, UsageError
from cosettle_cache.core.settings import LinearSettings, TrainSettings
from cosettle_cache.core.types import Slot
from cosettle_cache.heads.projection import Projection, load_projection, projection_sha256, read_provenance
from cosettle_cache.store import open_store
from cosettle_cache.training.batches import (
    Batch,
    BatchRing,
    EpochOrder,
    Ids,
    Portion,
    Step,
    make_portions,
    make_steps,
)
from cosettle_cache.training.closed_form import fit_linear
from cosettle_cache.training.learner import Learner, Trainer, learning_rate
from cosettle_cache.training.log import (
    Checkpoint,
    TrainReport,
    read_figures,
    read_validation,
    write_checkpoint,
)
from cosettle_cache.training.plan import Axis, make_train_plan
from cosettle_cache.training.run import train

SMALL = TrainSettings(epochs=3, batch_size=3, base_lr=0.3, checkpoint_every=2, separability_weight=0.02)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are far too small for threads, which then only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class ArraySource:
    """Samples in memory."""

    samples: np.ndarray
    delay_s: float = 0.0

    def read_into(self, ids: Ids, out: np.ndarray, /) -> None:
        time.sleep(self.delay_s)
        out[:] = self.samples[ids]


@dataclass(frozen=True)
class ClipsCase(Case):
    """Clips whose frames show the same tokens with noise, behind a position signal that the shift moves."""

    def slot_tokens(self, slot: Slot) -> np.ndarray:
        layout = self.plan.arrays[0]
        shape = (slot.grid.rows, slot.grid.cols, layout.n_channels)
        position = 2 * np.random.default_rng(7).standard_normal((2, *shape))
        tokens = []
        for number, encoding in enumerate(slot.encodings):
            clip = sum(map(ord, encoding.video_id)) + 1000 * encoding.view
            content = np.random.default_rng([self.seed, clip]).standard_normal(shape)
            noise = 0.3 * np.random.default_rng([self.seed, clip, number]).standard_normal(shape)
            tokens.append(content + noise + position[int(encoding.shift is not None)])
        return np.stack(tokens).astype(np.float16)


def make_store(tmp_path: Path, n_videos: int = 10, seed: int = 0, name: str = "store.zarr") -> Any:
    case = pairs_case(n_videos, n_views=2, side=4, dim=16, seed=seed)
    return open_store(ClipsCase(case.manifest, case.plan, seed).write(tmp_path / name))


@pytest.mark.parametrize("variant", ["linear_kl", "linear_mse", "mlp2_kl", "mlp3_kl"])
def test_every_step_of_the_released_run(
    golden: Callable[[str], Path], golden_json: Callable[[str], Any], variant: str
) -> None:
    expected = golden_json(f"train/train_{variant}.json")
    projection, samples = golden_head(golden, variant, "init")
    run = TrainSettings(
        head=expected["head"],
        regularizer=expected["regularizer"],
        epochs=expected["epochs"],
        batch_size=expected["batch_size"],
        base_lr=expected["base_lr"],
    )
    trainer = Trainer([Learner(projection, run)])
    in_order = np.arange(12).reshape(3, 4)
    portions = make_portions(make_steps(lambda _: in_order, run.epochs))
    with BatchRing(ArraySource(samples.numpy()), portions, samples.shape[1:], 4) as ring:
        found = [trainer.feed(batch)[0].figures[0] for batch in ring]
    for figures, line in zip(found, expected["log"], strict=True):
        assert figures.step == line["step"]
        assert figures.lr == pytest.approx(line["lr"], rel=1e-9, abs=1e-12)
        assert figures.total == pytest.approx(line["loss"], rel=1e-4)
        assert figures.cycle_accuracy == pytest.approx(line["cycle_accuracy"], rel=1e-4)
        assert figures.identity_cosine == pytest.approx(line["identity_cosine"], rel=1e-4)
    final, _ = golden_head(golden, variant, "final")
    for name, tensor in final.state_dict().items():
        assert (projection.state_dict()[name] - tensor).abs().max() <= 1e-4, name


def test_parts_of_a_batch_add_up() -> None:
    samples = torch.randn(7, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    step = Step(3, 1, 1.5, False, np.arange(7))
    batch = Batch(Portion(step, step.ids, True), samples)
    whole, parts = (
        Learner(Projection(8, init="pytorch"), SMALL),
        Learner(Projection(8, init="pytorch"), SMALL),
    )
    (wanted,) = Trainer([whole]).feed(batch)[0].figures
    (found,) = Trainer([parts], part_bytes=3 * 4 * samples[0].numel()).feed(batch)[0].figures
    assert found.total == pytest.approx(wanted.total, rel=1e-5)
    assert found.cycle_accuracy == pytest.approx(wanted.cycle_accuracy, abs=1e-6)
    assert found.identity_cosine == pytest.approx(wanted.identity_cosine, rel=1e-6)
    for a, b in zip(whole.projection.parameters(), parts.projection.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_step_uses_the_memory_of_the_one_before() -> None:
    def n_faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    samples = torch.randn(8, 3, 14, 14, 384, generator=torch.Generator().manual_seed(0)).half()
    trainer, seen = Trainer([Learner(Projection(384), SMALL)]), []
    for number in range(8):  # some until the heap has found its size
        step = Step(number, 1, 1.5, False, np.arange(8))
        trainer.feed(Batch(Portion(step, step.ids, True), samples))
        seen.append(n_faults())
    assert seen[-1] - seen[5] < 1000  # 5,000 a step where freed memory goes back to the system


def test_weight_decay_is_on_matrices_only() -> None:
    optimizer = Learner(Projection(8, "mlp2"), SMALL).optimizer
    decays = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert decays == {0.05: [2, 2], 0.0: [1, 1, 1, 1]}


@given(epochs=st.integers(1, 8), warmup=st.floats(0, 4), share=st.floats(0, 0.999))
def test_learning_rate_rises_then_falls(epochs: int, warmup: float, share: float) -> None:
    run = TrainSettings(epochs=epochs, warmup_epochs=warmup, min_lr=1e-6)
    rate = learning_rate(run, share * epochs)
    assert 0 <= rate <= run.lr * (1 + 1e-9)
    if share * epochs < warmup:
        assert rate == pytest.approx(run.lr * share * epochs / warmup)
    else:
        assert rate >= run.min_lr * 0.999
    if warmup < epochs:
        assert learning_rate(run, warmup) == pytest.approx(run.lr)


@given(
    n_clips=st.integers(1, 20),
    n_views=st.integers(1, 4),
    batch=st.integers(1, 25),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_an_epoch_visits_one_view_set_once(
    n_clips: int, n_views: int, batch: int, seed: int, epoch: int
) -> None:
    views = tuple(np.arange(n_clips) * n_views + view for view in range(n_views))
    order = EpochOrder(lambda epoch: views[epoch % n_views], batch, seed)
    batches = order(epoch)
    visited = np.concatenate(batches).tolist()
    assert len(set(visited)) == len(visited) and set(visited) <= set(views[epoch % n_views].tolist())
    if n_clips < batch:
        assert [len(ids) for ids in batches] == [n_clips]
    else:
        assert [len(ids) for ids in batches] == [batch] * (n_clips // batch)
    assert [ids.tolist() for ids in order(epoch)] == [ids.tolist() for ids in batches]


@given(start=st.integers(0, 20), epochs=st.integers(1, 5), seed=st.integers(0, 99))
def test_steps_from_the_middle_are_the_tail_of_all_steps(start: int, epochs: int, seed: int) -> None:
    views = (np.arange(9), np.arange(9, 20))
    order = EpochOrder(lambda epoch: views[epoch % 2], 3, seed)
    everything = [_key(step) for step in make_steps(order, epochs)]
    assert [_key(step) for step in make_steps(order, epochs, start)] == everything[start:]
    assert [number for number, *_ in everything] == list(range(len(everything)))
    assert sum(ends for *_, ends, _ in everything) == epochs


def _key(step: Step) -> tuple[Any, ...]:
    return (step.number, step.epoch, step.position, step.ends_epoch, step.ids.tolist())


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), max_size=12), seed=st.integers(0, 99))
def test_the_ring_gives_every_batch_as_the_source_has_it(sizes: Sequence[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal((30, 3, 2, 2, 4)).astype(np.float16)
    steps = [Step(i, 0, 0.0, False, generator.integers(0, 30, size)) for i, size in enumerate(sizes)]
    with BatchRing(ArraySource(samples), make_portions(steps), (3, 2, 2, 4), 5) as ring:
        for wanted, batch in zip(steps, ring, strict=True):
            assert batch.portion.step is wanted
            assert np.array_equal(batch.samples.numpy(), samples[wanted.ids])


def test_the_ring_counts_waiting_and_stops_when_left() -> None:
    samples = np.zeros((4, 3, 2, 2, 4), np.float16)
    steps = [Step(i, 0, 0.0, False, np.array([0])) for i in range(1000)]
    with BatchRing(ArraySource(samples, delay_s=0.05), make_portions(steps), (3, 2, 2, 4), 1) as ring:
        for batch in ring:
            if batch.portion.step.number == 2:
                break
    assert ring.waited_s >= 0.1
    assert not any(thread.name == "feed" for thread in threading.enumerate())


def test_the_ring_raises_what_the_source_raises() -> None:
    steps = [Step(0, 0, 0.0, False, np.array([99]))]
    source = ArraySource(np.zeros((4, 3, 2, 2, 4), np.float16))
    with pytest.raises(IndexError), BatchRing(source, make_portions(steps), (3, 2, 2, 4), 1) as ring:
        list(ring)


@dataclass
class After:
    """Progress that does something after a number of steps."""

    n_steps: int
    action: Callable[[], None]
    seen: int = 0
    calls: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def start(self, total: int, unit: str) -> None:
        self.total, self.unit = total, unit

    def advance(self, n: int = 1, **figures: float) -> None:
        self.seen += n
        self.calls += 1
        self.figures = figures
        if self.calls == self.n_steps:
            self.action()

    def finish(self) -> None:
        self.finished = True


def stop_after(n_steps: int, store: Any, out: Path, run: TrainSettings = SMALL) -> TrainReport:
    stop = threading.Event()
    return train(store, run, out, progress=After(n_steps, stop.set), stop=stop)


def crash_after(n_steps: int, store: Any, out: Path, run: TrainSettings = SMALL) -> None:
    def crash() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(store, run, out, progress=After(n_steps, crash))


def test_a_run_leaves_its_results(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    plan = make_train_plan(store, SMALL)
    progress = After(0, lambda: None)
    report = train(store, SMALL, tmp_path / "run", progress=progress)
    assert (plan.n_clips, plan.n_views, plan.n_steps, plan.n_dropped) == (10, 2, 9, 3)
    assert (report.steps, report.samples, report.steps_before) == (9, plan.n_samples, 0) == (9, 27, 0)
    assert (progress.total, progress.seen, progress.finished) == (27, 27, True)
    assert not report.interrupted and 0 <= report.waiting_share <= 1
    figures = read_figures(tmp_path / "run" / "metrics.jsonl")
    assert [item.step for item in figures] == list(range(9))
    assert (report.first, report.last) == (figures[0], figures[-1])
    path = tmp_path / "run" / "projection.safetensors"
    assert projection_sha256(load_projection(path, dim=16)) == report.projection_sha256
    provenance = read_provenance(path)
    assert (provenance["backbone"], json.loads(provenance["settings"])["epochs"]) == ("tiny", 3)
    (member,) = json.loads((tmp_path / "run" / "train.json").read_text())["members"]
    assert member["projection_sha256"] == report.projection_sha256
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.width >= 1000 and picture.height >= 600


def test_training_finds_the_way_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, n_videos=40)
    run = replace(SMALL, batch_size=20, epochs=40, base_lr=0.5, separability_weight=0.1)
    report = train(store, run, tmp_path / "run")
    assert report.first.cycle_accuracy < 0.6
    assert report.last.cycle_accuracy > report.first.cycle_accuracy + 0.2
    assert report.last.cycle < report.first.cycle


def test_linear_maps_start_as_asked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    still = replace(SMALL, head="affine", epochs=1, base_lr=0.0, warmup_epochs=0.0)
    fit_linear(store, LinearSettings("pca"), tmp_path / "fit")
    principal = load_projection(tmp_path / "fit" / "projection.safetensors").linears[0]
    wanted = {"identity": (torch.eye(16), torch.zeros(16)), "pca": (principal.weight, principal.bias)}
    for init, (weight, bias) in wanted.items():
        train(store, replace(still, init=init), tmp_path / init)
        linear = load_projection(tmp_path / init / "projection.safetensors").linears[0]
        assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, bias)


@pytest.mark.parametrize("sweep", [(), (Axis("separability_weight", (0.1, 1.0)),)])
def test_heads_are_kept_on_the_way(tmp_path: Path, sweep: Sequence[Axis]) -> None:
    store, run = make_store(tmp_path), replace(SMALL, keep_every=4)
    stop_after(5, store, tmp_path / "run", run) if not sweep else None
    train(store, run, tmp_path / "run", sweep=sweep)
    straight_run = train(store, SMALL, tmp_path / "straight", sweep=sweep)
    for member in straight_run.members:
        folder = tmp_path / "run" / member.name
        assert (
            projection_sha256(load_projection(folder / "projection.safetensors")) == member.projection_sha256
        )
        assert sorted(path.name for path in folder.glob("step-*")) == [
            "step-000004.safetensors",
            "step-000008.safetensors",
        ]
        kept = load_projection(folder / "step-000004.safetensors")
        assert projection_sha256(kept) != member.projection_sha256
    stopped = tmp_path / "stopped"
    if not sweep:
        stop_after(4, store, stopped)
        at_four = torch.load(stopped / "checkpoint.pt", weights_only=True)["learners"][0]["projection"]
        assert all(torch.equal(at_four[name], tensor) for name, tensor in kept.state_dict().items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and, in `run`, a run on it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    train(make_store(folder), SMALL, folder / "run")
    return folder


@pytest.mark.parametrize(
    ("interrupt", "n_steps"), [(stop_after, 1), (stop_after, 4), (crash_after, 1), (crash_after, 5)]
)
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, straight: Path, n_steps: int, interrupt: Callable[..., TrainReport | None]
) -> None:
    store = open_store(straight / "store.zarr")
    broken = tmp_path / "broken"
    report = interrupt(n_steps, store, broken)
    assert not (broken / "projection.safetensors").exists()
    if report is not None:
        assert report.interrupted and report.steps == n_steps
    resumed = train(store, SMALL, broken)
    assert resumed.steps_before + resumed.steps == 9 and resumed.steps_before <= n_steps
    for name in ("projection.safetensors", "metrics.jsonl"):
        assert (broken / name).read_bytes() == (straight / "run" / name).read_bytes(), name


@pytest.mark.parametrize(("seconds", "steps"), [(60, [2, 9]), (0, [2, 3, 4, 6, 8, 9])])
def test_checkpoints_are_a_minute_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: list[int]
) -> None:
    found = []

    def write(path: Path, checkpoint: Checkpoint) -> None:
        found.append(checkpoint.step)
        write_checkpoint(path, checkpoint)

    monkeypatch.setattr(run_module, "write_checkpoint", write)
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", seconds)
    train(make_store(tmp_path), SMALL, tmp_path / "run")
    assert found == steps


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    first = train(store, SMALL, tmp_path / "run")
    again = train(store, replace(SMALL, checkpoint_every=50), tmp_path / "run")
    assert (again.steps, again.steps_before, again.last) == (0, 9, first.last)
    assert again.projection_sha256 == first.projection_sha256
    fresh = train(store, SMALL, tmp_path / "run", resume=False)
    assert (fresh.steps, fresh.projection_sha256) == (9, first.projection_sha256)


def test_other_settings_and_other_stores_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    stop_after(2, store, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FingerprintError) as raised:
        train(store, replace(SMALL, temperature=0.05, seed=3), tmp_path / "run")
    assert raised.value.details == (
        "settings.seed: wanted 3, found 0",
        "settings.temperature: wanted 0.05, found 0.03",
    )
    other = make_store(tmp_path, n_videos=9, name="other.zarr")
    with pytest.raises(FingerprintError) as raised:
        train(other, SMALL, tmp_path / "run")
    assert any(line.startswith("store.manifest_digest") for line in raised.value.details)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_store_that_grew_is_another_store(tmp_path: Path) -> None:
    case = pairs_case(10, n_views=2, side=4, dim=16)
    clips = ClipsCase(case.manifest, case.plan)
    path = clips.write(tmp_path / "store.zarr", slots=range(3))
    stop_after(1, open_store(path), tmp_path / "run")
    clips.write(path)
    with pytest.raises(FingerprintError) as raised:
        train(open_store(path), SMALL, tmp_path / "run")
    assert any(line.startswith("samples.") for line in raised.value.details)


def test_damaged_checkpoint_and_missing_figures(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    out = tmp_path / "run"
    stop_after(2, store, out)
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (b"nonsense", whole[: len(whole) // 2], b""):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a checkpoint of a training run"):
            train(store, SMALL, out)
    torch.save({"step": Path("x")}, out / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        train(store, SMALL, out)
    (out / "checkpoint.pt").write_bytes(whole)
    (out / "metrics.jsonl").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match="shorter than when the checkpoint was taken"):
            train(store, SMALL, out)
    assert (out / "metrics.jsonl").read_bytes() == b""


def test_a_finished_projection_without_its_checkpoint_stays(tmp_path: Path) -> None:
    store, out = make_store(tmp_path), tmp_path / "run"
    train(store, SMALL, out)
    before = (out / "projection.safetensors").read_bytes()
    (out / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="the checkpoint of its run is gone"):
        train(store, SMALL, out)
    assert (out / "projection.safetensors").read_bytes() == before
    assert train(store, SMALL, out, resume=False).steps == 9


def test_a_folder_has_one_training(tmp_path: Path) -> None:
    store, out = make_store(tmp_path), tmp_path / "run"
    rivals = []

    def rival() -> None:
        with pytest.raises(UsageError, match="another run writes to") as raised:
            train(store, SMALL, out)
        rivals.append(raised.value.found)

    train(store, SMALL, out, progress=After(2, rival))
    assert rivals == [f"process {os.getpid()} on {socket.gethostname()}"]
    with pytest.raises(UsageError, match="holds something else"):
        train(store, SMALL, tmp_path)


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"step": "one"}', "7", "null", "\udcff"])
def test_figures_that_are_none(tmp_path: Path, line: str) -> None:
    for read in (read_figures, read_validation):
        (tmp_path / "lines.jsonl").write_bytes(line.encode(errors="surrogateescape") + b"\n")
        with pytest.raises(InputError, match=r"lines\.jsonl"):
            read(tmp_path / "lines.jsonl")


def test_plan_and_warnings_of_a_small_store(tmp_path: Path) -> None:
    store = make_store(tmp_path, n_videos=3)
    plan = make_train_plan(store, TrainSettings())
    assert (plan.batch_size, plan.n_steps, plan.n_dropped) == (3, 5, 0)
    assert (plan.lr, plan.released_init, plan.sample_shape) == (2e-4, "trunc_normal", (3, 4, 4, 16))
    scale, few = plan.warnings
    assert "3.92 times as strongly" in scale and "0.766 would act as 3 did" in scale
    assert "a view set has 3 samples, fewer than the batch of 512" in few
    assert json.dumps(plan.to_json())
    assert train(store, TrainSettings(), tmp_path / "run").samples == 15


def test_an_incomplete_store_is_said(tmp_path: Path) -> None:
    case = pairs_case(5, n_views=2, side=4, dim=16)
    path = ClipsCase(case.manifest, case.plan).write(tmp_path / "s.zarr", [0, 1], {"clip0": "broken"})
    *_, last = make_train_plan(open_store(path), SMALL).warnings
    assert last == "the store is not complete: 1 slots to do, 1 with failed clips"


def test_stores_that_cannot_train(tmp_path: Path) -> None:
    frames = open_store(frames_case().write(tmp_path / "frames.zarr"))
    with pytest.raises(InputError, match="shifted view") as raised:
        train(frames, SMALL, tmp_path / "run")
    assert (raised.value.wanted, raised.value.found) == (
        "a store of the pairs plan, or of the frames plan with shifted encodings",
        "a store of the frames plan without shifted encodings",
    )
    empty = open_store(pairs_case().write(tmp_path / "empty.zarr", slots=[]))
    with pytest.raises(InputError, match="no samples"):
        train(empty, SMALL, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"window": 3}, {"head": "conv"}, {"regularizer": "l1"}])
def test_settings_that_cannot_train(tmp_path: Path, change: dict[str, Any]) -> None:
    store = make_store(tmp_path)
    with pytest.raises(UsageError):
        train(store, replace(SMALL, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokens_that_are_not_finite_are_named(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Holed(ClipsCase):
        def slot_tokens(self, slot: Slot) -> np.ndarray:
            tokens = super().slot_tokens(slot)
            for number, encoding in enumerate(slot.encodings):
                if (encoding.video_id, encoding.view) == ("clip3", 0):
                    tokens[number, 0, 0, 0] = np.nan
            return tokens

    case = pairs_case(5, n_views=2, side=4, dim=16)
    store = open_store(Holed(case.manifest, case.plan).write(tmp_path / "s.zarr"))
    with pytest.raises(InputError, match="1 samples of the batch") as raised:
        train(store, replace(SMALL, batch_size=5), tmp_path / "run")
    assert raised.value.details == ("sample 6: clip3, view set 0",)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(InputError, match="diverged") as raised:
        train(store, replace(SMALL, base_lr=1e38, checkpoint_every=1), tmp_path / "run")
    assert len(raised.value.details) == 3
    assert "base_lr" in raised.value.hint
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    whole = train(store, SMALL, tmp_path / "straight", device="cuda")
    stop = threading.Event()
    train(store, SMALL, tmp_path / "broken", device="cuda", progress=After(3, stop.set), stop=stop)
    resumed = train(store, SMALL, tmp_path / "broken", device="cuda")
    # The figures of the third step came with the fourth.
    assert (resumed.steps_before, resumed.projection_sha256) == (4, whole.projection_sha256)
    on_cpu = train(store, SMALL, tmp_path / "cpu")
    assert whole.last.total == pytest.approx(on_cpu.last.total, rel=1e-3)
