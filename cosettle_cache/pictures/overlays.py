"""The pictures of one video: every kind of tokens by itself, and all side by side with what was given.

Frames and each kind's labels come in, one frame after the other; films and stills go out. Nothing is kept
beyond the frame in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from cosettle_cache.core.files import make_folder
from cosettle_cache.pictures.drawing import canvas_scale, enlarge, side_by_side
from cosettle_cache.pictures.film import Film
from cosettle_cache.videos.frames import Image8

#: Name of the film that shows all kinds; no kind bears it.
SIDE_BY_SIDE = "side_by_side"
#: Title of the panel of annotations, and of the first one where later frames have none.
TRUTH, GIVEN = "truth", "frame 0, as given"

_Labels = TypeVar("_Labels")
#: Draws labels, in pixels of the frame, on a frame that was enlarged by a whole factor.
Draw = Callable[[Image8, _Labels, int], Image8]


def write_overlays(
    images: Iterable[Image8],
    kinds: Mapping[str, Iterable[_Labels]],
    draw: Draw[_Labels],
    *,
    truth: Iterable[_Labels | None],
    n_frames: int,
    fps: float | None,
    folder: Path,
) -> None:
    """Write `folder/KIND.mp4` of every kind and `folder/side_by_side.mp4`, and four PNG stills of each.

    `kinds` are the labels by kind of tokens, `truth` the annotations, None for frames without; the first has
    one. Small frames are enlarged. Raises `OutputError` when something cannot be written.
    """
    make_folder(folder)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(Film(folder, name, n_frames, fps)) for name in (*kinds, SIDE_BY_SIDE)
        }
        given: Image8 | None = None
        for image, annotation, *labels in zip(images, truth, *kinds.values(), strict=True):
            scale = canvas_scale(*image.shape[:2])
            canvas = enlarge(image, scale)
            panels = {name: draw(canvas, label, scale) for name, label in zip(kinds, labels, strict=True)}
            for name, panel in panels.items():
                writers[name].add(panel)
            if annotation is not None:
                true = draw(canvas, annotation, scale)
                given = true if given is None else given
                panels = {TRUTH: true, **panels}
            elif given is not None:
                panels = {GIVEN: given, **panels}
            writers[SIDE_BY_SIDE].add(side_by_side(panels))
