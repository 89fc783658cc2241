"""Work over processes: real schedulers and workers on this machine, killed, interrupted, absent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from cluster_units import die_at, die_once, environment, process, refuse, square
from extract_cases import make_clips, manifest_of, tree
from store_cases import frames_case

from cosettle_cache.cli import run_command
from cosettle_cache.core import cluster as distributed
from cosettle_cache.core.cluster import Cluster, connect
from cosettle_cache.core.errors import ClusterError, InputError, UsageError
from cosettle_cache.core.parallel import share_of_cores
from cosettle_cache.core.settings import EncoderSettings, ExtractSettings, PairsSettings
from cosettle_cache.core.types import Manifest
from cosettle_cache.extraction.run import FilledSlot, SlotReport, StoreJob, extract_across, fill_slot
from cosettle_cache.store import StoreWriter, open_store
from cosettle_cache.store._local import TEMPORARY
from cosettle_cache.store.plan import make_plan
from cosettle_cache.videos.manifest import read_manifest, write_manifest

N_WORKERS = 2
ENCODER = EncoderSettings("timm/test_vit", "random")
WORDS = ["--backbone", "timm/test_vit", "--weights", "random", "--views", "20", "--size", "64"]
WORDS += ["--slot-encodings", "60", "--batch", "4", "--quiet"]


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def cluster(notes: list[str]) -> Iterator[Cluster]:
    with connect(workers=N_WORKERS, gpus=("3", "5"), note=notes.append) as cluster:
        yield cluster


def test_every_item_comes_back_once_with_its_result(cluster: Cluster) -> None:
    found = sorted(cluster.run(square, range(25)))
    assert found == [(number, number * number) for number in range(25)]


def test_workers_share_cores_and_are_dealt_gpus(cluster: Cluster) -> None:
    assert cluster.has_gpus()
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    found = {result for _, result in cluster.run(partial(environment, names), range(20), on_gpus=True)}
    cores = str(share_of_cores(N_WORKERS))
    assert found == {("3", cores), ("5", cores)}
    pids = {result for _, result in cluster.run(process, range(20))}
    assert len(pids) == N_WORKERS
    assert os.getpid() not in pids


def test_a_stopped_run_ends_with_what_is_in_hand(cluster: Cluster) -> None:
    stop = Event()
    found = []
    for item, _ in cluster.run(process, range(1000), stop=stop):
        found.append(item)
        stop.set()
    assert 1 <= len(found) <= 2 * N_WORKERS
    assert len(list(cluster.run(square, range(5)))) == 5


def test_errors_of_a_unit_arrive_as_they_are(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="nothing here") as caught:
        list(cluster.run(refuse, range(5)))
    assert (caught.value.wanted, caught.value.details[0][:10]) == ("something", "on worker ")
    with pytest.raises(ZeroDivisionError):
        list(cluster.run(partial(divmod, 1), [0]))


def test_a_killed_worker_is_replaced_and_its_items_done(
    cluster: Cluster, notes: list[str], tmp_path: Path
) -> None:
    found = sorted(cluster.run(partial(die_once, tmp_path / "mark"), range(150)))
    assert found == [(number, number) for number in range(150)]
    cluster.client.wait_for_workers(N_WORKERS, timeout=600)
    assert any("workers lost" in note for note in notes)


def test_an_item_that_kills_workers_is_named_and_alone(cluster: Cluster) -> None:
    found = []
    with pytest.raises(ClusterError, match="at item 3;") as caught:
        for item, _ in cluster.run(partial(die_at, 3), range(8)):
            found.append(item)
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7]
    assert caught.value.hint is not None


def test_another_version_is_a_sentence(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "__version__", "0.0.0")
    with pytest.raises(ClusterError, match="another version") as caught:
        list(cluster.run(square, range(3)))
    assert caught.value.wanted == "0.0.0"


def test_a_missing_scheduler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT_S", 60)
    places = ("127.0.0.1:9", "no-such-host.invalid:8786", "127.0.0.1:99999", "127.0.0.1:port", "", "1")
    began = time.monotonic()
    for address in ("nonsense", "http://127.0.0.1:9", "tls://127.0.0.1:9", *map("tcp://{}".format, places)):
        with pytest.raises(ClusterError, match="no scheduler answers"), connect(scheduler=address):
            pass
    monkeypatch.setattr(distributed, "ANSWER_TIMEOUT_S", 0.2)
    for greeting in (b"", b"SSH-2.0-OpenSSH_9.2"):  # nothing, and no dask
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: server.accept()[0].sendall(greeting))  # noqa: B023
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(ClusterError, match="no scheduler answers"), connect(scheduler=address):
                pass
    assert time.monotonic() - began < 30  # at once, not when the time is over
    with pytest.raises(UsageError), connect():
        pass


def test_only_we_reach_the_workers_we_start(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT_S", 1)
    address = cluster.client.scheduler.address
    assert address.startswith("tls://127.0.0.1:")
    assert all(worker.startswith("tls://127.0.0.1:") for worker in cluster.client.nthreads())
    for other in (address, address.replace("tls:", "tcp:")):
        with pytest.raises(ClusterError, match="no scheduler answers"), connect(scheduler=other):
            pass


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short clips, of which one cannot be decoded."""
    root = make_clips(tmp_path_factory.mktemp("across") / "clips", 12)
    write_manifest(root.parent / "m.parquet", manifest_of(root))
    for path in (root / "clip5").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def straight(clips: Path) -> Path:
    """A store made by this process alone."""
    assert run_command(["extract", *places(clips, clips.parent / "straight.zarr")]) == 4
    return clips.parent / "straight.zarr"


def places(clips: Path, out: Path) -> list[str]:
    manifest = str(clips.parent / "m.parquet")
    return [*WORDS, "--manifest", manifest, "--data-root", str(clips), "--out", str(out)]


def wait_for(done: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def writer_of(straight: Path, out: Path, manifest: Manifest) -> StoreWriter:
    """Open a store made like `straight`."""
    store = open_store(straight)
    return StoreWriter.create_or_resume(out, store.arrays, store.fingerprint, manifest, store.encoder)


@pytest.fixture(scope="module")
def interrupted(clips: Path, straight: Path) -> Path:
    """A store of two worker processes, stopped by a Ctrl-C to all; half its slots are held till then."""
    out = clips.parent / "across.zarr"
    words = [sys.executable, "-m", "cosettle_cache.cli", "extract", *places(clips, out), "--workers", "2"]
    with closing(writer_of(straight, out, read_manifest(clips.parent / "m.parquet"))) as holder:
        assert all(holder.claim(index) for index in range(6, 12))
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            wait_for(lambda: list(out.glob("index/4x4/*.parquet")) or process.poll() is not None, 600)
            os.killpg(process.pid, signal.SIGINT)
            talk = process.communicate(timeout=600)[1]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (process.returncode, "finishing the slots in hand" in talk) == (130, True), talk
    return out


def test_an_interrupt_of_all_processes_finishes_what_is_in_hand(interrupted: Path) -> None:
    states = open_store(interrupted).slot_states()
    assert states["todo"] >= 6
    assert states["done"] + states["failed"] >= 1
    assert not list(interrupted.rglob("*.tmp"))


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler with two workers, started as one starts them on a cluster."""
    folder = tmp_path_factory.mktemp("dask")
    file = ["--scheduler-file", str(folder / "scheduler.json")]
    common = ["--no-dashboard", *file]
    lines = [
        ["scheduler", "--host", "127.0.0.1", "--port", "0", *common],
        ["worker", "--nworkers", "2", "--nthreads", "2", "--local-directory", str(folder), *common],
    ]
    with ExitStack() as stack:
        for line in lines:
            log = stack.enter_context((folder / f"{line[0]}.log").open("w"))
            words = [sys.executable, "-m", "dask", *line]
            process = subprocess.Popen(words, stderr=log, stdout=log, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)  # with what it has started
            wait_for((folder / "scheduler.json").exists)
        yield json.loads((folder / "scheduler.json").read_text())["address"]


@dataclass
class KillsOneWorker:
    """A progress report that kills a worker with the first slot, and keeps what it was told."""

    pids: Callable[[], Iterable[int]]
    n_images: int = 0
    killed: bool = False

    def start(self, total: int, unit: str) -> None:
        self.total = total

    def advance(self, n: int = 1, **figures: float) -> None:
        self.n_images += n
        if not self.killed:
            self.killed = True
            os.kill(next(iter(self.pids())), signal.SIGKILL)

    def finish(self) -> None:
        pass


def test_a_scheduler_goes_on_and_a_killed_worker_changes_nothing(
    scheduler: str, interrupted: Path, clips: Path, straight: Path
) -> None:
    manifest = read_manifest(clips.parent / "m.parquet")
    settings = PairsSettings(n_views=20, size=64)
    job = StoreJob(str(interrupted), clips, ENCODER, settings, ExtractSettings(batch=4, slot_encodings=60))
    plan = make_plan(manifest, settings, patch=16, dim=64, slot_encodings=60)
    before = open_store(interrupted)
    writer = writer_of(straight, interrupted, manifest)
    notes: list[str] = []
    with closing(writer), connect(scheduler=scheduler, note=notes.append) as cluster:
        cluster.client.wait_for_workers(2, timeout=600)
        progress = KillsOneWorker(cluster.client.run(os.getpid).values)
        report = extract_across(cluster.run, job, plan, writer, progress=progress)
    assert progress.killed
    assert (report.interrupted, report.n_slots_before) == (False, plan.n_slots - before.slot_states()["todo"])
    assert report.n_slots + report.n_slots_before + report.n_slots_elsewhere == plan.n_slots
    assert progress.n_images == progress.total - sum(video == "clip5" for video in report.failures) * 60
    assert report.seconds.encode > 0
    # A worker killed between the two may leave a part under its temporary name; the next writer removes it.
    kept = {
        name: data for name, data in tree(interrupted).items() if not TEMPORARY.fullmatch(Path(name).name)
    }
    assert kept == tree(straight)
    assert list(open_store(interrupted).failures) == ["clip5"]


def test_a_worker_without_the_data_or_the_code_says_so(
    scheduler: str, interrupted: Path, clips: Path, tmp_path: Path
) -> None:
    job = StoreJob(str(interrupted), tmp_path / "absent", ENCODER, PairsSettings())
    with connect(scheduler=scheduler) as cluster:
        with pytest.raises(InputError, match="absent is not a folder on ") as caught:
            list(cluster.run(partial(fill_slot, job), [0]))
        assert "on worker" in caught.value.details[0]
        elsewhere = StoreJob(str(tmp_path / "s.zarr"), clips, ENCODER, PairsSettings())
        with pytest.raises(InputError, match=r"s\.zarr does not exist"):
            list(cluster.run(partial(fill_slot, elsewhere), [0]))
        with pytest.raises(ClusterError, match="cannot import"):
            list(cluster.run(square, [0]))


def test_workers_and_a_scheduler_exclude_each_other(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract", *places(clips, tmp_path / "s.zarr"), "--workers", "2"]
    assert run_command([*words, "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run_command([*words, "--device", "cuda:1"]) == 2
    assert "dealt their GPUs" in capsys.readouterr().err


def test_cards_of_unlike_models_in_one_store_are_said(tmp_path: Path) -> None:
    case = frames_case()
    writer = case.writer(tmp_path / "s.zarr")
    job = StoreJob(str(tmp_path / "s.zarr"), tmp_path, ENCODER, PairsSettings())

    def run(_: object, slots: Sequence[int]) -> Iterator[tuple[int, SlotReport]]:
        for index, card in zip(slots, ("H100", "H100", "A100"), strict=False):
            case.commit(writer, index)
            yield index, SlotReport(f"host:{index}", FilledSlot(index, 1, {}), {}, (), card)

    notes: list[str] = []
    with closing(writer):
        extract_across(run, job, case.plan, writer, note=notes.append)
    told = [note for note in notes if "filled on" in note]
    assert told == ["slots are filled on A100 and H100: tokens may differ in their last bits"]
