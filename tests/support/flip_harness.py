"""Flip bytes of small stores, one at a time, and see that nothing wrong is ever read, and that all is mended.

Run as a program it goes through every byte of two stores and prints the figures of docs/store.md:

    python tests/support/flip_harness.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from store_cases import Case, folder_bytes, frames_case, pairs_case

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import PlanKind
from cosettle_cache.store import FeatureStore, VerifyReport, open_store, repair_store, verify_store

#: The frames of the second, which fails, lie in both slots of the array.
VIDEOS = (("bear", 3, 1, 2), ("dog", 2, 1, 2), ("fox", 1, 1, 2))

#: Every byte is flipped in metadata and index; every mended store is compared with the first one.
STORES: dict[str, Callable[[], Case]] = {
    "float16, no codec, frames": lambda: frames_case(VIDEOS, dim=4),
    "int8, zstd, pairs": lambda: pairs_case(
        2, n_views=1, side=1, dim=70, slot_encodings=3, dtype="int8", codec="zstd"
    ),
}
FAILURES = {"dog": "gone"}


@dataclass
class Figures:
    """Flips by what came of them; a flip may count in several columns."""

    flips: int = 0
    found_by_verify: int = 0
    refused_by_reader: int = 0
    read_right: int = 0
    repaired: int = 0

    def __iadd__(self, other: Figures) -> Figures:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        return self


@dataclass(frozen=True)
class Flip:
    """One bit of one byte of one file."""

    name: str
    offset: int
    bit: int


class FlipTest:
    """A store, what it holds, and how to check one flip in it."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path = case, case.write(path, failures=FAILURES)
        self.files = folder_bytes(path)
        self.tokens = read_everything(open_store(path))

    def every_byte(self, dice: random.Random) -> Iterator[Flip]:
        for name, data in sorted(self.files.items()):
            yield from (Flip(name, offset, dice.randrange(8)) for offset in range(len(data)))

    def some_bytes(self, dice: random.Random, n_per_file: int) -> Iterator[Flip]:
        for name, data in sorted(self.files.items()):
            for _ in range(n_per_file):
                yield Flip(name, dice.randrange(len(data)), dice.randrange(8))

    def check(self, flips: Iterable[Flip], *, repair_every: int = 1) -> Figures:
        figures = Figures()
        for number, flip in enumerate(flips):
            figures += self.check_one(flip, repair=number % repair_every == 0)
        return figures

    def check_one(self, flip: Flip, *, repair: bool) -> Figures:
        """Flip, read, verify, and repair or put back; raise `AssertionError` at the first surprise."""
        data = bytearray(self.files[flip.name])
        data[flip.offset] ^= 1 << flip.bit
        (self.path / flip.name).write_bytes(data)
        refused = self.is_refused(flip)
        self.check_report(flip, verify_store(self.path))
        if repair:
            self.mend(flip)
        else:
            (self.path / flip.name).write_bytes(self.files[flip.name])
        return Figures(1, 1, refused, not refused, repair)

    def is_refused(self, flip: Flip) -> bool:
        try:
            tokens = read_everything(open_store(self.path))
        except CosettleError:
            return True
        assert tokens == self.tokens, f"{flip}: wrong tokens"
        return False

    def check_report(self, flip: Flip, report: VerifyReport) -> None:
        """Verification names the file; where it holds tokens or lists them, slot and encodings too."""
        (damage,) = report.damages
        assert damage.file == flip.name, f"{flip}: {report}"
        if "/" in flip.name and flip.name.partition("/")[2].count("/"):
            is_metadata = flip.name.endswith(".json")
            assert is_metadata == (damage.slot is None) == (not damage.encodings), f"{flip}: {damage}"

    def mend(self, flip: Flip) -> None:
        repair_store(self.path)
        left = verify_store(self.path)
        assert {damage.file for damage in left.damages} <= {"index/manifest.parquet"}, f"{flip}: {left}"
        self.case.write(self.path, failures=FAILURES)
        assert folder_bytes(self.path) == self.files, f"{flip}: not the same bytes after repair"


def read_everything(store: FeatureStore) -> list[bytes]:
    """Return all that a store's reader gives, as bytes."""
    everything = [repr(store.manifest).encode(), repr(store.index.to_pylist()).encode()]
    if store.plan_kind is PlanKind.PAIRS:
        return [*everything, store.samples(store.sample_ids).tobytes()]
    return [*everything, *(store.tokens(video_id).tobytes() for video_id in store.video_ids)]


def report(title: str, figures: Figures, seconds: float) -> str:
    return (
        f"{title}: {figures.flips} bytes flipped; verify found {figures.found_by_verify}; the reader refused "
        f"{figures.refused_by_reader} and gave the right tokens for {figures.read_right}; {figures.repaired} "
        f"repaired and extracted to identical bytes; {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", choices=list(STORES))
    parser.add_argument("--repair-every", type=int, default=10)
    options = parser.parse_args()
    for title in [options.store] if options.store else STORES:
        started = perf_counter()
        with TemporaryDirectory() as folder:
            test = FlipTest(STORES[title](), Path(folder) / "store.zarr")
            figures = test.check(test.every_byte(random.Random(0)), repair_every=options.repair_every)
        print(report(title, figures, perf_counter() - started))


if __name__ == "__main__":
    main()
