"""Check a manifest against the disk: every frame and annotation it promises, before an encoder starts."""

from __future__ import annotations

from pathlib import Path

from cosettle_cache.console import Progress
from cosettle_cache.datasets.davis import open_sequence
from cosettle_cache.errors import MediaError
from cosettle_cache.frames import iter_frames, probe
from cosettle_cache.types import LabelKind, Manifest, Video


def check_media(manifest: Manifest, data_root: Path, *, decode: bool, progress: Progress) -> dict[str, str]:
    """Return a reason for every video that does not hold what its row says.

    Sizes and counts are compared always; with `decode` every frame is decoded and every mask is read too.
    """
    problems: dict[str, str] = {}
    progress.start(len(manifest), "videos")
    try:
        for video in manifest:
            try:
                _check_video(video, data_root, decode)
            except MediaError as error:
                problems[video.video_id] = error.summary
            progress.advance()
    finally:
        progress.finish()
    return problems


def _check_video(video: Video, data_root: Path, decode: bool) -> None:
    info = probe(data_root / video.media)
    if info.n_frames < video.first_frame + video.n_frames:
        last = video.first_frame + video.n_frames
        raise MediaError(
            f"{video.media} ends early", wanted=f"{last} frames", found=f"{info.n_frames} frames"
        )
    if (info.height, info.width) != (video.height, video.width):
        raise MediaError(
            f"{video.media} has another size",
            wanted=f"{video.height}x{video.width}",
            found=f"{info.height}x{info.width}",
        )
    if decode:
        for _ in iter_frames(video, data_root):
            pass
    if video.label_kind is LabelKind.MASKS:
        sequence = open_sequence(video, data_root)
        for index in range(video.n_frames if decode else 1):
            sequence.mask(index)
