"""The header: what the group's attributes say about a store, read and checked without Zarr."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import DamagedStoreError, FingerprintError, InputError, UsageError
from cosettle_cache.core.settings import differing, digest, flat
from cosettle_cache.core.types import ArrayLayout, Fingerprint, Grid
from cosettle_cache.store.format import MANIFEST, ROOT_METADATA, SPEC_VERSION, array_folder, spec_version
from cosettle_cache.store.remote import Storage, is_store

ATTRIBUTE = "cosettle_cache"
AXES = ("encoding", "row", "col", "channel")

#: A hole read past the index must not pass for tokens: not a number, or a value that no token takes.
FILL_VALUES: Mapping[str, Any] = {"float16": "NaN", "int8": -128}

#: Stores of version 0.1 do not name it.
_DEVICE = "versions.device"
_ELSEWHERE = "write to another folder with --out, or repeat the settings of this store"


@dataclass(frozen=True, slots=True)
class Header:
    """Fingerprint, array layouts, and free notes on the encoder (where its weights came from, its size)."""

    fingerprint: Fingerprint
    arrays: tuple[ArrayLayout, ...]
    encoder: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the group's attribute; its `digest` covers everything beside it."""
        arrays = [asdict(layout) | {"grid": str(layout.grid)} for layout in self.arrays]
        versions = [spec_version(layout.dtype, layout.codec) for layout in self.arrays]
        for document, version in zip(arrays, versions, strict=True):
            if version == 1:  # it does not have these keys
                del document["dtype"], document["codec"]
        document = {
            # The oldest version of the format that can say all this.
            "spec_version": max(versions, default=1),
            "fingerprint": self.fingerprint.to_json(),
            "arrays": arrays,
            "encoder": dict(self.encoder),
        }
        plain = json.loads(json.dumps(document))
        return {**plain, "digest": digest(plain)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Header:
        """Rebuild from `to_json`."""
        items = document["arrays"]
        arrays = tuple(ArrayLayout(**{**item, "grid": Grid.parse(item["grid"])}) for item in items)
        return cls(Fingerprint.from_json(document["fingerprint"]), arrays, document["encoder"])


def read_header(storage: Storage) -> Header:
    """Read the header; `InputError` when this is no store or a newer one, `DamagedStoreError` when broken."""
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
        hint = repair_hint(path)
        raise DamagedStoreError(f"the header of {path} is damaged: {error}", hint=hint) from error
    attribute = document.get("attributes", {}).get(ATTRIBUTE) if isinstance(document, dict) else None
    if not isinstance(attribute, dict):
        raise InputError(f"{path} is a Zarr node, but not a store", wanted=f"the attribute {ATTRIBUTE}")
    return parse_header(attribute, path)


def parse_header(document: Mapping[str, Any], path: str) -> Header:
    """Return the header of the store at `path` from the group's attribute; raises as `read_header` does."""
    version = document.get("spec_version")
    if isinstance(version, int) and version > SPEC_VERSION:
        raise InputError(
            f"{path} was made by a newer cosettle-cache",
            wanted=f"spec version {SPEC_VERSION} or older",
            found=f"spec version {version}",
            hint="pip install --upgrade cosettle-cache",
        )
    stored = {key: value for key, value in document.items() if key != "digest"}
    if digest(stored) != document.get("digest"):
        raise DamagedStoreError(
            f"the header of {path} is damaged: its digest does not match", hint=repair_hint(path)
        )
    header = Header.from_json(stored)
    try:
        for layout in header.arrays:
            spec_version(layout.dtype, layout.codec)
    except UsageError as error:
        message = f"the header of {path} names a dtype or codec that it cannot have"
        raise DamagedStoreError(message) from error
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
        facts = _array_facts(json.loads(storage.read(name)), layout)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStoreError(damage, found=error, hint=hint) from error
    wanted, found = ({fact: pair[side] for fact, pair in facts.items()} for side in (0, 1))
    if found != wanted:
        raise DamagedStoreError(damage, wanted=wanted, found=found, hint=hint)


def check_same(wanted: Header, found: Header, path: str, *, hint: str = _ELSEWHERE) -> None:
    """Raise `FingerprintError` listing every difference that makes the tokens of the two stores differ."""
    wanted = Header.from_json(wanted.to_json())
    settings, theirs = (flat(header.fingerprint.to_json()) for header in (wanted, found))
    if _DEVICE not in theirs:
        settings.pop(_DEVICE, None)
    details = differing(settings, theirs)
    if wanted.arrays != found.arrays:
        texts = ["; ".join(map(_array_text, header.arrays)) for header in (wanted, found)]
        details += differing({"arrays": texts[0]}, {"arrays": texts[1]})
    if details:
        raise FingerprintError(f"{path} holds a store made with other settings", details=details, hint=hint)


def lost_header(path: str | Path) -> DamagedStoreError:
    """Return the error for a local store that has all but its root's metadata."""
    return DamagedStoreError(f"{path} has lost its {ROOT_METADATA}", hint=repair_hint(str(path)))


def _no_store(storage: Storage) -> InputError:
    path, local = storage.path, storage.local
    hint = f"cosettle-cache extract --out {path} makes one"
    if local is None:
        return InputError(f"{path} holds no store", wanted=f"an object {ROOT_METADATA}", hint=hint)
    if not os.path.lexists(local):
        return InputError(f"{path} does not exist", wanted="a store", hint=hint)
    found = "a file" if local.is_file() else "a folder without one"
    wanted = f"a folder with a {ROOT_METADATA}"
    return InputError(f"{path} is not a store", wanted=wanted, found=found, hint=hint)


def _array_facts(document: Mapping[str, Any], layout: ArrayLayout) -> dict[str, tuple[Any, Any]]:
    """Return what the metadata of an array must say, and what it says, by the name of the fact."""
    (sharding,) = document["codecs"]
    settings = sharding["configuration"]
    codecs = [codec["name"] for codec in settings["codecs"]]
    endian = settings["codecs"][0].get("configuration", {}).get("endian", "little")
    shard = document["chunk_grid"]["configuration"]["chunk_shape"]
    inner = [layout.grid.rows, layout.grid.cols, layout.stored_channels]
    return {
        "node": ((3, "array"), (document["zarr_format"], document["node_type"])),
        "shape": ([layout.n_encodings, *inner], document["shape"]),
        "shard": ([layout.slot_encodings, *inner], shard),
        "chunk": ([layout.chunk_encodings, *inner], settings["chunk_shape"]),
        "dtype": (layout.dtype, document["data_type"]),
        "fill": (FILL_VALUES[layout.dtype], document["fill_value"]),
        "axes": (list(AXES), document["dimension_names"]),
        "keys": (".", document["chunk_key_encoding"]["configuration"]["separator"]),
        "codecs": (["bytes", *["zstd"] * (layout.codec == "zstd"), "crc32c"], codecs),
        "endian": ("little", endian),
        "index codecs": (["bytes", "crc32c"], [codec["name"] for codec in settings["index_codecs"]]),
        "index": ("end", settings.get("index_location", "end")),
    }


def _array_text(layout: ArrayLayout) -> str:
    return (
        f"{layout.grid} with {layout.n_encodings} encodings of {layout.n_channels} channels ({layout.dtype}, "
        f"codec {layout.codec}), {layout.slot_encodings} per slot"
    )
