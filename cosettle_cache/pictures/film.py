"""Pictures in a row: an MP4 that is written frame by frame, and which frames also become stills.

Frames go in one after the other; nothing is kept beyond the frame in hand.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from cosettle_cache.core.errors import OutputError
from cosettle_cache.core.files import output_errors, temporary_name, write_durably
from cosettle_cache.videos.frames import Image8, check_av

try:
    import av
except ImportError:  # `check_av` says so
    av = None  # type: ignore[assignment]

#: Frames per second where the source does not say; DAVIS was filmed at 24.
_USUAL_FPS = 24.0
#: A third of the usual preset's time for a tenth more bytes.
_H264 = {"preset": "veryfast", "crf": "20"}


def still_frames(n_frames: int, at_most: int = 4) -> list[int]:
    """Return up to `at_most` of the frames: first, last, and evenly between."""
    return sorted({round(place) for place in np.linspace(0, n_frames - 1, min(n_frames, at_most))})


class Movie:
    """An MP4, or WebP by its name, that gets the name when whole; odd sizes lose their last row or column."""

    def __init__(self, path: Path, fps: float | None) -> None:
        self._path, self._temporary = path, temporary_name(path)
        self._rate = Fraction(fps or _USUAL_FPS).limit_denominator(1001)
        self._is_webp = path.suffix == ".webp"
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Movie:
        check_av(self._path)
        # A loop of 0 rounds never ends.
        layout, options = ("webp", {"loop": "0"}) if self._is_webp else ("mp4", {})
        with output_errors(self._path):
            self._container = av.open(str(self._temporary), "w", format=layout, options=options)
        return self

    def add(self, image: Image8) -> None:
        """Append one frame; the first decides the size."""
        height, width = (side // 2 * 2 for side in image.shape[:2])
        if self._stream is None:
            self._stream = self._open_stream(height, width)
        cropped = np.ascontiguousarray(image[:height, :width])
        self._encode(av.VideoFrame.from_ndarray(cropped, format="rgb24"))

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        # Some builds of FFmpeg lack H.264; every build has MPEG-4.
        codec, options = ("libx264", _H264) if "libx264" in av.codecs_available else ("mpeg4", {})
        if self._is_webp:
            codec, options = "libwebp_anim", {}
            if codec not in av.codecs_available:
                raise OutputError("this build of FFmpeg cannot write WebP", wanted=codec, hint="--film mp4")
        stream = self._container.add_stream(codec, rate=self._rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # Pictures are drawn beside something that needs the cores more.
        stream.codec_context.thread_count = 1
        return stream

    def _encode(self, frame: av.VideoFrame | None) -> None:
        assert self._stream is not None
        with output_errors(self._path):
            self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._encode(None)
            with output_errors(self._path):
                self._container.close()
                if kind is None:
                    self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


class Film(Movie):
    """`folder/NAME.mp4` of all pictures and `folder/NAME_FRAME.png` of four, as they come."""

    def __init__(self, folder: Path, name: str, n_frames: int, fps: float | None) -> None:
        super().__init__(folder / f"{name}.mp4", fps)
        self._stills, self._n_added = frozenset(still_frames(n_frames)), 0

    def add(self, image: Image8) -> None:
        """Append one picture."""
        super().add(image)
        if self._n_added in self._stills:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            still = self._path.with_name(f"{self._path.stem}_{self._n_added:05d}.png")
            write_durably(still, [buffer.getbuffer()])
        self._n_added += 1
