"""Stage three: labels of every video's first frame travel through stored tokens, are written and scored.

A feature store, annotated first frames and a protocol go in; predictions in the benchmark's own format,
pictures and score rows, for raw and for projected tokens, come out. Nothing kept grows with the length of a
video, and a video that is finished is not done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosettle_cache.core import lazy_names

if TYPE_CHECKING:
    from cosettle_cache.propagation.propagator import Propagator, propagate
    from cosettle_cache.propagation.run import PropagationReport, propagate_store

__all__ = ["PropagationReport", "Propagator", "propagate", "propagate_store"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PropagationReport": "run",
        "Propagator": "propagator",
        "propagate": "propagator",
        "propagate_store": "run",
    },
)
