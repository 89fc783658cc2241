"""Object masks: `VIDEO/FRAME.png` at the annotation's size, J&F per object (PROTOCOLS 1, 4).

In come a video whose first frame has a mask and its label maps; out go palette masks and, where every frame
is annotated, one row per object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cosettle_cache.core.files import inside, make_folder
from cosettle_cache.core.types import Video
from cosettle_cache.metrics import DavisScorer
from cosettle_cache.metrics.rows import object_rows
from cosettle_cache.pictures.drawing import draw_mask, write_overlays
from cosettle_cache.propagation.labels import (
    FirstLabels,
    LabelMap,
    Mask,
    Size,
    decode_classes,
    encode_mask,
    encode_mask_nearest,
    name_classes,
)
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Setting, Subject
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.layouts import object_kinds
from cosettle_cache.videos.masks import (
    frame_stems,
    open_sequence,
    read_mask,
    sample_mask,
    write_mask,
)


def open_masks(video: Video, data_root: Path, setting: Setting) -> Subject:
    """Return a video with objects; raise `MediaError` for annotations that cannot be used."""
    sequence = open_sequence(video, data_root, setting.protocol.later_objects)
    first_mask = sequence.first_mask()
    size, numbers = first_mask.shape, {n for n, begin in sequence.begins.items() if begin > 0}
    first = with_objects(encode_index_map(first_mask, setting), numbers)

    def given(frame: int) -> LabelMap | None:
        mask = objects_given(frame)
        if mask is None:
            return None
        found = with_objects(encode_index_map(mask, setting), set(first.object_ids))
        # Of other objects nothing is given, the background included.
        is_new = torch.tensor([sequence.begins.get(number) == frame for number in first.object_ids])
        return found.label_map * is_new

    def correct(frame: int, prediction: Mask) -> Mask:
        mask = objects_given(frame)
        return prediction if mask is None else np.where(mask > 0, mask, prediction)

    def objects_given(frame: int) -> Mask | None:
        new = [number for number, begin in sequence.begins.items() if begin == frame > 0]
        mask = sequence.mask(frame) if new else None
        return None if mask is None else np.where(np.isin(mask, new), mask, np.uint8(0))

    decode, finish = decode_index_map(first, setting, size, out=size)

    def begin(folder: Path) -> Predictions:
        names = [f"{name}.png" for name in sequence.frame_names]
        predictions = write_index_maps(inside(folder, video.video_id), names)
        if not sequence.scorable:
            return predictions
        scorer = DavisScorer(sequence.n_objects, video.height, video.width, sequence.starts)
        kinds = object_kinds(video, data_root)
        rows = partial(object_rows, scorer=scorer, shown=sequence.begins, kinds=kinds)
        return replace(predictions, score=scorer.add, rows=rows)

    return Subject(first.label_map, sequence.mask, decode, begin, finish, given, correct)


def with_objects(labels: FirstLabels, numbers: set[int]) -> FirstLabels:
    """Return the labels with an empty map for every object of `numbers` that they lack."""
    ids = sorted({*labels.object_ids, *numbers})
    if len(ids) == len(labels.object_ids):
        return labels
    label_map = torch.zeros(*labels.label_map.shape[:2], len(ids))
    label_map[..., [ids.index(number) for number in labels.object_ids]] = labels.label_map
    return FirstLabels(tuple(ids), label_map)


def draw_masks(drawing: Drawing) -> None:
    """Lay the masks of every kind over the frames."""
    sequence = open_sequence(drawing.video, drawing.data_root, drawing.setting.protocol.later_objects)
    draw_index_maps(drawing, "{}.png", map(sequence.mask, range(drawing.video.n_frames)))


def encode_index_map(mask: Mask, setting: Setting) -> FirstLabels:
    """Return the label map of a first frame by the protocol's rule."""
    if setting.protocol.label_encoding == "nearest":
        return encode_mask_nearest(mask, setting.grid)
    return encode_mask(mask, setting.size, setting.grid)


def decode_index_map(
    first: FirstLabels, setting: Setting, annotation: Size, out: Size | None = None
) -> tuple[Callable[[LabelMap], Tensor], Callable[[Mask], Mask]]:
    """Return `decode` and `finish` of index maps by the protocol, at size `out` or that of the argmax."""
    at = setting.size if setting.protocol.decode_size == "input" else annotation
    stretched, names = setting.protocol.norm_mask, first.object_ids
    decode = partial(decode_classes, size=at, stretched=stretched, upsampling=setting.protocol.upsampling)
    return decode, partial(name_classes, object_ids=names, mask_size=out or at, stretched=stretched)


def write_index_maps(folder: Path, names: Sequence[str]) -> Predictions:
    """Return predictions that are files of these names, one per frame, in a folder that is made; unscored."""
    make_folder(folder)
    files = [folder / name for name in names]
    return Predictions(files, lambda index, prediction: write_mask(files[index], prediction))


def draw_index_maps(drawing: Drawing, pattern: str, truth: Iterable[Mask | None]) -> None:
    """Lay index maps in files of the frames' names over the frames, at the frames' size."""
    video = drawing.video
    names, size = frame_stems(video, drawing.data_root), (video.height, video.width)

    def maps(folder: Path) -> Iterator[UInt8[np.ndarray, "_ _"]]:
        for name in names:
            mask = read_mask(inside(folder, video.video_id) / pattern.format(name))
            yield mask if mask.shape == size else sample_mask(mask, size)

    write_overlays(
        iter_frames(video, drawing.data_root),
        {kind: maps(folder) for kind, folder in drawing.predictions.items()},
        draw_mask,
        truth=truth,
        n_frames=video.n_frames,
        fps=video.fps,
        folder=drawing.folder,
    )
