"""The header: what the group's attributes say about a store, read and checked without Zarr."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import (
    CosettleError,
    DamagedStoreError,
    FingerprintError,
    InputError,
    UsageError,
    first_line,
)
from cosettle_cache.core.files import HUB_PREFIX, parse_json
from cosettle_cache.core.settings import differing, digest, flat
from cosettle_cache.core.types import ArrayLayout, Fingerprint, Grid, PlanKind
from cosettle_cache.store._local import cached_property
from cosettle_cache.store.format import (
    MANIFEST,
    PART_VERSION,
    ROOT_METADATA,
    SPEC_VERSION,
    array_folder,
    check_arrays,
    spec_version,
)
from cosettle_cache.store.remote import Storage, is_store

ATTRIBUTE = "cosettle_cache"
AXES = ("encoding", "row", "col", "channel")

#: A hole read past the index must not pass for tokens: not a number, or a value that no token takes.
FILL_VALUES: Mapping[str, Any] = {"float16": "NaN", "int8": -128}

#: Stores of version 0.1 do not name it.
_DEVICE = "versions.device"
_ELSEWHERE = "write to another folder with --out, or repeat the settings of this store"


@dataclass(frozen=True)
class Header:
    """Fingerprint, array layouts, notes on the encoder; `stored` is the document read, unknown keys too."""

    fingerprint: Fingerprint
    arrays: tuple[ArrayLayout, ...]
    encoder: Mapping[str, Any]
    stored: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the group's attribute; its `digest` covers everything beside it."""
        if self.stored is not None:
            return dict(self.stored)
        arrays = [asdict(layout) | {"grid": str(layout.grid)} for layout in self.arrays]
        versions = [spec_version(layout.dtype, layout.codec) for layout in self.arrays]
        for document, version in zip(arrays, versions, strict=True):
            if version == 1:  # it does not have these keys
                del document["dtype"], document["codec"]
        document = {
            # The oldest version of the format that can say all this.
            "spec_version": max(versions, default=1),
            "part_version": PART_VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "arrays": arrays,
            "encoder": dict(self.encoder),
        }
        plain = json.loads(json.dumps(document))
        return {**plain, "digest": digest(plain)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Header:
        """Rebuild from `to_json`; keys that are not known do not matter.

        Raises `KeyError`, `TypeError`, `ValueError`, `AttributeError` or `CosettleError` for other documents.
        """
        items = [_known(ArrayLayout, item) for item in document["arrays"]]
        arrays = tuple(ArrayLayout(**{**item, "grid": Grid.parse(item["grid"])}) for item in items)
        if [str(layout.grid) for layout in arrays] != [item["grid"] for item in items]:
            raise ValueError("a grid is not written as rows x columns")
        check_arrays(arrays)
        values = _known(Fingerprint, document["fingerprint"])
        for item in fields(Fingerprint):
            if not isinstance(values[item.name], {"int": int, "str": str}.get(str(item.type), dict)):
                raise TypeError(f"{item.name} is {values[item.name]!r}")
        plan, version = values["plan"], document.get("part_version", 1)
        for name, number in (("n_views", 1), ("every", 1), ("n_shifted", 0)):
            if type(found := plan.get(name, number)) is not int or found < number:
                raise ValueError(f"{name} is {found!r}")
        if type(version) is not int or not isinstance(document["encoder"], dict):
            raise TypeError("part_version or encoder is of another type")
        PlanKind(plan["kind"])
        return cls(Fingerprint(**values), arrays, document["encoder"], document)

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides the tokens and where they lie: what index parts are tied to."""
        document = self.to_json()
        return digest([document["fingerprint"], document["arrays"]])

    @property
    def part_version(self) -> int:
        """The oldest version that an index part of the store may have; 1 where version 0.1 made it."""
        return int(self.to_json().get("part_version", 1))


def read_header(storage: Storage) -> Header:
    """Read the header; `InputError` when this is no store or a newer one, `DamagedStoreError` when broken."""
    path = storage.path
    # The manifest first: a store that is being made appears all at once, between two looks as well.
    has_manifest = storage.local is not None and storage.exists(MANIFEST)
    if not is_store(storage):
        raise lost_header(path) if has_manifest else _no_store(storage)
    try:
        document = parse_json(storage.read(ROOT_METADATA), ROOT_METADATA)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise _damaged(path, error.summary) from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    attribute = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(attribute, dict):
        raise InputError(f"{path} is a Zarr node, but not a store", wanted=f"the attribute {ATTRIBUTE}")
    return parse_header(attribute, path)


def parse_header(document: Mapping[str, Any], path: str) -> Header:
    """Return the header of the store at `path` from the group's attribute; raises as `read_header` does."""
    version = document.get("spec_version")
    if type(version) is int and version > SPEC_VERSION:
        raise InputError(
            f"{path} was made by a newer cosettle-cache",
            wanted=f"spec version {SPEC_VERSION} or older",
            found=f"spec version {version}",
            hint="pip install --upgrade cosettle-cache",
        )
    try:
        if digest({key: value for key, value in document.items() if key != "digest"}) != document.get(
            "digest"
        ):
            raise ValueError("its digest does not match")
        if type(version) is not int or version < 1:
            raise ValueError(f"its spec version is {version!r}")
        return Header.from_json(document)
    except KeyError as error:
        raise _damaged(path, f"it lacks {error}") from error
    except UsageError as error:
        raise _damaged(path, "it names a dtype or codec that it cannot have") from error
    except (CosettleError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, first_line(error)) from error


def _damaged(path: str, reason: str) -> DamagedStoreError:
    return DamagedStoreError(f"the header of {path} is damaged: {reason}", hint=repair_hint(path))


def _known(kind: type[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a document that are fields of `kind`; those without a default must be there."""
    names = {item.name: item.default is MISSING for item in fields(kind)}
    return {name: document[name] for name, needed in names.items() if needed or name in document}


def repair_hint(path: str) -> str:
    """Return the hint of every error of a damaged store."""
    return f"cosettle-cache store repair {path}, then the same extract command again"


def check_array(storage: Storage, layout: ArrayLayout) -> None:
    """Raise `DamagedStoreError` when the Zarr metadata of an array is not what its layout says."""
    name = f"{array_folder(layout.grid)}/{ROOT_METADATA}"
    damage = f"the array metadata {name} of {storage.path} is damaged"
    hint = repair_hint(storage.path)
    try:
        facts = _array_facts(parse_json(storage.read(name), name), layout)
    except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStoreError(damage, found=error, hint=hint) from error
    wanted, found = ({fact: pair[side] for fact, pair in facts.items()} for side in (0, 1))
    if found != wanted:
        raise DamagedStoreError(damage, wanted=wanted, found=found, hint=hint)


def check_same(
    wanted: Header, found: Header, path: str, *, hint: str = _ELSEWHERE, exact: bool = False
) -> None:
    """Raise `FingerprintError` listing what makes tokens differ; `exact`: what version 0.1 leaves out too."""
    settings, theirs = (flat(header.to_json()["fingerprint"]) for header in (wanted, found))
    if exact:
        settings["part_version"], theirs["part_version"] = wanted.part_version, found.part_version
    elif _DEVICE not in theirs:
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
    hint = None if path.startswith(HUB_PREFIX) else f"cosettle-cache extract --out {path} makes one"
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
