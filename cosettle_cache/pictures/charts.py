"""Scores by sequence as one PNG: a row per sequence, a dot per kind of tokens, the whole below.

In come figures in percent; out goes a picture that stays legible for a few sequences and for hundreds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cosettle_cache.core.files import write_durably

#: Sequences that get a row with their name; of more only the ranks are drawn.
MAX_NAMED = 60
#: Longer names lose their middle.
_NAME_LENGTH = 34
#: Percentage points that the axis spans at least.
_LEAST_SPAN = 10.0

Figures = Mapping[str, float]
Colour = tuple[float, float, float, float]


def write_chart(path: Path, title: str, unit: str, sequences: Mapping[str, Figures], whole: Figures) -> None:
    """Write the picture of `make_chart`; raise `OutputError` when it cannot be written."""
    picture = make_chart(title, unit, sequences, whole)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", facecolor="white")
    write_durably(path, [buffer.getbuffer()])


def make_chart(title: str, unit: str, sequences: Mapping[str, Figures], whole: Figures) -> Figure:
    """Draw the figures (percent) of every sequence by kind of tokens, the best of the first kind on top.

    `whole` holds the benchmark's figure of all sequences together, dashed. What is no number is left out.
    """
    kinds = list(whole)
    known = {name: _numbers(figures) for name, figures in sequences.items()}
    ordered = sorted(known.items(), key=lambda item: item[1].get(kinds[0], -math.inf), reverse=True)
    named = len(ordered) <= MAX_NAMED
    height = 1.9 + 0.26 * len(ordered) + 0.18 * len(kinds) if named else 6.5
    picture = Figure(figsize=(9, height), dpi=130, layout="constrained")
    axis = picture.subplots()
    (_draw_rows if named else _draw_ranks)(axis, ordered, _colours(kinds))
    _finish(axis, title, unit, whole, named)
    picture.legend(
        handles=_legend(whole), loc="outside lower center", ncols=min(3, len(kinds)), frameon=False
    )
    return picture


def _numbers(figures: Figures) -> Figures:
    return {kind: value for kind, value in figures.items() if math.isfinite(value)}


def _label(kind: str, value: float) -> str:
    return f"{_short(kind)}: {value:.2f} in all" if math.isfinite(value) else f"{_short(kind)}: no figure"


def _legend(whole: Figures) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker="o", linestyle="--", label=_label(kind, value))
        for (kind, value), colour in zip(whole.items(), _colours(list(whole)).values(), strict=True)
    ]


def _colours(kinds: Sequence[str]) -> dict[str, Colour]:
    """Return grey for the first kind, which the others are compared with, and a colour for each other one."""
    palette = colormaps["tab10"]
    shades = [palette(number % 10) for number in range(len(kinds))]
    return dict(zip(kinds, [(0.35, 0.37, 0.4, 1.0), *shades], strict=False))


def _draw_rows(axis: Axes, ordered: Sequence[tuple[str, Figures]], colours: Mapping[str, Colour]) -> None:
    for row, (_, figures) in enumerate(ordered):
        if figures:
            ends = [min(figures.values()), max(figures.values())]
            axis.plot(ends, [row, row], color="0.8", linewidth=2.5, zorder=1)
    for kind, colour in colours.items():
        rows = [row for row, (_, figures) in enumerate(ordered) if kind in figures]
        axis.scatter([ordered[row][1][kind] for row in rows], rows, s=46, color=colour, zorder=3)
    axis.set_yticks(range(len(ordered)), [_short(name) for name, _ in ordered])
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))


def _draw_ranks(axis: Axes, ordered: Sequence[tuple[str, Figures]], colours: Mapping[str, Colour]) -> None:
    for kind, colour in colours.items():
        ranks = [rank for rank, (_, figures) in enumerate(ordered, start=1) if kind in figures]
        values = [ordered[rank - 1][1][kind] for rank in ranks]
        axis.scatter(ranks, values, s=12, color=colour, alpha=0.8)
    first = next(iter(colours))
    axis.set_xlabel(f"{len(ordered)} sequences, in the order of {first}")


def _limits(low: float, high: float) -> tuple[float, float]:
    """Return limits that leave out what no percentage can be, and do not blow up a small difference."""
    low, high = max(low, -1.5), min(high, 101.5)
    return max(min(low, high - _LEAST_SPAN), -1.5), max(high, low + _LEAST_SPAN)


def _finish(axis: Axes, title: str, unit: str, whole: Figures, named: bool) -> None:
    line = axis.axvline if named else axis.axhline
    for value, colour in zip(whole.values(), _colours(list(whole)).values(), strict=True):
        line(value, color=colour, linestyle="--", linewidth=1.4, zorder=2)
    if named:
        axis.set_xlim(_limits(*axis.get_xlim()))
        axis.set_xlabel(unit)
    else:
        axis.set_ylim(_limits(*axis.get_ylim()))
        axis.set_ylabel(unit)
    axis.set_title(title, loc="left", fontsize=11, wrap=True)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    if len(name) <= _NAME_LENGTH:
        return name
    half = _NAME_LENGTH // 2
    return f"{name[: half - 1]}…{name[-half:]}"
