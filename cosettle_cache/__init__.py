"""Dense patch tokens of frozen encoders, kept once in Zarr stores, and what Co-Settle does with them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PositionShift": "core.types",
    "load_backbone": "encoders",
    "open_store": "store",
    "Projection": "heads.projection",
    "load_projection": "heads.projection",
    "transfer_loss": "training.losses",
    "make_protocol": "propagation.protocols",
    "propagate": "propagation.propagator",
    "davis_j_and_f": "metrics",
    "mean_iou": "metrics",
    "pck": "metrics",
    "trade_off": "analysis.trade_off",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Lazy, so that `import cosettle_cache` costs nothing and the command line answers at once.
    if name not in _HOMES:
        raise AttributeError(f"module 'cosettle_cache' has no attribute '{name}'")
    return getattr(import_module(f"cosettle_cache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
