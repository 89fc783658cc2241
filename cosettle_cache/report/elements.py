"""HTML and SVG elements as trees: all text and attributes are escaped when the tree becomes text.

Names and children go in, elements of the standard library come out; nothing is ever pasted into markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any
from xml.etree.ElementTree import Element, tostring

Child = Element | str
Attribute = str | int | float | bool | None


def element(name: str, /, *children: Child, **attributes: Attribute) -> Element:
    """Return an element; `aria_label` is written `aria-label`, `class_` is `class`.

    An attribute that is None or False is left out, True stands without a value.
    """
    made = Element(
        name, {_written(key): _value(value) for key, value in attributes.items() if _is_set(value)}
    )
    append(made, children)
    return made


def append(parent: Element, children: Iterable[Child]) -> None:
    """Add elements and text at the end of `parent`."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        else:
            parent.text = (parent.text or "") + child


def data_element(identifier: str, document: Any) -> Element:
    """Return `document` as JSON that scripts of the page read by `identifier`.

    The content of a script element is not escaped, so no `<` may stand in it. Raises `ValueError` for numbers
    that JSON does not have.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", text, type="application/json", id=identifier)


def finite(values: Iterable[float]) -> list[float | None]:
    """Return values with None for those that JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def to_html(root: Element) -> str:
    """Return the document of `root`."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _is_set(value: Attribute) -> bool:
    return value is not None and value is not False


def _written(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: Attribute) -> str:
    if value is True:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
