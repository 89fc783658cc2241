"""Where the frames of a report's pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.types import Video


@dataclass(frozen=True, slots=True)
class Media:
    """Videos by id and the folder that their paths are relative to; empty when nobody says where they are."""

    videos: Mapping[str, Video]
    root: Path
