"""Tables on disk: Parquet, CSV and JSON, written durably. The only room that writes with pyarrow.

Files that are too long to hold are written and read group by group.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from cosettle_cache.core.errors import InputError, first_line, masked
from cosettle_cache.core.files import make_folder, replacing, sync, write_durably

Row = Mapping[str, Any]

#: Most rows of a Parquet file that is read as a whole; a few bytes of it can claim billions.
_MOST_ROWS = 2**22


def make_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Return `rows` as a table of exactly `schema`."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def with_metadata(table: pa.Table, metadata: Mapping[str, str]) -> pa.Table:
    """Return `table` carrying `metadata` (and nothing else) as file metadata."""
    return table.replace_schema_metadata(dict(metadata))


def read_metadata(table: pa.Table) -> dict[str, str]:
    """Return the file metadata of a table as text."""
    raw = table.schema.metadata or {}
    return {k.decode(): v.decode() for k, v in raw.items() if not k.startswith(b"ARROW")}


def encode_parquet(table: pa.Table) -> bytes:
    """Return `table` as the bytes of a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, compression="zstd", store_schema=True)
    return bytes(sink.getvalue())


def write_table(path: Path, table: pa.Table) -> None:
    """Write `table` as Parquet, or as CSV when `path` ends in .csv, into a folder made if need be."""
    make_folder(path.parent)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, sink := pa.BufferOutputStream())
        write_durably(path, [bytes(sink.getvalue())])
    else:
        write_durably(path, [encode_parquet(table)])


@contextmanager
def stream_table(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Give a function that appends rows, each call one row group; at the end `path` holds the Parquet file.

    After an error inside, `path` holds what it held before.
    """
    make_folder(path.parent)
    with replacing(path) as temporary:
        with pa.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            yield writer.write_batch
        sync(temporary)


def open_table(path: Path) -> pa.parquet.ParquetFile:
    """Open a Parquet file for reading it group by group; raise `InputError` when it is missing or is none."""
    _check_file(path, "a Parquet file")
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet or CSV file; raise `InputError` when it is missing or is neither.

    `schema` gives the types of a CSV file's columns, which the file itself cannot say.
    """
    _check_file(path, "a Parquet or CSV file")
    try:
        if path.suffix == ".csv":
            # Without types a name such as 0001 would be read as the number 1.
            types = {} if schema is None else {field.name: field.type for field in schema}
            options = pa.csv.ConvertOptions(strings_can_be_null=True, null_values=[""], column_types=types)
            table = pa.csv.read_csv(path, convert_options=options)
        elif (n_rows := pa.parquet.read_metadata(path).num_rows) > _MOST_ROWS:
            raise ValueError(f"{n_rows} rows, more than {_MOST_ROWS}")
        else:
            table = pa.parquet.read_table(path, partitioning=None)
        table.validate(full=True)  # texts of other bytes than UTF-8 among others
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise InputError(f"{path} has the column {twice[0]} twice", wanted="every column once")
    return table


def read_rows(path: Path, schema: pa.Schema) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows of a table that anybody may have written, and its metadata.

    Columns of `schema` are of its types, where they are there. Raises `InputError` for what cannot be.
    """
    table = read_table(path, schema)
    kinds = {field.name: field.type for field in schema}
    try:
        columns = [
            column.cast(kinds.get(field.name, field.type))
            for field, column in zip(table.schema, table.columns, strict=True)
        ]
        cast = pa.table(columns, names=table.column_names)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error
    return table_rows(cast, path), read_metadata(table)


def table_rows(table: pa.Table, title: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a foreign table; raise `InputError` that names it for cells that Python lacks."""
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowException, ValueError, OverflowError) as error:  # dates after 9999, nanoseconds
        raise _unreadable(title, error) from error


def _check_file(path: Path, wanted: str) -> None:
    try:
        if path.is_file():
            return
    except OSError as error:  # a name that is too long, say
        raise _unreadable(path, error) from error
    raise InputError(f"{path} does not exist", wanted=wanted)


def _unreadable(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable table", found=first_line(error))


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, into a folder made if need be."""
    make_folder(path.parent)
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_durably(path, [masked(text).encode()])
