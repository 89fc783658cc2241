"""Learning curves of a training run: one panel per figure, all its projections in each.

The journals come in, a section with charts and the figures that the pointer reads off comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from cosettle_cache.pictures.curves import PANELS
from cosettle_cache.report.axes import (
    Axis,
    horizontal_grid,
    labels_below,
    labels_beside,
    make_axis,
    vertical_grid,
)
from cosettle_cache.report.elements import data_element, element, finite
from cosettle_cache.report.marks import colour_class
from cosettle_cache.report.runs import Curves, TrainRun

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
