"""Body parts: `VIDEO/FRAME_mask.png` at the network's size, mIoU over all pixels (PROTOCOLS 3).

In come a clip whose first frame has part classes and its label maps; out go class maps and one row with the
clip's confusion. Classes that the first frame lacks are never predicted; the first frame is scored.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cosettle_cache.core.types import Score, Video
from cosettle_cache.metrics import Confusion, count_pixels, no_pixels
from cosettle_cache.metrics.rows import parts_row
from cosettle_cache.propagation.labels import LabelMap, Mask
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Setting, Subject
from cosettle_cache.propagation.tasks.masks import (
    decode_index_map,
    draw_index_maps,
    encode_index_map,
    write_index_maps,
)
from cosettle_cache.videos.masks import PARTS, open_parts, sample_mask

#: What the released scripts call a frame's map.
FILE = "{}_mask.png"

ClassMap = UInt8[np.ndarray, "_ _"]


def open_part_clip(video: Video, data_root: Path, setting: Setting) -> Subject:
    """Return a clip with body parts; raise `MediaError` for annotations that cannot be used."""
    sequence = open_parts(video, data_root)
    first_mask = sequence.first_mask()
    first = encode_index_map(first_mask, setting)

    def decode(label_map: LabelMap) -> ClassMap:
        return decode_index_map(label_map, first, setting, first_mask.shape)

    def begin(folder: Path) -> Predictions:
        names = [FILE.format(name) for name in sequence.frame_names]
        predictions = write_index_maps(folder / video.video_id, names)
        if len(sequence.labelled) == 1:  # the first frame alone: there is nothing to score
            return predictions
        counts: list[Confusion] = []

        def score(truth: Mask, prediction: ClassMap) -> None:
            counts.append(count_pixels(truth, sample_mask(prediction, truth.shape), len(PARTS)))

        def rows(row: Score) -> list[Score]:
            return [parts_row(row, sum(counts, start=no_pixels(len(PARTS))))]

        return replace(predictions, score=score, rows=rows)

    return Subject(first.label_map, sequence.mask, decode, begin)


def draw_parts(drawing: Drawing) -> None:
    """Lay the parts of every kind over the frames; true values that are no class are left out."""
    sequence = open_parts(drawing.video, drawing.data_root)
    truth = (sequence.mask(index) for index in range(drawing.video.n_frames))
    known = (None if mask is None else np.where(mask < len(PARTS), mask, np.uint8(0)) for mask in truth)
    draw_index_maps(drawing, FILE, known)
