"""Making a store: group, arrays and manifest appear under the final name at once, or not at all.

In come a header and a manifest; out goes a folder. Zarr writes the metadata, so that it is what Zarr reads.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosettle_cache.errors import InputError
from cosettle_cache.files import make_folder, output_errors, sync, temporary_name, write_durably
from cosettle_cache.manifest import manifest_table
from cosettle_cache.store.header import ATTRIBUTE, Header
from cosettle_cache.store.layout import (
    INDEX_GROUP,
    TOKEN_DTYPE,
    TOKENS_GROUP,
    manifest_path,
    part_folder,
)
from cosettle_cache.store.locks import WriterLock, is_temporary
from cosettle_cache.store.sealed import seal
from cosettle_cache.types import ArrayLayout, Manifest

AXES = ("encoding", "row", "col", "channel")


def create_store(path: Path, header: Header, manifest: Manifest) -> None:
    """Create an empty store at `path`, which may be an empty folder; a rival who was faster wins.

    Raises `InputError` when `path` holds something else, `OutputError` when it cannot be written.
    """
    with output_errors(path):
        _check_vacant(path)
        make_folder(path.parent)
        _remove_dead_builds(path)
        build = temporary_name(path)
        try:
            build.mkdir()
            lock = WriterLock(build)
            _write_metadata(build, header)
            write_durably(manifest_path(build), [seal(manifest_table(manifest))])
            _sync_tree(build)
            _publish(build, path)
            lock.close()
        except BaseException:
            shutil.rmtree(build, ignore_errors=True)
            raise


def _check_vacant(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise InputError(
            f"{path} exists and is not a store",
            wanted="a store, an empty folder, or nothing",
            found="a folder with other files" if path.is_dir() else "a file",
            hint="choose another --out",
        )


def _write_metadata(build: Path, header: Header) -> None:
    import zarr

    root = zarr.create_group(str(build), zarr_format=3, attributes={ATTRIBUTE: header.to_json()})
    tokens = root.create_group(TOKENS_GROUP)
    root.create_group(INDEX_GROUP)
    for layout in header.arrays:
        tokens.create_array(str(layout.grid), **_array_settings(layout))
        part_folder(build, layout.grid).mkdir()


def _array_settings(layout: ArrayLayout) -> dict[str, Any]:
    from zarr.codecs import Crc32cCodec

    inner = (layout.grid.rows, layout.grid.cols, layout.n_channels)
    return {
        "shape": (layout.n_encodings, *inner),
        "shards": (layout.slot_encodings, *inner),
        "chunks": (layout.chunk_encodings, *inner),
        "dtype": TOKEN_DTYPE,
        # A hole read past the index must not pass for tokens.
        "fill_value": math.nan,
        "filters": None,
        "compressors": [Crc32cCodec()],
        "dimension_names": AXES,
        # One file per shard in one folder: one folder to flush and to list.
        "chunk_key_encoding": {"name": "default", "separator": "."},
    }


def _publish(build: Path, path: Path) -> None:
    try:
        build.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(build)
    sync(path.parent)


def _remove_dead_builds(path: Path) -> None:
    for sibling in _builds(path):
        lock = WriterLock(sibling)
        if lock.alone:
            shutil.rmtree(sibling, ignore_errors=True)
        lock.close()


def _builds(path: Path) -> Iterator[Path]:
    for sibling in path.parent.iterdir():
        if is_temporary(sibling) and sibling.name.startswith(f".{path.name}.") and sibling.is_dir():
            yield sibling


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
