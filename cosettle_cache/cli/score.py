"""`cosettle-cache score`: what anybody's predictions are worth on a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.options import (
    DataRoot,
    DryRun,
    Json,
    Quiet,
)
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import ExitCode, InputError, UncleanError, UsageError
from cosettle_cache.core.files import make_folder, name_folders
from cosettle_cache.core.types import Grid, Score

if TYPE_CHECKING:
    from cosettle_cache.videos.find import Data


class ScoreTask(StrEnum):
    """The benchmarks that have truth to score against."""

    DAVIS = "davis"
    VIP = "vip"
    JHMDB = "jhmdb"
    SPRITES = "sprites"


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What to score: the videos, and the folders of predictions by the names their rows get."""

    task: str
    data: Data
    folders: Mapping[str, Path]
    grid: Grid


def score(
    task: Annotated[ScoreTask, typer.Option(help="Benchmark.")],
    predictions: Annotated[list[Path], typer.Option(help="Folder of results; repeatable.")],
    data_root: DataRoot = None,
    manifest: Annotated[Path | None, typer.Option(help="Videos; default: all found.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet or CSV file of all rows.")] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file of a dot per video.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score what is complete.")] = False,
    grid: Annotated[str, typer.Option(help="Grid that predicted joints count in.")] = "20x20",
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Score masks, parts or joints in a benchmark's own output format.

    Example: cosettle-cache score --task davis --predictions results --data-root /data
    """
    talk = Talk(quiet=quiet)
    request = ScoreRequest(
        task.value, _data(task, manifest, data_root), name_folders(predictions), _grid(grid)
    )
    problems = _problems(request, talk)
    _refuse_incomplete(request, problems, partial=partial)
    if dry_run:
        talk.result(f"{len(request.data.manifest) - len(problems)} videos can be scored")
        return int(ExitCode.DONE)
    for path in filter(None, (out, chart)):
        make_folder(path.parent)
    scores, failures = _score(request, frozenset(problems), talk)
    left_out = {**{video_id: "; ".join(lines) for video_id, lines in problems.items()}, **failures}
    _report(scores, left_out, talk, as_json)
    _write(scores, out, chart, talk)
    if left_out:
        details = [f"{what}: {reason}" for what, reason in left_out.items()]
        raise UncleanError(f"{len(left_out)} videos were not scored", details=details)
    return int(ExitCode.DONE)


def _data(task: ScoreTask, manifest: Path | None, data_root: Path | None) -> Data:
    from cosettle_cache.videos.find import benchmark_data, manifest_data, sprites_data

    if manifest is not None:
        return manifest_data(manifest, data_root)
    return sprites_data("val") if task is ScoreTask.SPRITES else benchmark_data(task.value, data_root)


def _grid(text: str) -> Grid:
    try:
        return Grid.parse(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no grid", wanted="ROWSxCOLS, as 20x20") from error


def _problems(request: ScoreRequest, talk: Talk) -> dict[str, list[str]]:
    """Return by video id what is wrong with its predictions, in any of the folders."""
    from cosettle_cache.propagation.score import find_problems

    problems: dict[str, list[str]] = {}
    for name, folder in request.folders.items():
        progress = talk.progress(f"check {name}")
        data = request.data
        found = find_problems(
            request.task, data.manifest, data.root, folder, grid=request.grid, progress=progress
        )
        for video_id, lines in found.items():
            problems.setdefault(video_id, []).extend(_prefixed(lines, name, len(request.folders)))
        if list(folder.glob("*results-*.csv")):
            talk.note(f"{folder} holds CSV results of another tool: they are not read")
    return problems


def _prefixed(lines: Sequence[str], name: str, n_folders: int) -> list[str]:
    return [f"{name}: {line}" if n_folders > 1 else line for line in lines]


def _refuse_incomplete(
    request: ScoreRequest, problems: Mapping[str, Sequence[str]], *, partial: bool
) -> None:
    """Raise `InputError` that lists everything, unless the rest may be scored and there is one."""
    n_videos = len(request.data.manifest)
    if problems and (not partial or len(problems) == n_videos):
        raise InputError(
            f"{len(problems)} of {n_videos} videos cannot be scored",
            details=[f"{video_id}: {line}" for video_id, lines in problems.items() for line in lines],
            hint="--partial scores the others" if len(problems) < n_videos else None,
        )


def _score(
    request: ScoreRequest, leave_out: frozenset[str], talk: Talk
) -> tuple[list[Score], dict[str, str]]:
    from cosettle_cache.propagation.score import score_predictions

    scores: list[Score] = []
    failures = dict(request.data.failures)
    for name, folder in request.folders.items():
        scoring = score_predictions(
            request.task,
            request.data.manifest,
            request.data.root,
            folder,
            name=name,
            leave_out=leave_out,
            grid=request.grid,
            progress=talk.progress(f"score {name}"),
        )
        scores += scoring.scores
        failures |= {f"{name}/{video_id}": reason for video_id, reason in scoring.failures.items()}
    return scores, failures


def _report(scores: Sequence[Score], left_out: Mapping[str, str], talk: Talk, as_json: bool) -> None:

    from cosettle_cache.metrics.rows import score_table, summary_json

    if as_json:
        document = {"complete": not left_out, "left_out": dict(left_out), **summary_json(scores)}
        talk.result(json.dumps(document, indent=2))
    elif scores:
        talk.table(f"{scores[0].dataset}: percent", *score_table(scores))


def _write(scores: Sequence[Score], out: Path | None, chart: Path | None, talk: Talk) -> None:
    from cosettle_cache.metrics.rows import write_rows
    from cosettle_cache.propagation.run import write_score_chart

    for what, path, write in (("rows", out, write_rows), ("chart", chart, write_score_chart)):
        if path is not None:
            write(path, scores)
            talk.note(f"{what}: {path}")
