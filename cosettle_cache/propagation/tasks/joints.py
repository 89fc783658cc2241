"""Joints: one pickled `[2 joint frame]` per clip in cells of the grid, PCK in two readings (PROTOCOLS 2).

In come a clip with joints and its label maps; out go `NUMBER.dat`, as the released scripts write it, the same
as `CLIP.npy`, and one row. Without annotations beyond the first frame nothing is scored.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from cosettle_cache.core.files import make_folder, write_durably
from cosettle_cache.core.types import Score, Video
from cosettle_cache.metrics.rows import clip_row
from cosettle_cache.pictures.drawing import draw_joints, write_overlays
from cosettle_cache.propagation.labels import LabelMap, decode_keypoints, encode_keypoints
from cosettle_cache.propagation.tasks.base import Drawing, Predictions, Setting, Subject
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.jhmdb import cells_to_pixels, open_joints, pixels_to_cells, write_predicted_joints

#: Joints of one frame: x, then y, in cells.
Cells = Float32[np.ndarray, "2 joint"]


def open_joint_clip(video: Video, data_root: Path, setting: Setting) -> Subject:
    """Return a clip with joints; raise `MediaError` for annotations that cannot be used."""
    sequence = open_joints(video, data_root)
    size = (video.height, video.width)
    first = pixels_to_cells(sequence.joints[:, :, 0], size, setting.grid)

    def decode(label_map: LabelMap) -> Cells:
        return decode_keypoints(label_map, n_cells=setting.protocol.keypoint_top_k).cpu().numpy()

    def begin(folder: Path) -> Predictions:
        by_name, by_number = folder / f"{video.video_id}.npy", folder / f"{setting.number}.dat"
        make_folder(by_name.parent)
        points: list[Cells] = []

        def write(index: int, prediction: Cells) -> None:
            points.append(prediction)
            if len(points) == video.n_frames:
                buffer = io.BytesIO()
                np.save(buffer, np.stack(points, axis=-1))
                write_durably(by_name, [buffer.getbuffer()])
                write_predicted_joints(by_number, np.stack(points, axis=-1))

        def rows(row: Score) -> list[Score]:
            if sequence.joints.shape[2] < 2:
                return []
            found = cells_to_pixels(np.stack(points, axis=-1), size, setting.grid)
            return [clip_row(row, sequence.joints, found, size)]

        return Predictions([by_name, by_number], write, rows=rows)

    # No frame has a truth of its own: joints are scored when all are there.
    return Subject(encode_keypoints(first, setting.grid), lambda index: None, decode, begin)


def draw_joint_clip(drawing: Drawing) -> None:
    """Draw the skeletons of every kind over the frames."""
    video = drawing.video
    size, grid = (video.height, video.width), drawing.setting.grid
    truth = open_joints(video, drawing.data_root).joints
    found = {kind: np.load(folder / f"{video.video_id}.npy") for kind, folder in drawing.predictions.items()}
    frames = range(video.n_frames)
    write_overlays(
        iter_frames(video, drawing.data_root),
        {
            kind: (cells_to_pixels(points[:, :, frame], size, grid) for frame in frames)
            for kind, points in found.items()
        },
        draw_joints,
        truth=(truth[:, :, frame] if frame < truth.shape[2] else None for frame in frames),
        n_frames=video.n_frames,
        fps=video.fps,
        folder=drawing.folder,
    )
