"""The members of a sweep in one picture: the curves of all, in one colour each.

In come the figures of every step by member; out goes a PNG of the panels that a single run's picture has.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosettle_cache.core.files import write_durably
from cosettle_cache.pictures.curves import PANELS, smooth
from cosettle_cache.training.run_state import StepFigures

_SMOOTHED_STEPS = 50


def write_sweep(path: Path, figures: Mapping[str, Sequence[StepFigures]]) -> None:
    """Draw total and parts of the objective and the cycle accuracy of every member over the steps."""
    picture = Figure(figsize=(12, 6.5 + 0.2 * len(figures)), dpi=120, layout="constrained")
    axes = picture.subplots(2, 2, sharex=True)
    colors = colormaps["turbo"]
    for number, (name, items) in enumerate(figures.items()):
        color = colors(0.05 + 0.9 * number / max(len(figures) - 1, 1))
        for axis, (field, _) in zip(axes.flat, PANELS, strict=True):
            _draw_sweep(axis, items, field, name, color)
    for axis, (_, title) in zip(axes.flat, PANELS, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    write_durably(path, [buffer.getbuffer()])


def _draw_sweep(
    axis: Axes, items: Sequence[StepFigures], field: str, name: str, color: tuple[float, float, float, float]
) -> None:
    values = smooth([getattr(item, field) for item in items], len(items) // _SMOOTHED_STEPS)
    axis.plot([item.step for item in items], values, color=color, label=name, linewidth=1.5)
