"""Classes of single frames as Breakfast, GTEA and 50Salads keep them: a text file per video, a class a line.

In comes a folder of `groundTruth/`, `mapping.txt` and `splits/`, out go classes of frames, names of a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from cosettle_cache.core.errors import InputError
from cosettle_cache.videos.lists import read_lines

_NUMBER = re.compile(r"\d{1,9}")
_STEREO = re.compile(r"(.*)_stereo_(.*)_ch0")


@dataclass(frozen=True, slots=True)
class FrameLabels:
    """A folder of frame labels; `numbers` maps class names to what `mapping.txt` says."""

    root: Path
    numbers: Mapping[str, int]

    @property
    def names(self) -> dict[int, str]:
        """Class names by number."""
        return {number: name for name, number in self.numbers.items()}

    def path(self, video_id: str) -> Path:
        """Return the label file of a video."""
        return self.root / "groundTruth" / f"{flat_name(video_id)}.txt"

    def read(self, video_id: str) -> Int64[np.ndarray, " frame"]:
        """Return the class number of every frame; raise `InputError` for a missing or foreign file."""
        path = self.path(video_id)
        if not path.is_file():
            raise InputError(f"{video_id} has no frame labels", wanted=str(path))
        lines = read_lines(path)
        unknown = sorted(set(lines) - self.numbers.keys())
        if not lines:
            raise InputError(f"{path} is empty", found="no lines")
        if unknown:
            mapping = self.root / "mapping.txt"
            raise InputError(f"{path} has classes that {mapping} lacks", found=", ".join(unknown))
        return np.array([self.numbers[line] for line in lines], np.int64)

    def numbers_of(self, names: Iterable[str]) -> frozenset[int]:
        """Return the numbers of classes; raise `InputError` for a name that there is not."""
        names = list(names)
        unknown = [name for name in names if name not in self.numbers]
        if unknown:
            raise InputError(
                f"{self.root / 'mapping.txt'} has no class {unknown[0]}",
                wanted=", ".join(list(self.numbers)[:8]),
            )
        return frozenset(self.numbers[name] for name in names)

    def bundle(self, part: str, split: str) -> frozenset[str]:
        """Return the names in `splits/PART.SPLIT.bundle`, without suffix."""
        path = self.root / "splits" / f"{part}.{split}.bundle"
        if not path.is_file():
            known = sorted(item.name for item in path.parent.glob("*.bundle"))
            raise InputError(f"{path} does not exist", found=", ".join(known) or "no bundles")
        return frozenset(line.removesuffix(".txt") for line in read_lines(path))


def flat_name(video_id: str) -> str:
    """Return a video's name as label and feature files bear it: `P03/cam01/P03_tea` is `P03_cam01_P03_tea`.

    Of stereo pairs the first camera is annotated: `P03/stereo/P03_tea_ch0` is `P03_stereo01_P03_tea`.
    """
    flat = video_id.replace("/", "_")
    match = _STEREO.fullmatch(flat)
    return f"{match[1]}_stereo01_{match[2]}" if match else flat


def open_frame_labels(root: str | Path) -> FrameLabels:
    """Return the labels under `root`; raise `InputError` when its mapping is missing or malformed."""
    root = Path(root)
    path = root / "mapping.txt"
    if not (root / "groundTruth").is_dir() or not path.is_file():
        raise InputError(f"{root} holds no frame labels", wanted="groundTruth/ and mapping.txt in it")
    numbers: dict[str, int] = {}
    for line in read_lines(path):
        number, _, name = line.partition(" ")
        if not _NUMBER.fullmatch(number) or not name.strip() or name.strip() in numbers:
            raise InputError(f"{path} is malformed", wanted="NUMBER NAME a line, no name twice", found=line)
        numbers[name.strip()] = int(number)
    return FrameLabels(root, numbers)
