"""Check a manifest against the disk: every frame and annotation it promises, before an encoder starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cosettle_cache.core.console import Progress
from cosettle_cache.core.errors import MediaError
from cosettle_cache.core.types import Manifest, Video
from cosettle_cache.videos.build import count_labels
from cosettle_cache.videos.frames import MediaInfo, iter_frames, probe


def check_media(manifest: Manifest, data_root: Path, *, decode: bool, progress: Progress) -> dict[str, str]:
    """Return a reason for every video that does not hold what its row says.

    Sizes and counts are compared as far as the row knows them; with `decode` every frame is decoded and every
    mask is read too.
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
    video = _measured(video, probe(data_root / video.media))
    if decode:
        for _ in iter_frames(video, data_root):
            pass
    if video.label_kind is not None:
        _, n_labelled = count_labels(video, data_root, decode=decode)
        if n_labelled < video.labelled_frames:
            raise MediaError(
                f"{video.labels} lacks annotations",
                wanted=f"{video.labelled_frames} annotated frames",
                found=f"{n_labelled} annotated frames",
            )


def _measured(video: Video, info: MediaInfo) -> Video:
    """Return the row with what it did not know filled in; raise `MediaError` where it knew otherwise."""
    n_frames = video.n_frames or info.n_frames - video.first_frame
    if not 0 < video.first_frame + n_frames <= info.n_frames:
        raise MediaError(
            f"{video.media} ends early",
            wanted=f"{video.first_frame + n_frames} frames",
            found=f"{info.n_frames} frames",
        )
    size = (video.height or info.height, video.width or info.width)
    if size != (info.height, info.width):
        raise MediaError(
            f"{video.media} has another size",
            wanted=f"{size[0]}x{size[1]}",
            found=f"{info.height}x{info.width}",
        )
    return replace(video, n_frames=n_frames, height=info.height, width=info.width)
