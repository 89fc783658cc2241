"""The DAVIS layout: `JPEGImages/480p/NAME/00000.jpg`, `Annotations/480p/NAME/00000.png`, lists of names.

In comes a folder in this layout (any resolution folder), out go a manifest, a sequence's masks as index maps,
and palette PNGs as the benchmark expects them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.ImageFile import ImageFile

from cosettle_cache.datasets.build import BuildResult, Clip, Source, build, entries, subfolders
from cosettle_cache.errors import InputError, MediaError, UsageError
from cosettle_cache.files import output_errors
from cosettle_cache.frames import decode_errors, frame_names
from cosettle_cache.types import LabelKind, MediaKind, Video

#: Index of pixels that belong to nobody; they are read as background.
VOID = 255
#: The resolution folder that is meant when several lie side by side.
USUAL_RESOLUTION = "480p"

Mask = UInt8[np.ndarray, "height width"]


def build_davis_manifest(
    root: Path, data_root: Path, split: str = "val", resolution: str | None = None, dataset: str = "davis"
) -> BuildResult:
    """Return the sequences that `ImageSets/2017/SPLIT.txt` lists, or all of them where there are no lists.

    `root` holds `JPEGImages`; a sequence without a folder of annotations becomes a row without labels.
    """
    resolution = resolution or _only_resolution(root)
    frames, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
    names = _listed_names(root, split)
    source = Source(dataset, split if names else "", root, data_root)
    clips = [Clip(name, frames / name) for name in names or [path.name for path in subfolders(frames)]]
    return build(clips, source, lambda clip: _labelled_video(clip, masks / clip.path.name, source))


def _only_resolution(root: Path) -> str:
    found = [path.name for path in subfolders(root / "JPEGImages")]
    if USUAL_RESOLUTION in found or len(found) == 1:
        return USUAL_RESOLUTION if USUAL_RESOLUTION in found else found[0]
    raise InputError(
        f"{root} has no single resolution folder",
        wanted=f"JPEGImages/{USUAL_RESOLUTION}, or one other",
        found=", ".join(found) or "none",
    )


def _listed_names(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "2017"
    lists = {path.stem: path for path in entries(folder) if path.suffix == ".txt"} if folder.is_dir() else {}
    if not lists:
        return []
    if split not in lists:
        raise UsageError(f"{root} has no split {split}", wanted=", ".join(lists), found=split)
    names = list(dict.fromkeys(lists[split].read_text().split()))
    if not names:
        raise InputError(f"{lists[split]} lists no sequences", wanted="one name per line")
    return names


def _labelled_video(clip: Clip, masks: Path, source: Source) -> Video:
    video = source.video(clip)
    if not masks.is_dir():
        return video
    video = replace(video, labels=source.relative(masks), label_kind=LabelKind.MASKS)
    sequence = open_sequence(video, source.data_root)
    return replace(video, n_objects=sequence.n_objects, labelled_frames=len(sequence.labelled))


@dataclass(frozen=True, slots=True)
class DavisSequence:
    """One video and its annotations; `labelled` are the frames (from 0 in the row's range) that have one.

    Either every frame is annotated or the first alone, as in a test set. The objects are 1 to `n_objects`,
    the largest index of the first annotation.
    """

    video: Video
    frame_names: tuple[str, ...]
    labelled: frozenset[int]
    n_objects: int
    folder: Path

    def first_mask(self) -> Mask:
        """Return the annotation of the first frame."""
        return _read_objects(self.folder / f"{self.frame_names[0]}.png")

    def mask(self, index: int) -> Mask | None:
        """Return the annotation of a frame, None where there is none; void is read as background.

        Raises `MediaError` for an unreadable one and for one with an object that the first lacks.
        """
        if index not in self.labelled:
            return None
        path = self.folder / f"{self.frame_names[index]}.png"
        mask = _read_objects(path)
        unknown = np.unique(mask[mask > self.n_objects])
        if len(unknown):
            raise MediaError(
                f"{path} has objects that the first annotation lacks",
                wanted=f"indices 0 to {self.n_objects}",
                found=", ".join(map(str, unknown)),
            )
        return mask


def open_sequence(video: Video, data_root: Path) -> DavisSequence:
    """Return the annotated sequence of one manifest row, after a look at every annotation's name and size.

    Raises `MediaError` for a missing annotation (all are listed) and for one of another size than the frames.
    The annotations of a video file are named by frame number, from `00000.png`.
    """
    if video.labels is None:
        raise MediaError(f"{video.video_id} has no labels", hint="add its annotations, rebuild the manifest")
    folder = data_root / video.labels
    names = _frame_stems(video, data_root)
    present = [index for index, name in enumerate(names) if (folder / f"{name}.png").is_file()]
    _check_complete(folder, names, present)
    for index in present:
        _check_size(folder / f"{names[index]}.png", video)
    n_objects = int(_read_objects(folder / f"{names[0]}.png").max())
    if n_objects == 0:
        raise MediaError(
            f"{folder / names[0]}.png shows no object",
            wanted="object indices from 1 to 254",
            found="background and void only",
            hint=f"write the object as 1 where a mask of two values has {VOID}",
        )
    return DavisSequence(video, names, frozenset(present), n_objects, folder)


def _frame_stems(video: Video, data_root: Path) -> tuple[str, ...]:
    used = range(video.first_frame, video.first_frame + video.n_frames)
    if video.media_kind is MediaKind.FILE:
        return tuple(f"{index:05d}" for index in used)
    names = frame_names(data_root / video.media)
    if len(names) < used.stop:
        raise MediaError(
            f"{video.media} ends early", wanted=f"{used.stop} frames", found=f"{len(names)} frames"
        )
    return tuple(Path(names[index]).stem for index in used)


def _check_complete(folder: Path, names: tuple[str, ...], present: list[int]) -> None:
    first = f"{names[0]}.png"
    if 0 not in present:
        raise MediaError(
            f"the annotation of the first frame of {folder.name} is missing",
            wanted=str(folder / first),
            hint="annotations bear the names of their frames; propagation starts from the first",
        )
    if 1 < len(present) < len(names):
        missing = [f"{name}.png" for index, name in enumerate(names) if index not in set(present)]
        raise MediaError(
            f"{folder.name} lacks {len(missing)} of {len(names)} annotations: {', '.join(missing)}",
            wanted="one for every frame, or for the first alone",
            found=f"{len(present)} in {folder}",
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


def _read_objects(path: Path) -> Mask:
    mask = read_mask(path)
    return np.where(mask == VOID, np.uint8(0), mask)


def read_mask(path: Path) -> Mask:
    """Return the indices in a palette or 8-bit grey image; raise `MediaError` for any other."""
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


def write_mask(path: Path, mask: Mask) -> None:
    """Write indices as an 8-bit palette PNG in the benchmark's colours; raise `OutputError` if it cannot."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    encoded = BytesIO()
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
