"""Stage three: labels of every video's first frame travel through stored tokens, are written and scored.

A feature store, annotated first frames and a protocol go in; predictions in the benchmark's own format,
pictures and score rows, for raw and for projected tokens, come out. Nothing kept grows with the length of a
video, and a video that is finished is not done again.
"""

from __future__ import annotations

from cosettle_cache.propagation.checks import check_store
from cosettle_cache.propagation.folder import RunFolder
from cosettle_cache.propagation.propagator import Propagator, propagate
from cosettle_cache.propagation.report import PropagationReport, StageSeconds
from cosettle_cache.propagation.run import OVERLAYS, propagate_store
from cosettle_cache.propagation.tasks import BENCHMARKS, Benchmark
from cosettle_cache.propagation.tasks.base import Drawing

__all__ = [
    "BENCHMARKS",
    "OVERLAYS",
    "Benchmark",
    "Drawing",
    "PropagationReport",
    "Propagator",
    "RunFolder",
    "StageSeconds",
    "check_store",
    "propagate",
    "propagate_store",
]
