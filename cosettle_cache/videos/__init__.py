"""Videos: manifests, decoding, folder layouts of data sets and their labels.

In comes a folder in a public layout, out goes a manifest of it and, for evaluation, the labels of its videos.
The table of data sets costs nothing to import; decoders and readers are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_cache.core import lazy_names
from cosettle_cache.videos.datasets import DATASETS, DataSet

if TYPE_CHECKING:
    from cosettle_cache.videos.build import BuildResult, build_manifest
    from cosettle_cache.videos.jhmdb import JointSequence, open_joints
    from cosettle_cache.videos.masks import DavisSequence, PartSequence, open_parts, open_sequence

__all__ = [
    "DATASETS",
    "BuildResult",
    "DataSet",
    "DavisSequence",
    "JointSequence",
    "PartSequence",
    "build_manifest",
    "open_joints",
    "open_parts",
    "open_sequence",
]

_HOMES = {
    **dict.fromkeys(("BuildResult", "build_manifest"), "build"),
    **dict.fromkeys(("DavisSequence", "PartSequence", "open_parts", "open_sequence"), "masks"),
    **dict.fromkeys(("JointSequence", "open_joints"), "jhmdb"),
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
