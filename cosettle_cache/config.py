"""Settings of the rooms and the digests that identify them; no defaults live anywhere else.

A settings object is frozen and plain, so it can be printed, compared and written beside a result.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

#: Environment variable that names the data root when `--data-root` is absent.
DATA_ROOT_VARIABLE = "COSETTLE_DATA"

#: Packages whose versions can move a number; recorded with every store and score.
VERSIONED_PACKAGES = ("torch", "timm", "numpy", "opencv-python-headless", "pillow", "av")


@dataclass(frozen=True, slots=True)
class PairsSettings:
    """The paper's training recipe: `n_views` samples per clip, each two frames `gap` of the clip apart.

    `size` is pixels per side; crop scale and aspect ranges and the flip probability are the released ones.
    """

    n_views: int = 5
    gap: float = 0.15
    size: int = 224
    scale_min: float = 0.5
    scale_max: float = 1.0
    aspect_min: float = 3 / 4
    aspect_max: float = 4 / 3
    flip_probability: float = 0.5
    shift_ratio: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FramesSettings:
    """Every `every`-th frame once, resized by the size rule, plus `n_shifted` shifted encodings of each."""

    size: str = "480x880"
    every: int = 1
    n_shifted: int = 0
    shift_ratio: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Objective, optimiser and schedule; defaults are the released script's (PROTOCOLS 5.6, 7.1).

    The learning rate is `base_lr * batch_size / 256`.
    """

    head: str = "linear"
    regularizer: str = "kl"
    temperature: float = 0.03
    separability_weight: float = 3.0
    window: int = 2
    epochs: int = 5
    warmup_epochs: float = 1.0
    batch_size: int = 512
    base_lr: float = 1e-4
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_every: int = 100

    @property
    def lr(self) -> float:
        """Peak learning rate after warm-up."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True, slots=True)
class SpritesSettings:
    """The built-in clips: how many of each split, how long, and their size in pixels."""

    n_train: int = 12
    n_val: int = 4
    train_frames: int = 20
    val_frames: int = 24
    height: int = 240
    width: int = 432
    jpeg_quality: int = 90
    seed: int = 0

    @property
    def resolution(self) -> str:
        """Name of the resolution folder."""
        return f"{self.height}p"


def digest(document: Any) -> str:
    """Return the hex SHA-256 of `document` as canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_json(settings: PairsSettings | FramesSettings | TrainSettings) -> dict[str, Any]:
    """Return a settings object as plain JSON types."""
    return asdict(settings)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can move a number."""
    return {name: _version(name) for name in VERSIONED_PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def cache_folder() -> Path:
    """Return the folder for generated and downloaded files (`$XDG_CACHE_HOME/cosettle-cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cosettle-cache"
