"""Plans: manifest and settings -> slots, as pure functions, before anything is decoded or encoded.

A plan knows every encoding of a store and where it goes. Random choices come from a hash of seed, video and
view, so any slot can be computed anywhere, in any order, with the same result.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cosettle_cache.config import FramesSettings, PairsSettings, settings_json
from cosettle_cache.errors import InputError, UsageError
from cosettle_cache.types import (
    ArrayLayout,
    Crop,
    Encoding,
    Grid,
    Manifest,
    PlanKind,
    PositionShift,
    Role,
    Slot,
    Video,
)

#: A shard of this size is large enough to read at disk speed and small enough to lose; see docs/store.md.
SLOT_BYTES = 64 * 2**20
MAX_SLOT_ENCODINGS = 256
ENCODINGS_PER_SAMPLE = 3


@dataclass(frozen=True, slots=True)
class _Span:
    """The rows `[start, stop)` of one array that belong to one video."""

    video: Video
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _ArrayPlan:
    layout: ArrayLayout
    first_slot: int
    spans: tuple[_Span, ...]


@dataclass(frozen=True)
class Plan:
    """All slots of a store. `slot(i)` is computed on demand; nothing grows with the number of encodings."""

    settings: PairsSettings | FramesSettings
    patch: int
    _arrays: tuple[_ArrayPlan, ...]

    @property
    def kind(self) -> PlanKind:
        """Whether this is a pairs or a frames plan."""
        return PlanKind.PAIRS if isinstance(self.settings, PairsSettings) else PlanKind.FRAMES

    @property
    def arrays(self) -> tuple[ArrayLayout, ...]:
        """One layout per grid."""
        return tuple(array.layout for array in self._arrays)

    @property
    def n_slots(self) -> int:
        """Number of slots over all arrays."""
        return sum(layout.n_slots for layout in self.arrays)

    @property
    def n_encodings(self) -> int:
        """Number of encodings over all arrays."""
        return sum(layout.n_encodings for layout in self.arrays)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tokens in float16, checksums not counted."""
        return sum(layout.n_encodings * layout.encoding_bytes for layout in self.arrays)

    def slot(self, index: int) -> Slot:
        """Return slot `index` (0 to `n_slots` - 1)."""
        array = self._arrays[bisect_right([a.first_slot for a in self._arrays], index) - 1]
        shard = index - array.first_slot
        start = shard * array.layout.slot_encodings
        stop = min(start + array.layout.slot_encodings, array.layout.n_encodings)
        encodings = tuple(self._encodings_between(array, start, stop))
        return Slot(index, array.layout.grid, shard, start, encodings)

    def image_size(self, video: Video) -> tuple[int, int]:
        """Return the (height, width) in pixels at which the frames of `video` are encoded."""
        return _image_size(self.settings, video)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's kind and settings, as they stand in a store's fingerprint."""
        slots = {str(layout.grid): layout.slot_encodings for layout in self.arrays}
        return {"kind": str(self.kind), "slot_encodings": slots, **settings_json(self.settings)}

    def _encodings_between(self, array: _ArrayPlan, start: int, stop: int) -> Iterator[Encoding]:
        first = bisect_right([span.start for span in array.spans], start) - 1
        for span in array.spans[first:]:
            if span.start >= stop:
                return
            rows = range(max(start, span.start) - span.start, min(stop, span.stop) - span.start)
            yield from (video_encoding(self.settings, span.video, self.patch, row) for row in rows)


def make_plan(
    manifest: Manifest,
    settings: PairsSettings | FramesSettings,
    *,
    patch: int,
    dim: int,
    slot_encodings: int | None = None,
) -> Plan:
    """Return the plan of all encodings of `manifest` for an encoder of `patch` pixels and `dim` channels.

    `slot_encodings` overrides the slot size (it is rounded to whole samples in a pairs plan). Raises
    `InputError` when an image size is not a multiple of the patch.
    """
    by_grid: dict[Grid, list[Video]] = {}
    for video in manifest:
        by_grid.setdefault(_grid(settings, video, patch), []).append(video)
    arrays: list[_ArrayPlan] = []
    first_slot = 0
    for grid, videos in sorted(by_grid.items()):
        spans = _spans(settings, videos)
        layout = _layout(settings, grid, spans[-1].stop, dim, slot_encodings)
        arrays.append(_ArrayPlan(layout, first_slot, spans))
        first_slot += layout.n_slots
    return Plan(settings, patch, tuple(arrays))


def video_encoding(settings: PairsSettings | FramesSettings, video: Video, patch: int, row: int) -> Encoding:
    """Return encoding number `row` of `video`: a, b, shifted a per view set, or all plain frames then shifts."""
    if isinstance(settings, PairsSettings):
        view, part = divmod(row, ENCODINGS_PER_SAMPLE)
        return make_sample(settings, video, view, settings.size // patch)[part]
    repeat, number = divmod(row, _n_kept(settings, video))
    frame = number * settings.every
    if repeat == 0:
        return Encoding(video.video_id, frame, 0, Role.PLAIN)
    grid = _grid(settings, video, patch)
    draw = _uniforms(settings.seed, video.video_id, repeat, frame, n=2)
    return Encoding(
        video.video_id, frame, repeat, Role.SHIFTED, shift=_draw_shift(settings.shift_ratio, grid, draw)
    )


def make_sample(
    settings: PairsSettings, video: Video, view: int, side: int
) -> tuple[Encoding, Encoding, Encoding]:
    """Return one training sample: plain frame a, plain frame b, shifted frame a, one crop and flip for all.

    `side` is the grid's rows (= columns). The recipe is the released one (PROTOCOLS 5.6, 7.3).
    """
    draw = _uniforms(settings.seed, video.video_id, view, n=9)
    frame_a, frame_b = choose_pair(video.n_frames, settings.gap, draw[0], draw[1])
    crop = choose_crop(settings, draw[2:6])
    flip = draw[6] < settings.flip_probability
    shift = _draw_shift(settings.shift_ratio, Grid(side, side), draw[7:9])
    return (
        Encoding(video.video_id, frame_a, view, Role.A, crop, flip),
        Encoding(video.video_id, frame_b, view, Role.B, crop, flip),
        Encoding(video.video_id, frame_a, view, Role.SHIFTED, crop, flip, shift),
    )


def choose_pair(n_frames: int, gap: float, first: float, second: float) -> tuple[int, int]:
    """Return two frame indices `int(gap * n_frames)` apart from two uniform numbers in [0, 1).

    Frame 0 is never the first of a pair; clips of up to four frames, or too short for the gap, give two
    independent frames (released sampler, PROTOCOLS 7.3).
    """
    distance = int(gap * n_frames + 1e-9)  # 0.15 * 20 must be 3 in binary floating point as well
    if n_frames <= 4 or distance < 1:
        return int(first * n_frames), int(second * n_frames)
    start = 1 + int(first * (n_frames - distance - 1))
    return start, start + distance


def choose_crop(settings: PairsSettings, draw: Sequence[float]) -> Crop:
    """Return a random resized crop of the square image from four uniform numbers: area, aspect, top, left.

    One draw, clipped to the image, without the usual ten retries (released transform, PROTOCOLS 7.3).
    """
    size = settings.size
    area = size * size * (settings.scale_min + draw[0] * (settings.scale_max - settings.scale_min))
    low, high = math.log(settings.aspect_min), math.log(settings.aspect_max)
    aspect = math.exp(low + draw[1] * (high - low))
    width = min(round(math.sqrt(area * aspect)), size)
    height = min(round(math.sqrt(area / aspect)), size)
    return Crop(int(draw[2] * (size - height + 1)), int(draw[3] * (size - width + 1)), height, width)


def resolve_size(rule: str, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that a size rule gives for frames of `height` x `width`.

    Rules: `480x880` (exactly, aspect ignored), `native`, `short:480/64` (short side 480, long side floored to
    a multiple of 64, as DINO does), `long:880/64` (long side 880, short side floored, as T-CORE does for VIP).
    """
    if rule == "native":
        return height, width
    side, _, numbers = rule.rpartition(":")
    try:
        first, second = (int(number) for number in numbers.split("/" if side else "x"))
    except ValueError as error:
        raise _bad_rule(rule) from error
    if min(first, second) < 1 or side not in ("", "short", "long"):
        raise _bad_rule(rule)
    return (first, second) if not side else _fit(side, first, second, height, width)


def _bad_rule(rule: str) -> UsageError:
    return UsageError(
        f"{rule!r} is no size", wanted="HEIGHTxWIDTH, native, short:S/M or long:S/M", found=rule
    )


def _fit(side: str, target: int, multiple: int, height: int, width: int) -> tuple[int, int]:
    anchor = min(height, width) if side == "short" else max(height, width)
    other = max(height, width) if side == "short" else min(height, width)
    fitted = other * target // anchor // multiple * multiple
    anchor_is_height = (height == anchor) if height != width else True
    return (target, fitted) if anchor_is_height else (fitted, target)


def check_multiple(height: int, width: int, patch: int, what: str) -> Grid:
    """Return the grid of `height` x `width` pixels; raise `InputError` when the patch does not divide them."""
    if height >= patch and width >= patch and height % patch == 0 and width % patch == 0:
        return Grid(height // patch, width // patch)
    near = f"{max(height // patch, 1) * patch}x{max(width // patch, 1) * patch}"
    raise InputError(
        f"{what} would be encoded at a size that is not a multiple of the patch",
        wanted=f"multiples of {patch} pixels",
        found=f"{height}x{width}",
        hint=f"--size {near}",
    )


def _grid(settings: PairsSettings | FramesSettings, video: Video, patch: int) -> Grid:
    return check_multiple(*_image_size(settings, video), patch, video.video_id)


def _image_size(settings: PairsSettings | FramesSettings, video: Video) -> tuple[int, int]:
    if isinstance(settings, PairsSettings):
        return settings.size, settings.size
    return resolve_size(settings.size, video.height, video.width)


def _n_kept(settings: FramesSettings, video: Video) -> int:
    return -(-video.n_frames // settings.every)


def _n_encodings(settings: PairsSettings | FramesSettings, video: Video) -> int:
    if isinstance(settings, PairsSettings):
        return settings.n_views * ENCODINGS_PER_SAMPLE
    return _n_kept(settings, video) * (1 + settings.n_shifted)


def _spans(settings: PairsSettings | FramesSettings, videos: Sequence[Video]) -> tuple[_Span, ...]:
    spans: list[_Span] = []
    start = 0
    for video in videos:
        spans.append(_Span(video, start, start + _n_encodings(settings, video)))
        start = spans[-1].stop
    return tuple(spans)


def _layout(
    settings: PairsSettings | FramesSettings,
    grid: Grid,
    n_encodings: int,
    dim: int,
    slot_encodings: int | None,
) -> ArrayLayout:
    chunk = ENCODINGS_PER_SAMPLE if isinstance(settings, PairsSettings) else 1
    wanted = slot_encodings or min(MAX_SLOT_ENCODINGS, SLOT_BYTES // (grid.n_tokens * dim * 2))
    per_slot = max(wanted // chunk, 1) * chunk
    return ArrayLayout(grid, n_encodings, per_slot, chunk, dim)


def _draw_shift(ratio: float, grid: Grid, draw: Sequence[float]) -> PositionShift:
    free_rows = int((1 + ratio) * grid.rows) - grid.rows + 1
    free_cols = int((1 + ratio) * grid.cols) - grid.cols + 1
    return PositionShift(ratio, int(draw[0] * free_rows), int(draw[1] * free_cols))


def _uniforms(*key: object, n: int) -> list[float]:
    # A hash, not a generator: the numbers can never change with a library version.
    raw = hashlib.shake_256("\0".join(map(str, key)).encode()).digest(8 * n)
    words = (int.from_bytes(raw[8 * i : 8 * i + 8], "big") for i in range(n))
    return [(word >> 11) / 2**53 for word in words]
