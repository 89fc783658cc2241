"""Scores of `propagate` as a table and a chart: every sequence, raw against projected.

The rows of a run come in; sections of the page come out. Figures are percentages, differences are points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from cosettle_cache.core.types import Score
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.metrics.results import Mean, mean_scores, score_table, sequence_means
from cosettle_cache.report.axes import Axis, labels_below, make_axis, vertical_grid
from cosettle_cache.report.elements import Child, element
from cosettle_cache.report.marks import legend, mark
from cosettle_cache.report.runs import ScoreRun
from cosettle_cache.report.tables import (
    number_cell,
    scrollable,
    signed,
    simple_table,
    sortable_head,
    text_cell,
)

#: Sequences that a chart has room for; of more, those that gain and lose most are drawn.
CHARTED = 40

_OBJECT_FIGURES = ("j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay", "jf_mean")


def score_section(run: ScoreRun, number: int) -> Element:
    """Return table, chart and all further figures of one run."""
    heading = element("h2", "Scores: ", element("span", run.name, class_="name"))
    if not run.scores:
        none = element("p", "Nothing was scored: no video of this run is annotated throughout.")
        return element("section", heading, none, id=f"scores-{number}")
    first = run.scores[0]
    videos = len({score.video_id for score in run.scores})
    said = f"{first.task}, {videos} videos, encoder {first.backbone}, protocol {first.protocol}."
    warning = [] if run.complete else [_incomplete()]
    return element(
        "section",
        heading,
        element("p", said, class_="about"),
        *warning,
        _main_table(run),
        _chart(run),
        *_further(run),
        id=f"scores-{number}",
    )


def overview_section(runs: Sequence[ScoreRun]) -> Element:
    """Return one line per run and kind of tokens, each against the raw tokens of its own run."""
    rows = []
    for run in runs:
        means = mean_scores(run.scores)
        rows += [_overview_row(run, mean, _figures(means)) for mean in means]
    head = sortable_head(["run", "task", "encoder", "tokens", "main figure", "percent", "against raw"], 5)
    table = element("table", element("thead", head), element("tbody", *rows), class_="sortable")
    heading = element("h2", "All runs")
    said = element("p", "Each kind of tokens against the raw tokens of its own run.", class_="about")
    return element("section", heading, said, scrollable(table, "All runs"), id="overview")


def _overview_row(run: ScoreRun, mean: Mean, figures: Mapping[str, float]) -> Element:
    first = run.scores[0]
    texts = [text_cell(text) for text in (first.task, first.backbone, mean.tokens, mean.main_name)]
    value, raw = figures.get(mean.tokens), figures.get(RAW)
    against = None if value is None or raw is None or mean.tokens == RAW else value - raw
    difference = text_cell("") if against is None else number_cell(against, _difference(against))
    return element(
        "tr", element("th", run.name, scope="row", class_="name"), *texts, _plain(value, figures), difference
    )


def _plain(value: float | None, figures: Mapping[str, float]) -> Element:
    """Return the cell of a figure, with a star for the best of `figures`."""
    if value is None:
        return text_cell("–")
    return number_cell(value, f"{100 * value:.1f}", *_star(_is_best(value, figures)))


def _is_best(value: float, figures: Mapping[str, float]) -> bool:
    """Say whether nothing is larger, as far as people see."""
    return len(figures) > 1 and f"{100 * value:.1f}" == f"{100 * max(figures.values()):.1f}"


def _figures(means: Sequence[Mean]) -> dict[str, float]:
    """Return the main figure by kind of tokens, of those that have one."""
    return {mean.tokens: mean.main for mean in means if mean.main is not None}


def _incomplete() -> Element:
    text = "This run was interrupted: the figures are of the videos that had their turn."
    return element("p", element("strong", "Not complete. "), text, class_="warning", role="note")


def _main_table(run: ScoreRun) -> Element:
    totals = mean_scores(run.scores)
    name = totals[0].main_name
    against = RAW in run.tokens and len(run.tokens) > 1
    said = f"{name}, percent; ★ is the best of a row" + (
        "; ▲ and ▼ are points against raw." if against else "."
    )
    head = sortable_head(["sequence", *run.tokens], 1)
    body = [_row(video_id, means, run.tokens) for video_id, means in sequence_means(run.scores)]
    foot = _row(totals[0].label, totals, run.tokens)
    table = element(
        "table",
        element("caption", said),
        element("thead", head),
        element("tbody", *body),
        element("tfoot", foot),
        class_="sortable",
    )
    return scrollable(table, f"{name} by sequence")


def _row(title: str, means: Sequence[Mean], kinds: Sequence[str]) -> Element:
    figures = _figures(means)
    cells = [_cell(kind, figures) for kind in kinds]
    return element("tr", element("th", title, scope="row", class_="name"), *cells)


def _cell(kind: str, figures: Mapping[str, float]) -> Element:
    cell = _plain(figures.get(kind), figures)
    if kind != RAW and RAW in figures and kind in figures:
        cell.append(_difference(figures[kind] - figures[RAW]))
    return cell


def _star(is_best: bool) -> list[Child]:
    star = element("span", "★", class_="best", role="img", aria_label="best of the row")
    return [star] if is_best else []


def _difference(share: float) -> Element:
    return signed(100 * share, 1)


def _chart(run: ScoreRun) -> Element:
    """Return a line per sequence with one mark per kind of tokens on a common axis."""
    named = sequence_means(run.scores)
    chosen = _most_moved(named) if len(named) > CHARTED else named
    left_out = f" The {CHARTED} that gain or lose most." if len(chosen) < len(named) else ""
    axis = make_axis([100 * value for _, means in chosen for value in _figures(means).values()])
    name = mean_scores(run.scores)[0].main_name
    rows = [_chart_row(video_id, means, run.tokens, axis) for video_id, means in chosen]
    scale = element("li", element("span", f"{name}, %", class_="unit"), labels_below(axis), class_="scale")
    caption = element("figcaption", f"{name} by sequence.{left_out}", legend(run.tokens))
    return element("figure", caption, element("ul", *rows, scale, class_="dots"))


def _most_moved(named: list[tuple[str, list[Mean]]]) -> list[tuple[str, list[Mean]]]:
    def moved(item: tuple[str, list[Mean]]) -> float:
        values = _figures(item[1])
        return max((abs(value - values.get(RAW, value)) for value in values.values()), default=0.0)

    kept = {video_id for video_id, _ in sorted(named, key=moved, reverse=True)[:CHARTED]}
    return [item for item in named if item[0] in kept]


def _chart_row(video_id: str, means: Sequence[Mean], kinds: Sequence[str], axis: Axis) -> Element:
    values = {kind: 100 * value for kind, value in _figures(means).items()}
    ends = [axis.across(end(values.values())) for end in (min, max)] if values else ["0%", "0%"]
    span = element("line", x1=ends[0], x2=ends[1], y1="50%", y2="50%", class_="span")
    marks = [
        mark(number, axis.across(values[kind]), "50%", f"{kind}: {values[kind]:.1f}")
        for number, kind in enumerate(kinds)
        if kind in values
    ]
    said = ", ".join(f"{kind} {value:.1f}" for kind, value in values.items()) or "no figure"
    picture = element("svg", *vertical_grid(axis), span, *marks, role="img", aria_label=f"{video_id}: {said}")
    return element("li", element("span", video_id, class_="name"), picture)


def _further(run: ScoreRun) -> list[Element]:
    header, rows = score_table(run.scores)
    everything = element(
        "details", element("summary", "All figures"), simple_table(header, rows, 2, "All figures")
    )
    if run.scores[0].object_id is None or run.scores[0].j_mean is None:
        return [everything]
    header = ["sequence", "object", "tokens", "J", "J recall", "J decay", "F", "F recall", "F decay", "J&F"]
    table = simple_table(header, [_object_row(score) for score in run.scores], 3, "Every object")
    return [everything, element("details", element("summary", "Every object"), table)]


def _object_row(score: Score) -> list[str]:
    figures = [getattr(score, name) for name in _OBJECT_FIGURES]
    shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
    return [score.video_id, str(score.object_id), score.tokens, *shown]
