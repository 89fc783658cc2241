"""Scores of `propagate` as a table and a chart: every sequence, raw against projected.

The rows of a run come in; sections of the page come out. Figures are percentages, differences are points.

Tables of the page: cells of text and numbers, and heads whose buttons sort.

Texts and values come in, elements come out; a cell's value for sorting stands beside what people read.

Where the figures of the page come from: protocols, digests and versions, folded away.

Runs come in, a section of details elements comes out.

How kinds of tokens, and whatever else is compared, are told apart: a colour and a shape for each.

Colours live in the style sheet under the classes `k0` to `k7`; shapes do without any.

Learning curves of a training run: one panel per figure, all its projections in each.

The journals come in, a section with charts and the figures that the pointer reads off comes out.

The trade-off plane: how steady tokens are within clips against how far clips lie apart.

The rows of `analyze` come in; a section with one plane per definition and a table of all figures comes out.

Axes of charts that stretch with the page: positions are percentages, so text keeps its size.

Values go in; ticks, grid lines and positions come out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import Score
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.heads.projection import read_provenance
from cosettle_cache.metrics.rows import Mean, mean_scores, row_origins, score_table, sequence_means
from cosettle_cache.pictures.charts import PANELS
from cosettle_cache.report.page import Child, data_element, element, finite
from cosettle_cache.report.runs import AnalysisRun, Curves, Runs, ScoreRun, TradeOffRow, TrainRun
from cosettle_cache.training.log import RunFiles


def text_cell(text: str) -> Element:
    """Return a cell of text."""
    return element("td", text, class_="name")


def number_cell(value: float, shown: Child, *more: Child) -> Element:
    """Return a right-aligned cell that sorts by `value`."""
    return element("td", shown, *more, class_="number", data_value=f"{value:.9g}")


def signed(difference: float, digits: int) -> Element:
    """Return a difference with its sign, and an arrow that says the same."""
    shown = f"{difference:+.{digits}f}"
    if float(shown) == 0:
        return element("span", f"± {0:.{digits}f}", class_="difference")
    arrow, word = ("▲", "up") if difference > 0 else ("▼", "down")
    return element("span", f"{arrow} {shown.replace('-', '−')}", class_=f"difference {word}")


def sortable_head(names: Sequence[str], n_texts: int) -> Element:
    """Return a row of column heads, each a button; those after the first `n_texts` are of numbers."""
    return element("tr", *(_head(name, is_number=index >= n_texts) for index, name in enumerate(names)))


def simple_table(header: Sequence[str], rows: Sequence[Sequence[str]], n_texts: int, label: str) -> Element:
    """Return a sortable table of texts; columns after the first `n_texts` are numbers where they can be."""
    body = [
        element("tr", *(_table_cell(cell, index >= n_texts) for index, cell in enumerate(row)))
        for row in rows
    ]
    head = element("thead", sortable_head(header, n_texts))
    table = element("table", head, element("tbody", *body), class_="sortable")
    return scrollable(table, label)


def scrollable(table: Element, label: str) -> Element:
    """Return a table in a box that scrolls sideways on narrow screens, by keyboard too."""
    return element("div", table, class_="scroll", tabindex="0", role="group", aria_label=label)


def _head(name: str, *, is_number: bool) -> Element:
    button = element("button", element("span", name), type="button")
    return element("th", button, scope="col", class_="number" if is_number else None)


def _table_cell(text: str, is_number: bool) -> Element:
    if not is_number:
        return text_cell(text)
    try:
        return number_cell(float(text), text)
    except ValueError:
        return element("td", text, class_="number")


def provenance_section(runs: Runs, explored: Mapping[str, Any]) -> Element:
    """Return everything that decided the figures; `explored` is of the store in the affinity explorer."""
    documents = [(f"Scores {run.name}", _score_origin(run)) for run in runs.scored]
    documents += [
        (f"Training {run.name}, {name}", found) for run in runs.trained for name, found in _trained(run)
    ]
    documents += [(f"Trade-off {run.name}", _analysis_origin(run)) for run in runs.analyzed]
    documents += [("Affinity explorer", dict(explored))] if explored else []
    blocks = [element("details", element("summary", title), _block(found)) for title, found in documents]
    return element("section", element("h2", "Provenance"), *blocks, id="provenance")


def _block(document: Mapping[str, Any]) -> Element:
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    return element("pre", text, tabindex="0")


def _score_origin(run: ScoreRun) -> dict[str, Any]:
    """Return what the rows of a run say of themselves, each value once."""
    found: dict[str, Any] = {"folder": str(run.folder), "complete": run.complete}
    for name, values in row_origins(run.scores).items():
        parsed = [_parsed(value) if name.endswith("_json") else value for value in values]
        found[name.removesuffix("_json") if name == "versions_json" else name] = (
            parsed[0] if len(parsed) == 1 else parsed
        )
    found["projection_sha256"] = {score.tokens: score.provenance.projection_sha256 for score in run.scores}
    found["scored_size"] = {score.video_id: score.scored_size for score in run.scores}
    found["boundary_tolerance_px"] = {score.video_id: score.boundary_tolerance_px for score in run.scores}
    return found


def _analysis_origin(run: AnalysisRun) -> dict[str, Any]:
    rows = [{key: _parsed(value) for key, value in row.items()} for row in run.provenance]
    return {"folder": str(run.folder), "rows": rows}


def _trained(run: TrainRun) -> list[tuple[str, dict[str, Any]]]:
    """Return what every finished projection of a run says of itself."""
    files = RunFiles(run.folder)
    candidates = [(member.name, _member_file(files, member.name).projection) for member in run.members]
    return [(name, _projection_origin(path)) for name, path in candidates if path.is_file()]


def _member_file(files: RunFiles, name: str) -> RunFiles:
    member = files.member(name)
    return member if member.projection.is_file() else files


def _projection_origin(path: Path) -> dict[str, Any]:
    try:
        found = read_provenance(path)
    except CosettleError as error:
        return {"file": str(path), "unreadable": error.summary}
    return {"file": str(path), **{key: _parsed(value) for key, value in found.items()}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, TypeError):
        return text


N_COLOURS = 8

#: Outlines around the origin, in pixels: ring, diamond, square, triangles, plus, cross, hexagon.
SHAPES = (
    "M-7.5 0a7.5 7.5 0 1 0 15 0a7.5 7.5 0 1 0 -15 0z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
    "M-4.6 -4.6H4.6V4.6H-4.6z",
    "M0 -5.6L5.8 4.6H-5.8z",
    "M0 5.6L5.8 -4.6H-5.8z",
    "M-1.8 -5.6H1.8V-1.8H5.6V1.8H1.8V5.6H-1.8V1.8H-5.6V-1.8H-1.8z",
    "M-5.4 -3L-3 -5.4L0 -2.4L3 -5.4L5.4 -3L2.4 0L5.4 3L3 5.4L0 2.4L-3 5.4L-5.4 3L-2.4 0z",
    "M0 -5.8L5 -2.9V2.9L0 5.8L-5 2.9V-2.9z",
)


def colour_class(number: int) -> str:
    """Return the class that gives thing `number` its colour."""
    return f"k{number % N_COLOURS}"


def mark(number: int, x: str, y: str, title: str = "") -> Element:
    """Return the shape of thing `number` for a chart, its centre at (`x`, `y`), percentages allowed.

    The first is a wide ring: what the others are compared with is seen around them.
    """
    shape = _shape(number)
    children = [element("title", title), shape] if title else [shape]
    return element("svg", *children, x=x, y=y, overflow="visible", class_=colour_class(number))


def swatch(number: int) -> Element:
    """Return the shape of thing `number` for a line of text."""
    return element(
        "svg",
        _shape(number),
        viewBox="-9 -9 18 18",
        class_=f"swatch {colour_class(number)}",
        aria_hidden="true",
    )


def _shape(number: int) -> Element:
    return element("path", d=SHAPES[number % len(SHAPES)], class_="mark hollow" if number == 0 else "mark")


def legend(names: Sequence[str]) -> Element:
    """Return shapes and names in one line."""
    items = [
        element("li", swatch(number), element("span", name, class_="name"))
        for number, name in enumerate(names)
    ]
    return element("ul", *items, class_="legend")


#: Share of the range that is left free on either side of the values.
MARGIN = 0.06


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values and the round ones in it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return where `value` lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)

    def across(self, value: float) -> str:
        """Return the position from the left."""
        return f"{100 * self.share(value):.3f}%"

    def down(self, value: float) -> str:
        """Return the position from the top, large values up."""
        return f"{100 - 100 * self.share(value):.3f}%"

    def label(self, tick: float) -> str:
        """Return a tick as text, with as many digits as its neighbours need."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick) or 1.0
        return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def make_axis(values: Iterable[float], n_ticks: int = 5, margin: float = MARGIN) -> Axis:
    """Return an axis over the finite ones of `values`, with a `margin` of their range on either side."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    room = margin * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room
    step = round_step((high - low) / n_ticks)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Axis(low, high, tuple(number * step for number in range(first, last + 1)))


def round_step(at_least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below `at_least`."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))


def vertical_grid(axis: Axis) -> list[Element]:
    """Return a line from top to bottom for every tick."""
    places = [axis.across(tick) for tick in axis.ticks]
    return [element("line", x1=x, x2=x, y1="0%", y2="100%", class_="grid") for x in places]


def horizontal_grid(axis: Axis) -> list[Element]:
    """Return a line from left to right for every tick."""
    places = [axis.down(tick) for tick in axis.ticks]
    return [element("line", x1="0%", x2="100%", y1=y, y2=y, class_="grid") for y in places]


def labels_below(axis: Axis) -> Element:
    """Return the ticks of a horizontal axis as a strip of text."""
    texts = [element("text", axis.label(tick), x=axis.across(tick), y="13") for tick in axis.ticks]
    return element("svg", *texts, class_="ticks below", aria_hidden="true")


def labels_beside(axis: Axis) -> Element:
    """Return the ticks of a vertical axis as a column of text, to be put left of the chart."""
    texts = [
        element("text", axis.label(tick), x="100%", y=axis.down(tick), dy="0.32em") for tick in axis.ticks
    ]
    return element("svg", *texts, class_="ticks beside", aria_hidden="true")


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
    said = f"{first.task}, {videos} videos, encoder {first.provenance.backbone}, protocol {first.protocol}."
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
    texts = [text_cell(text) for text in (first.task, first.provenance.backbone, mean.tokens, mean.main_name)]
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
    if run.scores[0].object_id is None:
        return [everything]
    header = ["sequence", "object", "tokens", "J", "J recall", "J decay", "F", "F recall", "F decay", "J&F"]
    table = simple_table(header, [_object_row(score) for score in run.scores], 3, "Every object")
    return [everything, element("details", element("summary", "Every object"), table)]


def _object_row(score: Score) -> list[str]:
    figures = [score.figures.get(name) for name in _OBJECT_FIGURES]
    shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
    return [score.video_id, str(score.object_id), score.tokens, *shown]


#: Points of a curve; more steps are averaged in as many groups.
MAX_POINTS = 300

#: Figures of the held-out clips, and the titles of their panels.
HELD_OUT = (
    ("cycle_accuracy", "cycle accuracy, held-out clips"),
    ("margin", "margin D, held-out clips"),
    ("inter_distance", "D inter, held-out clips"),
    ("intra_distance", "D intra, held-out clips"),
)

#: Patterns of dashes in the style sheet.
N_DASHES = 4

#: Units of the space that curves are drawn in, stretched over the panel.
_UNITS = 1000


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: a value per step, or per group of steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """The curves of one figure."""

    title: str
    series: tuple[Series, ...]


def curves_section(run: TrainRun, number: int) -> Element:
    """Return the curves of one run."""
    heading = element("h2", "Training: ", element("span", run.name, class_="name"))
    panels = make_panels(run.members)
    identifier = f"curves-{number}"
    if not panels:
        return element("section", heading, element("p", "No step has been taken yet."), id=identifier)
    names = [member.name for member in run.members]
    return element(
        "section",
        heading,
        element("p", _about(run), class_="about"),
        *([_legend(names)] if len(names) > 1 else []),
        element("div", *(_figure(panel, names) for panel in panels), class_="panels", data_curves=identifier),
        data_element(f"data-{identifier}", [_document(panel) for panel in panels]),
        id=identifier,
    )


def make_panels(members: Sequence[Curves]) -> list[Panel]:
    """Return a panel per figure that any of `members` has."""
    steps = [_panel(title, field, [(item.name, item.steps) for item in members]) for field, title in PANELS]
    epochs = [
        _panel(title, field, [(item.name, item.epochs) for item in members]) for field, title in HELD_OUT
    ]
    return [panel for panel in (*steps, *epochs) if panel.series]


def _panel(title: str, field: str, members: Sequence[tuple[str, Sequence[Any]]]) -> Panel:
    series = (
        _thinned(name, [item.step for item in items], [getattr(item, field) for item in items])
        for name, items in members
        if items
    )
    return Panel(title, tuple(series))


def _thinned(name: str, steps: Sequence[int], values: Sequence[float]) -> Series:
    n_groups = min(len(steps), MAX_POINTS)
    means = [
        [float(group.mean()) for group in np.array_split(np.asarray(item, float), n_groups)]
        for item in (steps, values)
    ]
    return Series(name, tuple(means[0]), tuple(means[1]))


def _about(run: TrainRun) -> str:
    n_steps = max((len(member.steps) for member in run.members), default=0)
    epochs = run.report.get("epochs")
    thinned = (
        f"; each point is the mean of about {n_steps / MAX_POINTS:.1f} steps" if n_steps > MAX_POINTS else ""
    )
    length = f"{n_steps} steps" + (f" in {epochs} epochs" if epochs else "")
    return (
        f"{length}{thinned}. Point at a panel, or give it the focus and use the arrow keys, to read values."
    )


def _figure(panel: Panel, names: Sequence[str]) -> Element:
    across = make_axis([step for item in panel.series for step in item.steps])
    up = make_axis([value for item in panel.series for value in item.values])
    curves = [_curve(item, names.index(item.name), across, up) for item in panel.series]
    plane = element("svg", *curves, viewBox=f"0 0 {_UNITS} {_UNITS}", preserveAspectRatio="none")
    cursor = element("line", class_="cursor", x1="0%", x2="0%", y1="0%", y2="100%", hidden=True)
    plot = element(
        "svg",
        *horizontal_grid(up),
        *vertical_grid(across),
        plane,
        cursor,
        class_="plot",
        tabindex="0",
        role="application",
        aria_label=f"{panel.title} over steps; arrow keys read values",
        data_low=across.low,
        data_high=across.high,
    )
    return element(
        "figure",
        element("figcaption", panel.title),
        element("div", labels_beside(up), plot, labels_below(across), class_="frame"),
        element("output", _last(panel), aria_live="polite", class_="reading"),
        class_="panel",
    )


def _last(panel: Panel) -> str:
    ends = [f"{item.values[-1]:.4g}" for item in panel.series]
    return f"at the end: {', '.join(ends)}" if len(ends) <= 4 else f"{len(ends)} curves"


def _curve(series: Series, number: int, across: Axis, up: Axis) -> Element:
    points = zip(series.steps, series.values, strict=True)
    places = [
        (f"{_UNITS * across.share(step):.1f}", f"{_UNITS - _UNITS * up.share(value):.1f}")
        for step, value in points
        if math.isfinite(value)
    ]
    # A single step is a dot: a line of no length with round ends.
    path = "M" + "L".join(f"{x} {y}" for x, y in places) if places else ""
    return element("path", d=path + ("h0" if len(places) == 1 else ""), class_=_line_class(number))


def _line_class(number: int) -> str:
    """Return colour and dashes of curve `number`; colour 0 is for what is not learnt."""
    return f"curve {colour_class(number + 1)} dashes{number % N_DASHES}"


def _legend(names: Sequence[str]) -> Element:
    items = [
        element("li", _sample(number), element("span", name, class_="name"))
        for number, name in enumerate(names)
    ]
    return element("ul", *items, class_="legend")


def _sample(number: int) -> Element:
    line = element("path", d="M0 7H28", class_=_line_class(number))
    return element("svg", line, viewBox="0 0 28 14", class_="sample", aria_hidden="true")


def _document(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "series": [
            {"name": item.name, "steps": finite(item.steps), "values": finite(item.values)}
            for item in panel.series
        ],
    }


#: Least distance of two labels, as a share of the plane's height (20 rem) and width.
_APART, _BESIDE = 0.055, 0.35
#: Room for labels beside the outermost points.
_MARGIN = 0.15
_N_MARGINS = 7


@dataclass(frozen=True, slots=True)
class Point:
    """A row in the plane; `label` says what its mark does not."""

    row: TradeOffRow
    number: int
    label: str


def plane_section(runs: Sequence[AnalysisRun]) -> Element | None:
    """Return the planes of all rows; None for none."""
    rows = [row for run in runs for row in run.rows]
    if not rows:
        return None
    kinds = list(dict.fromkeys([RAW, *(row.tokens for row in rows)]))
    names = list(dict.fromkeys(row.definition for row in rows))
    planes = [_plane(name, [row for row in rows if row.definition == name], kinds) for name in names]
    said = (
        "Right is less steady within a clip, up is clips further apart; a line leads from the raw tokens of "
        "an encoder to each of its projections. Distances are in diameters that cover all tokens."
    )
    return element(
        "section",
        element("h2", "Trade-off"),
        element("p", said, class_="about"),
        legend(kinds),
        element("div", *planes, class_="panels planes"),
        _table(rows),
        id="trade-off",
    )


def _plane(definition: str, rows: Sequence[TradeOffRow], kinds: Sequence[str]) -> Element:
    across = make_axis([row.d_intra for row in rows], margin=_MARGIN)
    up = make_axis([row.d_inter for row in rows], margin=_MARGIN)
    points = [Point(row, kinds.index(row.tokens), _label(row, rows)) for row in rows]
    plot = element(
        "svg",
        *horizontal_grid(up),
        *vertical_grid(across),
        _margins(rows[0].gamma, across, up),
        *(_way(row, raw, across, up) for row, raw in _projected(rows)),
        *(_mark(point, across, up) for point in points),
        *_labels(points, across, up),
        class_="plot plane",
        role="img",
        aria_label=f"Trade-off, definition {definition}; the table below has the same figures",
    )
    note = f"D intra →   Dotted: equal margin D = D inter − {rows[0].gamma:g} D intra."
    return element(
        "figure",
        element("figcaption", f"definition {definition}"),
        element("span", "D inter ↑", class_="unit"),
        element("div", labels_beside(up), plot, labels_below(across), class_="frame"),
        element("span", note, class_="unit"),
        class_="panel",
    )


def _label(row: TradeOffRow, rows: Sequence[TradeOffRow]) -> str:
    """Return what tells a row from the others: tokens, and encoder and data set where there are several."""
    parts = [row.backbone] if len({item.backbone for item in rows}) > 1 else []
    parts += [row.dataset] if len({item.dataset for item in rows}) > 1 else []
    return " ".join([*parts, row.tokens])


def _raw_rows(rows: Sequence[TradeOffRow]) -> Mapping[tuple[str, str, str], TradeOffRow]:
    return {(row.definition, row.backbone, row.dataset): row for row in rows if row.tokens == RAW}


def _projected(rows: Sequence[TradeOffRow]) -> list[tuple[TradeOffRow, TradeOffRow]]:
    """Return projected rows, each with the raw one of its encoder and data set."""
    raw = _raw_rows(rows)
    found = [(row, raw.get((row.definition, row.backbone, row.dataset))) for row in rows if row.tokens != RAW]
    return [(row, start) for row, start in found if start is not None]


def _way(row: TradeOffRow, raw: TradeOffRow, across: Axis, up: Axis) -> Element:
    ends = {"x1": across.across(raw.d_intra), "x2": across.across(row.d_intra)}
    return element("line", **ends, y1=up.down(raw.d_inter), y2=up.down(row.d_inter), class_="span")


def _mark(point: Point, across: Axis, up: Axis) -> Element:
    row = point.row
    figures = f"D inter {row.d_inter:.4f}, D intra {row.d_intra:.4f}, D {row.margin:.4f}"
    title = f"{row.backbone} {row.tokens}: {figures}"
    return mark(point.number, across.across(row.d_intra), up.down(row.d_inter), title)


def _labels(points: Sequence[Point], across: Axis, up: Axis) -> list[Element]:
    """Return a label beside every point, from the top down, each below those it would lie on."""
    placed: list[tuple[float, float]] = []
    texts = []
    for point in sorted(points, key=lambda point: -point.row.d_inter):
        x, y = across.share(point.row.d_intra), 1 - up.share(point.row.d_inter)
        while any(abs(x - other) < _BESIDE and abs(y - height) < _APART for other, height in placed):
            y += _APART / 4
        placed.append((x, y))
        left = x > 1 - _BESIDE
        place = {"x": f"{100 * x:.2f}%", "y": f"{100 * y:.2f}%", "dy": "0.32em"}
        place["dx"] = "-12" if left else "12"
        texts.append(element("text", point.label, **place, class_="label left" if left else "label"))
    return texts


def _margins(gamma: float, across: Axis, up: Axis) -> Element:
    """Return lines along which the margin is the same."""
    least, most = up.low - gamma * across.high, up.high - gamma * across.low
    lines = []
    for margin in np.linspace(least, most, _N_MARGINS + 2)[1:-1]:
        ends = [_UNITS - _UNITS * up.share(float(margin) + gamma * x) for x in (across.low, across.high)]
        lines.append(element("path", d=f"M0 {ends[0]:.1f}L{_UNITS} {ends[1]:.1f}", class_="equal"))
    return element("svg", *lines, viewBox=f"0 0 {_UNITS} {_UNITS}", preserveAspectRatio="none")


def _table(rows: Sequence[TradeOffRow]) -> Element:
    names = ["encoder", "data", "clips", "tokens", "definition"]
    names += ["D inter", "D intra", "margin D", "cycle accuracy", "effective rank"]
    raw = _raw_rows(rows)
    body = [_table_row(row, raw.get((row.definition, row.backbone, row.dataset))) for row in rows]
    table = element(
        "table",
        element("caption", "Margin D with its difference to the raw tokens."),
        element("thead", sortable_head(names, len(names) - 5)),
        element("tbody", *body),
        class_="sortable",
    )
    return scrollable(table, "Trade-off")


def _table_row(row: TradeOffRow, raw: TradeOffRow | None) -> Element:
    texts = [row.dataset, str(row.n_videos), row.tokens, row.definition]
    margin = number_cell(row.margin, f"{row.margin:.4f}")
    if raw is not None and raw is not row:
        margin.append(signed(row.margin - raw.margin, 4))
    figures = [row.d_inter, row.d_intra]
    others = [row.cycle_accuracy, row.effective_rank]
    return element(
        "tr",
        element("th", row.backbone, scope="row", class_="name"),
        *map(text_cell, texts),
        *(number_cell(value, f"{value:.4f}") for value in figures),
        margin,
        *(number_cell(value, f"{value:.4f}") for value in others),
    )
