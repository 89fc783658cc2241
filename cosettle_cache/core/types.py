"""The frozen types that travel between rooms: what a video, a grid, an encoding, a slot and a score are.

Nothing here touches disk, decodes an image or imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class MediaKind(StrEnum):
    """How a video lies on disk: a folder of frame images, one video file, or one image (a still)."""

    FRAMES = "frames"
    FILE = "file"
    IMAGE = "image"


class LabelKind(StrEnum):
    """What is annotated: masks of objects or body parts, key points, tracks of points, classes of pixels."""

    MASKS = "masks"
    PARTS = "parts"
    KEYPOINTS = "keypoints"
    TRACKS = "tracks"
    CLASSES = "classes"


class PlanKind(StrEnum):
    """The two store plans: training samples, or every (k-th) frame."""

    PAIRS = "pairs"
    FRAMES = "frames"


class Role(StrEnum):
    """What an encoding is for: the two frames of a sample, the shifted first one, or a plain frame."""

    A = "a"
    B = "b"
    SHIFTED = "shifted"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, order=True)
class Grid:
    """Rows and columns of patch tokens (pixels have height and width)."""

    rows: int
    cols: int

    @property
    def n_tokens(self) -> int:
        """Number of patch tokens."""
        return self.rows * self.cols

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Return the grid written as `rowsxcols`."""
        rows, cols = text.split("x")
        return cls(int(rows), int(cols))


@dataclass(frozen=True, slots=True)
class PositionShift:
    """Co-Settle's positional-encoding augmentation with its offsets made explicit.

    The position embedding is enlarged to `int((1 + ratio) * grid)` and the crop of the grid's own size whose
    top-left corner is (`row`, `col`) is used instead (released code; PROTOCOLS 7.2).
    """

    ratio: float = 10.0
    row: int = 0
    col: int = 0


@dataclass(frozen=True, slots=True)
class Crop:
    """A crop box in pixels of the resized image: top-left corner and size."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """One encoded view: which frame of which video, how cropped and flipped, with which position shift.

    `frame` counts from 0 in the manifest row's own frame range. `view` is the view set in a pairs plan and
    the number of the shift (0 = plain) in a frames plan.
    """

    video_id: str
    frame: int
    view: int
    role: Role
    crop: Crop | None = None
    flip: bool = False
    shift: PositionShift | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """A fixed number of consecutive encodings of one array: one shard, one writer, one unit of resume.

    `index` numbers the slots of the whole plan; `shard` numbers those of the array of `grid`; `start` is the
    row of the first encoding in that array.
    """

    index: int
    grid: Grid
    shard: int
    start: int
    encodings: tuple[Encoding, ...]


#: Channels that share a scale in an int8 store.
SCALE_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """The array of one grid: how many encodings, per slot (shard) and per inner chunk, and how wide.

    `dtype` is `float16`, or `int8` (scaled in groups of channels); `codec` compresses the inner chunks:
    `none` or `zstd`.
    """

    grid: Grid
    n_encodings: int
    slot_encodings: int
    chunk_encodings: int
    n_channels: int
    dtype: str = "float16"
    codec: str = "none"

    @property
    def n_slots(self) -> int:
        """Number of slots; the last one may be part-filled."""
        return -(-self.n_encodings // self.slot_encodings)

    @property
    def stored_channels(self) -> int:
        """Length of the array's last axis: int8 tokens carry the bytes of their float16 scales."""
        if self.dtype == "int8":
            return self.n_channels + 2 * -(-self.n_channels // SCALE_CHANNELS)
        return self.n_channels

    @property
    def encoding_bytes(self) -> int:
        """Bytes of one encoding on disk, before compression."""
        return self.grid.n_tokens * self.stored_channels * (1 if self.dtype == "int8" else 2)


@dataclass(frozen=True, slots=True)
class Video:
    """One manifest row. `media` and `labels` are relative to the data root and use forward slashes.

    `first_frame` is the index (in natural order) of the first frame used, `n_frames` how many follow;
    `height` and `width` are pixels; all three are 0 where a published list does not know them. `fps` is
    frames per second where known. `labelled_frames` counts the annotated frames. `content` is a digest of
    the bytes of its frames and `stamp` tells when it was taken (`videos.content`); None where nobody looked.
    """

    video_id: str
    media: str
    media_kind: MediaKind
    n_frames: int
    height: int
    width: int
    dataset: str = ""
    split: str = ""
    first_frame: int = 0
    fps: float | None = None
    labels: str | None = None
    label_kind: LabelKind | None = None
    labelled_frames: int = 0
    n_objects: int = 0
    class_name: str | None = None
    content: str | None = None
    stamp: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Videos in order, and where the list came from (builder, source, date: free text by key)."""

    videos: tuple[Video, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos)

    def __iter__(self) -> Iterator[Video]:
        return iter(self.videos)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that decides the tokens of a store; two stores with equal fingerprints hold equal tokens."""

    spec_version: int
    backbone: str
    weights_sha256: str
    token_rule: str
    position_rule: str
    preprocessing: str
    plan: Mapping[str, Any]
    dtype: str
    precision: str
    manifest_digest: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EvalProtocol:
    """Every constant in which the code bases differ (PROTOCOLS 1.1-1.4, 2, 3.2); made by `make_protocol`.

    What the encoder sees: `size` is a size rule (`videos.frames.resolve_size`), `resampling` how frames are
    brought to it (`linear`: OpenCV's bilinear of the float image; `bicubic`: Pillow's, antialiased, of 8
    bits); `red_std` is the deviation of the red channel where the encoder normalises with ImageNet's 0.229.

    The context: the first frame and `n_context` frames before the query's. `window` is a `disc` (distance
    below `radius` patches) or a `square` (distance along each axis at most `radius`), unless `rim` says that
    a distance of `radius` itself is outside (`open`) or inside (`closed`); `mask_first` says that
    it limits the first frame as well, `first_frame_copies` that queue places without a frame, at the start of
    a video, count as copies of the first frame inside the window.

    The weights: the `top_k` most similar tokens, with `keep_ties` also all those as similar as the last of
    them; softmax over cosines divided by `temperature`.

    The labels: `label_encoding` of the first mask is `bilinear` (of one-hot maps) or `nearest` (of ids);
    `norm_mask` stretches each class that is there to 0..1 before the argmax, which is taken at `decode_size`:
    `input` (of the network) or `annotation`, after `upsampling`: `bilinear` or `nearest`. A joint is the mean
    of its `keypoint_top_k` strongest cells. Objects that the first frame lacks and a later annotation has
    cost the video (`later_objects` is `fail`), are background (`ignore`), or are given in the frame of their
    first annotation (`inject`, the rule of YouTube-VOS and MOSE).
    """

    name: str
    size: str
    red_std: float
    top_k: int
    keep_ties: bool
    n_context: int
    radius: float
    window: str
    mask_first: bool
    first_frame_copies: bool
    temperature: float
    label_encoding: str
    norm_mask: bool
    decode_size: str
    keypoint_top_k: int
    resampling: str = "linear"
    rim: str = "shape"
    upsampling: str = "bilinear"
    later_objects: str = "fail"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a figure comes from, made by `core.settings.make_provenance`; every row of a table carries it.

    The encoder's fields are empty where nobody knows how predictions were made, `projection_sha256` where
    tokens are raw.
    """

    dataset: str
    manifest_digest: str
    backbone: str
    weights_sha256: str
    projection_sha256: str
    versions_json: str


@dataclass(frozen=True, slots=True)
class Score:
    """One scored thing under one protocol: an object (J&F), a clip's parts (mIoU), joints (PCK), points (AJ).

    `figures` are shares from 0 to 1 by name; one that the thing does not have is left out. `tokens` is `raw`,
    the projection's name, or the name of the predictions that were scored. `counts_json` holds what pools
    over clips, as mIoU and PCK of a data set are no means of the clips' figures.
    """

    task: str
    video_id: str
    tokens: str
    n_frames: int
    scored_size: str
    protocol: str
    protocol_json: str
    provenance: Provenance
    object_id: int | None = None
    boundary_tolerance_px: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    counts_json: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Score:
        """Rebuild from `dataclasses.asdict`; unknown and missing keys raise `TypeError`."""
        return cls(**{**document, "provenance": Provenance(**document.get("provenance", {}))})
