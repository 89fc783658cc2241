"""Score rows: figures and counts of one video become rows, rows become tables on disk and means.

On disk a table has one line per row and figure (columns `name` and `value`) with the row's whole provenance,
so a number never travels alone; a row without any figure has one line of no name. Older tables are read too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.files import output_errors, own_file
from cosettle_cache.core.tables import make_table, read_rows, write_json, write_table
from cosettle_cache.core.types import Provenance, Score, Video
from cosettle_cache.metrics import jhmdb, tapvid
from cosettle_cache.metrics.davis import DavisScorer
from cosettle_cache.metrics.jhmdb import JointCounts
from cosettle_cache.metrics.vip import Confusion, clip_miou

SCORES_FILE, SUMMARY_FILE = "scores.parquet", "summary.json"
CHART_FILE, CHART_SVG = "scores.png", "scores.svg"

#: Version of the table, in its metadata under this key; tables without it have a column per figure.
TABLE_VERSION, _VERSION_KEY = 2, "scores_table_version"
_TYPES = {
    "object_id": pa.int64(),
    "value": pa.float64(),
    "n_frames": pa.int64(),
    "boundary_tolerance_px": pa.int64(),
}
_COLUMNS = (
    *("task", "dataset", "video_id", "tokens", "object_id", "name", "value"),
    *("n_frames", "scored_size", "boundary_tolerance_px", "protocol", "protocol_json", "manifest_digest"),
    *("backbone", "weights_sha256", "projection_sha256", "versions_json", "counts_json"),
)
SCHEMA = pa.schema(
    [(name, _TYPES.get(name, pa.string())) for name in _COLUMNS], metadata={_VERSION_KEY: str(TABLE_VERSION)}
)

#: Fields that must agree within one summary; they are reported once.
PROVENANCE = (
    *("task", "dataset", "protocol", "protocol_json", "manifest_digest"),
    *("backbone", "weights_sha256", "versions_json"),
)

#: Figures by benchmark; PCK is at the benchmark's thresholds, in both readings.
J_AND_F_FIGURES = ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
PCK_FIGURES = tuple("pck_" + f"{threshold:g}".replace(".", "_") for threshold in jhmdb.THRESHOLDS)
STRICT_FIGURES = tuple(f"strict_{name}" for name in PCK_FIGURES)
TRACK_FIGURES = ("aj", "delta_avg", "oa", *(f"delta_{threshold}" for threshold in tapvid.THRESHOLDS))


def video_row(
    task: str,
    video: Video,
    tokens: str,
    protocol: str,
    settings: Mapping[str, Any],
    provenance: Provenance,
    size: tuple[int, int] | None = None,
) -> Score:
    """Return a video's row to put figures into, scored at (height, width) `size` or its own size (None)."""
    height, width = size or (video.height, video.width)
    return Score(
        task=task,
        video_id=video.video_id,
        tokens=tokens,
        n_frames=video.n_frames,
        scored_size=f"{height}x{width}",
        protocol=protocol,
        protocol_json=json.dumps(settings, sort_keys=True),
        provenance=provenance,
    )


def object_rows(
    row: Score,
    scorer: DavisScorer,
    shown: Collection[int],
    kinds: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Score]:
    """Return `row` with J and F once per object, of those `shown` in the first true mask.

    Where its numbers have gaps, the official tool also counts the numbers between, as objects that are never
    there and so always right; they get no row here. `kinds` has the `category`, whether `seen` in training.
    """
    row = replace(row, boundary_tolerance_px=scorer.tolerance)
    found = {item.object_id: item for item in scorer.finish() if item.object_id in shown}
    return [
        replace(
            row,
            object_id=number,
            figures={name: getattr(item, name) for name in J_AND_F_FIGURES},
            counts_json=_compact(kinds[number]) if number in kinds else "",
        )
        for number, item in found.items()
    ]


def parts_row(row: Score, confusion: Confusion) -> Score:
    """Return `row` with the parts of one clip."""
    found = confusion.score()
    figures = {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
    return replace(row, figures=figures, counts_json=_compact({"confusion": confusion.counts.tolist()}))


def clip_row(
    row: Score, truth: jhmdb.Joints, prediction: jhmdb.AnyJoints, image_size: tuple[int, int]
) -> Score:
    """Return `row` with the joints of one clip, true and predicted in pixels of images of (height, width)."""
    inherited = jhmdb.count_joints(truth, prediction)
    strict = jhmdb.count_joints_strictly(truth, prediction, image_size)
    counts = {"inherited": _plain(inherited), "strict": _plain(strict)}
    return replace(row, figures=_joint_figures(inherited, strict), counts_json=_compact(counts))


def tracks_row(row: Score, counts: tapvid.TrackCounts, truth_sha256: str) -> Score:
    """Return `row` with the points of one clip; `truth_sha256` identifies true tracks that are in no file."""
    values = (counts.aj, counts.delta_avg, counts.oa, *counts.deltas.tolist())
    figures = dict(zip(TRACK_FIGURES, values, strict=True))
    known = {name: value for name, value in figures.items() if not np.isnan(value)}
    document = {"tracks": _plain(counts), "truth_sha256": truth_sha256}
    return replace(row, figures=known, counts_json=_compact(document))


def _joint_figures(inherited: JointCounts, strict: JointCounts) -> dict[str, float]:
    return {
        **dict(zip(PCK_FIGURES, inherited.shares().tolist(), strict=True)),
        **dict(zip(STRICT_FIGURES, strict.shares().tolist(), strict=True)),
        "visible_share": inherited.visible_share,
    }


def _plain(counts: JointCounts | tapvid.TrackCounts) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in asdict(counts).items()}


def _compact(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"))


#: Shares from 0 to 1 and counts by name.
Figures = Mapping[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Mean:
    """The figures of all rows of one kind of tokens, as the benchmark pools them; shares from 0 to 1.

    `clip_miou` averages the clips' IoU of each class first (the paper's formula), `miou` counts all pixels
    together (as released). A figure of tracks is averaged over the clips that have it, and is None where none
    has. `main` is the benchmark's main figure and `main_name` what people call it, `label` says what the
    figures are over, `titles` are the columns people read, by figure.
    """

    tokens: str
    n_videos: int
    figures: Figures
    main: float | int | None
    main_name: str
    label: str
    titles: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"tokens": self.tokens, "n_videos": self.n_videos, **self.figures}

    def cells(self) -> list[str]:
        """Return what stands under the titles: counts, and percent."""
        values = [self.figures[name] for name in self.titles]
        return [
            "-" if value is None else str(value) if isinstance(value, int) else f"{100 * value:.2f}"
            for value in values
        ]


def mean_scores(scores: Sequence[Score]) -> list[Mean]:
    """Return one mean per kind of tokens, in order of first appearance; all rows are of one benchmark."""
    kinds: dict[str, list[Score]] = {}
    for score in scores:
        kinds.setdefault(score.tokens, []).append(score)
    # Only points can leave a clip without any figure.
    known = {name for score in scores for name in score.figures} or {"oa"}
    means = []
    for kind, rows in kinds.items():
        main, label, titles, pool = next(rule for mark, rule in RULES.items() if mark in known)
        figures, n_videos = pool(rows), len({row.video_id for row in rows})
        means.append(Mean(kind, n_videos, figures, figures[main], titles[main], label, titles))
    return means


def sequence_means(scores: Sequence[Score]) -> list[tuple[str, list[Mean]]]:
    """Return (video_id, its mean per kind of tokens) for every video."""
    ordered = sorted(scores, key=lambda score: score.video_id)
    grouped = groupby(ordered, key=lambda score: score.video_id)
    return [(video_id, mean_scores(list(rows))) for video_id, rows in grouped]


def best_gain(scores: Sequence[Score], against: str) -> str | None:
    """Return in a sentence what the best other kind of tokens gains or loses; None where there is none."""
    whole = mean_scores(scores)
    means = {mean.tokens: mean.main for mean in whole if mean.main is not None}
    before = means.pop(against, None)
    if before is None or not means:
        return None
    best = max(means, key=means.__getitem__)
    points, name = 100 * (means[best] - before), whole[0].main_name
    videos = [{mean.tokens: mean.main or 0.0 for mean in of_one} for _, of_one in sequence_means(scores)]
    n_better = sum(video.get(best, 0.0) > video.get(against, 0.0) for video in videos)
    verb = "loses" if points < 0 else "gains"
    return (
        f"{best} {verb} {abs(points):.1f} points of {name} over {against} tokens "
        f"({100 * before:.1f} to {100 * means[best]:.1f}); {n_better} of {len(videos)} videos are better."
    )


def _pool_objects(rows: Sequence[Score]) -> Figures:
    means = {name: sum(row.figures[name] for row in rows) / len(rows) for name in J_AND_F_FIGURES}
    return {"n_objects": len(rows), **means, **_seen_and_unseen(rows)}


def _seen_and_unseen(rows: Sequence[Score]) -> Figures:
    """Return J and F of objects of categories seen in training and of others, and the mean of the four.

    Only YouTube-VOS says which are: without its categories there are none of these figures.
    """
    known = [(row, json.loads(row.counts_json).get("seen")) for row in rows if row.counts_json]
    figures: dict[str, float] = {}
    for side, is_seen in (("seen", True), ("unseen", False)):
        of_side = [row for row, seen in known if seen is is_seen]
        for letter in "jf" if of_side else "":
            of_letter = [row.figures[f"{letter}_mean"] for row in of_side]
            figures[f"{letter}_{side}"] = sum(of_letter) / len(of_side)
    overall = {"overall": sum(figures.values()) / 4} if len(figures) == 4 else {}
    return {**figures, **overall}


def _pool_parts(rows: Sequence[Score]) -> Figures:
    counts = (json.loads(row.counts_json)["confusion"] for row in rows)
    clips = [Confusion(np.array(item, dtype=np.int64)) for item in counts]
    total = sum(clips[1:], start=clips[0]).score()
    return {"miou": total.miou, "clip_miou": clip_miou(clips), "pixel_accuracy": total.pixel_accuracy}


def _pool_joints(rows: Sequence[Score]) -> Figures:
    documents = [json.loads(row.counts_json) for row in rows]
    totals = []
    for reading in ("inherited", "strict"):
        clips = []
        for document in documents:
            counts: dict[str, Any] = document[reading]
            arrays = {name: np.array(value) for name, value in counts.items() if isinstance(value, list)}
            clips.append(JointCounts(**{**counts, **arrays}))
        totals.append(sum(clips[1:], start=clips[0]))
    return _joint_figures(*totals)


def _pool_tracks(rows: Sequence[Score]) -> Figures:
    means: dict[str, float | None] = {}
    for name in TRACK_FIGURES:
        known = [row.figures[name] for row in rows if name in row.figures]
        means[name] = sum(known) / len(known) if known else None
    return means


#: How rows of one benchmark become one, by a figure that every row of theirs has: the main figure, what the
#: figures are over, the columns people read, and the function.
RULES: Mapping[str, tuple[str, str, Mapping[str, str], Callable[[Sequence[Score]], Figures]]] = {
    "jf_mean": (
        "jf_mean",
        "mean over objects",
        {"n_objects": "objects", "jf_mean": "J&F", "j_mean": "J", "f_mean": "F"},
        _pool_objects,
    ),
    "miou": (
        "miou",
        "all clips together",
        {"miou": "mIoU", "clip_miou": "mIoU by clip", "pixel_accuracy": "pixels"},
        _pool_parts,
    ),
    "visible_share": (
        "pck_0_1",
        "all clips together",
        {
            **{"pck_0_1": "PCK@0.1", "pck_0_2": "PCK@0.2"},
            **{"strict_pck_0_1": "strict PCK@0.1", "strict_pck_0_2": "strict PCK@0.2"},
            "visible_share": "visible",
        },
        _pool_joints,
    ),
    "oa": (
        "aj",
        "mean over clips",
        {
            **{"aj": "AJ", "delta_avg": "delta_avg", "oa": "OA"},
            **{f"delta_{threshold}": f"<{threshold} px" for threshold in tapvid.THRESHOLDS},
        },
        _pool_tracks,
    ),
}


def write_scores(folder: Path, scores: Sequence[Score], *, complete: bool = True) -> tuple[Path, Path]:
    """Write all rows, their means and provenance into `folder`; `complete`: every video had its turn."""
    rows, summary = folder / SCORES_FILE, folder / SUMMARY_FILE
    write_rows(rows, scores)
    write_json(summary, {"complete": complete, **summary_json(scores)})
    return rows, summary


def write_rows(path: Path, scores: Sequence[Score]) -> None:
    """Write all rows as Parquet, or as CSV when `path` ends in .csv; a line per figure, one at least."""
    nothing: Mapping[str, Any] = {"": None}
    lines = [
        {**_origin(score), "name": name, "value": value}
        for score in scores
        for name, value in (score.figures or nothing).items()
    ]
    write_table(path, make_table(lines, SCHEMA))


def check_rows(path: Path, inputs: Sequence[Path | None] = ()) -> None:
    """Raise `UsageError` where a command may not write rows to `path` (see `own_file`)."""
    own_file(path, "a table of scores", lambda file: bool(read_scores(file)), inputs)


def remove_scores(folder: Path) -> None:
    """Remove what an earlier run wrote, so that its figures cannot pass for those of a run that failed."""
    with output_errors(folder):
        for name in (SCORES_FILE, SUMMARY_FILE, CHART_FILE, CHART_SVG):
            (folder / name).unlink(missing_ok=True)


#: What rows of other tables lead to here, and counts that are no counts in their means.
NO_SCORES = (
    *(LookupError, TypeError, ValueError, AttributeError),
    *(ArithmeticError, StopIteration, RecursionError),
)


def read_scores(path: Path) -> list[Score]:
    """Read a table of scores, older ones (a column per figure) too; raise `InputError` for any other."""
    rows, metadata = read_rows(path, SCHEMA)
    version = metadata.get(_VERSION_KEY, str(TABLE_VERSION))
    if version != str(TABLE_VERSION):
        raise InputError(f"{path} has another version", wanted=f"version {TABLE_VERSION}", found=version)
    read = _read_lines if rows and {"name", "value"} <= rows[0].keys() else rows_of_wide
    try:
        return read(rows)
    except NO_SCORES as error:
        raise InputError(f"{path} is not a table of scores", found=repr(error)) from error


def _read_lines(lines: Sequence[dict[str, Any]]) -> list[Score]:
    found: dict[tuple[tuple[str, Any], ...], dict[str, float]] = {}
    for line in lines:
        name, value = line.pop("name"), line.pop("value")
        figures = found.setdefault(tuple(line.items()), {})
        if name:  # else the one line of a row without any figure
            figures[name] = value
    return [_make_row(dict(origin), figures) for origin, figures in found.items()]


def rows_of_wide(rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return score rows from ones with a column per figure; other ones raise `KeyError` or `TypeError`."""
    scores = []
    for row in rows:
        named = ((name, value) for name, value in row.items() if name not in _COLUMNS)
        figures = {name: float(value) for name, value in named if value is not None}
        if "j_mean" in figures:  # the oldest tables leave J&F to the reader
            figures["jf_mean"] = (figures["j_mean"] + figures["f_mean"]) / 2
        scores.append(_make_row(row, figures))
    return scores


def _make_row(row: Mapping[str, Any], figures: Mapping[str, float]) -> Score:
    row = {"object_id": None, "boundary_tolerance_px": None, "counts_json": "", **row}
    names = [name for name in _COLUMNS if name not in ("name", "value")]
    # CSV does not tell an empty text from none.
    known: dict[str, Any] = {name: row[name] if name in _TYPES else row[name] or "" for name in names}
    provenance = Provenance(**{item.name: known.pop(item.name) for item in fields(Provenance)})
    return Score(provenance=provenance, figures=figures, **known)


def row_origins(scores: Sequence[Score]) -> dict[str, list[str]]:
    """Return the different values of each field that says where rows come from (one each, as a rule)."""
    rows = [_origin(score) for score in scores]
    return {name: list(dict.fromkeys(row[name] for row in rows)) for name in PROVENANCE}


def _origin(score: Score) -> dict[str, Any]:
    row = {name: getattr(score, name) for name in _COLUMNS if hasattr(score, name)}
    return {**row, **asdict(score.provenance)}


def summary_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Return means per kind of tokens and per sequence with the rows' common provenance."""
    return {
        "means": {mean.tokens: mean.to_json() for mean in mean_scores(scores)},
        "sequences": {
            video_id: {mean.tokens: mean.main for mean in means} for video_id, means in sequence_means(scores)
        },
        "projections": {score.tokens: score.provenance.projection_sha256 for score in scores},
        "scored_sizes": {score.video_id: score.scored_size for score in scores},
        "boundary_tolerance_px": {score.video_id: score.boundary_tolerance_px for score in scores},
        "provenance": {name: "; ".join(values) for name, values in row_origins(scores).items()},
    }


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table people read: one line per sequence, then the whole; percent."""
    totals = mean_scores(scores)
    lines = [(video_id, mean) for video_id, means in sequence_means(scores) for mean in means]
    lines += [(mean.label, mean) for mean in totals]
    titles = totals[0].titles.values() if totals else ()
    return ["sequence", "tokens", *titles], [[name, mean.tokens, *mean.cells()] for name, mean in lines]
