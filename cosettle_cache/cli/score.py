"""`cosettle-cache score`: what anybody's predictions are worth on a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosettle_cache.cli.options import DataRoot, Mode, check_clean
from cosettle_cache.core.console import Talk
from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.files import make_folder, name_folders
from cosettle_cache.core.types import Grid, Score
from cosettle_cache.propagation.tasks import TASKS

if TYPE_CHECKING:
    from cosettle_cache.videos.find import Data

#: Surplus folders that a note names.
_LISTED = 8
#: The tasks that have truth to score against.
_TASKS = [name for name, row in TASKS.items() if row.score is not None]


def score(
    task: Annotated[str, typer.Option(metavar=f"[{'|'.join(_TASKS)}]", help="Benchmark.")],
    predictions: Annotated[list[Path], typer.Option(help="Folder of results; repeatable.")],
    mode: Mode,
    data_root: DataRoot = None,
    manifest: Annotated[Path | None, typer.Option(help="Videos; default: all found.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet or CSV file of all rows.")] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file of a dot per video.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score what is complete.")] = False,
    grid: Annotated[str, typer.Option(help="Grid that predicted joints count in.")] = "20x20",
) -> None:
    """Score masks, parts or joints in a benchmark's own output format.

    Example: cosettle-cache score --task davis --predictions results --data-root /data
    """
    from cosettle_cache.metrics.rows import score_table, summary_json, write_rows
    from cosettle_cache.propagation.run import write_score_chart
    from cosettle_cache.propagation.score import score_predictions

    talk, folders = Talk(quiet=mode.quiet), name_folders(predictions)
    _check_files(out, chart, manifest)
    data, cells = _find_videos(task, manifest, data_root), _parse_grid(grid)
    left_out = _check(task, data, folders, cells, partial=partial, talk=talk)
    if mode.dry_run:
        talk.result(f"{len(data.manifest) - len(left_out)} videos can be scored")
        return
    for file in filter(None, (out, chart)):
        make_folder(file.parent)
    scores, failures = list[Score](), {**left_out, **data.failures}
    for name, folder in folders.items():
        rows, unscored = score_predictions(
            task,
            data.manifest,
            data.root,
            folder,
            name=name,
            leave_out=left_out,
            grid=cells,
            progress=talk.progress(f"score {name}"),
        )
        scores += rows
        failures |= {f"{name}/{video_id}": reason for video_id, reason in unscored.items()}
    if mode.as_json:
        document = {"complete": not failures, "left_out": failures, **summary_json(scores)}
        talk.json(document)
    elif scores:
        talk.table(f"{scores[0].provenance.dataset}: percent", *score_table(scores))
    if out is not None:
        write_rows(out, scores)
        talk.note(f"rows: {out}")
    if chart is not None:
        write_score_chart(scores, chart)
        talk.note(f"chart: {chart}")
    check_clean(failures, f"{len(failures)} videos were not scored")


def _check_files(out: Path | None, chart: Path | None, manifest: Path | None) -> None:
    """Raise `UsageError` for a file to write that is none of ours."""
    from cosettle_cache.metrics.rows import check_rows

    if out is not None:
        check_rows(out, [manifest])
    if chart is not None:
        from cosettle_cache.pictures.charts import check_chart  # with matplotlib

        check_chart(chart, [manifest, out])


def _find_videos(task: str, manifest: Path | None, data_root: Path | None) -> Data:
    from cosettle_cache.propagation.score import find_scored
    from cosettle_cache.videos.find import benchmark_data, manifest_data, sprites_data

    folder = find_scored(task).folder
    if manifest is not None:
        return manifest_data(manifest, data_root)
    return sprites_data("val") if task == "sprites" else benchmark_data(folder, data_root)


def _parse_grid(text: str) -> Grid:
    try:
        return Grid.parse(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no grid", wanted="ROWSxCOLS, as 20x20") from error


def _check(
    task: str, data: Data, folders: Mapping[str, Path], grid: Grid, *, partial: bool, talk: Talk
) -> dict[str, str]:
    """Return by video id why it cannot be scored, in any of the folders.

    Raises `InputError` that lists everything, unless the rest may be scored and there is one.
    """
    from cosettle_cache.propagation.score import find_problems, surplus_folders

    problems: dict[str, list[str]] = {}
    for name, folder in folders.items():
        progress = talk.progress(f"check {name}")
        prefix = f"{name}: " if len(folders) > 1 else ""
        found = find_problems(task, data.manifest, data.root, folder, grid=grid, progress=progress)
        for video_id, lines in found.items():
            problems.setdefault(video_id, []).extend(prefix + line for line in lines)
        if any(folder.glob("*results-*.csv")):
            talk.note(f"{folder} holds CSV results of another tool: they are not read")
        if others := surplus_folders(data.manifest, folder):
            names = ", ".join(others[:_LISTED]) + (" ..." if len(others) > _LISTED else "")
            talk.note(f"{folder} holds {len(others)} folders of no video: {names}")
    n_videos = len(data.manifest)
    if problems and (not partial or len(problems) == n_videos):
        raise InputError(
            f"{len(problems)} of {n_videos} videos cannot be scored",
            details=[f"{video_id}: {line}" for video_id, lines in problems.items() for line in lines],
            hint="--partial scores the others" if len(problems) < n_videos else None,
        )
    return {video_id: "; ".join(lines) for video_id, lines in problems.items()}
