"""Checkpoint files from strangers: a path comes in, named tensors go out, nothing in the file is executed.

Reads .safetensors, .pth / .pt (both torch formats) and TorchScript archives, and takes the state dict out of
the wrappers that the published files use. `torch.jit.load` compiles and may run code of a file, so the module
tree of an archive is unpickled by an unpickler that knows tensors, storages and plain containers only.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cosettle_cache.core.errors import CheckpointError
from cosettle_cache.core.files import first_bytes, read_json, sha256_file
from cosettle_cache.core.hub import file_beside, local_file, refetch_hint
from cosettle_cache.encoders.layouts import bare_name

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
    except Exception:  # zipfile raises anything for a damaged archive, which is named where it is read
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
    """Stands for an object of any class: what it was set to, no behaviour."""

    def __init__(self, *_: object) -> None:
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
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
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


#: Keys under which published files keep the state dict, in order of preference (PROTOCOLS 7.4): MAE, BLIP and
#: the authors' files; MoCo v3 and iBOT; DINO and DINOv2 training files; I-JEPA. Where none of them is there,
#: the only state dict of a file is taken whatever its key.
WRAPPERS = ("model", "state_dict", "teacher", "encoder")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ADAPTER_NAME = re.compile(r"(?:^|\.)(adapter_(?:linear|layer_norm)\d*\.(?:weight|bias))$")
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
_INDEX, _HEAD_BYTES = ".index.json", 256
_REFUSED_CLASS = re.compile(r"(?:GLOBAL|class|type|function)\s+\W?([A-Za-z_]\w*(?:\.\w+)+)")
_WANTED = "a state dict in a .safetensors, .pth or .pt file"


class Checkpoint(dict[str, Tensor]):
    """Tensors by name, their files, and the keys of other state dicts of the model (averages, say)."""

    passed_over: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def sha256(self) -> str:
        """Return the digest of the file, or of the digests of several in the order of their names."""
        digests = [sha256_file(path) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


#: Harmless classes beside the weights, by the names that pickles have for them; none of them is imported.
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_HARMLESS = [
    (_Record, name)
    for name in (
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
        *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int32", "Int64", "Bool")),
        *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in _PATHS),
    )
]


def read_checkpoint(path: str | Path, key: str = "") -> Checkpoint:
    """Return the tensors of a checkpoint file by name, on the CPU, taken out of their wrapper (`model`, ...).

    Entries beside the state dict (epoch, optimiser, arguments) are left out; `key` names another wrapper, or
    the first part of names. Of an `.index.json` the shards that it lists are read. An `hf:` name is a file of
    the hub.
    """
    file = local_file(path)
    if file.name.endswith(_INDEX):
        return _read_shards(path, key)
    return _unwrapped(file, _read_document(file), key, (file,))


def _read_shards(path: str | Path, key: str) -> Checkpoint:
    """Return the tensors of all shards that an index of transformers lists, every one of them there."""
    index = local_file(path)
    _check_file(index)
    listed = read_json(index)
    table = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path} lists no shards", wanted="weight_map: file by tensor")
    files = tuple(local_file(file_beside(path, name)) for name in sorted(set(table.values())))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_document(file)
    missing = [name for name in table if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise CheckpointError(
            f"the shards of {path} do not hold all that it lists", found=f"no {listing(missing)}"
        )
    return _unwrapped(index, {name: tensors[name] for name in table}, key, files)


def _read_document(path: Path) -> Any:
    _check_file(path)
    head = first_bytes(path, _HEAD_BYTES)
    # Safetensors begin with the length of their JSON header, 8 bytes, little-endian.
    if path.suffix == ".safetensors" or head[6:9] == b"\0\0{":
        return _read_safetensors(path)
    if head.startswith(_ZIP_MAGIC) and is_torchscript(path):
        return read_torchscript(path)
    return _read_torch(path)


def adapter_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the projection's tensors of one of the authors' checkpoints, in float32, by canonical names.

    `module.`, `visual.` and `adapter.adapter.` are stripped: `adapter_linear.weight`,
    `adapter_layer_norm1.bias`, `adapter_linear1.weight` and so on (PROTOCOLS 7.5).
    """
    tensors = read_checkpoint(path)
    found = [(match[1], tensor) for name, tensor in tensors.items() if (match := _ADAPTER_NAME.search(name))]
    if not found:
        raise CheckpointError(
            f"{path} holds no projection",
            wanted="tensors named adapter.adapter.adapter_linear.weight and so on",
            found=listing(tensors, 6),
        )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path} holds more than one projection", found=listing(names, 6))
    check_weights(path, dict(found))
    return {name: tensor.float() for name, tensor in found}


def _check_file(path: Path) -> None:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise CheckpointError(f"{path} is not a file", wanted=_WANTED, found=found)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty", wanted=_WANTED, found="0 bytes", hint=refetch_hint(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        _check_not_text(path)
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> Any:
    head = first_bytes(path, _HEAD_BYTES)
    if not head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        _check_not_text(path)
        raise _damaged(path, "bytes that belong to no known checkpoint format")
    if head.startswith(_ZIP_MAGIC) and not zipfile.is_zipfile(path):
        raise _damaged(path, "the end of the archive is missing")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_HARMLESS]):
            # Mapped, so that an optimiser state beside the weights is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # a damaged pickle fails with whatever its opcodes ran into
        raise _damaged(path, error) from error


def _check_not_text(path: Path) -> None:
    head = first_bytes(path, _HEAD_BYTES)
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < _HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return
    if not text.isprintable() and not all(c.isprintable() or c.isspace() for c in text):
        return
    hint = "download the file itself"
    if text.startswith("version https://git-lfs"):
        hint = "this is a Git LFS pointer; fetch the file with `git lfs pull` or download it"
    found = f"text starting with {text.strip().splitlines()[0][:60]!r}" if text.strip() else "white space"
    raise CheckpointError(f"{path} is a text file, not a checkpoint", wanted=_WANTED, found=found, hint=hint)


def _refused(path: Path, error: Exception) -> CheckpointError:
    match = _REFUSED_CLASS.search(str(error))
    name = match[1] if match else _first_global(path)
    if name is None:
        return _damaged(path, error)
    return CheckpointError(
        f"{path} holds the pickled object {name}, which could run code: refused, nothing was executed",
        wanted="tensors, numbers, strings, lists, dictionaries and argparse.Namespace only",
        found=name,
        hint="if you trust the file, save its state dict alone: torch.save(model.state_dict(), FILE)",
    )


def _first_global(path: Path) -> str | None:
    """Return the first class or function that a bare pickle names; its opcodes are listed, not run."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(first_bytes(path, 1 << 16)):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if "UNICODE" in opcode.name:
                strings.append(str(argument))
    except ValueError:
        pass  # cut short or no pickle at all
    return None


def _damaged(path: Path, reason: object) -> CheckpointError:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return CheckpointError(
        f"{path} cannot be read: truncated or damaged",
        wanted=_WANTED,
        found=f"{path.stat().st_size:,} bytes ({lines[0][:120]})",
        hint=refetch_hint(path),
    )


def _unwrapped(path: Path, document: Any, key: str, files: tuple[Path, ...]) -> Checkpoint:
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path} is not a state dict", wanted=_WANTED, found=type(document).__name__)
    dicts = {str(name): value for name, value in document.items() if _has_tensors(value)}
    # Averages lie one level deeper where their class has a state of its own: ema, module.
    deeper = {f"{name}.{part}": inner for name, value in document.items() for part, inner in _inside(value)}
    listed = [] if _has_tensors(document) else list(dicts or deeper)
    alone = listed[0] if len(listed) == 1 else ""
    dicts |= deeper
    if key and key not in dicts:
        below = [inner for name, inner in deeper.items() if name.startswith(f"{key}.")]
        dicts |= {key: below[0] if len(below) == 1 else _below(key, document)}
    chosen = key or next((name for name in WRAPPERS if name in dicts), alone)
    inner = dicts.get(chosen, {} if chosen else document)
    if not _has_tensors(inner):
        choice = f"#{key}" if key else f", at the top or under one of {', '.join(WRAPPERS)}"
        hint = f"--weights FILE#{next(iter(dicts))} takes that state dict" if dicts else None
        raise CheckpointError(
            f"{path} is not a state dict: it holds no named tensors{f' under {key}' if key else ''}",
            wanted=f"named tensors{choice}",
            found=f"keys {listing(document, 6)}",
            hint=hint,
        )
    found = Checkpoint({str(name): value for name, value in inner.items() if isinstance(value, Tensor)})
    found.files = files
    others = (name for name in dicts if name != chosen and not key)
    found.passed_over = tuple(name for name in others if _bare_names(dicts[name]) & _bare_names(found))
    return found


def _inside(value: object) -> list[tuple[str, Any]]:
    """Return the state dicts in a dictionary that is none itself."""
    if not isinstance(value, Mapping) or _has_tensors(value):
        return []
    return [(str(name), inner) for name, inner in value.items() if _has_tensors(inner)]


def _below(prefix: str, document: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what lies under a first part of names: `student` of `student.norm.weight`, in any wrapper."""
    inner = next((document[name] for name in WRAPPERS if _has_tensors(document.get(name))), document)
    start = f"{prefix}."
    return {
        str(name).removeprefix(start): item for name, item in inner.items() if str(name).startswith(start)
    }


def _bare_names(names: Iterable[object]) -> set[str]:
    """Return the ends of names, which are alike whatever the prefix of a state dict."""
    return {".".join(bare_name(str(name)).split(".")[-3:]) for name in names}


def check_weights(path: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for the first tensor that holds no weights: not dense floats, or not finite."""
    for name, tensor in tensors.items():
        fault = _fault(tensor)
        if fault:
            raise CheckpointError(
                f"the tensor {name} of {path} holds no weights: it is {fault}",
                wanted="dense floating-point numbers of 16, 32 or 64 bits, all finite",
            )


def _fault(tensor: Tensor) -> str | None:
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        return "nested, sparse or quantised"
    if tensor.dtype not in _FLOATS:
        return f"{str(tensor.dtype).removeprefix('torch.')} (quantised, or an index)"
    if tensor.is_meta or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"{tuple(tensor.shape)}, which is more numbers than the file holds"
    return None if bool(tensor.isfinite().all()) else "not finite (NaN or infinite)"


def _has_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def listing(names: Iterable[object], limit: int = 8) -> str:
    """Return the first few names in one line."""
    listed = [str(name) for name in names]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more if listed else "none"
