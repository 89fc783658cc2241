"""Prepared images on their way to the encoder: each distinct view once per batch, copied one batch ahead.

On a GPU the copy comes from pinned memory on a stream of its own, so that it overlaps with the batch before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.types import Encoding, PositionShift
from cosettle_cache.extraction.images import View


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One encoding's view and its position in the slot; encodings with equal pixels share the view."""

    position: int
    encoding: Encoding
    view: View


@dataclass(frozen=True, slots=True)
class Upload:
    """A batch on the device: distinct views, and for every image the number of its view and its shift."""

    images: Sequence[PreparedImage]
    pixels: Float[Tensor, "view 3 height width"]
    views: Sequence[tuple[int, PositionShift | None]]


class Uploader:
    """Brings batches to one device, one ahead of whoever consumes them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]

    def ahead(self, batches: Iterable[Sequence[PreparedImage]]) -> Iterator[Upload]:
        """Yield the batches in order; the next one is already under way when one is yielded."""
        waiting: Upload | None = None
        for batch in batches:
            upload = self._upload(batch)
            if waiting is not None:
                yield self._arrived(waiting)
            waiting = upload
        if waiting is not None:
            yield self._arrived(waiting)

    def _upload(self, batch: Sequence[PreparedImage]) -> Upload:
        distinct = {id(image.view): image.view for image in batch}
        number = {key: place for place, key in enumerate(distinct)}
        pixels = torch.stack(list(distinct.values()))
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return Upload(batch, pixels, [(number[id(image.view)], image.encoding.shift) for image in batch])

    def _arrived(self, upload: Upload) -> Upload:
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            upload.pixels.record_stream(current)
        return upload
