"""How many of this package's functions stand between a typed command and its work, on a small run.

    python benchmarks/call_depth.py

Runs `extract`, `train` and `propagate` on the built-in clips with a random encoder in a temporary folder. For
each it prints the calls on the stack when the encoder, the loss or the writer of the first PNG is entered;
other packages' functions and comprehensions are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import cosettle_cache

PACKAGE = str(Path(cosettle_cache.__file__).parent)
#: By command: (file, function) at which the work begins; the first that is entered counts.
WORK = {
    "extract": [("encoders/vit.py", "tokens"), ("backbones/body.py", "tokens")],
    "train": [("training/losses.py", "transfer_loss"), ("objective.py", "fast_transfer_loss")],
    "propagate": [("videos/masks.py", "write_mask"), ("datasets/index_png.py", "write_mask")],
}
CLIPS = ["--backbone", "timm/vit_tiny_patch16_224", "--weights", "random", "--device", "cpu", "--quiet"]
LINES = {
    "extract": ["extract", *CLIPS, "--views", "1", "--out", "pairs.zarr"],
    "train": [
        "train",
        "--features",
        "pairs.zarr",
        "--epochs",
        "1",
        "--batch",
        "4",
        "--quiet",
        "--out",
        "run",
    ],
    "propagate": ["propagate", "--task", "sprites", *CLIPS, "--set", "size=64x96", "--overlays", "none"],
}


def name(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    return f"{file.relative_to(PACKAGE)}:{frame.f_code.co_name}"


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<")


def call_chain(command: str) -> list[str]:
    """Return the package's functions on the deepest stack of the first call of the command's work."""
    from cosettle_cache.cli import run_command

    found: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or found or not is_ours(frame):
            return
        place = (str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), frame.f_code.co_name)
        if place in WORK[command]:
            stack, at = [], frame
            while at is not None:
                stack += [name(at)] if is_ours(at) else []
                at = at.f_back  # type: ignore[assignment]
            found.extend(reversed(stack))

    import threading

    threading.setprofile(watch)  # type: ignore[arg-type]
    sys.setprofile(watch)
    try:
        run_command(LINES[command])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def main() -> None:
    chains: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command in LINES:
            chains[command] = call_chain(command)
            print(f"{command}: {len(chains[command])}", *chains[command], sep="\n    ")
    print(json.dumps({command: len(chain) for command, chain in chains.items()}))


if __name__ == "__main__":
    main()
