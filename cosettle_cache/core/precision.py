"""Float32 that is float32: what a process may have set against it is put aside, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

from cosettle_cache.core.errors import UsageError

if TYPE_CHECKING:
    import torch

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


@contextmanager
def tf32_products() -> Iterator[None]:
    """Within `exact_float32`, let a GPU multiply float32 matrices as TF32: sums in float32, 11 bits each."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    found = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, found)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `UsageError` for tf32 or bf16 where it is not to be had, or many times slower than float32."""
    import torch

    name = {"bf16": "bfloat16", "tf32": "TF32"}.get(precision)
    if name == "TF32" and device.type != "cuda":
        raise UsageError(
            "only GPUs have TF32", wanted="--device cuda", found=device, hint="--precision float32"
        )
    if name and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} has no {name}",
            wanted="a card of compute capability 8.0 or later",
            found=".".join(map(str, torch.cuda.get_device_capability(device))),
            hint="--precision fp16",
        )


def device_versions(device: str) -> dict[str, str]:
    """Return what moves tokens in their last bits besides packages: the kind of device and its libraries."""
    import torch

    return {"device": f"cuda {torch.version.cuda}" if torch.device(device).type == "cuda" else "cpu"}


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
