"""How kinds of tokens, and whatever else is compared, are told apart: a colour and a shape for each.

Colours live in the style sheet under the classes `k0` to `k7`; shapes do without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from cosettle_cache.report.elements import element

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
