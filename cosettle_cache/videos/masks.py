"""Annotations of one video as index maps: PNG files whose pixels are object numbers (DAVIS) or parts (VIP).

In comes a manifest row whose `labels` is a folder of files named after the frames, or one file for the first
frame alone; out go maps. Colours are for the eye only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.files import output_errors
from cosettle_cache.core.types import MediaKind, Video
from cosettle_cache.videos.datasets import DATASETS, DataSet
from cosettle_cache.videos.frames import check_size, frame_names, image_size, open_image

#: Index of pixels that belong to nobody.
VOID = 255
#: DAVIS scores neither the first nor the last frame.
MIN_SCORED_FRAMES = 3
#: VIP's class of every value in `Category_ids`.
PARTS = (
    *("background", "hat", "hair", "sun-glasses", "upper-clothes", "dress", "coat", "socks"),
    *("pants", "gloves", "scarf", "skirt", "torso-skin", "face", "right-arm", "left-arm"),
    *("right-leg", "left-leg", "right-shoe", "left-shoe"),
)

Mask = UInt8[np.ndarray, "height width"]


def read_mask(path: str | Path) -> Mask:
    """Return the indices in a palette or 8-bit grey image; raise `MediaError` for any other."""
    path = Path(path)
    with open_image(path) as image:
        # Pillow scales grey of 2 or 4 bits to 0..255: index 1 would come out as 85 or 17.
        stretched = any(str(tile[-1]) in ("L;2", "L;4") for tile in image.tile)
        if image.mode not in ("P", "L", "1") or stretched:
            raise MediaError(
                f"{path} does not hold object indices",
                wanted="a palette or 8-bit grey PNG",
                found=f"an image of mode {image.mode}",
                hint="save the indices themselves, not their colours",
            )
        return np.array(image, dtype=np.uint8)


def read_classes(video: Video, data_root: str | Path) -> Mask:
    """Return the class of every pixel of an image, `VOID` where nobody says; `MediaError` if it cannot."""
    if video.labels is None:
        raise MediaError(f"{video.video_id} has no mask of classes")
    path = Path(data_root) / video.labels
    mask = read_mask(path)
    check_size(f"{path} has another size than its image", mask.shape, (video.height, video.width))
    return mask


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
    index, channel = np.arange(256)[:, None], np.arange(3)
    bits = [(index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)]
    return np.asarray(sum(bits), dtype=np.uint8)


#: Red, green and blue of every index, as in PASCAL VOC and DAVIS: its bits, dealt to the three in turn.
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
        return self.path if self.path.is_file() else mask_file(self.path, self.frame_names[index])

    @property
    def data_set(self) -> DataSet | None:
        """The row of the video's data set, where there is one."""
        return DATASETS.get(self.video.dataset)

    def read(self, index: int) -> Mask:
        """Return the index map of one frame; raise `MediaError` when it cannot be read."""
        return self.known(read_mask(self.path_of(index)))

    def known(self, mask: UInt8[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "_ _"]:
        """Return a mask in the data set's own numbers: of a binary one every value above 0 is object 1."""
        is_binary = self.data_set is not None and self.data_set.binary
        return (mask > 0).astype(np.uint8) if is_binary else mask


@dataclass(frozen=True, slots=True)
class DavisSequence(MaskFiles):
    """One video and its objects: 1 to `n_objects`, the largest index of an annotation that counts.

    `begins` is the frame in which each object is given: the first one, or with `later` objects to `inject`
    that of its first annotation. Where objects that the first frame lacks are to `ignore`, they are
    background; `fail`: they cost the video.
    """

    n_objects: int
    later: str
    begins: Mapping[int, int]

    @property
    def scorable(self) -> bool:
        """Whether every frame, or of a sparse data set some, is annotated besides the first and the last.

        Masks each of which gives new objects are what a server hands out, not the truth that it keeps.
        """
        if len(self.labelled) < MIN_SCORED_FRAMES:
            return False
        if self.data_set is None or not self.data_set.sparse:
            return len(self.labelled) == self.video.n_frames
        known = set[int]()
        for index in sorted(self.labelled):
            found = set(_objects(self.read(index)))
            if found <= known:
                return True
            known |= found
        return False

    @property
    def starts(self) -> dict[int, int]:
        """The number, among the annotated frames, of the one in which each object is given."""
        places = {index: place for place, index in enumerate(sorted(self.labelled))}
        return {number: places[index] for number, index in self.begins.items()}

    def first_mask(self) -> Mask:
        """Return the annotation of the first frame; void is background."""
        return _without_void(self.read(0))

    def mask(self, index: int) -> Mask | None:
        """Return the annotation of a frame, None where there is none; void is read as background.

        Raises `MediaError` for an unreadable one and for one with an object that the first lacks.
        """
        if index not in self.labelled:
            return None
        mask = _without_void(self.read(index))
        is_known = np.isin(mask, [0, *self.begins])
        if self.later == "ignore":
            return np.where(is_known, mask, np.uint8(0))
        unknown = np.unique(mask[~is_known])
        if len(unknown):
            raise MediaError(
                f"{self.path_of(index)} has objects that the first annotation lacks",
                wanted=", ".join(map(str, sorted({0, *self.begins}))),
                found=", ".join(map(str, unknown)),
                hint="annotations of DAVIS's unsupervised task have objects that come later: take the others"
                ", or propagate with --set later_objects=ignore or inject",
            )
        return mask


def open_sequence(video: Video, data_root: str | Path, later: str | None = None) -> DavisSequence:
    """Return the objects of one manifest row; `open_mask_files` says what raises `MediaError`.

    So does a first annotation without an object. `later` is the protocol's `later_objects`, by default
    `inject` for a sparse data set and `fail` for others; to inject, every annotation is read.
    """
    files = open_mask_files(video, data_root)
    later = later or ("inject" if files.data_set is not None and files.data_set.sparse else "fail")
    begins = dict.fromkeys(_objects(files.read(0)), 0)
    n_objects = max(begins, default=0)
    for index in sorted(files.labelled) if later == "inject" and n_objects else ():
        begins = {**dict.fromkeys(_objects(files.read(index)), index), **begins}
    n_objects = max(begins) if later == "inject" and begins else n_objects
    if n_objects == 0:
        raise MediaError(
            f"{files.path_of(0)} shows no object",
            wanted="object indices from 1 to 254",
            found="background and void only",
            hint=f"write the object as 1 where a mask of two values has {VOID}",
        )
    return DavisSequence(video, files.frame_names, files.labelled, files.path, n_objects, later, begins)


def _objects(mask: Mask) -> list[int]:
    return [int(number) for number in np.unique(_without_void(mask)) if number]


def _without_void(mask: Mask) -> Mask:
    return np.where(mask == VOID, np.uint8(0), mask)


@dataclass(frozen=True, slots=True)
class PartSequence(MaskFiles):
    """One clip of VIP and its body parts; `first_classes` are those of the first frame, background aside.

    Images and annotations are pairs; the frames between lie elsewhere and play no role (PROTOCOLS 3.1).
    """

    first_classes: tuple[int, ...]

    @property
    def n_objects(self) -> int:
        """Number of parts in the first frame."""
        return len(self.first_classes)

    def first_mask(self) -> Mask:
        """Return the classes of the first frame; a value that is no class is background."""
        return _known_parts(self.read(0))

    def mask(self, index: int) -> Mask | None:
        """Return the classes of a frame as annotated, None where it is not; other values are not scored."""
        return self.read(index) if index in self.labelled else None


def open_parts(video: Video, data_root: str | Path) -> PartSequence:
    """Return the parts of a row; raise `MediaError` as `open_mask_files` does, or if its first has none."""
    files = open_mask_files(video, data_root, numbered=False)
    classes = np.unique(_known_parts(files.read(0)))
    if not classes.any():
        raise MediaError(
            f"{files.path_of(0)} shows no part",
            wanted=f"classes from 1 to {len(PARTS) - 1}",
            found="background only",
        )
    first_classes = tuple(classes[classes > 0].tolist())
    return PartSequence(video, files.frame_names, files.labelled, files.path, first_classes)


def _known_parts(mask: Mask) -> Mask:
    return np.where(mask < len(PARTS), mask, np.uint8(0))


def open_mask_files(video: Video, data_root: str | Path, *, numbered: bool = True) -> MaskFiles:
    """Return the annotations of one manifest row, after a look at every one's name and size.

    Raises `MediaError` for a missing annotation (all are listed), for one of another size than the frames,
    and, where frames are `numbered` one after the other, for a number that is missing. The annotations of a
    video file are named by frame number, from `00000.png`.
    """
    if video.labels is None:
        raise MediaError(
            f"{video.video_id} has no labels",
            hint="add its annotations (of DAVIS: Annotations/480p), rebuild the manifest",
        )
    path = Path(data_root) / video.labels
    names = frame_stems(video, data_root)
    if numbered:
        check_numbers(names, video.media)
    files = [mask_file(path, name) for name in names]
    present = [0] if path.is_file() else [index for index, file in enumerate(files) if file.is_file()]
    if 0 not in present:
        raise MediaError(
            f"the annotation of the first frame of {path.name} is missing",
            wanted=str(files[0]),
            hint="annotations bear the names of their frames; propagation starts from the first",
        )
    row = DATASETS.get(video.dataset)
    if 1 < len(present) < len(names) and not (row and row.sparse):
        missing = [file.name for file in files if not file.is_file()]
        raise MediaError(
            f"{path.name} lacks {len(missing)} of {len(names)} annotations: {', '.join(missing)}",
            wanted="one for every frame, or for the first alone",
            found=f"{len(present)} in {path}",
            hint="where some frames are annotated, as in YouTube-VOS, keep those alone or the first mask",
        )
    opened = MaskFiles(video, names, frozenset(present), path)
    for index in present:
        file, size = opened.path_of(index), (video.height, video.width)
        check_size(f"{file} has another size than its frame", image_size(file), size)
    return opened


def mask_file(folder: Path, name: str) -> Path:
    """Return the place of the mask `name`, whose suffix may be in capitals."""
    path = folder / f"{name}.png"
    capital = path.with_name(f"{name}.PNG")
    return capital if not path.is_file() and capital.is_file() else path


def frame_stems(video: Video, data_root: str | Path) -> tuple[str, ...]:
    """Return the names of a row's frames without suffix; those of a video file are numbers from `00000`."""
    used = range(video.first_frame, video.first_frame + video.n_frames)
    if video.media_kind is MediaKind.IMAGE:
        return (Path(video.media).stem,)
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
    step = min(steps, default=0)
    if len(numbers) < len(names) or len(steps) < 2 or step < 1 or any(other % step for other in steps):
        return
    missing = sorted(set(range(numbers[0], numbers[-1], step)) - set(numbers))
    raise MediaError(
        f"{media} lacks {len(missing)} frames between its first and its last",
        wanted=f"every number at step {step}",
        found="none of " + ", ".join(map(str, missing[:8])),
        hint="fetch the missing frames, or number the frames anew if the gap is meant",
    )
