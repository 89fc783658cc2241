"""A pretended CUDA device: code runs with `device="cuda:0"` on a machine without one, with real numbers.

    with pretend_cuda() as device:              # or the fixture `cuda` of tests/conftest.py
        run_command([... "--device", "cuda"])   # or any function of the package
    assert device.waits <= 3, device.report()
    assert not device.at("analysis/pca.py")     # what one file waits for, by line

A tensor on the pretended device is a `CudaTensor`: it says that it is on cuda:0 and holds one on the CPU, on
which every operator works. What CUDA refuses is refused: operators on tensors of both devices (but for
numbers without a dimension, and indices), `.numpy()`, `np.asarray`, `data_ptr`. What makes the host wait for
the device is counted by the line of the package that asked for it:

* `waits`: numbers read back (`item`, `tolist`, `bool`, `float`), copies to the host, copies to the device
  that do not say `non_blocking` or are not from pinned memory, masks as indices, `nonzero` and its kin,
  indices on the CPU, `synchronize` of the device, a stream or an event;
* `uploads` and `downloads`: copies between the two, waited for or not, with `bytes_up` and `bytes_down`;
* `kernels`: operators that did work on the device.

Nothing is concurrent: streams and events do nothing, so a race is not found. Threads that start inside know
the device as well; processes do not. autocast and GradScaler become those of the CPU, inference mode becomes
`no_grad`; memory figures are of a card of 80 GB that is empty. Pinned memory is known by its address, so
views of it are pinned too. Training works, gradients included.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cosettle_cache

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_ROOM = str(cosettle_cache.__path__[0])

#: Operators that give a view or make no numbers: no kernel.
_NO_KERNEL = {
    *("view", "_unsafe_view", "view_as_real", "view_as_complex", "expand", "permute", "transpose", "t"),
    *("slice", "select", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "_reshape_alias", "unfold"),
    *("split", "split_with_sizes", "unbind", "diagonal", "lift_fresh", "is_pinned"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}
#: Operators whose result the host needs before it can go on: a number, or the size of what comes out.
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}


@dataclass
class Device:
    """What was asked of the pretended device, by the line of the package that asked."""

    waited: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0
    pinned: set[int] = field(default_factory=set)

    @property
    def waits(self) -> int:
        """How often the host waited."""
        return self.waited.total()

    def at(self, file: str) -> dict[str, int]:
        """Return the waits that lines of a file (`analysis/pca.py`) asked for, by line and cause."""
        return {place: count for place, count in self.waited.items() if place.startswith(f"{file}:")}

    def report(self) -> str:
        """Return everything in lines, the most frequent first."""
        tables = {"wait": self.waited, "upload": self.uploads, "download": self.downloads}
        lines = [
            f"{n:6d} {name} {place}" for name, table in tables.items() for place, n in table.most_common()
        ]
        return "\n".join([f"{self.kernels.total()} kernels, {self.waits} waits", *lines])

    def clear(self) -> None:
        """Forget what was counted so far."""
        for table in (self.waited, self.uploads, self.downloads, self.kernels):
            table.clear()
        self.bytes_up = self.bytes_down = 0

    def wait(self, cause: str) -> None:
        """Count one wait."""
        self.waited[f"{_place()} {cause}"] += 1

    def upload(self, tensor: torch.Tensor, non_blocking: bool) -> None:
        """Count one copy to the device."""
        self.uploads[_place()] += 1
        self.bytes_up += tensor.nbytes
        if not (non_blocking and self.is_pinned(tensor)):
            self.wait("upload")

    def download(self, tensor: torch.Tensor, non_blocking: bool) -> None:
        """Count one copy to the host."""
        self.downloads[_place()] += 1
        self.bytes_down += tensor.nbytes
        if not non_blocking:
            self.wait("download")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note that a tensor is in pinned memory."""
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Say whether it is."""
        return tensor.untyped_storage().data_ptr() in self.pinned


def _place() -> str:
    """Return file and line of the innermost frame in the package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ROOM):
            return f"{name[len(_ROOM) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside:0"


def _refuse(*_: object, **__: object) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


class CudaTensor(torch.Tensor):
    """A tensor that says it is on cuda:0; `held` is its content, on the CPU."""

    held: torch.Tensor
    on: Device
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    numpy = __array__ = _refuse
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, on: Device) -> CudaTensor:
        look: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, **look)
        made.held, made.on = held, on
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        on = next(item.on for item in tree_leaves((args, kwargs)) if isinstance(item, CudaTensor))
        return _run(on, func, args, dict(kwargs or {}))

    def tolist(self) -> Any:
        self.on.wait("tolist")
        return self.held.tolist()

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        raise RuntimeError("a pretended tensor has no address on the device")

    def __reduce_ex__(self, protocol: Any) -> Any:  # as torch.save does
        self.on.download(self.held, non_blocking=False)
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held!r})"


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _held(item: Any) -> Any:
    return item.held if isinstance(item, CudaTensor) else item


def _run(on: Device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do one operator on the CPU, count it, and refuse what the device would."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    ours = [item for item in tensors if isinstance(item, CudaTensor)]
    if name == "_to_copy" and ours:
        # Moves come through `_Calls`; this is a gradient's, by a device that C++ takes for the CPU.
        kwargs.pop("device", None)
    wanted = kwargs.get("device")
    if name == "_has_compatible_shallow_copy_type":
        return len(ours) in (0, len(tensors))
    if name == "copy_" and ours and len(ours) < len(tensors):
        target, source, *rest = args
        count = on.upload if isinstance(target, CudaTensor) else on.download
        count(_held(source), bool(rest and rest[0]))
        _held(target).copy_(_held(source))
        return target
    if ours:
        _check_devices(on, name, args, tensors)
        if name in _WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            on.wait("item" if name == "_local_scalar_dense" else name)
    to_device = bool(ours) if wanted is None else _is_cuda(wanted)
    if to_device and name not in _NO_KERNEL:
        on.kernels[name] += 1
    kwargs = kwargs | ({"device": CPU} if _is_cuda(wanted) else {})
    pinned = kwargs.pop("pin_memory", None)
    out = (_mm_float32 if name == "mm" and len(args) > 2 else func)(
        *tree_map(_held, args), **tree_map(_held, kwargs)
    )
    if pinned:
        on.pin(out)
    if not to_device:
        return out
    # Operators that write into an argument, or return it, return that very tensor.
    known = {id(item.held): item for item in ours}

    def wrapped(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or isinstance(item, CudaTensor):
            return item
        return known.get(id(item)) if id(item) in known else CudaTensor(item, on)

    return tree_map(wrapped, out)


def _mm_float32(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    """Multiply float16 matrices with float32 sums and results, which no CPU has."""
    assert dtype == out.dtype == torch.float32
    return torch.mm(a.float(), b.float(), out=out)


def _check_devices(on: Device, name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    indexing = name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
    indices = [item for item in args[1] if item is not None] if indexing else []
    values = args[2] if indexing and len(args) > 2 else None
    for index in indices:
        if not isinstance(index, CudaTensor):
            on.upload(index, non_blocking=False)
        # A mask that gets one value is filled without a look at it.
        if index.dtype in (torch.bool, torch.uint8) and (values is None or values.numel() != 1):
            on.wait("mask as index")
    chosen = {id(index) for index in indices}
    strangers = [item for item in tensors if not isinstance(item, CudaTensor) and id(item) not in chosen]
    if any(item.dim() for item in strangers):
        shapes = ", ".join(f"{tuple(item.shape)} on {item.device}" for item in tensors)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name} of {shapes}"
        )


class _Operators(TorchDispatchMode):
    """Makes tensors on the device where an operator is asked for them."""

    def __init__(self, on: Device) -> None:
        super().__init__()
        self.on = on

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(self.on, func, args, dict(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Stands in for the calls that move tensors; in C++ all of them are on the CPU."""

    def __init__(self, on: Device) -> None:
        super().__init__()
        self.on = on

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return self._move(args[0], *_parse_to(args[1:], kwargs))
        if func is torch.Tensor.cpu:
            return self._move(args[0], CPU, None, False)
        if func is torch.Tensor.cuda:
            return self._move(args[0], CUDA, None, bool(kwargs.get("non_blocking")))
        if func is torch.Tensor.pin_memory:
            if isinstance(args[0], CudaTensor):
                raise RuntimeError("cannot pin a tensor on cuda:0, only dense CPU tensors can be pinned")
            return self.on.pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return self.on.is_pinned(args[0])
        if func is torch.Tensor.record_stream:
            return None
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            device = kwargs.pop("device", None)
            if func is torch.Tensor.new_tensor:
                kwargs.setdefault("dtype", args[0].dtype)
                device = args[0].device if device is None else device
                func, args = torch.tensor, args[1:]
            if isinstance(args[0], CudaTensor):
                return self._move(args[0], torch.device(device or CUDA), kwargs.get("dtype"), False)
            made = func(*args, **kwargs)
            return self._move(made, torch.device(device or CPU), None, False)
        return func(*args, **kwargs)

    def _move(
        self, tensor: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool
    ) -> torch.Tensor:
        place = tensor.device if device is None else torch.device(device)
        if place.type == tensor.device.type:
            return tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
        if isinstance(tensor, CudaTensor):
            self.on.download(tensor.held, non_blocking)
            return tensor.held.detach().clone().to(dtype or tensor.dtype)
        self.on.upload(tensor, non_blocking)
        return CudaTensor(tensor.detach().clone().to(dtype or tensor.dtype), self.on)


def _parse_to(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None, bool]:
    """Return device, data type and `non_blocking` of `Tensor.to`."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device, args[0].dtype, bool(kwargs.get("non_blocking"))
    kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[:3], **kwargs)
    return device, dtype, non_blocking


class _Queue:
    """A stream or an event: nothing ever has to be waited for."""

    device = CUDA
    cuda_stream = 0
    on: Device

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def synchronize(self) -> None:
        self.on.wait("synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def record_event(self, event: Any = None) -> Any:
        return event or self

    def elapsed_time(self, end: object) -> float:
        return 0.0

    def _nothing(self, *_: object) -> None:
        return None

    wait_stream = wait_event = record = wait = _nothing

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _patches(on: Device) -> dict[str, Any]:
    """Return what stands in for parts of torch, by name."""
    queue = type("Queue", (_Queue,), {"on": on})
    card = SimpleNamespace(
        name="pretended", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0
    )
    on_cpu: Callable[..., Any] = torch.autocast
    scaler: Callable[..., Any] = torch.amp.GradScaler
    answers: dict[str, Any] = {
        **{"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0},
        **{"is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_name": "pretended"},
        **{"get_device_properties": card, "mem_get_info": (80 * 2**30, 80 * 2**30), "_lazy_init": None},
        **{"memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0},
        **{"reset_peak_memory_stats": None, "empty_cache": None, "set_device": None},
        **{"is_current_stream_capturing": False},
    }
    made: dict[str, Any] = {
        f"torch.cuda.{name}": (lambda *_, _answer=answer, **__: _answer) for name, answer in answers.items()
    }
    made |= {"torch.cuda.Stream": queue, "torch.cuda.Event": queue}
    streams = ("torch.cuda.current_stream", "torch.cuda.default_stream", "torch.accelerator.current_stream")
    made |= {name: lambda *_: queue() for name in streams}
    made |= {name: lambda *_: nullcontext() for name in ("torch.cuda.stream", "torch.cuda.device")}
    made["torch.cuda.synchronize"] = lambda *_: on.wait("synchronize")
    # A wrapper cannot be an inference tensor.
    made["torch.inference_mode"] = torch.no_grad
    made["torch.autocast"] = lambda device_type, *args, **kwargs: on_cpu("cpu", *args, **kwargs)
    made["torch.amp.GradScaler"] = lambda device="cuda", **kwargs: scaler("cpu", **kwargs)
    return made


@contextmanager
def pretend_cuda() -> Iterator[Device]:
    """Let `cuda` and `cuda:0` be devices of this process; give what is counted."""
    on = Device()
    plain_run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        # Modes are each thread's own.
        with _Operators(on), _Calls(on):
            plain_run(thread)

    # Else a module's parameters keep their place in memory when it moves.
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, stand_in in {**_patches(on), "threading.Thread.run": run_there}.items():
            stack.enter_context(patch(name, stand_in))
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(_Operators(on))
        stack.enter_context(_Calls(on))
        yield on
