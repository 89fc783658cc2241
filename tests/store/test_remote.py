"""Stores on a real S3 server: written, resumed, read, verified; rivals, kills, outages; requests counted."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from extract_cases import make_clips, manifest_of
from propagation_cases import make_squares, single_thread
from remote_cases import (
    BUCKET,
    CREDENTIALS,
    Proxy,
    Server,
    check_samples,
    free_port,
    read_through_cache,
    running_proxy,
    running_server,
    samples_of,
    start,
    variables,
    write_store,
)
from store_cases import crash_case, folder_bytes, frames_case, pairs_case
from test_crash import small_disk  # noqa: F401

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import (
    CosettleError,
    DamagedStoreError,
    FingerprintError,
    InputError,
    OutputError,
    RemoteError,
    UsageError,
)
from cosettle_cache.core.settings import PairsSettings, TrainSettings, parse_bytes
from cosettle_cache.encoders import load_backbone
from cosettle_cache.extraction.run import extract, make_fingerprint
from cosettle_cache.propagation import propagate_store
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import StoreWriter, copy_store, open_store, repair_store, verify_store
from cosettle_cache.store.plan import make_plan
from cosettle_cache.store.reader import FeatureStore
from cosettle_cache.store.remote import open_storage
from cosettle_cache.training.run import train


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name.replace('[', '/').rstrip(']')}.zarr"


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with running_proxy(server) as proxy:
        yield proxy


def object_bytes(url: str) -> dict[str, bytes]:
    """Return the bytes of every object below a URL, by relative name."""
    storage = open_storage(url)
    return {name: storage.read(name) for name, _ in storage.walk()}


# -- the same store as on a disk


@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "none"), ("float16", "zstd")])
def test_pairs_are_written_and_read(url: str, tmp_path: Path, dtype: str, codec: str) -> None:
    case = pairs_case(dtype=dtype, codec=codec)
    assert object_bytes(case.write(url)) == folder_bytes(case.write(tmp_path / "local.zarr"))
    store = open_store(url)
    assert store.path == url
    assert store.complete
    assert np.array_equal(store.sample_ids, np.arange(10))
    ids = np.random.default_rng(0).permutation(np.repeat(store.sample_ids, 2))
    out = np.empty((len(ids), 3, 2, 2, 8), np.float16)
    store.read_into(ids, out)
    assert np.array_equal(out, samples_of(case)[ids])
    assert store.n_bytes == open_store(tmp_path / "local.zarr").n_bytes


def test_frames_are_written_and_read(url: str) -> None:
    case = frames_case((("bear", 23, 2, 3), ("dog", 3, 3, 2)), slot_encodings=5)
    store = open_store(case.write(url))
    assert store.video_ids == ("bear", "dog")
    wanted = case.array(store.arrays[0].grid)
    assert np.array_equal(store.tokens("bear"), wanted)
    assert np.array_equal(np.stack(list(store.iter_tokens("bear"))), wanted)
    assert all(map(np.array_equal, store.stream_tokens("bear"), wanted))
    rows = [22, 0, 7, 8, 9, 7]
    out = np.empty((6, 2, 3, 8), np.float16)
    store.read_encodings(store.grid("bear"), rows, out)
    assert np.array_equal(out, wanted[rows])


def test_resume_failures_and_retries(url: str, tmp_path: Path) -> None:
    case = frames_case()
    case.write(url, slots=[0, 1], failures={"camel": "a truncated file"})
    writer = case.writer(url)
    assert writer.todo() == [2, 3]
    assert writer.todo(retry_failed=True) == [1, 2, 3]
    assert not writer.claim(0)
    assert writer.claim(2)
    store = open_store(url)
    assert dict(store.slot_states()) == {"todo": 2, "done": 1, "failed": 1}
    assert store.failures == {"camel": "a truncated file"}
    with pytest.raises(InputError, match="truncated file"):
        store.tokens("camel")
    for index in writer.todo(retry_failed=True):
        case.commit(writer, index)
    assert open_store(url).complete
    assert object_bytes(url) == folder_bytes(case.write(tmp_path / "local.zarr"))


def test_other_settings_never_resume(url: str) -> None:
    case = frames_case()
    case.write(url)
    with pytest.raises(FingerprintError, match="other settings"):
        case.writer(url, backbone="another")


@pytest.mark.parametrize("name", ["with spaces/a b.zarr", "odd #%20 ?=&+ü.zarr", "slash.zarr///"])
def test_urls_are_taken_as_they_are(server: Server, name: str) -> None:
    case = frames_case()
    case.write(f"s3://{BUCKET}/{name}")
    assert open_store(f"s3://{BUCKET}/{name}".rstrip("/")).complete
    names = {found for found, _ in open_storage(f"s3://{BUCKET}").walk()}
    assert f"{name.rstrip('/')}/zarr.json" in names


def test_an_empty_place_is_needed(url: str) -> None:
    open_storage(url).write("notes.txt", [b"mine"])
    with pytest.raises(InputError, match="not empty and not a store"):
        frames_case().writer(url)
    with pytest.raises(InputError, match="holds no store"):
        open_store(url)


def test_verified_and_copied(url: str, tmp_path: Path) -> None:
    case = pairs_case()
    case.write(url)
    assert verify_store(url).damages == ()
    copy_store(url, tmp_path / "copy.zarr")
    copy_store(tmp_path / "copy.zarr", f"{url}-copy")
    assert folder_bytes(tmp_path / "copy.zarr") == object_bytes(url) == object_bytes(f"{url}-copy")


def test_damage_is_found(url: str) -> None:
    case = pairs_case()
    storage = open_storage(case.write(url))
    first, second, third = (f"tokens/2x2/c.{number}.0.0.0" for number in range(3))
    data = bytearray(storage.read(first))
    data[5] ^= 1
    storage.write(first, [bytes(data)])
    storage.delete(second)
    storage.write(third, [b""])
    assert verify_store(url).damaged_slots == (0, 1, 2)
    for sample, message in ((0, "checksum"), (4, "cannot be read"), (8, "truncated")):
        with pytest.raises(DamagedStoreError, match=message):
            open_store(url).samples([sample])
    assert np.array_equal(open_store(url).samples([1]), samples_of(case)[[1]])


# -- the stages


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


def test_extract_to_a_url_and_train_from_it(url: str, tmp_path: Path, one_thread: None) -> None:
    root = make_clips(tmp_path / "clips", 4)
    manifest = manifest_of(root)
    backbone = load_backbone("timm/test_vit", weights="random")
    plan = make_plan(manifest, PairsSettings(n_views=1, size=64), patch=16, dim=64, slot_encodings=6)
    fingerprint = make_fingerprint(backbone, plan, manifest)
    for place in (url, tmp_path / "local.zarr"):
        writer = StoreWriter.create_or_resume(place, plan.arrays, fingerprint, manifest, {})
        report = extract(plan, manifest, root, backbone, writer, batch_size=4)
        writer.close()
        assert (report.n_slots, dict(report.failures)) == (2, {})
    assert object_bytes(url) == folder_bytes(tmp_path / "local.zarr")
    settings = TrainSettings(epochs=1, batch_size=2, warmup_epochs=0.0)
    remote, local = (
        train(open_store(place), settings, tmp_path / f"run{number}", device="cpu")
        for number, place in enumerate((url, tmp_path / "local.zarr"))
    )
    assert remote.steps == 2
    assert remote.first is not None
    assert remote.first.total == local.first.total


def test_propagate_from_a_url(url: str, tmp_path: Path, one_thread: None) -> None:
    case = make_squares(tmp_path / "data")
    protocol = make_protocol(size="native", top_k=1)
    reports = [
        propagate_store(open_store(place), tmp_path / "data", protocol, tmp_path / f"out{number}")
        for number, place in enumerate((case.write(url), case.write(tmp_path / "local.zarr")))
    ]
    assert reports[0].scores == reports[1].scores
    assert len(reports[0].scores) == 4
    assert not reports[0].failures


def test_propagate_command_from_a_url(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_squares(tmp_path / "data")
    case.write(url)
    arguments = ["propagate", "--task", "davis", "--features", url, "--set", "size=native", "--json"]
    folders = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    cached = ["--cache-dir", str(tmp_path / "cache"), "--cache-size", "1MB"]
    assert run_command([*arguments, *folders, *cached, "--dry-run"]) == 0
    capsys.readouterr()
    assert run_command([*arguments, *folders, *cached]) == 0
    assert json.loads(capsys.readouterr().out)
    assert len(list((tmp_path / "cache").glob("*.shard"))) == 1


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("20GB", 20 * 10**9), ("1.5T", 1_500_000_000_000), ("500 MB", 5 * 10**8), ("7", 7)]
)
def test_sizes_are_read_as_written(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text + "x")
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes("9" * 400 + "T")


def test_a_store_that_closes_ends_the_run(url: str, proxy: Proxy, tmp_path: Path) -> None:
    case = make_squares(tmp_path / "data")
    store = open_store(case.write(url))
    assert store.video_ids == ("left", "right")
    proxy.n_refused, proxy.refusal = 10**6, 403
    report = propagate_store(store, tmp_path / "data", make_protocol(size="native"), tmp_path / "out")
    assert isinstance(report.error, RemoteError)
    assert not report.failures, "it is no fault of the video"


# -- writers that meet, and writers that die


def test_rivals_create_the_same_store(url: str, tmp_path: Path) -> None:
    processes = [start(write_store, url) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert object_bytes(url) == folder_bytes(crash_case().write(tmp_path / "local.zarr"))


def test_a_killed_writer_leaves_whole_slots(url: str, server: Server, tmp_path: Path) -> None:
    case = crash_case()
    with running_proxy(server, latency_s=0.03) as proxy:
        for n_requests in (12, 23):
            proxy.clear()
            process = start(write_store, url)
            while len(proxy.requests) < n_requests and process.is_alive():
                time.sleep(0.002)
            process.kill()
            process.join()
            store = open_store(url)
            check_samples(case, store)
            assert len(store.sample_ids) < 8
    case.write(url)
    assert object_bytes(url) == folder_bytes(case.write(tmp_path / "local.zarr"))


# -- what the service says, and when it says nothing


@contextlib.contextmanager
def fails_within(seconds: float, kind: type[CosettleError], match: str) -> Iterator[None]:
    started = time.perf_counter()
    with pytest.raises(kind, match=match) as caught:
        yield
    assert time.perf_counter() - started < seconds
    assert caught.value.hint is not None or caught.value.wanted is not None
    assert len(caught.value.lines()) <= 4


def test_nobody_at_the_endpoint(server: Server) -> None:
    with variables(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}"):
        with fails_within(8, RemoteError, "does not answer"):
            open_store(f"s3://{BUCKET}/x.zarr")
        with fails_within(8, CosettleError, "does not answer"):
            frames_case().writer(f"s3://{BUCKET}/x.zarr")


def test_no_such_bucket(server: Server) -> None:
    with fails_within(2, InputError, "holds no store"):
        open_store("s3://no-such-bucket/x.zarr")
    with fails_within(2, RemoteError, "there is no such bucket"):
        frames_case().writer("s3://no-such-bucket/x.zarr")


def test_access_is_refused() -> None:
    server = Server(free_port())
    with variables(**CREDENTIALS, AWS_ENDPOINT_URL=server.endpoint):
        try:
            server.start(INITIAL_NO_AUTH_ACTION_COUNT="1")
            server.make_bucket()
            with fails_within(2, RemoteError, "access is refused"):
                open_store(f"s3://{BUCKET}/x.zarr")
        finally:
            server.stop()


@pytest.mark.parametrize("url", ["foo://bucket/x", "file:///x.zarr", "memory:///x", "s3:///x", "http://h/x"])
def test_urls_that_cannot_hold_a_store(url: str) -> None:
    with fails_within(1, UsageError, "cannot hold a store"):
        open_store(url)


def test_transient_errors_are_waited_out(url: str, proxy: Proxy) -> None:
    case = pairs_case()
    proxy.n_refused = 2
    case.write(url)
    store = open_store(url)
    for fault in ("n_refused", "n_broken"):
        setattr(proxy, fault, 3)
        assert np.array_equal(store.samples([7, 1, 9]), samples_of(case)[[7, 1, 9]])
        assert getattr(proxy, fault) == 0


def test_a_server_that_dies_in_mid_read_and_comes_back(url: str, proxy: Proxy) -> None:
    case = pairs_case()
    store = open_store(case.write(url))

    def interrupt() -> None:
        time.sleep(0.1)
        proxy.stop()
        time.sleep(1)
        proxy.start()

    proxy.latency_s = 0.05
    thread = Thread(target=interrupt)
    thread.start()
    for _ in range(12):
        assert np.array_equal(store.samples(range(10)), samples_of(case))
    thread.join()


@pytest.mark.parametrize(
    ("fault", "faulty"),
    [
        ("answers 404", "c.1.0.0.0"),
        ("answers 404", "000001.parquet"),
        ("answers 404", "manifest.parquet"),
        ("ignores ranges", "c.1.0.0.0"),
        ("truncates bodies", "c.1.0.0.0"),
        ("truncates bodies", "000001.parquet"),
    ],
)
def test_a_repair_deletes_nothing_behind_a_broken_proxy(
    url: str, proxy: Proxy, capsys: pytest.CaptureFixture[str], fault: str, faulty: str
) -> None:
    case = pairs_case()
    before = object_bytes(case.write(url))
    proxy.fault, proxy.faulty = fault, faulty
    assert run_command(["store", "repair", url]) == 3
    assert faulty in capsys.readouterr().err
    with pytest.raises(RemoteError):
        repair_store(url)
    proxy.fault = ""
    assert object_bytes(url) == before
    assert verify_store(url).damages == ()


def test_a_repair_sets_aside_what_is_damaged(url: str) -> None:
    storage = open_storage(pairs_case().write(url))
    whole, shard = object_bytes(url), "tokens/2x2/c.1.0.0.0"
    storage.write(shard, [whole[shard][:-1]])
    assert repair_store(url).removed == ("index/2x2/000001.parquet", shard)
    aside = {name: data for name, data in object_bytes(url).items() if name.endswith(".tmp")}
    assert set(aside.values()) == {whole["index/2x2/000001.parquet"], whole[shard][:-1]}
    assert open_store(url).slot_states()["todo"] == 1
    pairs_case().write(url)
    assert object_bytes(url) == whole


# -- requests, counted and timed


def test_requests_of_samples(url: str, proxy: Proxy) -> None:
    case = pairs_case(16, n_views=1, slot_encodings=24)
    case.write(url)
    proxy.clear()
    store = open_store(url)
    assert len(proxy.requests) <= 4
    proxy.clear()
    store.samples([3])
    assert len(proxy.requests) == 3, "the shard's index, its index part, then the sample"
    store = open_store(url)
    assert len(store.sample_ids) == 16, "from here on the index parts are known, as in training"
    proxy.clear()
    store.samples([3])
    assert len(proxy.requests) == 2, "the shard's index, then the sample"
    proxy.clear()
    store.samples([5])
    assert len(proxy.requests) == 1
    proxy.clear()
    store.samples([4, 1, 2, 3])
    assert [request.split()[0] for request in proxy.requests] == ["GET"]
    assert proxy.n_bytes == 4 * 192 + 3 * 64 + 4 - 4 * 0
    proxy.clear()
    store.samples(range(16))
    assert len(proxy.requests) == 3, "one shard's index is known: the other's, and one request each"
    proxy.clear()
    store.samples([0, 2, 4])
    assert len(proxy.requests) == 3
    assert proxy.n_bytes == 3 * 196, "nothing between chunks that are not asked for"


def test_many_requests_at_once(url: str, proxy: Proxy) -> None:
    case = pairs_case(64, n_views=1, slot_encodings=6)
    store = open_store(case.write(url))
    assert len(store.sample_ids) == 64
    proxy.clear()
    proxy.latency_s = 0.05
    started = time.perf_counter()
    assert np.array_equal(store.samples(range(64)), samples_of(case))
    seconds = time.perf_counter() - started
    assert len(proxy.requests) == 64, "32 shards, an index and a range each"
    assert 8 <= proxy.most_at_once <= 17
    assert seconds < 0.5 * 64 * 0.05


def test_frames_are_read_ahead(url: str, proxy: Proxy) -> None:
    case = frames_case((("bear", 48, 2, 3),), slot_encodings=3)
    store = open_store(case.write(url))
    assert store.video_ids
    proxy.clear()
    proxy.latency_s = 0.05
    started = time.perf_counter()
    assert sum(1 for _ in store.stream_tokens("bear")) == 48
    assert time.perf_counter() - started < 0.5 * 32 * 0.05
    assert len(proxy.requests) == 32


# -- copies of shards on this machine


@dataclass(frozen=True)
class Cache:
    folder: Path
    url: str

    def open(self, n_bytes: int = 10**9) -> FeatureStore:
        return open_store(self.url, cache_dir=self.folder, cache_bytes=n_bytes)

    @property
    def copies(self) -> list[Path]:
        return sorted(self.folder.glob("*.shard"))

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.copies)


CACHED = crash_case()


@pytest.fixture
def cache(url: str, proxy: Proxy, tmp_path: Path) -> Cache:
    """A cache of a store of eight shards, one sample each."""
    CACHED.write(url)
    proxy.clear()
    return Cache(tmp_path / "cache", url)


def n_fetched(proxy: Proxy) -> int:
    return sum(request.startswith("GET") and "/tokens/4x4/c." in request for request in proxy.requests)


def test_shards_are_fetched_once(cache: Cache, proxy: Proxy) -> None:
    check_samples(CACHED, cache.open())
    assert (n_fetched(proxy), len(cache.copies)) == (8, 8)
    proxy.clear()
    store = cache.open()
    check_samples(CACHED, store)
    check_samples(CACHED, store)
    assert n_fetched(proxy) == 0
    assert sum(request.startswith("HEAD") and "/c." in request for request in proxy.requests) == 8


@pytest.mark.parametrize("limit", [1, 20_000])
def test_the_cache_is_bounded(cache: Cache, limit: int) -> None:
    shard = 3 * 4 * 4 * 64 * 2 + 4 + 60 + 20
    store = cache.open(limit)
    for _ in range(2):
        for sample in (0, 5, 1, 7):
            assert np.array_equal(store.samples([sample]), samples_of(CACHED)[[sample]])
            assert cache.n_bytes <= max(limit, shard)


def test_what_was_used_last_stays(cache: Cache, proxy: Proxy) -> None:
    store = cache.open(20_000)
    for sample in (0, 1, 2, 0, 3):
        store.samples([int(sample)])
        time.sleep(0.01)
    assert n_fetched(proxy) == 4
    store.samples([0])
    assert n_fetched(proxy) == 4
    store.samples([1])
    assert n_fetched(proxy) == 5


def test_a_shard_written_again_is_fetched_again(url: str, proxy: Proxy, tmp_path: Path) -> None:
    case, cache = crash_case(), Cache(tmp_path / "cache", url)
    case.write(url, failures={"clip1": "gone"})
    with pytest.raises(InputError, match="gone"):
        cache.open().samples([1])
    case.write(url, slots=[1])
    assert np.array_equal(cache.open().samples([1]), samples_of(case)[[1]])


def test_a_damaged_copy_is_fetched_again(cache: Cache, proxy: Proxy) -> None:
    store = cache.open()
    check_samples(CACHED, store)
    for number, path in enumerate(cache.copies):
        data = path.read_bytes()
        path.write_bytes((data[: 100 * number], b"", data[:50] + b"x" + data[51:])[number % 3])
    for reader in (store, cache.open()):
        check_samples(CACHED, reader)
    assert n_fetched(proxy) == 16


def test_a_copy_that_vanishes_is_fetched_again(cache: Cache) -> None:
    store = cache.open()
    check_samples(CACHED, store)
    for path in cache.copies:
        path.unlink()
    check_samples(CACHED, store)


def test_damage_of_the_store_is_damage(cache: Cache) -> None:
    storage = open_storage(cache.url)
    name = "tokens/4x4/c.0.0.0.0"
    storage.write(name, [b"x" + storage.read(name)[1:]])
    with pytest.raises(DamagedStoreError, match="slot 0"):
        cache.open().samples([0])


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_processes_share_a_cache(cache: Cache, proxy: Proxy, limit: int) -> None:
    processes = [start(read_through_cache, cache.url, cache.folder, limit) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    if limit == 10**9:
        assert n_fetched(proxy) == 8
    check_samples(CACHED, cache.open())


def test_a_process_killed_while_it_fetches(cache: Cache, proxy: Proxy) -> None:
    proxy.latency_s = 0.05
    process = start(read_through_cache, cache.url, cache.folder, 10**9)
    while n_fetched(proxy) < 3 and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    proxy.latency_s = 0
    leftover = cache.folder / f".{'0' * 40}.shard.{'0' * 32}.tmp"
    leftover.write_bytes(bytes(30_000))
    os.utime(leftover, (0, 0))
    check_samples(CACHED, cache.open(20_000))
    assert not leftover.exists()
    assert {path.stat().st_size for path in cache.copies} == {6144 + 64 + 20}


def test_a_cache_touches_no_file_of_others(cache: Cache, tmp_path: Path) -> None:
    store = cache.open(20_000)
    names = ["mine.shard", f".notes.{'0' * 32}.tmp", f"{'A' * 40}.shard", f"{'0' * 40}.shard.txt"]
    theirs = [cache.folder / name for name in names]
    for path in theirs:
        path.write_bytes(bytes(30_000))
        os.utime(path, (0, 0))
    for sample in store.sample_ids:
        store.samples([int(sample)])
    assert [path.stat().st_size for path in theirs] == [30_000] * 4
    ours = {path.name for path in cache.copies} - set(names)
    assert len(ours) == 3, "as many as fit; theirs do not count"
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/1.png").write_bytes(b"")
    with pytest.raises(UsageError, match="holds something else"):
        Cache(tmp_path / "frames", cache.url).open()


def test_a_cache_on_a_full_disk(cache: Cache, small_disk: Path) -> None:  # noqa: F811
    (small_disk / "filler").write_bytes(bytes(220 * 1024))
    here = Cache(small_disk / "cache", cache.url)
    with pytest.raises(OutputError, match=r"shard cache cannot be used.*no space left") as caught:
        check_samples(CACHED, here.open())
    assert "--cache-size" in str(caught.value.hint)
    check_samples(CACHED, here.open(10_000))


def test_compressed_chunks_come_from_the_copies(url: str, proxy: Proxy, tmp_path: Path) -> None:
    case = pairs_case(codec="zstd")
    case.write(url)
    store = open_store(url, cache_dir=tmp_path / "cache")
    check_samples(case, store)
    proxy.clear()
    check_samples(case, store)
    assert not [request for request in proxy.requests if request.startswith("GET")]


def test_a_refusal_while_zarr_reads(url: str, proxy: Proxy) -> None:
    case = pairs_case(codec="zstd")
    store = open_store(case.write(url))
    check_samples(case, store)
    proxy.n_refused, proxy.refusal = 10**6, 403
    with pytest.raises(RemoteError, match="access is refused"):
        store.samples([3])


def test_announced_shards_fill_the_cache(cache: Cache, proxy: Proxy) -> None:
    store = cache.open()
    store.will_need([2, 5, 6])
    deadline = time.monotonic() + 60
    while len(cache.copies) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(cache.copies) == 3
    proxy.clear()
    store.samples([6, 2, 5])
    assert n_fetched(proxy) == 0


def test_a_window_that_does_not_fit_twice_is_not_fetched(cache: Cache, proxy: Proxy) -> None:
    store = cache.open(n_bytes=1000)
    store.will_need(range(store.n_slots))
    time.sleep(0.2)
    assert n_fetched(proxy) == 0


def test_without_a_cache_announcing_asks_for_nothing(url: str, proxy: Proxy) -> None:
    CACHED.write(url)
    store = open_store(url)
    proxy.clear()
    store.will_need(range(store.n_slots))
    assert not [request for request in proxy.requests if "tokens" in request]
