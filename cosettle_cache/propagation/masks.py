"""Object masks in the DAVIS layout: `VIDEO/FRAME.png` with object numbers, at the annotation's own size.

In comes a case, out go one J&F row per object of the first annotation. The benchmark scores neither the
first nor the last frame, so their masks may be missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Score
from cosettle_cache.metrics import DavisScorer
from cosettle_cache.metrics.rows import object_rows
from cosettle_cache.propagation.case import Case, lacking
from cosettle_cache.videos.davis import MIN_SCORED_FRAMES, DavisSequence, open_sequence
from cosettle_cache.videos.frames import decode_errors
from cosettle_cache.videos.index_png import read_mask

#: Modes of images whose pixels are numbers.
_INDEXED = ("P", "L", "1")


def check_masks(case: Case) -> list[str]:
    """Return what keeps the video from being scored, after a look at every file's name, size and kind."""
    sequence = open_sequence(case.video, case.data_root)
    if not sequence.scorable:
        found = f"{len(sequence.labelled)} of {case.video.n_frames} frames annotated"
        return [f"cannot be scored: {found}, at least {MIN_SCORED_FRAMES} and all needed"]
    folder = case.predictions / case.video.video_id
    if not folder.is_dir():
        return ["no folder of masks"]
    names = [f"{name}.png" for name in sequence.frame_names[1:-1]]
    missing = [name for name in names if not (folder / name).is_file()]
    present = [name for name in names if name not in set(missing)]
    faults = [fault for name in present if (fault := _header_fault(folder / name, case))]
    return [*lacking("masks", missing, names), *faults]


def _header_fault(path: Path, case: Case) -> str | None:
    wanted = (case.video.height, case.video.width)
    try:
        with decode_errors(path), Image.open(path) as image:
            found, mode = (image.height, image.width), image.mode
    except MediaError as error:
        return f"{path.name}: {error.summary}"
    if found != wanted:
        return f"{path.name} is {found[0]}x{found[1]}, not {wanted[0]}x{wanted[1]}"
    if mode not in _INDEXED:
        return f"{path.name} holds colours (mode {mode}), not object numbers"
    return None


def score_masks(case: Case, row: Score) -> list[Score]:
    """Return one row per object that the first annotation shows; raise `InputError` for unknown objects."""
    sequence = open_sequence(case.video, case.data_root)
    first = sequence.first_mask()
    scorer = DavisScorer.from_first_mask(first)
    for index in range(case.video.n_frames):
        truth = sequence.mask(index)
        assert truth is not None
        scored = 0 < index < case.video.n_frames - 1
        scorer.add(truth, _prediction(case, sequence, index) if scored else truth)
    return object_rows(row, scorer, set(np.unique(first).tolist()))


def _prediction(case: Case, sequence: DavisSequence, index: int) -> np.ndarray:
    return read_mask(case.predictions / case.video.video_id / f"{sequence.frame_names[index]}.png")
