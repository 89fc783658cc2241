"""Damage to files: bytes flipped, cut or replaced, and changes in a file's own terms, from a seed.

These are fields of JSON, words of a text, columns of Parquet, members of an archive, opcodes of a pickle,
chunks of a PNG, claims of a header. Checksums and lengths around a change are made right again, so that a
reader comes to see it.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Numbers that fit no type, text that is none, brackets without end: as JSON, TOML, cells and bytes.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -0.5, 1e-320),
    *(float("nan"), float("inf"), "", "\0", "\ud800", "x" * 5000, "../x", "/etc", "\x1b[31m", "\u202e", "²"),
    *("٣", "NaN", "1e999", "true", [], {}, [[]], [None], [1, "a"], {"a": {}}, [0] * 300, "nested"),
)
WORDS = (
    *(word for word in VALUES if isinstance(word, str)),
    *("-1", "0", "inf", "1e-400", str(2**63), "9" * 5000, '"', "'", ",", "\n", "\r", "[", "{", "=", "#", " "),
    *("C:\\x", "a//b", ".", "a b", "\u2028", "1.5", "-", "--", "1_000", "0x10", "1979-05-27", "[[", "/", ":"),
)
BYTES = (
    *(b"[" * 20_000, b'{"a":' * 5000, b"9" * 5000, b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xff" * 8),
    *(
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\x80\x00\x00\x00",
        b"\x00\x00\x00\x80",
        b"\x00" * 64,
        b"PK",
    ),
)


def damaged(data: bytes, dice: Random) -> bytes:
    """Return `data` with one to three changes, in its own terms where it has any, else as bytes."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        changed = None
        if dice.random() < 0.7:
            with suppress(Exception):  # after an earlier change it may have no terms any more
                changed = next((change(data, dice) for mark, change in FORMATS if mark(data)), None)
        data = damaged_bytes(data, dice) if changed is None else changed
    return data


def damaged_bytes(data: bytes, dice: Random) -> bytes:
    """Flip, cut, replace, double, move or remove bytes."""
    start, length = dice.randrange(len(data) + 1), dice.choice((0, 1, 2, 4, 8, 64, 1024))
    end = start + length
    match dice.randrange(8):
        case 0 | 1 if data:
            flipped = bytearray(data)
            for _ in range(dice.choice((1, 1, 3, 10))):
                flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            return bytes(flipped)
        case 2:
            return data[:start]
        case 3:
            return data[:start] + dice.choice(BYTES) + data[end:]
        case 4:
            return data[:end] * dice.choice((1, 2, 9)) + data[start:]
        case 5:
            return data[end:] + data[:start] if dice.random() < 0.2 else data[:start] + data[end:]
        case 6:
            other = dice.randrange(len(data) + 1)
            return data[:start] + data[other : other + length] + data[end:]
        case _:
            return data[:start] + dice.randbytes(length) + data[end:]


def damaged_text(data: bytes, dice: Random) -> bytes:
    """Change a word, a line or the encoding of a text: TOML, CSV, lists, options, one line of a journal."""
    lines = data.decode().splitlines(keepends=True)
    at = dice.randrange(len(lines))
    match dice.randrange(6):
        case 0:
            lines.insert(dice.randrange(len(lines)), lines[at])
        case 1:
            del lines[at]
        case 2 if lines[at].startswith(("{", "[{")):
            return b"".join(
                damaged_json(line.encode(), dice) + b"\n" if number == at else line.encode()
                for number, line in enumerate(lines)
            )
        case 3 if dice.random() < 0.3:
            return data.decode().encode(dice.choice(("utf-8-sig", "utf-16", "cp037")))
        case _:
            parts = re.split(r"([\s,;=:/{}\[\]]+)", lines[at])
            value = dice.choice((*WORDS, *map(json.dumps, VALUES)))
            parts[dice.randrange(len(parts))] = "[" * 50_000 if value == "nested" else value
            lines[at] = "".join(parts)
    return "".join(lines).encode("utf-8", "surrogatepass")


def damaged_json(data: bytes, dice: Random) -> bytes:
    """Replace, remove, rename or double a value somewhere in a document."""
    root = [json.loads(data)]
    places = list(_places(root))
    holder, key = dice.choice(places)
    match dice.randrange(6):
        case 0 if holder is not root:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[dice.choice(WORDS)] = holder.pop(key)
        case 2:
            holder[key] = [holder[key]] * dice.choice((1, 2, 200))
        case 3:
            other, place = dice.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case _:
            holder[key] = dice.choice(VALUES)
    text = json.dumps(root[0])
    return text.replace('"nested"', "[" * 50_000 + "]" * 50_000).encode()


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        if isinstance(holder[key], list | dict):
            yield from _places(holder[key])


_TYPES = (pa.string(), pa.int64(), pa.int8(), pa.float32(), pa.bool_(), pa.binary(), pa.list_(pa.int32()))
_TYPES += (pa.timestamp("ns"), pa.dictionary(pa.int8(), pa.string()), pa.null(), pa.decimal128(30, 5))


def damaged_parquet(data: bytes, dice: Random) -> bytes:
    """Rename, retype, empty, double or remove a column, change a cell, rows, or the metadata."""
    table = pq.read_table(pa.BufferReader(data))
    name = dice.choice(table.column_names)
    at, column = table.column_names.index(name), table[name]
    match dice.randrange(9):
        case 0:
            names = [
                dice.choice((*WORDS[2:], *table.column_names)) if n == name else n for n in table.column_names
            ]
            table = table.rename_columns(names)
        case 1:
            table = table.drop_columns([name])
        case 2:
            table = table.append_column(name, column)
        case 3:
            table = table.set_column(at, name, pa.nulls(len(table), dice.choice((*_TYPES, column.type))))
        case 4:
            table = table.set_column(at, name, column.cast(dice.choice(_TYPES), safe=False))
        case 5:
            rows = dice.choice(([], [0], [0, 0], range(len(table) - 1, -1, -1), [0] * 500))
            table = table.take(list(rows))
        case 6:
            metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            text = damaged_json(json.dumps(metadata).encode(), dice)
            changed = {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in json.loads(text).items()
            }
            key = dice.choice(list(changed))
            changed[key] = damaged_text(changed[key].encode(), dice).decode("utf-8", "ignore")
            table = table.replace_schema_metadata(changed)
        case _:
            cells, value = column.to_pylist(), dice.choice(VALUES)
            cells[dice.randrange(len(cells))] = value
            kind = column.type if dice.random() < 0.5 else None
            cells = (
                cells
                if kind or isinstance(value, str) is pa.types.is_string(column.type)
                else [value] * len(cells)
            )
            table = table.set_column(at, name, pa.array(cells, kind))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=dice.choice((None, 1, 7)))
    return bytes(sink.getvalue())


def damaged_zip(data: bytes, dice: Random) -> bytes:
    """Damage, rename, double or remove a member; checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    at = dice.randrange(len(members))
    name, content = members[at]
    match dice.randrange(8):
        case 0:
            del members[at]
        case 1:
            members[at] = dice.choice(WORDS).replace("\ud800", "?"), content
        case 2:
            members.append((name, damaged(content, dice)))
        case _:
            members[at] = name, damaged(content, dice)
    with zipfile.ZipFile(
        buffer := io.BytesIO(), "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def damaged_npy(data: bytes, dice: Random) -> bytes:
    """Write another header before the numbers."""
    kinds = (
        "<f8",
        "<f4",
        ">f8",
        "|b1",
        "|u1",
        "<i8",
        "<c16",
        "<U8",
        "|S9",
        "|V4",
        "<M8[s]",
        "|O",
        "<f2",
        "<i4,<f8",
    )
    shape = tuple(dice.choice((0, 1, 2, 3, 15, 10**5, 10**13, 2**63, -1)) for _ in range(dice.randrange(5)))
    header = {"descr": dice.choice(kinds), "fortran_order": dice.random() < 0.5, "shape": shape}
    text = damaged_text(repr(header).encode(), dice) if dice.random() < 0.3 else repr(header).encode()
    body = data[10 + struct.unpack("<H", data[8:10])[0] :]
    return data[:8] + struct.pack("<H", min(len(text) + 1, 65535)) + text + b"\n" + body


def damaged_png(data: bytes, dice: Random) -> bytes:
    """Damage, move, double or remove a chunk; checksums are right again."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    at = dice.randrange(len(chunks))
    kind, content = chunks[at]
    match dice.randrange(5):
        case 0:
            del chunks[at]
        case 1:
            chunks.insert(
                dice.randrange(len(chunks)),
                (dice.choice((b"eXIf", b"iCCP", b"zTXt", b"PLTE", b"tRNS", b"acTL", kind)), content),
            )
        case _:
            chunks[at] = kind, damaged_bytes(content, dice)
    pieces = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:8] + b"".join(pieces)


def damaged_safetensors(data: bytes, dice: Random) -> bytes:
    """Change the header: names, types, shapes, places, or our own description in it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    own = header.get("__metadata__", {})
    if own and dice.random() < 0.4:
        key = next(iter(own))
        own[key] = damaged_json(own[key].encode(), dice).decode()
        text = json.dumps(header).encode()
    else:
        text = damaged_json(json.dumps(header).encode(), dice)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def damaged_pickle(data: bytes, dice: Random) -> bytes:
    """Replace, double, move or remove an opcode with its argument."""
    starts = [place for _, _, place in pickletools.genops(data)]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    at, more = (
        dice.randrange(len(ops)),
        (
            b"N",
            b"]",
            b"}",
            b"(",
            b"0",
            b"K\x05",
            b"\x89",
            b"R",
            b"b",
            b"a",
            b"s",
            b"u",
            b"e",
            b"\x85",
            b"Q",
            b"J\xff\xff\xff\x7f",
            b"G\x7f\xf8\0\0\0\0\0\0",
            b"C\x01\0",
            b"\x8c\x01a",
            b"h\x01",
            b"\x8f",
            b"\x90",
            b"\x97",
            b"\x98",
        ),
    )
    match dice.randrange(5):
        case 0:
            del ops[at]
        case 1:
            ops.insert(at, dice.choice(ops))
        case 2:
            ops[at] = dice.choice(ops)
        case 3:
            ops.insert(at, dice.choice(more))
        case _:
            ops[at] = dice.choice(more)
    return b"".join(ops)


def _begins(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(marks)


def _is_json(data: bytes) -> bool:
    try:
        return data[:1] in (b"{", b"[") and bool(json.loads(data))
    except (ValueError, RecursionError):
        return False


def _is_text(data: bytes) -> bool:
    try:
        return not re.search("[\x00-\x08]", data.decode())
    except UnicodeDecodeError:
        return False


#: How to know files of a format, and how to damage them in its terms.
FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes, Random], bytes]], ...] = (
    (_begins(b"PAR1"), damaged_parquet),
    (_begins(b"PK\x03\x04"), damaged_zip),
    (_begins(b"\x93NUMPY"), damaged_npy),
    (_begins(b"\x89PNG"), damaged_png),
    (_begins(b"\x80"), damaged_pickle),
    (lambda data: data[6:9] == b"\0\0{", damaged_safetensors),
    (_is_json, damaged_json),
    (_is_text, damaged_text),
)
