"""What a benchmark knows about one video: how its first labels become a map, and maps become predictions.

A manifest row and a setting go in; label maps come in frame by frame, and files in the benchmark's own format
and score rows go out. One module per kind of labels: masks, parts, joints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Predictions(Protocol):
    """What one kind of tokens says about one video: taken frame by frame, written, scored."""

    @property
    def files(self) -> Sequence[Path]:
        """The files written so far."""

    def write(self, index: int, prediction: Any) -> None:
        """Write the prediction of frame `index`; frames come in order, and all of them come."""

    def score(self, truth: Any, prediction: Any) -> None:
        """Compare a frame's prediction with what is annotated."""

    def rows(self, row: Score) -> list[Score]:
        """Return `row` with the video's figures, once per scored thing; none where it cannot be scored."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One video opened for a benchmark.

    `label_map` holds the first frame's labels on the grid. `truth` returns what is annotated of a frame (None
    where nothing is), `decode` the prediction that a label map stands for, `begin` empty predictions that go
    below a folder.
    """

    label_map: LabelMap
    truth: Callable[[int], Any]
    decode: Callable[[LabelMap], Any]
    begin: Callable[[Path], Predictions]


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
