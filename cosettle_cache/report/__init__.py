"""The report: one HTML file that shows what runs did, to be looked at anywhere and sent to anybody.

Folders of runs come in (and, for the affinity explorer, a store and projections), a page with everything
inside goes out. Sections appear where their data are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from cosettle_cache.core.files import make_folder, write_durably
from cosettle_cache.heads.kinds import load_heads
from cosettle_cache.report.explorer import Tokens, explorer_section, make_tokens
from cosettle_cache.report.overlays import overlay_section
from cosettle_cache.report.page import Media, assemble, check_page
from cosettle_cache.report.runs import Runs, holds_run, read_runs
from cosettle_cache.report.sections import (
    curves_section,
    overview_section,
    plane_section,
    provenance_section,
    score_section,
)
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.find import media_root

__all__ = ["Contents", "Written", "check_page", "holds_run", "open_contents", "write_report"]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a report is made of: runs, frames, and with a store the tokens of the affinity explorer."""

    runs: Runs
    media: Media
    tokens: Tokens | None

    def to_json(self) -> dict[str, Any]:
        """Return what there is to show, by the names of runs."""
        found: dict[str, Any] = {}
        for scored in self.runs.scored:
            n_videos = len({score.video_id for score in scored.scores})
            found.setdefault(scored.name, {})["scores"] = {"videos": n_videos, "tokens": list(scored.tokens)}
        for trained in self.runs.trained:
            found.setdefault(trained.name, {})["steps"] = trained.n_steps
        return {"runs": found, "explorer": self.tokens.to_json() if self.tokens else None}


@dataclass(frozen=True, slots=True)
class Written:
    """The size of the file, and the videos that it could not show, with reasons."""

    n_bytes: int
    failures: Sequence[str]


def open_contents(
    folders: Mapping[str, Path],
    store: FeatureStore | None = None,
    projections: Sequence[Path] = (),
    data_root: Path | None = None,
) -> Contents:
    """Return what folders of runs hold, and `store` adds; raise `InputError` for any that does not fit."""
    runs = read_runs(folders)
    if store is None:
        return Contents(runs, Media({}, Path()), None)
    tokens = make_tokens(store, load_heads(projections, store))
    videos = {video.video_id: video for video in store.manifest}
    return Contents(runs, Media(videos, media_root(store.manifest, data_root)), tokens)


def write_report(path: Path, contents: Contents, n_videos: int = 3, max_frames: int = 24) -> Written:
    """Write the page, with pictures of up to `n_videos` videos of every run and `max_frames` of each.

    Raises `OutputError` when it cannot be written, `UsageError` where another file is (see `check_page`).
    """
    check_page(path)
    names = list(contents.to_json()["runs"])
    title = f"Report: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    runs, media, tokens = contents.runs, contents.media, contents.tokens
    scored = [run for run in runs.scored if run.scores]
    sections, failures = list[Element | None](), list[str]()
    if len(scored) > 1:
        sections.append(overview_section(scored))
    for number, run in enumerate(runs.scored):
        pictures, failed = overlay_section(run, number, media, n_videos, max_frames)
        sections += [score_section(run, number), pictures]
        failures += failed
    if tokens is not None:
        explorer, failed = explorer_section(tokens, media, scored, n_videos, max_frames)
        sections.append(explorer)
        failures += failed
    sections.append(plane_section(runs.analyzed))
    sections += [curves_section(run, number) for number, run in enumerate(runs.trained)]
    sections.append(provenance_section(runs, tokens.provenance() if tokens else {}))
    data = assemble(title, [item for item in sections if item is not None])
    make_folder(path.parent)
    write_durably(path, [data])
    return Written(len(data), failures)
