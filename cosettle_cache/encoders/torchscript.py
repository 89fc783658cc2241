"""The state dict of a TorchScript archive, without running the archive.

`torch.jit.load` compiles and may run code of the file. This reader unpickles the module tree with an
unpickler that knows tensors, storages and plain containers only; a scripted class becomes an inert record of
its attributes.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosettle_cache.core.errors import CheckpointError

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Say whether a zip file is a TorchScript archive (it carries `constants.pkl` beside `data.pkl`)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a TorchScript archive by dotted name; nothing is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(root) as file:
                module = _ArchiveUnpickler(file, archive, root.removesuffix("data.pkl")).load()
    except CheckpointError:
        raise
    except Exception as error:  # any damage surfaces somewhere inside pickle, zipfile or torch
        raise CheckpointError(f"{path} is a damaged TorchScript archive", found=str(error)[:120]) from error
    tensors = dict(_named_tensors(module)) if isinstance(module, _Record) else {}
    if not tensors:
        raise CheckpointError(
            f"{path} is a TorchScript archive without parameters", found=type(module).__name__
        )
    return tensors


class _Record:
    """Stands for an object of a scripted class: what it was set to, no behaviour."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _ArchiveUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(file)
        self._archive, self._prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".", maxsplit=1)[0] == "__torch__":
            return _Record
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return _first
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise CheckpointError(
            f"the archive holds the pickled object {module}.{name}: refused, nothing was executed",
            wanted="tensors and scripted modules only",
            found=f"{module}.{name}",
        )

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        assert kind == "storage"
        data = bytearray(self._archive.read(f"{self._prefix}data/{key}"))
        return torch.frombuffer(data, dtype=dtype)[:count] if count else torch.empty(0, dtype=dtype)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _first(value: Any, *_: object) -> Any:
    return value


def _named_tensors(record: _Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in record.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Record):
            yield from _named_tensors(value, f"{prefix}{name}.")
