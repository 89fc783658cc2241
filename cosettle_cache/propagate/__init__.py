"""Stage three: labels of every video's first frame travel through stored tokens, are written and scored.

A feature store, annotated first frames and a protocol go in; predictions in the benchmark's own format,
pictures and score rows, for raw and for projected tokens, come out. Nothing kept grows with the length of a
video, and a video that is finished is not done again.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from cosettle_cache.propagate.benchmarks import BENCHMARKS, Benchmark
from cosettle_cache.propagate.checks import check_store
from cosettle_cache.propagate.folder import RunFolder
from cosettle_cache.propagate.report import PropagationReport, StageSeconds
from cosettle_cache.propagate.run import OVERLAYS, propagate_store
from cosettle_cache.propagate.subjects import Drawing
from cosettle_cache.propagator import Propagator, propagate

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


class _Room(ModuleType):
    """This package, callable: the room and the public function have one name (`cosettle_cache.propagate`).

    Importing the room binds that name to the package, so whichever came first, calling it propagates.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Tensor:
        return propagate(*arguments, **settings)


sys.modules[__name__].__class__ = _Room
