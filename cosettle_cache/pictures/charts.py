"""Charts: scores by sequence, curves of training, and the trade-off plane, each drawn by matplotlib.

Plain figures come in; a chart goes out, saved as PNG or SVG by the suffix of its file. An SVG has text that
stays text, no background, and takes the colour of axes and text from the page around it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cosettle_cache.core.files import first_bytes, own_file, printable, write_durably

#: Figures by name: one number per kind of tokens, or one per line of a log.
Figures = Mapping[str, float]
Columns = Mapping[str, Sequence[float]]

#: Mid-tones, legible on white and on near black; the first is of what others are compared with.
_COLOURS = ("#818995", "#3d8bd0", "#dd7a1c", "#2f9e58", "#9a72d0", "#d2609f", "#a8861c", "#1f97a5", "#dd4b4b")
_MARKERS = "oDs^vPXh"
_DASHES = ("-", "--", ":", "-.")
_FAINT = "#8a8f98"

#: Names are never read as formulas; the same figures give the same bytes.
_STYLE: Any = {
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    # There are grid lines.
    "xtick.bottom": False,
    "ytick.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cosettle-cache",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

#: Sequences that get a row with their name; of more only the ranks are drawn.
MAX_NAMED = 60
#: Longer names lose their middle.
_NAME_LENGTH = 34
#: Percentage points that the axis spans at least.
_LEAST_SPAN = 10.0

#: Name of a step's figure, title of its panel; then those of the held-out clips, one per epoch.
_PANELS = (
    ("total", "total loss"),
    ("cycle", "cycle loss (nats)"),
    ("separability", "separability loss"),
    ("cycle_accuracy", "cycle accuracy"),
)
_HELD_OUT = (
    ("cycle_accuracy", "cycle accuracy, held-out clips"),
    ("margin", "margin D, held-out clips"),
    ("inter_distance", "D inter, held-out clips"),
    ("intra_distance", "D intra, held-out clips"),
)
_SMOOTHED_STEPS, _MARKED_STEPS = 50, 20
#: Points of a curve that is smoothed; of more steps every k-th is drawn.
_MAX_POINTS = 500

#: What no figure is; the drawing fails at larger numbers.
_LARGEST = 1e30

#: What charts are known for ours by.
_SOFTWARE, _SVG_BEGIN = "cosettle-cache", '<svg fill="currentColor"'

#: Least distance of two labels in a plane, as shares of its width and height.
_BESIDE, _APART = 0.35, 0.05


def check_chart(path: Path, inputs: Sequence[Path | None] = ()) -> None:
    """Raise `UsageError` where a command may not write the chart `path` (see `own_file`)."""

    def is_chart(file: Path) -> bool:
        begin = first_bytes(file, 200)
        return begin.startswith(_SVG_BEGIN.encode()) or f"Software\0{_SOFTWARE}".encode() in begin

    own_file(path, "a chart", is_chart, inputs)


def save_chart(chart: Figure, *paths: Path) -> None:
    """Write the chart as PNG or SVG by each path's suffix; raise `OutputError` when it cannot be written."""
    for path in paths:
        buffer = io.BytesIO()
        with catch_warnings():
            # Of scripts that the font lacks (an SVG has the text itself), and of labels without room.
            simplefilter("ignore", UserWarning)
            if path.suffix == ".svg":
                buffer.write(_svg(chart))
            else:
                chart.savefig(buffer, format="png", facecolor="white", metadata={"Software": _SOFTWARE})
        write_durably(path, [buffer.getvalue()])


@rc_context(_STYLE)
def _svg(chart: Figure) -> bytes:
    """Return the SVG without prologue, coordinates rounded, what is black in the page's colour."""
    buffer = io.StringIO()
    chart.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg", _SVG_BEGIN, 1)
    text = re.sub(r'(?<=[a-z]: )#000000(?=[;"])', "currentColor", text)
    text = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", text)

    def rounded(path: re.Match[str]) -> str:
        short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path[0])
        return re.sub(r"\s+", " ", short)

    return re.sub(r' d="[^"]*"', rounded, text).encode()


@rc_context(_STYLE)
def score_chart(title: str, unit: str, sequences: Mapping[str, Figures], whole: Figures) -> Figure:
    """Draw the figures (percent) of every sequence by kind of tokens, the best of the first kind on top.

    `whole` holds the benchmark's figure of all sequences together, dashed. What is no number is left out.
    """
    kinds = list(whole)
    known = {
        name: {kind: value for kind, value in figures.items() if _is_drawable(value)}
        for name, figures in sequences.items()
    }
    ordered = sorted(known.items(), key=lambda item: item[1].get(kinds[0], -math.inf), reverse=True)
    named = len(ordered) <= MAX_NAMED
    height = 1.9 + 0.26 * len(ordered) + 0.18 * len(kinds) if named else 6.5
    chart = Figure(figsize=(9, height), dpi=130, layout="constrained")
    axis = chart.subplots()
    (_draw_rows if named else _draw_ranks)(axis, ordered, kinds)
    line, handles = axis.axvline if named else axis.axhline, []
    for number, (kind, value) in enumerate(whole.items()):
        line(value, color=_colour(number), linestyle="--", linewidth=1.4, zorder=2)
        label = f"{_short(kind)}: " + (f"{value:.2f} in all" if _is_drawable(value) else "no figure")
        look = _look(number) | ({} if number else {"markerfacecolor": "none"})
        handles.append(Line2D([], [], **look, linestyle="--", label=label))
    if named:
        axis.set(xlim=_limits(*axis.get_xlim()), xlabel=unit)
    else:
        axis.set(ylim=_limits(*axis.get_ylim()), ylabel=unit)
    axis.set_title(printable(title), loc="left", fontsize=11, wrap=True)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    chart.legend(handles=handles, loc="outside lower center", ncols=min(3, len(kinds)), frameon=False)
    return chart


def _is_drawable(*values: float) -> bool:
    return all(abs(value) < _LARGEST for value in values)


def _look(number: int) -> dict[str, Any]:
    return {"color": _colour(number), "marker": _MARKERS[number % len(_MARKERS)]}


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _short(name: str) -> str:
    half, name = _NAME_LENGTH // 2, printable(name)
    return name if len(name) <= _NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"


def _draw_rows(axis: Axes, ordered: Sequence[tuple[str, Figures]], kinds: Sequence[str]) -> None:
    for row, (_, figures) in enumerate(ordered):
        if figures:
            ends = [min(figures.values()), max(figures.values())]
            axis.plot(ends, [row, row], color=_FAINT, alpha=0.45, linewidth=2.5, zorder=1)
    for number, kind in enumerate(kinds):
        rows = [row for row, (_, figures) in enumerate(ordered) if kind in figures]
        values = [ordered[row][1][kind] for row in rows]
        # A wide ring first: what the others are compared with is seen around them.
        if number == 0:
            axis.scatter(values, rows, s=110, facecolors="none", edgecolors=_colour(0), linewidths=2)
        else:
            axis.scatter(values, rows, s=46, zorder=3, **_look(number))
    axis.set_yticks(range(len(ordered)), [_short(name) for name, _ in ordered])
    axis.set_ylim(len(ordered) - 0.4, -0.6)
    axis.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))


def _draw_ranks(axis: Axes, ordered: Sequence[tuple[str, Figures]], kinds: Sequence[str]) -> None:
    for number, kind in enumerate(kinds):
        ranks = [rank for rank, (_, figures) in enumerate(ordered, start=1) if kind in figures]
        axis.scatter(ranks, [ordered[rank - 1][1][kind] for rank in ranks], s=12, alpha=0.8, **_look(number))
    axis.set_xlabel(f"{len(ordered)} sequences, in the order of {printable(kinds[0])}")


def _limits(low: float, high: float) -> tuple[float, float]:
    """Return limits that leave out what no percentage can be, and do not blow up a small difference."""
    low, high = max(low, -1.5), min(high, 101.5)
    return max(min(low, high - _LEAST_SPAN), -1.5), max(high, low + _LEAST_SPAN)


@rc_context(_STYLE)
def curves_chart(
    members: Mapping[str, Columns], held_out: Mapping[str, Columns], n_tokens: int | None = None
) -> Figure:
    """Draw the objective, its parts and the cycle accuracy over the steps, and the figures of held-out clips.

    Both hold the columns of a log (`step` among them) by the name of a run, or of the members of a sweep.
    `n_tokens` pooled tokens give the chance levels ln(n) and 1/n of the cycle loss and its accuracy.
    """
    panels = [(members, name, title) for name, title in _PANELS]
    if any(held_out.values()):
        panels += [(held_out, name, title) for name, title in _HELD_OUT]
    width, legend_height = 5 + 9 * len(panels) / 8, 0.2 * len(members) if len(members) > 1 else 0
    chart = Figure(figsize=(width, 6.5 + legend_height), dpi=120, layout="constrained")
    axes = chart.subplots(2, len(panels) // 2, sharex=True)
    for axis, (runs, name, title) in zip(axes.flat, panels, strict=True):
        for number, (label, columns) in enumerate(runs.items()):
            if columns:
                shown, alone = printable(label), len(members) == 1
                _draw_curve(axis, columns["step"], columns[name], shown, number, alone=alone)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    if n_tokens is not None:
        chances = ((1, math.log(n_tokens), f"ln {n_tokens}"), (3, 1 / n_tokens, f"1/{n_tokens}"))
        for place, level, formula in chances:
            axis = axes.flat[place]
            label = f"chance, {formula}"
            line = axis.axhline(level, color=_COLOURS[-1], linestyle="--", linewidth=1, label=label)
            axis.legend(handles=[line], loc="best", frameon=False)
    if len(members) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        chart.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return chart


def _draw_curve(
    axis: Axes, steps: Sequence[float], values: Sequence[float], label: str, number: int, *, alone: bool
) -> None:
    colour, dashes = _colour(number + 1), _DASHES[number // (len(_COLOURS) - 1) % len(_DASHES)]
    few = len(steps) <= _SMOOTHED_STEPS
    steps, values = (
        [value if _is_drawable(value) else math.nan for value in column] for column in (steps, values)
    )
    every = slice(None, None, -(-len(steps) // _MAX_POINTS))
    if alone or few:
        look: Any = {"alpha": 0.35 if not few else 1.0, "marker": "." if len(steps) <= _MARKED_STEPS else ""}
        axis.plot(steps[every], values[every], color=colour, linestyle=dashes, label=label, **look)
    if not few:
        smoothed = smooth(values, len(values) // _SMOOTHED_STEPS)
        axis.plot(steps[every], smoothed[every], color=colour, linestyle=dashes, label=label, linewidth=1.8)


def smooth(values: Sequence[float], width: int) -> Float[np.ndarray, " step"]:
    """Return the means of up to `width` values on either side; none across a gap."""
    array = np.asarray(values, float)
    finite = np.isfinite(array)
    # Sums of differences: those of equal values have no rounding error to be seen.
    base = array[finite][0] if finite.any() else 0.0
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array - base, 0.0))])
    gaps = np.concatenate([[0], np.cumsum(~finite)])
    middle = np.arange(len(array))
    first, after = np.maximum(middle - width, 0), np.minimum(middle + width + 1, len(array))
    means: NDArray[np.float64] = base + (sums[after] - sums[first]) / (after - first)
    return np.where(gaps[after] > gaps[first], np.nan, means)


@dataclass(frozen=True, slots=True)
class PlanePoint:
    """One kind of tokens (`raw` or a projection's name) of one encoder in the plane of one definition.

    Distances are in diameters, the margin is D = d_inter - `gamma` * d_intra.
    """

    plane: str
    gamma: float
    encoder: str
    tokens: str
    d_intra: float
    d_inter: float


@rc_context(_STYLE)
def plane_chart(points: Sequence[PlanePoint]) -> Figure:
    """Draw a panel per plane: arrows from raw tokens to their projections, dotted lines of equal margin."""
    planes = list(dict.fromkeys(point.plane for point in points))
    n_cols = min(len(planes), 2)
    n_rows = -(-len(planes) // n_cols)
    chart = Figure(figsize=(1.5 + 6 * n_cols, 5.5 * n_rows), dpi=120, layout="constrained")
    axes = chart.subplots(n_rows, n_cols, squeeze=False).flat
    for axis, plane in zip(axes, planes, strict=False):
        _draw_plane(axis, [point for point in points if point.plane == plane])
    for axis in list(axes)[len(planes) :]:
        axis.set_visible(False)
    return chart


def _draw_plane(axis: Axes, points: Sequence[PlanePoint]) -> None:
    title, gamma = printable(points[0].plane), points[0].gamma
    points = [item for item in points if _is_drawable(item.d_intra, item.d_inter, gamma)]
    for number, encoder in enumerate(dict.fromkeys(point.encoder for point in points)):
        own = [item for item in points if item.encoder == encoder]
        raw = next((item for item in own if item.tokens == "raw"), None)
        for point in own:
            marker, label = ("o", printable(encoder)) if point is (raw or own[0]) else ("s", None)
            place = (point.d_intra, point.d_inter)
            axis.scatter(*place, color=_colour(number + 1), marker=marker, label=label, zorder=3)
            if raw is not None and point is not raw:
                arrow: Any = {"arrowstyle": "->", "color": _colour(number + 1), "alpha": 0.6}
                axis.annotate("", place, (raw.d_intra, raw.d_inter), arrowprops=arrow)
    axis.margins(0.2)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for margin in np.linspace(low - gamma * right, high - gamma * left, 8)[1:-1] if points else ():
        start = (left, margin + gamma * left)
        axis.axline(start, slope=gamma, color=_FAINT, alpha=0.5, linestyle=":", zorder=0)
    # The lines moved the limits.
    axis.set(xlim=(left, right), ylim=(low, high), title=title)
    if not points:
        return
    axis.set(xlabel="D intra (less: steadier within a clip)", ylabel="D inter (more: clips further apart)")
    _label_points(axis, points)
    note = f"dotted: equal D = D inter - {gamma:g} D intra"
    at_corner: Any = {"transform": axis.transAxes, "ha": "right", "va": "bottom"}
    axis.text(0.99, 0.01, note, fontsize="x-small", color=_FAINT, **at_corner)
    axis.legend(loc="best", frameon=False)


def _label_points(axis: Axes, points: Sequence[PlanePoint]) -> None:
    """Write a name beside every point, from the top down, each below those it would lie on."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda item: -item.d_inter):
        x, y = (point.d_intra - left) / (right - left), (point.d_inter - low) / (high - low)
        while any(abs(x - other) < _BESIDE and abs(y - height) < _APART for other, height in placed):
            y -= _APART / 4
        placed.append((x, y))
        side, offset = ("right", -0.02) if x > 1 - _BESIDE else ("left", 0.02)
        where: Any = {"transform": axis.transAxes, "ha": side, "va": "center"}
        axis.text(x + offset, y, printable(point.tokens), fontsize="small", **where)
