"""Pickles from strangers: arrays and plain containers are read, everything else is refused unexecuted.

No class or function that a file names is ever looked up. What stands for one while the opcodes run is an
inert `_Part`; arrays are made when they have ended, from a plain dtype and exactly the bytes that they need.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any

import numpy as np

#: What a pickled NumPy array is made of, in any version of NumPy and of the pickle format.
_CORES = ("numpy.core", "numpy._core")
_ARRAY_PARTS = {
    **{("numpy", name): name for name in ("ndarray", "dtype")},
    **{(f"{core}.multiarray", name): name for core in _CORES for name in ("_reconstruct", "scalar")},
    **{(f"{core}.numeric", "_frombuffer"): "_frombuffer" for core in _CORES},
    ("_codecs", "encode"): "encode",
}
_PLAIN_DTYPE = re.compile(r"[<>|=]?([biuf]\d{1,2}|O8?)")


class _Part:
    """A name that a pickle calls, or the call; `state` is what the pickle gives the result of a call."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "ndarray" or self.arguments is not None:
            raise pickle.UnpicklingError("it calls what is no part of an array")
        if self.name == "encode":
            return _text(arguments[0]).encode("latin-1")
        return _Part(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        if self.arguments is None:
            raise pickle.UnpicklingError("it changes what is no array")
        self.state = state


_LOADS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


def _with_plain_keys(opcode: bytes, keys: slice) -> dict[int, Callable[[Any], None]]:
    """Refuse keys on the stack that are tuples: of tuples within tuples the hash takes for ever."""

    def load(unpickler: Any) -> None:
        if any(isinstance(key, tuple) for key in unpickler.stack[keys]):
            raise pickle.UnpicklingError("it holds a key that is no name")
        _LOADS[opcode[0]](unpickler)

    return {opcode[0]: load}


def _load_bytearray(unpickler: Any) -> None:
    """Read before memory is taken for what a file says that it holds."""
    length = int.from_bytes(unpickler.read(8), "little")
    content = unpickler.read(length)
    if len(content) < length:
        raise pickle.UnpicklingError("it ends within bytes")
    unpickler.append(bytearray(content))


class _Bounded:
    """A file of which no more is asked for than it holds: memory is taken before anything is read."""

    def __init__(self, file: BufferedIOBase) -> None:
        self.readline, self._file = file.readline, file
        start = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(start)

    def read(self, n_bytes: int) -> bytes:
        return self._file.read(min(n_bytes, self._end - self._file.tell()))


class ArrayUnpickler(pickle._Unpickler):
    """Loads arrays, plain numbers, texts, bytes, lists, tuples, dictionaries, and nothing else.

    Written in Python, and so without the table that the faster one makes as long as a file says.
    """

    dispatch = (
        _LOADS
        | _with_plain_keys(pickle.SETITEM, slice(-2, None, 2))
        | _with_plain_keys(pickle.SETITEMS, slice(0, None, 2))
        | _with_plain_keys(pickle.DICT, slice(0, None, 2))
        | _with_plain_keys(pickle.ADDITEMS, slice(None))
        | _with_plain_keys(pickle.FROZENSET, slice(None))
        | {pickle.BYTEARRAY8[0]: _load_bytearray}
    )

    def __init__(self, file: BufferedIOBase) -> None:
        super().__init__(_Bounded(file))

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a part of an array; refuse anything else."""
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of an array")
        return _Part(_ARRAY_PARTS[module, name])

    def load(self) -> Any:
        """Return what the file holds."""
        return _resolve(super().load(), {})


def _resolve(content: Any, done: dict[int, Any]) -> Any:
    """Return `content` with arrays in place of their parts; what stands in it twice is made once."""
    if not isinstance(content, _Part | list | tuple | dict):
        return content
    if id(content) not in done:
        if isinstance(content, _Part):
            done[id(content)] = _array(content, done)
        elif isinstance(content, dict):
            done[id(content)] = {key: _resolve(value, done) for key, value in content.items()}
        else:
            kind = tuple if isinstance(content, tuple) else list
            done[id(content)] = kind(_resolve(item, done) for item in content)
    return done[id(content)]


def _array(part: _Part, done: dict[int, Any]) -> Any:
    arguments = part.arguments or ()
    if part.name == "_reconstruct" and isinstance(part.state, tuple):
        _, shape, dtype, is_fortran, data = part.state
        if isinstance(data, list):
            data = [_resolve(item, done) for item in data]
        return _from_bytes(data, dtype, shape, "F" if is_fortran else "C")
    if part.name == "_frombuffer":
        data, dtype, shape, order = arguments[:4]
        return _from_bytes(data, dtype, shape, order)
    if part.name == "scalar":
        dtype, data = arguments
        return _from_bytes(data, dtype, (), "C")[()]
    raise pickle.UnpicklingError("it holds an array without content")


def _from_bytes(data: Any, part: Any, shape: Any, order: Any) -> np.ndarray:
    """Return an array of exactly `data`: bytes, or the items of an array of objects."""
    dtype = _dtype(part)
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise pickle.UnpicklingError("it holds an array whose shape is none")
    n_items = math.prod(shape)
    if dtype.hasobject:
        if not isinstance(data, list) or len(data) != n_items:
            raise pickle.UnpicklingError("it holds an array of other objects than its shape says")
        array = np.empty(n_items, dtype)
        array[:] = data
    else:
        if not isinstance(data, bytes | bytearray) or len(data) != n_items * dtype.itemsize:
            raise pickle.UnpicklingError("it holds an array of more or fewer bytes than its shape says")
        array = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _dtype(part: Any) -> np.dtype[Any]:
    if not isinstance(part, _Part) or part.name != "dtype" or not part.arguments:
        raise pickle.UnpicklingError("it holds an array without a type")
    name = _text(part.arguments[0])
    if not _PLAIN_DTYPE.fullmatch(name):
        raise pickle.UnpicklingError(f"it holds an array of {name[:40]!r}, which is no plain number")
    dtype = np.dtype(name)
    order = part.state[1] if isinstance(part.state, tuple) and len(part.state) > 1 else "="
    return dtype.newbyteorder(">") if order == ">" else dtype


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__} where a text belongs")
    return content
