"""The folder of a run: what settings it belongs to, and which videos are finished.

`progress/run.json` holds the settings; `progress/videos/VIDEO.json`, written under a temporary name and
renamed when everything else of a video is there, is its commit mark and holds its score rows. A folder with
other settings is refused, or cleared when asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.core.files import inside, make_folder, output_errors, read_json
from cosettle_cache.core.settings import differing, digest, flat_text, package_versions
from cosettle_cache.core.tables import write_json
from cosettle_cache.core.types import EvalProtocol, Score, Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.metrics.rows import rows_of_wide
from cosettle_cache.pictures.drawing import SIDE_BY_SIDE
from cosettle_cache.store import FeatureStore

#: Of the marks below; raised when they change.
VERSION = 1
OVERLAY_FOLDER, PROGRESS_FOLDER = "overlays", "progress"
#: Folders beside those of the kinds of tokens, and the film beside theirs.
RESERVED = (OVERLAY_FOLDER, PROGRESS_FOLDER, SIDE_BY_SIDE)
_DRAWN, _SETTINGS_FILE = ".drawn", "run.json"
#: Fields of the protocol that version 0.1 did not have, and what it did.
_UNSAID = {"resampling": "linear", "rim": "shape", "upsampling": "bilinear", "later_objects": "fail"}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where one run's results lie; a mark's `labels` tell the annotations apart that it started from."""

    path: Path

    @property
    def progress(self) -> Path:
        """Settings and marks."""
        return self.path / PROGRESS_FOLDER

    def pictures(self, video_id: str) -> Path:
        """Return the folder of a video's pictures."""
        return inside(self.path / OVERLAY_FOLDER, video_id)

    def settings(self) -> Any:
        """Return what `begin` wrote, None where nothing is; raise `InputError` when it is something else."""
        path = self.progress / _SETTINGS_FILE
        found = read_json(path) if path.exists() else None
        try:
            whole = found is None or (
                {"task", "protocol.name"} <= found["origin"].keys()
                and isinstance(found["kinds"], list)
                and all(isinstance(name, str) for name in found["kinds"])
            )
        except (AttributeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise InputError(f"{path} holds no settings of a run", hint="choose another folder with --out")
        return found

    def begin(self, origin: Mapping[str, Any], kinds: Sequence[str], restart: bool) -> None:
        """Take the folder for a run; raise `FingerprintError` when it belongs to other settings.

        Raises `InputError` for settings that cannot be read. With `restart` what an earlier run left is
        removed first.
        """
        wanted, found = flat_text(origin), self.settings()
        unsaid = flat_text({"protocol": _UNSAID})
        if restart and found is not None:
            # Marks first: whatever is left then, if this is cut short, counts for nothing.
            names = (f"{PROGRESS_FOLDER}/videos", OVERLAY_FOLDER, *found["kinds"], PROGRESS_FOLDER)
            for path in [inside(self.path, name) for name in names]:
                with output_errors(path):
                    if path.is_symlink():
                        path.unlink()
                    elif path.exists():
                        shutil.rmtree(path)
        elif found is not None and (details := differing(wanted, unsaid | found["origin"])):
            raise FingerprintError(
                f"{self.path} holds results of other settings",
                details=details,
                hint="choose another folder with --out, or start this one anew with --restart",
            )
        write_json(self.progress / _SETTINGS_FILE, {"origin": wanted, "kinds": list(kinds)})

    def finished(self, video: Video, data_root: Path) -> tuple[Score, ...] | None:
        """Return the rows of a finished video; None where files are gone or annotations have changed."""
        try:
            mark = read_json(self._mark(video.video_id))
            rows, files, labels = mark["scores"], mark["files"], mark["labels"]
            # Version 0.1 wrote rows with a column per figure.
            wide = any("figures" not in row for row in rows)
            scores = tuple(map(_in_full, rows_of_wide(rows) if wide else map(Score.from_json, rows)))
            there = all((self.path / name).is_file() for name in files)
        except (InputError, AttributeError, KeyError, TypeError, ValueError):
            return None  # no mark, a damaged one, or one of another version: to be done
        return scores if there and labels == labels_stamp(video, data_root) else None

    def reopen(self, video_id: str) -> None:
        """Forget that a video was finished, before anything of it is written."""
        for path in (self._mark(video_id), self.pictures(video_id) / _DRAWN):
            with output_errors(path):
                path.unlink(missing_ok=True)

    def finish(self, video: Video, data_root: Path, files: Sequence[Path], scores: Sequence[Score]) -> None:
        """Mark a video as finished."""
        document = {
            "labels": labels_stamp(video, data_root),
            "files": [path.relative_to(self.path).as_posix() for path in files],
            "scores": [asdict(score) for score in scores],
        }
        write_json(self._mark(video.video_id), document)

    def is_drawn(self, video_id: str) -> bool:
        """Say whether all pictures of a video are there."""
        return (self.pictures(video_id) / _DRAWN).is_file()

    def finish_pictures(self, video_id: str) -> None:
        """Mark the pictures of a video as complete."""
        path = make_folder(self.pictures(video_id)) / _DRAWN
        with output_errors(path):
            path.touch()

    def _mark(self, video_id: str) -> Path:
        path = inside(self.progress / "videos", video_id)
        return path.with_name(f"{path.name}.json")


def _in_full(row: Score) -> Score:
    protocol = _UNSAID | json.loads(row.protocol_json)
    return replace(row, protocol_json=json.dumps(protocol, sort_keys=True))


def run_origin(
    store: FeatureStore, task: str, protocol: EvalProtocol, kinds: Sequence[TokenKind]
) -> dict[str, Any]:
    """Return everything that decides the results of a run."""
    return {
        "version": VERSION,
        "task": task,
        "protocol": protocol.to_json(),
        "projections": {kind.name: kind.sha256 for kind in kinds if kind.projection is not None},
        "store": store.fingerprint.to_json(),
        "versions": package_versions(),
    }


def labels_stamp(video: Video, data_root: Path) -> str:
    """Return a digest of names, sizes and dates of a video's annotations: other files, another digest."""
    if video.labels is None:
        return ""
    path = data_root / video.labels
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = ((file.name, file.stat()) for file in files if file.exists())
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
