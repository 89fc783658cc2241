"""A slider over frames with a button that plays them; both work by keyboard as browsers have it.

The frames' names go in, an element comes out; `slider.js` moves what stands in the same figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from cosettle_cache.report.elements import element


def slider(label: str, names: Sequence[str], value: int = 0) -> Element:
    """Return a slider over `names`, at number `value`; without a choice it is disabled."""
    only_one = len(names) < 2
    return element(
        "div",
        element("button", "Play", type="button", class_="play", aria_pressed="false", disabled=only_one),
        element(
            "input",
            type="range",
            min=0,
            max=max(len(names) - 1, 0),
            step=1,
            value=value,
            aria_label=label,
            aria_valuetext=names[value],
            disabled=only_one,
        ),
        element("output", names[value]),
        class_="slider",
    )
