"""Kill real extractions at random moments, again and again, and see that nothing committed is ever lost.

Each store is filled by one process, or by several at once that share its slots; they are killed with SIGKILL
and started again until the store is finished. Run as a program it prints the figures of docs/store.md:

    python tests/support/crash_harness.py --kills 100 --writers 1
    python tests/support/crash_harness.py --kills 100 --writers 3
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import signal
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from extract_cases import make_clips, manifest_of, tree

from cosettle_cache.core.errors import InputError
from cosettle_cache.store import open_store, verify_store
from cosettle_cache.videos.manifest import read_manifest, write_manifest

#: Children start with everything imported; the server that forks them has done nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cosettle_cache.extraction.run", "cosettle_cache.encoders", "timm", "zarr"])

N_CLIPS, N_VIEWS, SLOT_ENCODINGS = 16, 2, 6
MANIFEST = "manifest.parquet"
#: Kills come within this share of an uninterrupted run, so that a store takes several.
REACH = 0.4
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class Clips:
    """The clips, and the bytes and tokens of the store that an uninterrupted extraction makes of them."""

    root: Path
    whole: dict[str, bytes]
    samples: np.ndarray
    seconds: float


@dataclass
class Figures:
    """Kills by what the store looked like just after, and how often it was looked at."""

    hits: Counter[str] = field(default_factory=Counter)
    n_stores: int = 0
    n_checks: int = 0

    @property
    def n_kills(self) -> int:
        return self.hits.total()


@dataclass(frozen=True)
class Writer:
    """One extraction in a process of its own, which waits for the word to begin."""

    process: BaseProcess
    line: Connection

    def begin(self) -> None:
        self.line.send(True)

    def kill(self) -> bool:
        """Kill it; False when it had ended by itself."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (0, -signal.SIGKILL), "it failed"
        return self.process.exitcode != 0


def extract_clips(root: Path, out: Path, line: Connection) -> None:
    """Fill a store, as `cosettle-cache extract` does, in a process that somebody kills."""
    import torch

    from cosettle_cache.core.settings import PairsSettings
    from cosettle_cache.encoders import load_backbone
    from cosettle_cache.extraction.run import extract, make_fingerprint
    from cosettle_cache.store import StoreWriter
    from cosettle_cache.store.plan import make_plan

    torch.set_num_threads(1)
    backbone = load_backbone("timm/test_vit", weights="random")
    manifest = read_manifest(root.parent / MANIFEST)
    settings = PairsSettings(n_views=N_VIEWS, size=64)
    plan = make_plan(manifest, settings, patch=16, dim=64, slot_encodings=SLOT_ENCODINGS)
    fingerprint = make_fingerprint(backbone, plan, manifest)
    line.send(True)
    line.recv()
    writer = StoreWriter.create_or_resume(out, plan.arrays, fingerprint, manifest, {"patch": 16})
    with closing(writer):
        extract(plan, manifest, root, backbone, writer, batch_size=4)


def start(root: Path, out: Path, n_writers: int) -> list[Writer]:
    """Return writers that are ready to begin."""
    writers = []
    for _ in range(n_writers):
        here, there = PROCESSES.Pipe()
        process = PROCESSES.Process(target=extract_clips, args=(root, out, there))
        process.start()
        writers.append(Writer(process, here))
    assert all(writer.line.recv() for writer in writers)
    return writers


def finish(root: Path, out: Path) -> float:
    """Extract without a disturbance; return the seconds that took."""
    (writer,) = start(root, out, 1)
    started = time.perf_counter()
    writer.begin()
    writer.process.join()
    assert writer.process.exitcode == 0
    return time.perf_counter() - started


def make_reference(folder: Path) -> Clips:
    """Draw clips and extract them without a disturbance."""
    root = make_clips(folder / "clips", N_CLIPS)
    write_manifest(folder / MANIFEST, manifest_of(root))  # once: it holds the date
    seconds = finish(root, folder / "whole.zarr")
    store = open_store(folder / "whole.zarr")
    return Clips(root, tree(folder / "whole.zarr"), store.samples(store.sample_ids), seconds)


def kill_until(clips: Clips, folder: Path, n_kills: int, n_writers: int, dice: random.Random) -> Figures:
    """Kill `n_kills` extractions, on as many stores as that takes; raise at the first thing that is wrong."""
    figures = Figures()
    while figures.n_kills < n_kills:
        path = folder / str(figures.n_stores) / "store.zarr"
        path.parent.mkdir()
        while figures.n_kills < n_kills and not is_finished(path):
            kill_round(clips, path, n_writers, dice, figures)
        finish(clips.root, path)
        assert differing(tree(path), clips.whole) == []
        assert [item.name for item in path.parent.iterdir()] == ["store.zarr"], "leftovers beside the store"
        figures.n_stores += 1
    return figures


def differing(found: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Return the names of files that are not those of the uninterrupted run."""
    return sorted(name for name in found | wanted if found.get(name) != wanted.get(name))


def kill_round(clips: Clips, path: Path, n_writers: int, dice: random.Random, figures: Figures) -> None:
    """Start writers and kill them one after the other, looking at the store after every kill."""
    writers = start(clips.root, path, n_writers)
    for writer in writers:
        writer.begin()
    for writer in dice.sample(writers, n_writers):
        time.sleep(dice.uniform(0, REACH * clips.seconds) / n_writers)
        if writer.kill():
            figures.hits[describe(path)] += 1
        check(clips, path)
        figures.n_checks += 1


def check(clips: Clips, path: Path) -> None:
    """Check that the store opens, shows right tokens only, and is whole as far as it goes."""
    try:
        store = open_store(path)
    except InputError:
        assert not path.exists(), "half a store"
        return
    found = store.samples(store.sample_ids)
    assert np.array_equal(found.view(np.uint16), clips.samples[store.sample_ids].view(np.uint16))
    assert len(found) * 3 == store.index.num_rows
    assert verify_store(path).damages == ()


def is_finished(path: Path) -> bool:
    return path.exists() and open_store(path).complete


def describe(path: Path) -> str:
    """Say where a kill hit, from what lies in the store; of several writers, what is furthest on its way."""
    if not path.exists():
        builds = [item for item in path.parent.iterdir() if TEMPORARY.fullmatch(item.name)]
        return "store half made" if builds else "before the store is made"
    names = names_below(path)
    unfinished = [name for name in names if TEMPORARY.fullmatch(name.rpartition("/")[2])]
    if any(name.startswith("index/") for name in unfinished):
        return "in an index part"
    if unfinished:
        return "in a shard"
    shards = {name.split("c.")[1].split(".")[0] for name in names if "/c." in name}
    parts = {str(int(Path(name).stem)) for name in names if re.search(r"/\d{6}\.parquet$", name)}
    if shards - parts:
        return "between shard and index part"
    return "between two slots" if parts else "before the first slot"


def names_below(path: Path) -> list[str]:
    with suppress(FileNotFoundError):  # others rename files meanwhile
        return [item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()]
    return names_below(path)


def report(figures: Figures, n_writers: int, seconds: float) -> str:
    hits = "".join(f"\n  {count:4d} {place}" for place, count in figures.hits.most_common())
    return (
        f"{n_writers} writers at once: {figures.n_kills} kills, {figures.n_checks} checks, "
        f"{figures.n_stores} stores finished to identical bytes, in {seconds:.0f} s; the kills hit{hits}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        clips = make_reference(Path(folder))
        stores = Path(folder) / "stores"
        stores.mkdir()
        started = time.perf_counter()
        figures = kill_until(clips, stores, options.kills, options.writers, random.Random(options.seed))
        print(report(figures, options.writers, time.perf_counter() - started))


if __name__ == "__main__":
    main()
