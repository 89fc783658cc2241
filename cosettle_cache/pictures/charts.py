"""Scores by sequence as one PNG: a row per sequence, a dot per kind of tokens, the whole below.

In come figures in percent; out goes a picture that stays legible for a few sequences and for hundreds.

The learning curves of a training run as one PNG: what was minimised, and whether walks find back.

In come the figures of every step; out goes a picture of four panels that share the axis of steps.

The members of a sweep in one picture: the curves of all, in one colour each.

In come the figures of every step by member; out goes a PNG of the panels that a single run's picture has.

The trade-off plane as one PNG: D_intra against D_inter, a point per encoder and per projection.

Points come in; out goes a picture in which an arrow leads from the raw tokens of an encoder to each of its
projections, over lines of equal margin.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

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


#: Figures of a training run by name, one number per line of its log; `step` among them.
Curves = Mapping[str, Sequence[float]]

#: Name of the figure, title of its panel.
PANELS = (
    ("total", "total loss"),
    ("cycle", "cycle loss (nats)"),
    ("separability", "separability loss"),
    ("cycle_accuracy", "cycle accuracy"),
)
_SMOOTHED_STEPS = 50


def write_curves(path: Path, curves: Curves, n_tokens: int) -> None:
    """Draw the curves; `n_tokens` pooled tokens give the chance levels ln(n) and 1/n, drawn dashed.

    The cycle loss and its accuracy at chance are what a head that knows nothing would score.
    """
    chance = {"cycle": (math.log(n_tokens), f"chance, ln {n_tokens}")}
    chance["cycle_accuracy"] = (1 / n_tokens, f"chance, 1/{n_tokens}")
    picture = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    axes = picture.subplots(2, 2, sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        _draw(axis, curves["step"], curves[name], title)
        if name in chance:
            _draw_chance(axis, *chance[name])
    for axis in axes[-1]:
        axis.set_xlabel("step")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    write_durably(path, [buffer.getbuffer()])


def _draw(axis: Axes, steps: Sequence[float], values: Sequence[float], title: str) -> None:
    few = len(steps) <= _SMOOTHED_STEPS
    axis.plot(steps, values, color="tab:blue", alpha=1.0 if few else 0.35, marker="." if few else "")
    if not few:
        axis.plot(steps, smooth(values, len(values) // _SMOOTHED_STEPS), color="tab:blue", linewidth=2)
    axis.set_title(title)
    axis.grid(alpha=0.3)


def _draw_chance(axis: Axes, level: float, label: str) -> None:
    axis.axhline(level, color="tab:red", linestyle="--", linewidth=1, label=label)
    axis.legend(loc="best", frameon=False)


def smooth(values: Sequence[float], width: int) -> Float[np.ndarray, " step"]:
    """Return the means of up to `width` values on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first, after = np.maximum(middle - width, 0), np.minimum(middle + width + 1, len(values))
    means: NDArray[np.float64] = (sums[after] - sums[first]) / (after - first)
    return means


def write_sweep(path: Path, members: Mapping[str, Curves]) -> None:
    """Draw total and parts of the objective and the cycle accuracy of every member over the steps."""
    picture = Figure(figsize=(12, 6.5 + 0.2 * len(members)), dpi=120, layout="constrained")
    axes = picture.subplots(2, 2, sharex=True)
    colors = colormaps["turbo"]
    for number, (name, curves) in enumerate(members.items()):
        color = colors(0.05 + 0.9 * number / max(len(members) - 1, 1))
        for axis, (field, _) in zip(axes.flat, PANELS, strict=True):
            _draw_sweep(axis, curves["step"], curves[field], name, color)
    for axis, (_, title) in zip(axes.flat, PANELS, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    write_durably(path, [buffer.getbuffer()])


def _draw_sweep(
    axis: Axes,
    steps: Sequence[float],
    values: Sequence[float],
    name: str,
    color: tuple[float, float, float, float],
) -> None:
    axis.plot(steps, smooth(values, len(values) // _SMOOTHED_STEPS), color=color, label=name, linewidth=1.5)


@dataclass(frozen=True, slots=True)
class PlanePoint:
    """One kind of tokens (`raw` or a projection's name) of one encoder; distances in diameters."""

    encoder: str
    tokens: str
    d_intra: float
    d_inter: float


def write_plane(path: Path, points: Sequence[PlanePoint], *, gamma: float, title: str) -> None:
    """Draw the points; lines of equal margin D = d_inter - gamma * d_intra are dotted."""
    picture = Figure(figsize=(7.5, 5.5), dpi=120, layout="constrained")
    axis = picture.subplots()
    encoders = list(dict.fromkeys(point.encoder for point in points))
    colors = colormaps["tab10"]
    for number, encoder in enumerate(encoders):
        _draw_encoder(axis, [item for item in points if item.encoder == encoder], colors(number % 10))
    axis.margins(0.2)
    _draw_margins(axis, gamma)
    axis.set(xlabel="D intra (less: steadier within a clip)", ylabel="D inter (more: clips further apart)")
    axis.set_title(title)
    axis.legend(loc="best", frameon=False)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    write_durably(path, [buffer.getbuffer()])


def _draw_encoder(axis: Axes, points: Sequence[PlanePoint], color: tuple[float, float, float, float]) -> None:
    raw = next((item for item in points if item.tokens == "raw"), None)
    for point in points:
        marker, label = ("o", point.encoder) if point is raw else ("s", None)
        axis.scatter(point.d_intra, point.d_inter, color=color, marker=marker, label=label, zorder=3)
        # Raw tokens are labelled on the other side: a projection may hardly move them.
        offset, side = ((-6, -12), "right") if point is raw else ((6, 5), "left")
        at = (point.d_intra, point.d_inter)
        axis.annotate(point.tokens, at, offset, textcoords="offset points", ha=side, fontsize="small")
        if raw is not None and point is not raw:
            axis.annotate(
                "",
                (point.d_intra, point.d_inter),
                (raw.d_intra, raw.d_inter),
                arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.6},
            )


def _draw_margins(axis: Axes, gamma: float) -> None:
    """Draw where the margin is the same, without moving the limits."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for margin in np.linspace(low - gamma * right, high - gamma * left, 8)[1:-1]:
        axis.axline((left, margin + gamma * left), slope=gamma, color="0.8", linestyle=":", zorder=0)
    axis.text(
        0.99,
        0.01,
        f"dotted: equal D = D inter - {gamma:g} D intra",
        transform=axis.transAxes,
        ha="right",
        va="bottom",
        fontsize="x-small",
        color="0.4",
    )
    axis.set(xlim=(left, right), ylim=(low, high))
