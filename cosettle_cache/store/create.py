"""Making a store: group, arrays and manifest appear under the final name at once, or not at all.

Zarr writes the metadata, so that it is what Zarr reads.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosettle_cache.core.errors import CosettleError, InputError
from cosettle_cache.core.files import (
    make_folder,
    output_errors,
    parse_json,
    sync,
    temporary_name,
    write_durably,
)
from cosettle_cache.core.tables import read_metadata, with_metadata
from cosettle_cache.core.types import ArrayLayout, Manifest
from cosettle_cache.store._local import WriterLock, is_temporary
from cosettle_cache.store._shards import ZSTD_LEVEL
from cosettle_cache.store.format import (
    DTYPES,
    INDEX_GROUP,
    MANIFEST,
    ROOT_METADATA,
    TOKENS_GROUP,
    part_folder,
)
from cosettle_cache.store.header import ATTRIBUTE, AXES, FILL_VALUES, Header, lost_header, parse_header
from cosettle_cache.store.index import seal
from cosettle_cache.store.remote import ObjectStorage, Storage, is_store
from cosettle_cache.videos.manifest import manifest_table

#: Key of the manifest's metadata with a copy of the header, from which a damaged one is restored.
HEADER_COPY = "store_header"


def create_store(storage: Storage, arrays: Sequence[ArrayLayout], files: Mapping[str, bytes]) -> None:
    """Create an empty store unless a rival does; raise `InputError` for other things there, `OutputError`."""
    if isinstance(storage, ObjectStorage):
        _create_objects(storage, files)
    else:
        _create_folder(storage.local, arrays, files)


def remove_dead_builds(path: Path) -> None:
    """Remove the unfinished stores beside `path` that nobody works on any more."""
    try:
        siblings = list(path.parent.iterdir())
    except PermissionError:
        return  # a folder may be written and not listed
    for sibling in siblings:
        if is_temporary(sibling) and sibling.name.startswith(f".{path.name}.") and sibling.is_dir():
            with suppress(FileNotFoundError):  # it has become the store meanwhile
                lock = WriterLock(sibling)
                if lock.alone:
                    shutil.rmtree(sibling, ignore_errors=True)
                lock.close()


def metadata_files(header: Header) -> dict[str, bytes]:
    """Return the Zarr metadata of a store by name; the same bytes with any version of Zarr."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    memory = MemoryStore()
    root = zarr.create_group(memory, zarr_format=3, attributes={ATTRIBUTE: header.to_json()})
    tokens = root.create_group(TOKENS_GROUP)
    root.create_group(INDEX_GROUP)
    for layout in header.arrays:
        inner = (layout.grid.rows, layout.grid.cols, layout.stored_channels)
        fill = FILL_VALUES[layout.dtype]
        tokens.create_array(
            str(layout.grid),
            shape=(layout.n_encodings, *inner),
            shards=(layout.slot_encodings, *inner),
            chunks=(layout.chunk_encodings, *inner),
            dtype=DTYPES[layout.dtype],
            fill_value=math.nan if fill == "NaN" else fill,
            filters=None,
            compressors=[ZstdCodec(level=ZSTD_LEVEL)] * (layout.codec == "zstd") + [Crc32cCodec()],
            dimension_names=AXES,
            # One file per shard in one folder: one folder to flush and to list.
            chunk_key_encoding={"name": "default", "separator": "."},
        )
    documents = {name: json.loads(value.to_bytes()) for name, value in memory._store_dict.items()}
    return {name: metadata_bytes(plain_metadata(document)) for name, document in documents.items()}


def plain_metadata(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return Zarr metadata without the one key that some versions of Zarr write and others do not."""
    return {key: value for key, value in document.items() if (key, value) != ("consolidated_metadata", None)}


def metadata_bytes(document: Mapping[str, Any]) -> bytes:
    """Return Zarr metadata as it is written: JSON indented by two spaces, as Zarr does."""
    return json.dumps(document, indent=2).encode()


def manifest_file(header: Header, manifest: Manifest) -> bytes:
    """Return the sealed manifest, with a copy of the header."""
    table = manifest_table(manifest)
    return seal(with_metadata(table, {**read_metadata(table), HEADER_COPY: json.dumps(header.to_json())}))


def header_copy(metadata: Mapping[str, str], path: str) -> Header | None:
    """Return the header in a manifest's metadata, None in the first release; raise as `parse_header` does."""
    if HEADER_COPY not in metadata:
        return None
    try:
        document = parse_json(metadata[HEADER_COPY], MANIFEST)
    except InputError:
        document = None
    return parse_header(document if isinstance(document, dict) else {}, f"{path}/{MANIFEST}")


def _create_objects(storage: ObjectStorage, files: Mapping[str, bytes]) -> None:
    """Put the root's metadata last, unless a rival did: it is what makes a store."""
    strange = [name for name, _ in storage.walk() if name not in files]
    if is_store(storage):
        return  # a rival was faster
    if strange:
        raise InputError(
            f"{storage.path} is not empty and not a store",
            wanted="a store, or no objects",
            found=", ".join(strange[:4]),
            hint="choose another --out",
        )
    for name, data in files.items():
        if name != ROOT_METADATA:
            storage.write(name, [data])
    storage.create(ROOT_METADATA, files[ROOT_METADATA])


def _create_folder(path: Path, arrays: Sequence[ArrayLayout], files: Mapping[str, bytes]) -> None:
    with output_errors(path):
        obstacle = _find_obstacle(path)
        if (path / ROOT_METADATA).exists():
            return  # looked at last: a rival's store appears all at once
        if obstacle is not None:
            raise obstacle
        make_folder(path.parent)
        remove_dead_builds(path)
        build, lock = _start_build(path)
        try:
            for name, data in files.items():
                (build / name).parent.mkdir(parents=True, exist_ok=True)
                write_durably(build / name, [data])
            for layout in arrays:
                (build / part_folder(layout.grid)).mkdir()
            for folder, _, _ in os.walk(build):
                sync(Path(folder))
            try:
                build.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(build)  # a rival was faster
            sync(path.parent)
            lock.close()
        except BaseException:
            shutil.rmtree(build, ignore_errors=True)
            raise


def _start_build(path: Path) -> tuple[Path, WriterLock]:
    """Return a new folder beside `path`, locked; a rival may remove one that is not locked yet."""
    while True:
        build = temporary_name(path)
        build.mkdir()
        with suppress(FileNotFoundError):
            lock = WriterLock(build)
            if build.exists():
                return build, lock
            lock.close()


def _find_obstacle(path: Path) -> CosettleError | None:
    """Return why no store can be made at `path`, provided that there is none."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if (path / MANIFEST).is_file():
        return lost_header(path)
    return InputError(
        f"{path} exists and is not a store",
        wanted="a store, an empty folder, or nothing",
        found="a folder with other files" if path.is_dir() else "a file",
        hint="choose another --out",
    )
