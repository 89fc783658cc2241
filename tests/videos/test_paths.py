"""Functions that take a path take text as well."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cosettle_cache.core.types import LabelKind
from cosettle_cache.videos import build_manifest, open_sequence
from cosettle_cache.videos.frames import frame_names, iter_frames, probe
from cosettle_cache.videos.manifest import read_manifest, write_manifest
from cosettle_cache.videos.masks import read_mask, write_mask


def test_text_is_a_path(tmp_path):
    for folder in ("JPEGImages/480p/a", "Annotations/480p/a"):
        (tmp_path / folder).mkdir(parents=True)
    root, frames = str(tmp_path), str(tmp_path / "JPEGImages/480p/a")
    for index in range(2):
        Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(f"{frames}/{index}.jpg")
        write_mask(f"{root}/Annotations/480p/a/{index}.png", np.eye(8, 12, dtype=np.uint8))
    assert read_mask(f"{root}/Annotations/480p/a/0.png").sum() == 8
    assert frame_names(frames) == ["0.jpg", "1.jpg"]
    assert probe(frames).n_frames == 2
    manifest = build_manifest("davis", root, root).manifest
    write_manifest(f"{root}/m.parquet", manifest)
    (video,) = read_manifest(f"{root}/m.parquet")
    assert (video, video.label_kind) == (manifest.videos[0], LabelKind.MASKS)
    assert len(list(iter_frames(video, root))) == 2
    assert next(iter_frames(video, root, [1])).shape == (8, 12, 3)
    assert open_sequence(video, root).n_objects == 1
