"""Where the frames of a report's pictures are, and what came of showing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from cosettle_cache.core.types import Video


@dataclass(frozen=True, slots=True)
class Media:
    """Videos by id and the folder that their paths are relative to; empty when nobody says where they are."""

    videos: Mapping[str, Video]
    root: Path


@dataclass(frozen=True, slots=True)
class Shown:
    """A section, if there is something to show, and the videos that could not be shown, with reasons."""

    section: Element | None
    failures: tuple[str, ...] = ()
