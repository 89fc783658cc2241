"""Every reader of foreign bytes, asked with damaged inputs: each is read, or refused by an error of ours.

A reader is a row of `READERS`: valid files made by the project's own writers, and the call that reads them.
Of these files one at a time is damaged (fuzz_damage.py) from a seed, so that every input can be made again.
The gate asks a few (tests/cli/test_fuzz.py); run as a program it asks many, in a child process that is
limited in memory and time, and prints a table:

    python tests/support/fuzz_readers.py --inputs 100000
    python tests/support/fuzz_readers.py --reader recipe --number 17    # one input again, with its traceback
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import fuzz_seeds as seeds
import torch
from fuzz_damage import damaged
from store_cases import folder_bytes

from cosettle_cache.cli import run_command
from cosettle_cache.cli.propagate import _overrides
from cosettle_cache.cli.recipes import check_expectations, read_recipe
from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.settings import parse_bytes
from cosettle_cache.encoders import load_backbone
from cosettle_cache.propagation.neighbor_files import load_neighbors
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.training.log import read_checkpoint
from cosettle_cache.training.plan import parse_axis
from cosettle_cache.videos.frames import resolve_size
from cosettle_cache.videos.image_pairs import read_pairs
from cosettle_cache.videos.jhmdb import read_joints, read_predicted_joints
from cosettle_cache.videos.lists import read_list
from cosettle_cache.videos.manifest import read_manifest
from cosettle_cache.videos.masks import read_mask
from cosettle_cache.videos.queries import read_queries
from cosettle_cache.videos.sprites import read_settings
from cosettle_cache.videos.tapvid import read_shares, read_tapvid

#: Seconds of work and further megabytes that one input may take; bytes of address space for all.
LIMIT_S, LIMIT_MB, LIMIT_BYTES = 20.0, 1000, 3 * 2**30
#: Beginnings of command lines; @ stands for the folder.
EXTRACT = "extract --manifest @/davis.csv --data-root @ --plan frames --out @/made.zarr -q"
BUILD = "manifest build --data-root @ --out @/o.csv"
SCORE = "score --data-root @ --task"
TRACK = "track --queries @/points.csv --features @/squares.zarr --out @/tracked --pictures none -q"


def leave(path: Path) -> None:
    """Leave checksums as they are."""


@dataclass(frozen=True)
class Reader:
    """`make` writes valid files into a folder; `read` reads the one that was damaged, or the folder.

    `aim` is the pattern of the files to damage, `share` how often this reader is asked beside others,
    `forge` makes checksums right again; `writes` says that reading changes the folder.
    """

    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]
    aim: str = "*"
    share: int = 30
    forge: Callable[[Path], None] = leave
    writes: bool = False


def typed(line: str) -> Callable[[Path, Path], str]:
    """Return the call of a command line: it may end with any code but 1.

    In it @ stands for the folder and $ for the words in the damaged file.
    """

    def read(folder: Path, path: Path) -> str:
        words = [word.replace("@", str(folder)) for word in line.split()]
        if words[-1] == "$":
            given = path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
            words[-1:] = given.split(" ")
        # As a terminal has them.
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
        with redirect_stdout(out), redirect_stderr(err):
            code = run_command(words)
        said = err.buffer.getvalue().decode()
        assert code != 1, said
        assert "Traceback" not in said, said
        return f"exit {code}"

    return read


def spoken(ask: Callable[[str], object]) -> Callable[[Path, Path], object]:
    """Ask for what a shell would hand over."""
    return lambda folder, path: ask(path.read_bytes().decode("utf-8", "surrogateescape"))


READERS: dict[str, Reader] = {
    "recipe": Reader(seeds.make_recipe, lambda folder, path: read_recipe(path, folder), "*.toml"),
    "expectations": Reader(
        seeds.make_recipe,
        lambda folder, path: check_expectations(read_recipe(folder / "recipe.toml")),
        "*.json",
    ),
    "option --set": Reader(
        lambda folder: seeds.texts(folder, "top_k=10", "temperature=0.7", "mask_first=true", "size=480x880"),
        spoken(lambda text: make_protocol("cosettle", task="davis", **_overrides([text]))),
    ),
    "option --sweep": Reader(
        lambda folder: seeds.texts(folder, "window=1,2", "base_lr=1e-3,0.1"), spoken(parse_axis)
    ),
    "option --size": Reader(
        lambda folder: seeds.texts(folder, "480x880", "short:480/64", "long:880/64"),
        spoken(lambda text: resolve_size(text, 480, 854)),
    ),
    "option --cache-size": Reader(lambda folder: seeds.texts(folder, "20GB", "1.5 TiB"), spoken(parse_bytes)),
    "manifest": Reader(seeds.make_tables, lambda _, path: read_manifest(path)),
    "manifest of a list": Reader(seeds.make_tables, lambda _, path: read_manifest(path, listed=True)),
    "list": Reader(seeds.make_lists, lambda _, path: read_list(path)),
    "queries": Reader(seeds.make_queries, lambda _, path: read_queries(path, seeds.VIDEOS)),
    "TAP-Vid pickle": Reader(seeds.make_pickles, lambda _, path: read_tapvid(path, {})),
    "tracks": Reader(seeds.make_shares, lambda _, path: read_shares(path, seeds.CLIP)),
    "joints": Reader(seeds.make_joint_files, lambda _, path: read_joints(path)),
    "predicted joints": Reader(seeds.make_predictions, lambda _, path: read_predicted_joints(path)),
    "mp4": Reader(seeds.make_film("libx264", "a.mp4"), seeds.read_media, share=6),
    "mp4 of MPEG-4": Reader(seeds.make_film("mpeg4", "a.mp4"), seeds.read_media, share=6),
    "mkv": Reader(seeds.make_film("libvpx-vp9", "a.mkv"), seeds.read_media, share=6),
    "webm": Reader(seeds.make_film("libvpx", "a.webm"), seeds.read_media, share=6),
    "avi": Reader(seeds.make_film("mjpeg", "a.avi", "yuvj420p"), seeds.read_media, share=6),
    "ts": Reader(seeds.make_film("libx264", "a.ts"), seeds.read_media, share=6),
    "gif": Reader(seeds.make_film("gif", "a.gif", "rgb8"), seeds.read_media, share=6),
    "images": Reader(seeds.make_images, seeds.read_media, share=60),
    "mask": Reader(seeds.make_images, lambda _, path: read_mask(path), "palette/*"),
    "weights": Reader(seeds.make_weights, lambda _, path: load_backbone("dino", weights=path), share=10),
    "projection": Reader(seeds.make_projections, seeds.read_projection),
    "training checkpoint": Reader(seeds.make_training, lambda _, path: read_checkpoint(path)),
    "run of scores, training, analysis": Reader(seeds.make_run, seeds.read_run, share=60),
    "settings and marks of a run": Reader(seeds.make_marks, seeds.read_marks, "*.json"),
    "neighbour lists": Reader(seeds.make_neighbors, lambda _, path: list(load_neighbors(path, seeds.KEY))),
    "mark of a folder": Reader(seeds.make_owned, seeds.read_owned),
    "frame labels": Reader(seeds.make_labels, seeds.read_labels),
    "image pairs": Reader(seeds.make_pairs, lambda folder, _: read_pairs(folder, "test")),
    "settings of the sprites": Reader(seeds.make_sprites, lambda folder, _: read_settings(folder)),
    "store": Reader(seeds.make_store, seeds.read_store, writes=True),
    "store, forged": Reader(seeds.make_store, seeds.read_store, forge=seeds.forge_store, writes=True),
}

#: (name, valid files, which of them are damaged, the command line)
COMMANDS: tuple[tuple[str, Callable[[Path], object], str, str], ...] = (
    (
        "train options",
        seeds.make_options("--epochs 3 --batch 2", "--base-lr 0.1 --window 1", "--seed 1 --sweep window=1,2"),
        *("?.txt", "train --features @/pairs.zarr --out @/o --dry-run $"),
    ),
    (
        "propagate options",
        seeds.make_options("--set top_k=3", "--memory-limit 5GB --overlays all", "--set size=64x96"),
        *("?.txt", "propagate --task davis --dry-run $"),
    ),
    (
        "probe options",
        seeds.make_options("--folds 2 --seeds 3", "--k 5 --c 0.5 --c 2", "--frames 4 --pair a,b --task knn"),
        *("?.txt", "probe --features @/frames.zarr --out @/o --dry-run $"),
    ),
    (
        "extract options",
        seeds.make_options("--size 32x32 --every 2", "--shifted 1 --seed 3", "--size native --batch 4"),
        *("?.txt", f"{EXTRACT} --backbone dino_s --weights random --dry-run $"),
    ),
    (
        "extract",
        seeds.make_extraction,
        "new.pt",
        f"{EXTRACT} --backbone dino --weights @/new.pt --size 32x32",
    ),
    ("run", seeds.make_recipe, "*", "run @/recipe.toml --dry-run --json"),
    ("manifest show", seeds.make_tables, "*.parquet", "manifest show @/manifest.parquet"),
    ("manifest from-list", seeds.make_lists, "*.csv", "manifest from-list vip @/manifest.csv --out @/o.csv"),
    ("manifest unpack", seeds.make_pickles, "4.pkl", "manifest unpack @/4.pkl @/out"),
    ("manifest check", seeds.make_benchmarks, "davis*", "manifest check @/davis.csv --data-root @ --decode"),
    ("manifest build davis", seeds.make_benchmarks, "davis/*", f"{BUILD} davis @/davis"),
    ("manifest build vip", seeds.make_benchmarks, "vip/*", f"{BUILD} vip @/vip"),
    ("manifest build jhmdb", seeds.make_benchmarks, "jhmdb/*", f"{BUILD} jhmdb @/jhmdb"),
    ("manifest build tapvid", seeds.make_benchmarks, "tapvid/*", f"{BUILD} tapvid @/tapvid"),
    ("manifest build ucf101", seeds.make_benchmarks, "ucf/*", f"{BUILD} ucf101 @/ucf"),
    ("manifest build folder", seeds.make_film("libx264", "a.mp4"), "*.mp4", f"{BUILD} folder @"),
    ("score davis", seeds.make_benchmarks, "[dr]*/*", f"{SCORE} davis --predictions @/results --json"),
    ("score vip", seeds.make_benchmarks, "[vm]*/*", f"{SCORE} vip --predictions @/maps"),
    ("score jhmdb", seeds.make_benchmarks, "j*/*", f"{SCORE} jhmdb --predictions @/joints"),
    ("report", seeds.make_run, "*", "report @/run --out @/page.html"),
    ("projection info", seeds.make_projections, "own*", "projection info @/own.safetensors --json"),
    ("projection export", seeds.make_projections, "own*", "projection export @/own.safetensors @/out.pth"),
    ("propagate again", seeds.make_squares_run, "[mnh]*", seeds.PROPAGATE),
    ("train again", seeds.make_squares_run, "trained/*", seeds.TRAIN),
    ("track", seeds.make_squares_run, "points.csv", TRACK),
    ("store info", seeds.make_store, "*", "store info @/frames.zarr --json"),
    ("store verify", seeds.make_store, "*", "store verify @/frames.zarr"),
    ("store repair", seeds.make_store, "*", "store repair @/pairs.zarr"),
)
READERS |= {
    name: Reader(
        make, typed(line), aim, 1, seeds.forge_store if name.startswith("store") else leave, writes=True
    )
    for name, make, aim, line in COMMANDS
}


class Bench:
    """Asks readers in a folder; their valid files are made when a reader is asked first."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[Any, dict[str, bytes]]()
        torch.set_num_threads(1)

    def intact(self, name: str) -> set[str]:
        """Return what comes of the files as they were written, each in its turn."""
        reader, folder = READERS[name], self.folder(name)[0]
        targets = self._targets(name)[: 1 if reader.writes else None]
        return {self._ask(reader, folder, folder / file) for file in targets}

    def ask(self, name: str, number: int) -> str:
        """Ask one input; return "read", the exit code or the kind of error that refused it."""
        path, data = self.damage(name, number)
        path.write_bytes(data)
        READERS[name].forge(path)
        return self._ask(READERS[name], self.folder(name)[0], path)

    def damage(self, name: str, number: int) -> tuple[Path, bytes]:
        """Return which file one input damages, and what stands in it then."""
        dice, (folder, files) = Random(f"{name} {number}"), self.folder(name)
        target = dice.choice(self._targets(name))
        return folder / target, damaged(files[target], dice)

    def _ask(self, reader: Reader, folder: Path, path: Path) -> str:
        try:
            with time_limit(LIMIT_S):
                found = reader.read(folder, path)
        except CosettleError as error:
            assert error.message and "\n" not in error.message, error.message
            return error.kind
        finally:
            self._restore(reader, folder, path)
        return found if isinstance(found, str) else "read"

    def _targets(self, name: str) -> list[str]:
        files = self.folder(name)[1]
        return sorted(file for file in files if fnmatch(file, READERS[name].aim))

    def folder(self, name: str) -> tuple[Path, dict[str, bytes]]:
        reader, folder = READERS[name], self._root / str(list(READERS).index(name))
        if not folder.exists():
            folder.mkdir(parents=True)
            if reader.make in self._made:
                self._write(folder, self._made[reader.make])
            else:
                reader.make(folder)
                self._made[reader.make] = folder_bytes(folder)
        return folder, self._made[reader.make]

    def _restore(self, reader: Reader, folder: Path, path: Path) -> None:
        files = self._made[reader.make]
        if reader.writes:
            shutil.rmtree(folder)
        name = str(path.relative_to(folder))
        self._write(folder, files if reader.writes else {name: files[name]})

    @staticmethod
    def _write(folder: Path, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


class Hang(BaseException):
    """One input takes too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    # Of the processor: a busy machine is no fault. Whoever waits for ever is ended by the parent.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def schedule(names: Sequence[str]) -> list[str]:
    """Return the readers in the order that they are asked in, over and over."""
    turns = [(turn / READERS[name].share, name) for name in names for turn in range(READERS[name].share)]
    return [name for _, name in sorted(turns)]


def work(names: Sequence[str], first: int, last: int) -> None:
    """Ask inputs `first` to `last`; tell about each before and after it, a line of JSON each."""
    # What else is printed, by libraries too, goes nowhere.
    order, told = schedule(names), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for name in names:
            bench.folder(name)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES,) * 2)
        peak = LIMIT_MB
        for number in range(first, last):
            name, started = order[number % len(order)], time.perf_counter()
            print(json.dumps([name, number]), file=told, flush=True)
            try:
                outcome, fault = bench.ask(name, number), ""
            except (Exception, Hang) as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                outcome, fault = "FAULT", f"{type(error).__name__} at {place}: {str(error)[-200:]!r}"
            before, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            if peak - before > LIMIT_MB:
                outcome, fault = "FAULT", f"memory: {peak - before} MB more"
            line = json.dumps([outcome, fault, time.perf_counter() - started, peak])
            print(line, file=told, flush=True)


@dataclass
class Tally:
    """What came of all inputs; a fault is known by its reader and its place in the code."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    slowest: Counter[str] = field(default_factory=Counter)
    faults: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    peak_mb: int = 0

    def add(self, name: str, number: int, outcome: str, fault: str, seconds: float, peak_mb: int) -> None:
        self.outcomes[name][outcome] += 1
        self.slowest[name], self.peak_mb = max(self.slowest[name], seconds), max(self.peak_mb, peak_mb)
        if fault:
            self.faults.setdefault((name, fault.split(": ", maxsplit=1)[0]), [fault]).append(number)

    def lines(self) -> Iterator[str]:
        for name, found in self.outcomes.items():
            said = ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
            yield f"{name:35}{found.total():7} {self.slowest[name]:7.2f} s   {said}"
        total, seconds = (
            sum(found.total() for found in self.outcomes.values()),
            time.perf_counter() - self.started,
        )
        yield f"{total} inputs, {seconds:.0f} s, peak {self.peak_mb} MB, {len(self.faults)} kinds of faults"
        for (name, _), (fault, *numbers) in self.faults.items():
            yield f"FAULT {name}: {fault} ({len(numbers)} times, --reader {name!r} --number {numbers[0]})"


def hunt(names: Sequence[str], n_inputs: int) -> Tally:
    """Ask inputs in a child process, and in another after each that died or hung; Ctrl-C ends it earlier."""
    tally, number = Tally(), 0
    with suppress(KeyboardInterrupt):
        while number < n_inputs:
            command = [sys.executable, __file__, "--child", "--from", str(number), "--inputs", str(n_inputs)]
            child = subprocess.Popen([*command, *names], stdout=subprocess.PIPE)
            try:
                lines = _lines(child)
                name, number = json.loads(next(lines))
                while number < n_inputs:
                    dead = ["FAULT", "the process died or hung", LIMIT_S, 0]
                    answer = next(lines, None)
                    tally.add(name, number, *(dead if answer is None else json.loads(answer)))
                    number += 1
                    if answer is None or (line := next(lines, None)) is None:
                        break
                    name, number = json.loads(line)
            finally:
                child.kill()
                child.wait()
    return tally


def _lines(child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what a child says, until it ends or is silent for too long; it makes its files first."""
    assert child.stdout is not None
    rest = b""
    while select.select([child.stdout], [], [], 240)[0] and (said := os.read(child.stdout.fileno(), 65536)):
        *lines, rest = (rest + said).split(b"\n")
        yield from lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="readers, or beginnings of their names; default: all")
    parser.add_argument("--without", default="nothing", help="leave out readers whose names begin so")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--reader")
    parser.add_argument("--number", type=int, default=0)
    options = parser.parse_args()
    names = [name for name in READERS if not options.names or name.startswith(tuple(options.names))]
    names = [name for name in names if not name.startswith(options.without)]
    if options.reader:
        with TemporaryDirectory() as root:
            path, data = Bench(Path(root)).damage(options.reader, options.number)
            print(f"{path.name}: {data[:300]!r}")
            print(Bench(Path(root, "again")).ask(options.reader, options.number))
    elif options.child:
        work(names, options.first, options.inputs)
    else:
        tally = hunt(names, options.inputs)
        print(*tally.lines(), sep="\n")
        sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
