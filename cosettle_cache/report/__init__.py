"""The report: one HTML file that shows what runs did, to be looked at anywhere and sent to anybody.

Folders of runs come in (and, for the affinity explorer, a store and projections), the text of a page with
everything inside goes out. Sections appear where their data are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.core.files import make_folder, write_durably
from cosettle_cache.report.explorer import Tokens, explorer_section, make_tokens
from cosettle_cache.report.overlays import overlay_section
from cosettle_cache.report.page import Media, Shown, assemble, encode
from cosettle_cache.report.runs import Runs, holds_run, read_runs
from cosettle_cache.report.sections import (
    curves_section,
    overview_section,
    plane_section,
    provenance_section,
    score_section,
)

__all__ = [
    "Limits",
    "Media",
    "Runs",
    "Tokens",
    "holds_run",
    "make_report",
    "make_tokens",
    "read_runs",
    "write_report",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the size of the file: videos with pictures per run, and frames of each."""

    n_videos: int = 3
    max_frames: int = 24


@dataclass(frozen=True, slots=True)
class Report:
    """The page, and the videos that it could not show, with reasons."""

    text: str
    failures: tuple[str, ...]


def make_report(runs: Runs, media: Media, tokens: Tokens | None, limits: Limits, title: str) -> Report:
    """Return the page; with `tokens`, whose frames are in `media`, it has an affinity explorer."""
    shown = _sections(runs, media, tokens, limits)
    sections = [item.section for item in shown if item.section is not None]
    return Report(assemble(title, sections), tuple(text for item in shown for text in item.failures))


def write_report(path: Path, report: Report) -> int:
    """Write the page; return its size in bytes. Raises `OutputError` when it cannot be written."""
    data = encode(report.text)
    make_folder(path.parent)
    write_durably(path, [data])
    return len(data)


def _sections(runs: Runs, media: Media, tokens: Tokens | None, limits: Limits) -> list[Shown]:
    scored = [run for run in runs.scored if run.scores]
    shown = [Shown(overview_section(scored))] if len(scored) > 1 else []
    for number, run in enumerate(runs.scored):
        shown.append(Shown(score_section(run, number)))
        shown.append(overlay_section(run, number, media, limits.n_videos, limits.max_frames))
    if tokens is not None:
        shown.append(explorer_section(tokens, media, scored, limits.n_videos, limits.max_frames))
    shown.append(Shown(plane_section(runs.analyzed)))
    shown += [Shown(curves_section(run, number)) for number, run in enumerate(runs.trained)]
    shown.append(Shown(provenance_section(runs, tokens.provenance() if tokens else {})))
    return shown
