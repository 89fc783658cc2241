"""The header: what the group's attributes say about a store, read and checked without Zarr.

In comes the folder of a store; out goes a `Header`, or an error that says why this is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import DamagedStoreError, FingerprintError, InputError
from cosettle_cache.core.settings import differing, digest, flat
from cosettle_cache.core.types import ArrayLayout, Fingerprint, Grid
from cosettle_cache.store.format import (
    CODECS,
    DTYPES,
    MANIFEST,
    ROOT_METADATA,
    SPEC_VERSION,
    array_folder,
    spec_version,
)
from cosettle_cache.store.remote import Storage, is_store

ATTRIBUTE = "cosettle_cache"
AXES = ("encoding", "row", "col", "channel")

#: Names of the inner codecs of an array, by the layout's codec.
CODEC_NAMES = {"none": ["bytes", "crc32c"], "zstd": ["bytes", "zstd", "crc32c"]}

#: A hole read past the index must not pass for tokens: not a number, or a value that no token takes.
FILL_VALUES: Mapping[str, Any] = {"float16": "NaN", "int8": -128}


@dataclass(frozen=True, slots=True)
class Header:
    """Fingerprint, array layouts, and free notes on the encoder (where its weights came from, its size)."""

    fingerprint: Fingerprint
    arrays: tuple[ArrayLayout, ...]
    encoder: Mapping[str, Any]

    @property
    def spec_version(self) -> int:
        """The oldest version of the format that can say all this."""
        return max(
            (spec_version(layout.dtype, layout.codec) for layout in self.arrays), default=spec_version()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the group's attribute; its `digest` covers everything beside it."""
        document = {
            "spec_version": self.spec_version,
            "fingerprint": self.fingerprint.to_json(),
            "arrays": [_layout_json(layout) for layout in self.arrays],
            "encoder": dict(self.encoder),
        }
        plain = json.loads(json.dumps(document))
        return {**plain, "digest": digest(plain)}

    def to_text(self) -> str:
        """Return the attribute as one line of JSON."""
        return json.dumps(self.to_json())

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Header:
        """Rebuild from `to_json`."""
        arrays = tuple(_layout(item) for item in document["arrays"])
        return cls(Fingerprint.from_json(document["fingerprint"]), arrays, document["encoder"])


def read_header(storage: Storage) -> Header:
    """Read the header; `InputError` when this is no store or a newer one, `DamagedStoreError` when broken."""
    return parse_header(_read_attribute(storage), storage.path)


def parse_header(document: Mapping[str, Any], path: str) -> Header:
    """Return the header of the store at `path` from the group's attribute; raises as `read_header` does."""
    _check_version(path, document.get("spec_version"))
    stored = {key: value for key, value in document.items() if key != "digest"}
    if digest(stored) != document.get("digest"):
        raise DamagedStoreError(
            f"the header of {path} is damaged: its digest does not match", hint=repair_hint(path)
        )
    header = Header.from_json(stored)
    for layout in header.arrays:
        if layout.dtype not in DTYPES or layout.codec not in CODECS:
            raise DamagedStoreError(f"the header of {path} names a dtype or codec that it cannot have")
    return header


def repair_hint(path: str) -> str:
    """Return the hint of every error of a damaged store."""
    return f"cosettle-cache store repair {path}, then the same extract command again"


def check_array(storage: Storage, layout: ArrayLayout) -> None:
    """Raise `DamagedStoreError` when the Zarr metadata of an array is not what its layout says."""
    name = f"{array_folder(layout.grid)}/{ROOT_METADATA}"
    damage = f"the array metadata {name} of {storage.path} is damaged"
    hint = repair_hint(storage.path)
    try:
        found = _array_facts(json.loads(storage.read(name)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStoreError(damage, found=error, hint=hint) from error
    wanted = _wanted_facts(layout)
    if found != wanted:
        raise DamagedStoreError(damage, wanted=wanted, found=found, hint=hint)


_ELSEWHERE = "write to another folder with --out, or repeat the settings of this store"


def check_same(wanted: Header, found: Header, path: str, *, hint: str = _ELSEWHERE) -> None:
    """Raise `FingerprintError` listing every difference that makes the tokens of the two stores differ."""
    wanted = Header.from_json(wanted.to_json())
    details = differing(flat(wanted.fingerprint.to_json()), flat(found.fingerprint.to_json()))
    if wanted.arrays != found.arrays:
        details += differing({"arrays": _arrays_text(wanted)}, {"arrays": _arrays_text(found)})
    if details:
        raise FingerprintError(
            f"{path} holds a store made with other settings",
            details=details,
            hint=hint,
        )


def _read_attribute(storage: Storage) -> dict[str, Any]:
    path = storage.path
    # The manifest first: a store that is being made appears all at once, between two looks as well.
    has_manifest = storage.local is not None and storage.exists(MANIFEST)
    if not is_store(storage):
        raise lost_header(path) if has_manifest else _no_store(storage)
    try:
        document = json.loads(storage.read(ROOT_METADATA))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedStoreError(
            f"the header of {path} is damaged: {error}", hint=repair_hint(path)
        ) from error
    attribute = document.get("attributes", {}).get(ATTRIBUTE) if isinstance(document, dict) else None
    if not isinstance(attribute, dict):
        raise InputError(f"{path} is a Zarr node, but not a store", wanted=f"the attribute {ATTRIBUTE}")
    return attribute


def lost_header(path: str | Path) -> DamagedStoreError:
    """Return the error for a local store that has all but its root's metadata."""
    return DamagedStoreError(f"{path} has lost its {ROOT_METADATA}", hint=repair_hint(str(path)))


def _no_store(storage: Storage) -> InputError:
    path, local = storage.path, storage.local
    if local is None:
        return InputError(f"{path} holds no store", wanted=f"an object {ROOT_METADATA}", hint=_make_one(path))
    if not os.path.lexists(local):
        return InputError(f"{path} does not exist", wanted="a store", hint=_make_one(path))
    return InputError(
        f"{path} is not a store",
        wanted=f"a folder with a {ROOT_METADATA}",
        found="a file" if local.is_file() else "a folder without one",
        hint=_make_one(path),
    )


def _make_one(path: str) -> str:
    return f"cosettle-cache extract --out {path} makes one"


def _check_version(path: str, version: object) -> None:
    if isinstance(version, int) and version > SPEC_VERSION:
        raise InputError(
            f"{path} was made by a newer cosettle-cache",
            wanted=f"spec version {SPEC_VERSION} or older",
            found=f"spec version {version}",
            hint="pip install --upgrade cosettle-cache",
        )


def _array_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    (sharding,) = document["codecs"]
    settings = sharding["configuration"]
    return {
        "node": (document["zarr_format"], document["node_type"]),
        "shape": document["shape"],
        "shard": document["chunk_grid"]["configuration"]["chunk_shape"],
        "chunk": settings["chunk_shape"],
        "dtype": document["data_type"],
        "fill": document["fill_value"],
        "axes": document["dimension_names"],
        "keys": document["chunk_key_encoding"]["configuration"]["separator"],
        "codecs": [codec["name"] for codec in settings["codecs"]],
        "endian": settings["codecs"][0].get("configuration", {}).get("endian", "little"),
        "index codecs": [codec["name"] for codec in settings["index_codecs"]],
        "index": settings.get("index_location", "end"),
    }


def _wanted_facts(layout: ArrayLayout) -> dict[str, Any]:
    inner = [layout.grid.rows, layout.grid.cols, layout.stored_channels]
    return {
        "node": (3, "array"),
        "shape": [layout.n_encodings, *inner],
        "shard": [layout.slot_encodings, *inner],
        "chunk": [layout.chunk_encodings, *inner],
        "dtype": layout.dtype,
        "fill": FILL_VALUES[layout.dtype],
        "axes": list(AXES),
        "keys": ".",
        "codecs": CODEC_NAMES[layout.codec],
        "endian": "little",
        "index codecs": ["bytes", "crc32c"],
        "index": "end",
    }


def _layout_json(layout: ArrayLayout) -> dict[str, Any]:
    document = {
        "grid": str(layout.grid),
        "n_encodings": layout.n_encodings,
        "slot_encodings": layout.slot_encodings,
        "chunk_encodings": layout.chunk_encodings,
        "n_channels": layout.n_channels,
    }
    # Keys that version 1 does not have, only where they say something.
    if spec_version(layout.dtype, layout.codec) > 1:
        document |= {"dtype": layout.dtype, "codec": layout.codec}
    return document


def _layout(document: Mapping[str, Any]) -> ArrayLayout:
    return ArrayLayout(**{**document, "grid": Grid.parse(document["grid"])})


def _arrays_text(header: Header) -> str:
    return "; ".join(
        f"{layout.grid} with {layout.n_encodings} encodings of {layout.n_channels} channels ({layout.dtype}, "
        f"codec {layout.codec}), {layout.slot_encodings} per slot"
        for layout in header.arrays
    )
