"""Index maps on disk: PNG files whose pixels are object or class numbers, with colours for the eye only.

In comes a file, out goes `[height width]` uint8, or the reverse.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.ImageFile import ImageFile

from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.files import output_errors
from cosettle_cache.videos.frames import decode_errors

#: Index of pixels that belong to nobody.
VOID = 255

Mask = UInt8[np.ndarray, "height width"]


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


def sample_mask(mask: Mask, size: tuple[int, int]) -> UInt8[np.ndarray, "_ _"]:
    """Return `mask` at `size` by Pillow's nearest neighbour, which samples the middle of target pixels."""
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


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
