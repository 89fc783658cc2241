"""Float32 that is float32: what a process may have set against it is put aside, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

_lock = Lock()
#: One entry per thread inside; flags are put back when it is empty again.
_inside: list[int] = []
#: The flags (owner, attribute, value) as the first thread inside found them.
_found: list[tuple[Any, str, Any]] = []


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Multiply float32 as float32 inside, on a device of this type: no autocast, TF32 or bfloat16 passes.

    The flags are the process's: of threads inside at once the last one out puts back what the first found.
    """
    import torch

    with _lock:
        if not _inside:
            for owner, name, value in _exact_flags():
                _found.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)
        _inside.append(get_ident())
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                for flag in _found:
                    setattr(*flag)
                _found.clear()


def _exact_flags() -> list[tuple[Any, str, Any]]:
    import torch

    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):  # torch before 2.9
        return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    # An operator that says "none" follows its backend, a backend the whole. Put aside in this order, so that
    # each is found as it was set, not as it follows. Setting mkldnn's sets the whole (torch 2.15): left out.
    whole = (backends, backends.cudnn)
    operators = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [
        *((owner, "fp32_precision", "none") for owner in whole),
        *((owner, "fp32_precision", "ieee") for owner in operators),
    ]
