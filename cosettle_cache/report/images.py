"""Pictures inside the page: frames as data URIs, no larger than a page needs.

Frames as arrays go in, texts that an `img` takes as its source come out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cosettle_cache.videos.frames import Image8

#: Pixels of a picture's longer side.
LONG_SIDE = 480
QUALITY = 72


def data_uri(image: Image8) -> str:
    """Return a frame, shrunk to `LONG_SIDE`, as WebP in a data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="webp", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getbuffer()).decode()}"


def spread(n_frames: int, at_most: int) -> list[int]:
    """Return up to `at_most` frames of `n_frames`, the first and the last among them, evenly spread."""
    chosen: Sequence[float] = np.linspace(0, n_frames - 1, min(n_frames, at_most)).tolist()
    return sorted({round(place) for place in chosen})
