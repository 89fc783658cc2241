"""A store's small files: group and array metadata follow from the header, which the manifest holds a copy of.

In comes a storage; out go the header, what is wrong with these files, and the bytes they should hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cosettle_cache.core.errors import CosettleError, DamagedStoreError, FingerprintError, InputError
from cosettle_cache.core.tables import read_metadata
from cosettle_cache.core.types import Manifest
from cosettle_cache.store.create import HEADER_COPY, metadata_bytes, metadata_files, plain_metadata
from cosettle_cache.store.damage import Damage
from cosettle_cache.store.format import MANIFEST, ROOT_METADATA, BytesError
from cosettle_cache.store.header import ATTRIBUTE, Header, check_same, parse_header, read_header
from cosettle_cache.store.sealed import unseal
from cosettle_cache.store.storage import ReadStorage
from cosettle_cache.videos.manifest import manifest_digest, manifest_from_table


@dataclass(frozen=True, slots=True)
class Metadata:
    """The header of a store, the bytes of the metadata that follows from it, and what is damaged.

    `manifest` is None where it is damaged.
    """

    header: Header
    files: Mapping[str, bytes]
    manifest: Manifest | None
    damages: tuple[Damage, ...]


def inspect_metadata(storage: ReadStorage) -> Metadata:
    """Compare every small file with what it must be; a damaged header is taken from the manifest's copy.

    Raises `InputError` when there is no store, `DamagedStoreError` when neither header can be trusted.
    """
    table, manifest_fault = _read_manifest(storage)
    copy = None if table is None else _header_copy(storage, table)
    header, header_fault = _find_header(storage, copy)
    manifest = None
    if table is not None:
        manifest, manifest_fault = _check_manifest(storage, header, table)
    files = _wanted_files(storage, header, trusted=header_fault is None)
    damages = [Damage(ROOT_METADATA, header_fault)] if header_fault else []
    skip = {ROOT_METADATA} if header_fault else set()
    damages += _document_damages(storage, {name: files[name] for name in files if name not in skip})
    if manifest_fault:
        damages.append(Damage(MANIFEST, manifest_fault))
    return Metadata(header, files, manifest, tuple(damages))


def _find_header(storage: ReadStorage, copy: Header | None) -> tuple[Header, str | None]:
    """Return the store's header and, where that is the manifest's copy, why."""
    try:
        header = read_header(storage)
    except (DamagedStoreError, InputError) as error:
        if copy is not None:
            return copy, error.message
        if not storage.exists(MANIFEST):
            raise
        raise DamagedStoreError(
            f"neither header of {storage.path} can be trusted: {ROOT_METADATA} is damaged, and {MANIFEST} "
            "holds no intact copy of it",
            found=error.message,
            hint=f"put {ROOT_METADATA} back from a backup, or extract into a new store",
        ) from error
    if copy is not None:
        _check_one_store(storage, header, copy)
    return header, None


def _check_one_store(storage: ReadStorage, header: Header, copy: Header) -> None:
    try:
        check_same(header, copy, f"{storage.path}/{MANIFEST}")
    except FingerprintError as error:
        raise DamagedStoreError(
            f"{ROOT_METADATA} and {MANIFEST} of {storage.path} belong to different stores",
            details=error.details,
            hint="put the right one back",
        ) from error


def _read_manifest(storage: ReadStorage) -> tuple[pa.Table | None, str | None]:
    try:
        return unseal(storage.read(MANIFEST)), None
    except FileNotFoundError:
        return None, "it is missing; the same extract command writes it again"
    except (BytesError, OSError) as error:
        return None, str(error)


def _header_copy(storage: ReadStorage, table: pa.Table) -> Header | None:
    """Return the copy of the header; stores of the first release have none."""
    text = read_metadata(table).get(HEADER_COPY)
    return None if text is None else parse_header(json.loads(text), storage.path)


def _check_manifest(
    storage: ReadStorage, header: Header, table: pa.Table
) -> tuple[Manifest | None, str | None]:
    try:
        manifest = manifest_from_table(table, MANIFEST)
    except CosettleError as error:
        return None, error.summary
    if manifest_digest(manifest) != header.fingerprint.manifest_digest:
        return None, "it lists other videos than the store was made from"
    return manifest, None


def _wanted_files(storage: ReadStorage, header: Header, *, trusted: bool) -> dict[str, bytes]:
    """Return the metadata that follows from the header; one whose digest is right stays as it stands."""
    files = metadata_files(header)
    if trusted:
        root = json.loads(files[ROOT_METADATA])
        root["attributes"][ATTRIBUTE] = json.loads(storage.read(ROOT_METADATA))["attributes"][ATTRIBUTE]
        files[ROOT_METADATA] = metadata_bytes(root)
    return files


def _document_damages(storage: ReadStorage, wanted: Mapping[str, bytes]) -> Iterator[Damage]:
    for name, data in wanted.items():
        fault = _document_fault(storage, name, json.loads(data))
        if fault:
            yield Damage(name, fault)


def _document_fault(storage: ReadStorage, name: str, wanted: Mapping[str, Any]) -> str | None:
    try:
        data = storage.read(name)
        found = json.loads(data)
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return str(error)
    if not isinstance(found, dict) or _canonical(plain_metadata(found)) != _canonical(wanted):
        return "it is not what the header implies"
    return None if metadata_bytes(found) == data else "its white space is not what Zarr writes"


def _canonical(document: Mapping[str, Any]) -> str:
    """Return text that differs whenever two documents do: as Python objects, 1 and true are equal."""
    return json.dumps(document, sort_keys=True)
