"""Everything that propagating the videos of a run takes, as one value that can be sent to other processes."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import EvalProtocol, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.propagation.checks import input_size
from cosettle_cache.propagation.folder import RunFolder
from cosettle_cache.propagation.tasks.base import Setting
from cosettle_cache.store import FeatureStore


@dataclass(frozen=True, slots=True)
class VideoWork:
    """What a run is about; pickling it sends settings and paths only.

    `device` None is the worker's choice. `memory_limit` bounds the search of all kinds together, in bytes;
    `neighbors` is the folder where neighbour lists are kept and looked for.
    """

    store: FeatureStore
    data_root: Path
    protocol: EvalProtocol
    folder: RunFolder
    task: str
    kinds: tuple[TokenKind, ...]
    search: str
    device: str | None
    memory_limit: int | None
    neighbors: Path | None

    @property
    def videos(self) -> tuple[Video, ...]:
        """The manifest; videos go by their number in it."""
        return self.store.manifest.videos

    @property
    def search_bytes(self) -> int | None:
        """The bytes that the search of one kind of tokens may take."""
        return None if self.memory_limit is None else self.memory_limit // len(self.kinds)

    def check_places(self) -> None:
        """Raise `InputError` on a machine that does not see the data or the output under the run's paths."""
        for path, what in ((self.data_root, "the data root"), (self.folder.progress, "the output folder")):
            if not path.is_dir():
                raise InputError(
                    f"{path} is not a folder on {platform.node()}",
                    wanted=f"{what} under the same path on every worker",
                )

    def setting(self, number: int) -> Setting:
        """Return what labels and maps of a video depend on."""
        video = self.videos[number]
        size = input_size(self.protocol.size, video)
        return Setting(self.protocol, size, self.store.grid(video.video_id), number)

    def torch_device(self) -> torch.device:
        """Return where to compute."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
