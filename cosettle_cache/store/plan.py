"""Plans: manifest and settings -> slots, as pure functions, before anything is decoded or encoded.

Random choices come from a hash of seed, video and
view, so any slot can be computed anywhere, in any order, with the same result.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.settings import LINEAR, FramesSettings, PairsSettings
from cosettle_cache.core.types import (
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
from cosettle_cache.store.format import SlotTable
from cosettle_cache.store.header import Header
from cosettle_cache.videos.frames import check_grid, resolve_size

#: A shard of this size is large enough to read at disk speed and small enough to lose; see docs/store.md.
SLOT_BYTES = 64 * 2**20
MAX_SLOT_ENCODINGS = 256
ENCODINGS_PER_SAMPLE = 3


@dataclass(frozen=True, slots=True)
class PairsRecipe:
    """Which encodings a video gets in a pairs plan: per view set plain a, plain b, shifted a.

    `unit` is the number of encodings that a slot should not split, so that a clip is decoded once.
    """

    settings: PairsSettings
    patch: int
    kind = PlanKind.PAIRS
    chunk_encodings = ENCODINGS_PER_SAMPLE

    @property
    def unit(self) -> int:
        """All encodings of a video."""
        return self.settings.n_views * ENCODINGS_PER_SAMPLE

    def image_size(self, video: Video) -> tuple[int, int]:
        """Return (height, width) in pixels: the training square, whatever the video's own size."""
        return self.settings.size, self.settings.size

    def n_encodings(self, video: Video) -> int:
        """Return how many encodings `video` gets."""
        return self.unit

    def encoding(self, video: Video, row: int) -> Encoding:
        """Return encoding number `row` of `video`; one crop and flip for the three of a sample.

        The recipe is the released one (PROTOCOLS 5.6, 7.3), except that the shift is drawn per sample instead
        of per batch, so that a sample does not depend on its neighbours.
        """
        settings = self.settings
        view, part = divmod(row, ENCODINGS_PER_SAMPLE)
        draw = _uniforms(settings.seed, video.video_id, view, n=9)
        frame_a, frame_b = choose_pair(video.n_frames, settings.gap, draw[0], draw[1])
        crop = choose_crop(settings, draw[2:6])
        flip = draw[6] < settings.flip_probability
        role = (Role.A, Role.B, Role.SHIFTED)[part]
        side = settings.size // self.patch
        shift = (
            _draw_shift(settings.shift_ratio, Grid(side, side), draw[7:9]) if role is Role.SHIFTED else None
        )
        return Encoding(video.video_id, frame_b if role is Role.B else frame_a, view, role, crop, flip, shift)


@dataclass(frozen=True, slots=True)
class FramesRecipe:
    """Which encodings a video gets in a frames plan: all kept frames plain, then shifted once per repeat."""

    settings: FramesSettings
    patch: int
    kind = PlanKind.FRAMES
    chunk_encodings = 1
    unit = 1

    def image_size(self, video: Video) -> tuple[int, int]:
        """Return (height, width) in pixels by the size rule."""
        return resolve_size(self.settings.size, video.height, video.width, self.patch)

    def n_encodings(self, video: Video) -> int:
        """Return how many encodings `video` gets."""
        return self._n_kept(video) * (1 + self.settings.n_shifted)

    def encoding(self, video: Video, row: int) -> Encoding:
        """Return encoding number `row` of `video`."""
        repeat, number = divmod(row, self._n_kept(video))
        frame = number * self.settings.every
        if repeat == 0:
            return Encoding(video.video_id, frame, 0, Role.PLAIN)
        height, width = self.image_size(video)
        draw = _uniforms(self.settings.seed, video.video_id, repeat, frame, n=2)
        shift = _draw_shift(self.settings.shift_ratio, Grid(height // self.patch, width // self.patch), draw)
        return Encoding(video.video_id, frame, repeat, Role.SHIFTED, shift=shift)

    def _n_kept(self, video: Video) -> int:
        return -(-video.n_frames // self.settings.every)


@dataclass(frozen=True)
class Plan:
    """All slots of a store, made on demand; by array its `_videos` and, in `_starts`, their first rows."""

    recipe: PairsRecipe | FramesRecipe
    arrays: tuple[ArrayLayout, ...]
    _videos: tuple[tuple[Video, ...], ...]
    _starts: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> PlanKind:
        """Whether this is a pairs or a frames plan."""
        return self.recipe.kind

    @property
    def n_slots(self) -> int:
        """Number of slots over all arrays."""
        return len(SlotTable(self.arrays))

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
        place = SlotTable(self.arrays).place(index)
        array = self.arrays.index(place.layout)
        videos, starts = self._videos[array], self._starts[array]
        number = bisect_right(starts, place.rows.start) - 1
        encodings = []
        for row in place.rows:
            while number + 1 < len(starts) and row >= starts[number + 1]:
                number += 1
            encodings.append(self.recipe.encoding(videos[number], row - starts[number]))
        return Slot(index, place.layout.grid, place.shard, place.rows.start, tuple(encodings))

    def frame_columns(self, array: int, rows: Int64[np.ndarray, " row"]) -> dict[str, pa.Array]:
        """Return columns of the index for rows of array number `array` of a frames plan."""
        assert isinstance(self.recipe, FramesRecipe)
        starts, videos = np.array(self._starts[array]), self._videos[array]
        numbers = np.searchsorted(starts, rows, "right") - 1
        n_kept = np.array([self.recipe._n_kept(video) for video in videos])[numbers]
        views, kept = np.divmod(rows - starts[numbers], n_kept)
        return {
            "video_id": pa.array([video.video_id for video in videos]).take(pa.array(numbers)),
            "frame": pa.array(kept * self.recipe.settings.every),
            "view": pa.array(views.astype(np.int32)),
        }

    def slot_length(self, index: int) -> int:
        """Return how many encodings slot `index` holds."""
        return len(SlotTable(self.arrays).place(index).rows)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's kind and settings, as they stand in a store's fingerprint."""
        slots = {str(layout.grid): layout.slot_encodings for layout in self.arrays}
        settings = asdict(self.recipe.settings)
        if settings.get("resampling") == LINEAR:  # stores of earlier versions do not say it
            del settings["resampling"]
        return {"kind": str(self.kind), "slot_encodings": slots, **settings}


def make_plan(
    manifest: Manifest,
    settings: PairsSettings | FramesSettings,
    *,
    patch: int,
    dim: int,
    slot_encodings: int | None = None,
    dtype: str = "float16",
    codec: str = "none",
) -> Plan:
    """Return the plan of all encodings of `manifest` for an encoder of `patch` pixels and `dim` channels.

    `slot_encodings` overrides the slot size (rounded down to whole samples in a pairs plan); `dtype` and
    `codec` are `ArrayLayout`'s. Raises `InputError` when an image size is not a multiple of the patch.
    """
    recipe: PairsRecipe | FramesRecipe
    if isinstance(settings, PairsSettings):
        recipe = PairsRecipe(settings, patch)
    else:
        recipe = FramesRecipe(settings, patch)
    by_grid: dict[Grid, list[Video]] = {}
    for video in manifest:
        grid = check_grid(*recipe.image_size(video), patch, video.video_id)
        by_grid.setdefault(grid, []).append(video)
    arrays: list[ArrayLayout] = []
    all_starts: list[tuple[int, ...]] = []
    for grid, videos in sorted(by_grid.items()):
        *starts, n_encodings = accumulate(map(recipe.n_encodings, videos), initial=0)
        layout = ArrayLayout(grid, n_encodings, 1, recipe.chunk_encodings, dim, dtype, codec)
        wanted = slot_encodings or min(MAX_SLOT_ENCODINGS, SLOT_BYTES // layout.encoding_bytes)
        unit = recipe.unit if wanted >= recipe.unit else recipe.chunk_encodings
        arrays.append(replace(layout, slot_encodings=max(wanted // unit, 1) * unit))
        all_starts.append(tuple(starts))
    by_array = tuple(tuple(videos) for _, videos in sorted(by_grid.items()))
    return Plan(recipe, tuple(arrays), by_array, tuple(all_starts))


def plan_of_store(header: Header, manifest: Manifest) -> Plan | None:
    """Return the plan that a store was made by; None where its notes on the encoder do not say enough."""
    values, patch = header.fingerprint.plan, header.encoder.get("patch")
    if type(patch) is not int or patch < 1:
        return None
    try:
        kind = PairsSettings if PlanKind(values["kind"]) is PlanKind.PAIRS else FramesSettings
        settings = kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})
        plan = make_plan(manifest, settings, patch=patch, dim=header.arrays[0].n_channels)
    except (CosettleError, ArithmeticError, TypeError, ValueError):
        return None
    # The rows of videos are the same with any size of slots.
    planned, stored = ([(a.grid, a.n_encodings) for a in arrays] for arrays in (plan.arrays, header.arrays))
    return replace(plan, arrays=header.arrays) if planned == stored else None


def choose_pair(n_frames: int, gap: float, first: float, second: float) -> tuple[int, int]:
    """Return two frame indices `int(gap * n_frames)` apart from two uniform numbers in [0, 1).

    Frame 0 is never the first of a pair; clips of up to four frames, or too short for the gap, give two
    independent frames (also where the gap leaves no pair) (released sampler, PROTOCOLS 7.3).
    """
    distance = int(gap * n_frames + 1e-9)  # 0.15 * 20 must be 3 in binary floating point as well
    if n_frames <= 4 or distance < 1 or n_frames - distance < 2:
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


def _draw_shift(ratio: float, grid: Grid, draw: Sequence[float]) -> PositionShift:
    free_rows = int((1 + ratio) * grid.rows) - grid.rows + 1
    free_cols = int((1 + ratio) * grid.cols) - grid.cols + 1
    return PositionShift(ratio, int(draw[0] * free_rows), int(draw[1] * free_cols))


def _uniforms(*key: object, n: int) -> list[float]:
    # A hash, not a generator: the numbers can never change with a library version.
    raw = hashlib.shake_256("\0".join(map(str, key)).encode()).digest(8 * n)
    words = (int.from_bytes(raw[8 * i : 8 * i + 8], "big") for i in range(n))
    return [(word >> 11) / 2**53 for word in words]
