"""Annotations of one video as index maps: which frames have one, and that they fit their frames.

In comes a manifest row whose `labels` is a folder of PNG files named after the frames, or one PNG file for
the first frame alone; out go the maps. What their numbers mean is the data set's business.

Index maps on disk: PNG files whose pixels are object or class numbers, with colours for the eye only.

In comes a file, out goes `[height width]` uint8, or the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.ImageFile import ImageFile

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.files import output_errors
from cosettle_cache.core.types import MediaKind, Video
from cosettle_cache.videos.frames import decode_errors, frame_names

#: Index of pixels that belong to nobody.
VOID = 255

Mask = UInt8[np.ndarray, "height width"]


def read_mask(path: str | Path) -> Mask:
    """Return the indices in a palette or 8-bit grey image; raise `MediaError` for any other."""
    path = Path(path)
    with decode_errors(path), Image.open(path) as image:
        if image.mode not in ("P", "L", "1") or _is_stretched(image):
            raise MediaError(
                f"{path} does not hold object indices",
                wanted="a palette or 8-bit grey PNG",
                found=f"an image of mode {image.mode}",
                hint="save the indices themselves, not their colours",
            )
        return np.array(image, dtype=np.uint8)


def _is_stretched(image: ImageFile) -> bool:
    # Pillow scales grey of 2 or 4 bits to 0..255: index 1 would come out as 85 or 17.
    return any(str(tile[-1]) in ("L;2", "L;4") for tile in image.tile)


def sample_mask(mask: Mask, size: tuple[int, int]) -> UInt8[np.ndarray, "_ _"]:
    """Return `mask` at `size` by Pillow's nearest neighbour, which samples the middle of target pixels."""
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def write_mask(path: str | Path, mask: Mask) -> None:
    """Write indices as an 8-bit palette PNG in the benchmark's colours; raise `OutputError` if it cannot."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    encoded, path = BytesIO(), Path(path)
    image.save(encoded, format="PNG")
    with output_errors(path):
        path.write_bytes(encoded.getvalue())


def _make_palette() -> UInt8[np.ndarray, "256 3"]:
    """Return the colours of PASCAL VOC and DAVIS: an index's bits, dealt to red, green and blue in turn."""
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    bits = [(index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)]
    return np.asarray(sum(bits), dtype=np.uint8)


#: Red, green and blue of every index.
PALETTE = _make_palette()


@dataclass(frozen=True, slots=True)
class MaskFiles:
    """The annotations of one video; `labelled` are the frames (from 0 in the row's range) that have one.

    Either every frame is annotated or the first alone. `path` is the folder, or the first frame's file.
    """

    video: Video
    frame_names: tuple[str, ...]
    labelled: frozenset[int]
    path: Path

    def path_of(self, index: int) -> Path:
        """Return the file of one frame."""
        return _mask_path(self.path, self.frame_names[index])

    def read(self, index: int) -> Mask:
        """Return the index map of one frame; raise `MediaError` when it cannot be read."""
        return read_mask(self.path_of(index))


def open_mask_files(video: Video, data_root: str | Path, *, numbered: bool = True) -> MaskFiles:
    """Return the annotations of one manifest row, after a look at every one's name and size.

    Raises `MediaError` for a missing annotation (all are listed), for one of another size than the frames,
    and, where frames are `numbered` one after the other, for a number that is missing. The annotations of a
    video file are named by frame number, from `00000.png`.
    """
    if video.labels is None:
        raise MediaError(f"{video.video_id} has no labels", hint="add its annotations, rebuild the manifest")
    path = Path(data_root) / video.labels
    names = frame_stems(video, data_root)
    if numbered:
        check_numbers(names, video.media)
    present = [index for index, name in enumerate(names) if _mask_path(path, name).is_file()]
    if path.is_file():
        present = [0]
    _check_complete(path, names, present)
    for index in present:
        _check_size(_mask_path(path, names[index]), video)
    return MaskFiles(video, names, frozenset(present), path)


def frame_stems(video: Video, data_root: str | Path) -> tuple[str, ...]:
    """Return the names of a row's frames without suffix; those of a video file are numbers from `00000`."""
    used = range(video.first_frame, video.first_frame + video.n_frames)
    if video.media_kind is MediaKind.FILE:
        return tuple(f"{index:05d}" for index in used)
    names = frame_names(Path(data_root) / video.media)
    if len(names) < used.stop:
        raise MediaError(
            f"{video.media} ends early", wanted=f"{used.stop} frames", found=f"{len(names)} frames"
        )
    return tuple(Path(names[index]).stem for index in used)


def check_numbers(names: Sequence[str], media: str) -> None:
    """Raise `MediaError` when frames are numbered at one step but some numbers are left out."""
    matches = [re.search(r"\d+$", name) for name in names]
    numbers = [int(match.group()) for match in matches if match]
    steps = {late - early for early, late in pairwise(numbers)}
    if len(numbers) < len(names) or len(steps) < 2 or min(steps) < 1:
        return
    step = min(steps)
    if any(other % step for other in steps):
        return
    missing = sorted(set(range(numbers[0], numbers[-1], step)) - set(numbers))
    raise MediaError(
        f"{media} lacks {len(missing)} frames between its first and its last",
        wanted=f"every number at step {step}",
        found="none of " + ", ".join(map(str, missing[:8])),
        hint="fetch the missing frames, or number the frames anew if the gap is meant",
    )


def _mask_path(path: Path, name: str) -> Path:
    return path if path.is_file() else path / f"{name}.png"


def _check_complete(path: Path, names: Sequence[str], present: Sequence[int]) -> None:
    first = f"{names[0]}.png"
    if 0 not in present:
        raise MediaError(
            f"the annotation of the first frame of {path.name} is missing",
            wanted=str(path / first),
            hint="annotations bear the names of their frames; propagation starts from the first",
        )
    if 1 < len(present) < len(names):
        missing = [f"{name}.png" for index, name in enumerate(names) if index not in set(present)]
        raise MediaError(
            f"{path.name} lacks {len(missing)} of {len(names)} annotations: {', '.join(missing)}",
            wanted="one for every frame, or for the first alone",
            found=f"{len(present)} in {path}",
        )


def _check_size(path: Path, video: Video) -> None:
    with decode_errors(path), Image.open(path) as image:
        found = (image.height, image.width)
    if found != (video.height, video.width):
        raise MediaError(
            f"{path} has another size than its frame",
            wanted=f"{video.height}x{video.width}",
            found=f"{found[0]}x{found[1]}",
        )
