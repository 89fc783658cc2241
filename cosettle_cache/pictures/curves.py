"""The learning curves of a training run as one PNG: what was minimised, and whether walks find back.

In come the figures of every step; out goes a picture of four panels that share the axis of steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cosettle_cache.core.files import write_durably
from cosettle_cache.training.run_state import StepFigures

#: Name of the field, title of its panel.
PANELS = (
    ("total", "total loss"),
    ("cycle", "cycle loss (nats)"),
    ("separability", "separability loss"),
    ("cycle_accuracy", "cycle accuracy"),
)
_SMOOTHED_STEPS = 50


def write_curves(path: Path, figures: Sequence[StepFigures], n_tokens: int) -> None:
    """Draw the curves; `n_tokens` pooled tokens give the chance levels ln(n) and 1/n, drawn dashed.

    The cycle loss and its accuracy at chance are what a head that knows nothing would score.
    """
    chance = {"cycle": (math.log(n_tokens), f"chance, ln {n_tokens}")}
    chance["cycle_accuracy"] = (1 / n_tokens, f"chance, 1/{n_tokens}")
    picture = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    axes = picture.subplots(2, 2, sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        _draw(axis, [item.step for item in figures], [getattr(item, name) for item in figures], title)
        if name in chance:
            _draw_chance(axis, *chance[name])
    for axis in axes[-1]:
        axis.set_xlabel("step")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    write_durably(path, [buffer.getbuffer()])


def _draw(axis: Axes, steps: Sequence[int], values: Sequence[float], title: str) -> None:
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
