"""Axes of charts that stretch with the page: positions are percentages, so text keeps its size.

Values go in; ticks, grid lines and positions come out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from cosettle_cache.report.elements import element

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
