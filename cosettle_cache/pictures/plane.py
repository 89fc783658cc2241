"""The trade-off plane as one PNG: D_intra against D_inter, a point per encoder and per projection.

Points come in; out goes a picture in which an arrow leads from the raw tokens of an encoder to each of its
projections, over lines of equal margin.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosettle_cache.core.files import write_durably


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
