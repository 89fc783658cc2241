"""Body parts as the released scripts write them: `VIDEO/FRAME_mask.png` at the network's size.

Pixels are classes, as palette, grey or three equal channels. In comes a case, out goes one row with the
clip's confusion. Maps are resized to the annotation by nearest neighbour; the first frame counts (PROTOCOLS
3.3).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Score
from cosettle_cache.metrics import count_pixels, no_pixels
from cosettle_cache.metrics.rows import parts_row
from cosettle_cache.propagation.case import Case, lacking
from cosettle_cache.videos.frames import decode_errors
from cosettle_cache.videos.index_png import Mask, read_mask, sample_mask
from cosettle_cache.videos.vip import PARTS, PartSequence, open_parts

#: How a frame's map may be called: as released, or like its annotation.
_SUFFIXES = ("_mask.png", ".png")


def check_parts(case: Case) -> list[str]:
    """Return what keeps the clip from being scored; frames without annotation are not looked for."""
    sequence = open_parts(case.video, case.data_root)
    folder = case.predictions / case.video.video_id
    if not folder.is_dir():
        return ["no folder of maps"]
    found = {f"{name}{_SUFFIXES[0]}": _find_map(folder, name) for name in _scored_names(sequence)}
    missing = [name for name, path in found.items() if path is None]
    faults = [fault for path in found.values() if path and (fault := _fault(path))]
    return [*lacking("maps", missing, list(found)), *faults]


def _fault(path: Path) -> str | None:
    try:
        with decode_errors(path), Image.open(path):
            return None
    except MediaError as error:
        return f"{path.name}: {error.summary}"


def score_parts(case: Case, row: Score) -> list[Score]:
    """Return the clip's row; raise `InputError` for a map with classes that do not exist."""
    sequence = open_parts(case.video, case.data_root)
    folder = case.predictions / case.video.video_id
    total = no_pixels(len(PARTS))
    for index in sorted(sequence.files.labelled):
        truth, path = sequence.mask(index), _find_map(folder, sequence.files.frame_names[index])
        assert truth is not None
        assert path is not None
        total += count_pixels(truth, sample_mask(_read_classes(path), truth.shape), len(PARTS))
    return [parts_row(row, total)]


def _scored_names(sequence: PartSequence) -> list[str]:
    return [sequence.files.frame_names[index] for index in sorted(sequence.files.labelled)]


def _find_map(folder: Path, name: str) -> Path | None:
    return next(
        (folder / f"{name}{suffix}" for suffix in _SUFFIXES if (folder / f"{name}{suffix}").is_file()), None
    )


def _read_classes(path: Path) -> Mask:
    """Return the classes of a map: numbers of a palette or of grey, or the value of three equal channels."""
    with decode_errors(path), Image.open(path) as image:
        if image.mode != "RGB":
            return read_mask(path)
        channels = np.asarray(image)
    if (channels != channels[..., :1]).any():
        raise MediaError(
            f"{path} does not hold classes",
            wanted="a palette or grey PNG, or three equal channels",
            found="colours",
        )
    return channels[..., 0]
