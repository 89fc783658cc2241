"""The trade-off plane: how steady tokens are within clips against how far clips lie apart.

The rows of `analyze` come in; a section with one plane per definition and a table of all figures comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from cosettle_cache.heads.kinds import RAW
from cosettle_cache.report.axes import (
    Axis,
    horizontal_grid,
    labels_below,
    labels_beside,
    make_axis,
    vertical_grid,
)
from cosettle_cache.report.elements import element
from cosettle_cache.report.marks import legend, mark
from cosettle_cache.report.runs import AnalysisRun, TradeOffRow
from cosettle_cache.report.tables import number_cell, scrollable, signed, sortable_head, text_cell

#: Least distance of two labels, as a share of the plane's height (20 rem) and width.
_APART, _BESIDE = 0.055, 0.35
#: Room for labels beside the outermost points.
_MARGIN = 0.15
_N_MARGINS = 7
_UNITS = 1000


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
