"""Tiny real stores of labelled videos: a class is a direction, and time moves tokens along another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from store_cases import Case, frames_case

from cosettle_cache.core.types import Slot

DIM = 8


@dataclass(frozen=True)
class LabelledCase(Case):
    """Tokens are centre of the class (or of the frame's own class) + place in time * drift + noise."""

    n_frames: Mapping[str, int] = field(default_factory=dict)
    frame_classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    noise: float = 0.3
    drift: float = 0.5

    def slot_tokens(self, slot: Slot) -> np.ndarray:
        centres = np.random.default_rng(7).standard_normal((6, DIM))
        directions = np.random.default_rng(8).standard_normal((6, DIM))
        names = sorted({video.class_name or "" for video in self.manifest})
        classes = {video.video_id: names.index(video.class_name or "") for video in self.manifest}
        noise = super().slot_tokens(slot).astype(np.float64) * self.noise
        for number, encoding in enumerate(slot.encodings):
            name, frame = encoding.video_id, encoding.frame
            of_frames = self.frame_classes.get(name)
            number_of = classes[name] if of_frames is None else of_frames[frame]
            when = frame / max(self.n_frames[name] - 1, 1) - 0.5
            noise[number] += centres[number_of] + self.drift * when * directions[number_of]
        return noise.astype(np.float16)


def labelled_case(
    sizes: Mapping[str | None, int],
    *,
    n_frames: int = 6,
    every: int = 1,
    splits: Sequence[str] = ("",),
    noise: float = 0.3,
    drift: float = 0.5,
    frame_classes: Mapping[str, Sequence[int]] | None = None,
) -> LabelledCase:
    """Return a case with so many videos of each class (None: without one); splits take turns."""
    rows = [(f"{name}/{number}", name) for name, size in sizes.items() for number in range(size)]
    plain = frames_case([(video_id, n_frames, 2, 2) for video_id, _ in rows], dim=DIM, every=every)
    videos = tuple(
        replace(video, class_name=name, split=splits[number % len(splits)], dataset="made")
        for number, (video, (_, name)) in enumerate(zip(plain.manifest, rows, strict=True))
    )
    return LabelledCase(
        replace(plain.manifest, videos=videos),
        plain.plan,
        n_frames={video.video_id: video.n_frames for video in videos},
        frame_classes=frame_classes or {},
        noise=noise,
        drift=drift,
    )


def write_frame_labels(
    root: Path, truth: Mapping[str, Sequence[str]], train: Sequence[str], test: Sequence[str]
) -> Path:
    """Write a folder as Breakfast has it."""
    for name in ("groundTruth", "splits"):
        (root / name).mkdir(parents=True)
    names = list(dict.fromkeys(name for lines in truth.values() for name in lines))
    (root / "mapping.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names)))
    for video, lines in truth.items():
        (root / "groundTruth" / f"{video}.txt").write_text("".join(f"{line}\n" for line in lines))
    for part, members in (("train", train), ("test", test)):
        text = "".join(f"{name}.txt\n" for name in members)
        (root / "splits" / f"{part}.split1.bundle").write_text(text)
    return root
