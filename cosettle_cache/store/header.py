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

from cosettle_cache.config import digest
from cosettle_cache.errors import DamagedStoreError, FingerprintError, InputError
from cosettle_cache.store.layout import ROOT_METADATA, SPEC_VERSION, array_folder
from cosettle_cache.types import ArrayLayout, Difference, Fingerprint, Grid

ATTRIBUTE = "cosettle_cache"
_MAKE_ONE = "cosettle-cache extract --out {path} makes one"


@dataclass(frozen=True, slots=True)
class Header:
    """Fingerprint, array layouts, and free notes on the encoder (where its weights came from, its size)."""

    fingerprint: Fingerprint
    arrays: tuple[ArrayLayout, ...]
    encoder: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the group's attribute; its `digest` covers everything beside it."""
        document = {
            "spec_version": SPEC_VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "arrays": [_layout_json(layout) for layout in self.arrays],
            "encoder": dict(self.encoder),
        }
        plain = json.loads(json.dumps(document))
        return {**plain, "digest": digest(plain)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Header:
        """Rebuild from `to_json`."""
        arrays = tuple(_layout(item) for item in document["arrays"])
        return cls(Fingerprint.from_json(document["fingerprint"]), arrays, document["encoder"])


def is_zarr(path: Path) -> bool:
    """Say whether `path` is a Zarr v3 node of any kind."""
    return os.path.isfile(path / ROOT_METADATA)  # noqa: PTH113 (False, not an error, where looking is forbidden)


def read_header(path: Path) -> Header:
    """Read the header; `InputError` when this is no store or a newer one, `DamagedStoreError` when broken."""
    document = _read_attribute(path)
    _check_version(path, document.get("spec_version"))
    stored = {key: value for key, value in document.items() if key != "digest"}
    if digest(stored) != document.get("digest"):
        raise DamagedStoreError(f"the header of {path} is damaged: its digest does not match")
    return Header.from_json(stored)


def check_array(path: Path, layout: ArrayLayout) -> None:
    """Raise `DamagedStoreError` when the Zarr metadata of an array is not what its layout says."""
    file = array_folder(path, layout.grid) / ROOT_METADATA
    try:
        found = _array_facts(json.loads(file.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedStoreError(f"the array metadata {file} is damaged", found=error) from error
    inner = [layout.grid.rows, layout.grid.cols, layout.n_channels]
    wanted = {
        "shape": [layout.n_encodings, *inner],
        "shard": [layout.slot_encodings, *inner],
        "chunk": [layout.chunk_encodings, *inner],
        "dtype": "float16",
        "codecs": ["bytes", "crc32c"],
        "index": "end",
    }
    if found != wanted:
        raise DamagedStoreError(f"the array metadata {file} is damaged", wanted=wanted, found=found)


def check_same(wanted: Header, found: Header, path: Path) -> None:
    """Raise `FingerprintError` listing every difference that makes the tokens of the two stores differ."""
    wanted = Header.from_json(wanted.to_json())
    differences = wanted.fingerprint.differences(found.fingerprint)
    if wanted.arrays != found.arrays:
        differences.append(Difference("arrays", _arrays_text(wanted), _arrays_text(found)))
    if differences:
        raise FingerprintError(
            f"{path} holds a store made with other settings",
            details=[f"{item.key}: wanted {item.wanted}, found {item.found}" for item in differences],
            hint="write to another folder with --out, or repeat the settings of this store",
        )


def _read_attribute(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist", wanted="a store", hint=_MAKE_ONE.format(path=path))
    if not is_zarr(path):
        raise InputError(
            f"{path} is not a store",
            wanted=f"a folder with a {ROOT_METADATA}",
            found="a file" if path.is_file() else "a folder without one",
            hint=_MAKE_ONE.format(path=path),
        )
    try:
        document = json.loads((path / ROOT_METADATA).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedStoreError(f"the header of {path} is damaged: {error}") from error
    attribute = document.get("attributes", {}).get(ATTRIBUTE) if isinstance(document, dict) else None
    if not isinstance(attribute, dict):
        raise InputError(f"{path} is a Zarr node, but not a store", wanted=f"the attribute {ATTRIBUTE}")
    return attribute


def _check_version(path: Path, version: object) -> None:
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
        "shape": document["shape"],
        "shard": document["chunk_grid"]["configuration"]["chunk_shape"],
        "chunk": settings["chunk_shape"],
        "dtype": document["data_type"],
        "codecs": [codec["name"] for codec in settings["codecs"]],
        "index": settings.get("index_location", "end"),
    }


def _layout_json(layout: ArrayLayout) -> dict[str, Any]:
    return {
        "grid": str(layout.grid),
        "n_encodings": layout.n_encodings,
        "slot_encodings": layout.slot_encodings,
        "chunk_encodings": layout.chunk_encodings,
        "n_channels": layout.n_channels,
    }


def _layout(document: Mapping[str, Any]) -> ArrayLayout:
    return ArrayLayout(**{**document, "grid": Grid.parse(document["grid"])})


def _arrays_text(header: Header) -> str:
    return "; ".join(
        f"{layout.grid} with {layout.n_encodings} encodings of {layout.n_channels} channels, "
        f"{layout.slot_encodings} per slot"
        for layout in header.arrays
    )
