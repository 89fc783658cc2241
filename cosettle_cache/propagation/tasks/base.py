"""What a benchmark knows about one video: how its first labels become a map, and maps become predictions.

A manifest row and a setting go in; label maps come in frame by frame, and files in the benchmark's own format
and score rows go out. One module per kind of labels: masks, parts, joints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cosettle_cache.core.types import EvalProtocol, Grid, Score, Video
from cosettle_cache.propagation.labels import Size
from cosettle_cache.propagation.propagator import LabelMap


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
        """Take the prediction of frame `index`; frames come in order."""

    def score(self, truth: Any, prediction: Any) -> None:
        """Compare a frame's prediction with what is annotated."""

    def close(self) -> None:
        """Write what is one file for the whole video."""

    def rows(self, row: Score) -> list[Score]:
        """Return `row` with the video's figures, once per scored thing; none where it cannot be scored."""


@runtime_checkable
class Subject(Protocol):
    """One video opened for a benchmark: its first labels on the grid, its truth, its predictions."""

    @property
    def label_map(self) -> LabelMap:
        """The first frame's labels."""

    def truth(self, index: int) -> Any:
        """Return what is annotated of frame `index`; None where nothing is."""

    def decode(self, label_map: LabelMap) -> Any:
        """Return the prediction that a label map stands for."""

    def begin(self, folder: Path) -> Predictions:
        """Return empty predictions that go below `folder`."""


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
