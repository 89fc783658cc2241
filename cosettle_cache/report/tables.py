"""Tables of the page: cells of text and numbers, and heads whose buttons sort.

Texts and values come in, elements come out; a cell's value for sorting stands beside what people read.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from cosettle_cache.report.elements import Child, element


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
