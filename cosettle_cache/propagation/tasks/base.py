"""What a benchmark knows about one video: how its first labels become a map, and maps become predictions.

A manifest row and a setting go in; label maps come in frame by frame, and files in the benchmark's own format
and score rows go out. One module per kind of labels: masks, parts, joints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cosettle_cache.core.types import EvalProtocol, Grid, Score, Video
from cosettle_cache.propagation.labels import LabelMap, Size


@dataclass(frozen=True, slots=True)
class Setting:
    """What labels and maps of one video depend on.

    `size` is the network input's (height, width) in pixels, `number` the video's place in the manifest.
    """

    protocol: EvalProtocol
    size: Size
    grid: Grid
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one kind of tokens says about one video.

    `write` takes the frame's index and its prediction, frame by frame; `files` are there when all have come.
    `score` takes what is annotated of a frame and its prediction; it is None where frames are not scored one
    by one. `rows` returns the row that it is given with the video's figures, once per scored thing, nothing
    where the video cannot be scored.
    """

    files: Sequence[Path]
    write: Callable[[int, Any], None]
    score: Callable[[Any, Any], None] | None = None
    rows: Callable[[Score], list[Score]] = lambda row: []


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One video opened for a benchmark.

    `label_map` holds the first frame's labels on the grid. `truth` returns what is annotated of a frame (None
    where nothing is), `begin` empty predictions that go below a folder. `decode` returns what a label map
    stands for, on the map's device and without a wait for it; `finish` makes the prediction of that, on the
    host. `given` returns the label map of objects that are given in a frame after the first, None where none
    are, and `correct` a frame's prediction with these objects as given.
    """

    label_map: LabelMap
    truth: Callable[[int], Any]
    decode: Callable[[LabelMap], Tensor]
    begin: Callable[[Path], Predictions]
    finish: Callable[[Any], Any] = lambda decoded: decoded
    given: Callable[[int], LabelMap | None] = lambda frame: None
    correct: Callable[[int, Any], Any] = lambda frame, prediction: prediction


@dataclass(frozen=True, slots=True)
class Drawing:
    """What the pictures of one video are made from, when all its predictions are on disk.

    `predictions` maps kinds of tokens (`raw` first) to the folders that `Subject.begin` was given; pictures
    go to `folder`, which exists.
    """

    video: Video
    data_root: Path
    setting: Setting
    predictions: Mapping[str, Path]
    folder: Path
