"""Dense patch tokens of frozen encoders, kept once in Zarr stores, and what Co-Settle does with them."""

from __future__ import annotations

from cosettle_cache.core import lazy_names

__version__ = "0.2.0"

_HOMES = {
    "PositionShift": "core.types",
    "load_backbone": "encoders",
    "open_store": "store",
    "TokenClips": "training.clips",
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

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
