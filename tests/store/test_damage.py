"""Damage is found and named, never read as tokens: flipped bytes anywhere, missing and truncated files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flip_harness import read_everything
from store_cases import Case, folder_bytes, frames_case, pairs_case

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import CosettleError, DamagedStoreError, ExitCode
from cosettle_cache.core.settings import digest
from cosettle_cache.core.tables import read_metadata, with_metadata
from cosettle_cache.store import open_store, repair_store, verify_store
from cosettle_cache.store._shards import checksum_bytes
from cosettle_cache.store.format import BytesError
from cosettle_cache.store.header import Header
from cosettle_cache.store.index import seal, unseal


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Case, Path]:
    case = pairs_case()
    return case, case.write(tmp_path / "store.zarr")


def shard_of(path: Path, shard: int = 0, grid: str = "2x2") -> Path:
    return path / "tokens" / grid / f"c.{shard}.0.0.0"


def test_flipped_token_names_the_sample(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    flip(shard_of(path, 1), 256 + 10)  # a chunk is 3 x 2 x 2 x 8 x 2 = 192 bytes, its stride 256
    store = open_store(path)
    assert store.samples([4]).shape == (1, 3, 2, 2, 8)
    with pytest.raises(DamagedStoreError) as caught:
        store.samples([4, 5])
    assert caught.value.exit_code is ExitCode.DAMAGED
    assert "slot 1 " in caught.value.message
    assert "checksum" in caught.value.message
    (line,) = caught.value.details
    assert line.startswith("clip2: frames")
    assert line.endswith("(rows 15 to 17)")


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_index(path: Path) -> None:
    flip(path, path.stat().st_size - 20)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip_index, make_folder])
def test_lost_shard_names_all_its_videos(pairs: tuple[Case, Path], damage: Callable[[Path], None]) -> None:
    _, path = pairs
    damage(shard_of(path, 1))
    store = open_store(path)
    with pytest.raises(DamagedStoreError) as caught:
        store.samples([3, 4])
    assert [line.split(":")[0] for line in caught.value.details] == ["clip2", "clip3"]
    assert "slot 1 " in caught.value.message
    assert store.samples([0, 8]).shape == (2, 3, 2, 2, 8)


def test_following_the_hint_mends_it(pairs: tuple[Case, Path]) -> None:
    case, path = pairs
    before = read_everything(open_store(path))
    flip(shard_of(path), 0)
    with pytest.raises(DamagedStoreError, match="slot 0") as caught:
        open_store(path).samples([0])
    command = str(caught.value.hint).partition(",")[0].split()
    assert command[:3] == ["cosettle-cache", "store", "repair"]
    assert run_command(command[1:]) == 0
    case.write(path)
    assert read_everything(open_store(path)) == before


def test_chunk_left_out_against_the_index(pairs: tuple[Case, Path], tmp_path: Path) -> None:
    case, path = pairs
    other = case.write(tmp_path / "other.zarr", failures={"clip0": "gone"})
    shutil.copy(shard_of(other), shard_of(path))
    with pytest.raises(DamagedStoreError, match="missing") as caught:
        open_store(path).samples([1])
    assert caught.value.details[0].startswith("clip0")


def test_damaged_part_names_the_rows(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    flip(path / "index" / "2x2" / "000001.parquet", 100)
    with pytest.raises(DamagedStoreError, match="index part of slot 1") as caught:
        open_store(path).sample_ids  # noqa: B018
    assert "rows 12 to 23" in caught.value.details[0]


def test_missing_index_folder(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    shutil.rmtree(path / "index" / "2x2")
    with pytest.raises(DamagedStoreError, match="index folder"):
        open_store(path)


def test_any_flipped_byte_of_a_sealed_table_is_found(pairs: tuple[Case, Path]) -> None:
    _, path = pairs
    data = (path / "index" / "2x2" / "000002.parquet").read_bytes()
    assert unseal(data).num_rows == 6
    for offset in range(len(data)):
        changed = data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]
        with pytest.raises(BytesError):
            unseal(changed)


@pytest.mark.parametrize("make_case", [pairs_case, frames_case])
def test_a_flipped_bit_anywhere_never_changes_what_is_read(
    make_case: Callable[[], Case], tmp_path: Path
) -> None:
    path = make_case().write(tmp_path / "store.zarr", failures={"dog": "gone"})
    wanted = read_everything(open_store(path))
    dice = random.Random(7)
    found = 0
    files = sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        original = file.read_bytes()
        for _ in range(8):
            flip(file, dice.randrange(len(original)), dice.randrange(8))
            try:
                assert read_everything(open_store(path)) == wanted
            except CosettleError:
                found += 1
            file.write_bytes(original)
    assert found > 4 * len(files)


def test_bytes_of_a_shard_are_checked_or_padding(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr")
    shard = shard_of(path, 0, "2x3")
    for offset in range(0, 4 * 96, 7):  # the first chunk's 96 bytes at stride 128
        flip(shard, offset)
        store = open_store(path)
        in_gap = offset % 128 >= 100
        if in_gap:
            assert np.isfinite(store.tokens("bear").astype(np.float32)).all()
        else:
            with pytest.raises(DamagedStoreError):
                store.tokens("bear")
        flip(shard, offset)


# -- files of other stores, and files that were changed and sealed again

SHARD, PART = "tokens/2x3/c.1.0.0.0", "index/2x3/000001.parquet"
MANIFEST = "index/manifest.parquet"


def swap_shards(path: Path, other: Path) -> None:
    first, second = (shard_of(path, shard, "2x3") for shard in (0, 1))
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def take(*names: str) -> Callable[[Path, Path], None]:
    """Return a damage that puts files of another store in place of the store's own."""

    def take_them(path: Path, other: Path) -> None:
        for name in names:
            shutil.copy(other / name, path / name)

    return take_them


def resealed(name: str, value: Any) -> Callable[[Path, Path], None]:
    """Return a damage that puts `value` into a column, or into the metadata, of an index part."""

    def change(path: Path, other: Path) -> None:
        table = unseal((path / PART).read_bytes())
        metadata = read_metadata(table)
        if name in table.column_names:
            number = table.schema.get_field_index(name)
            column = pa.array([value] * len(table), table.schema.field(name).type)
            table = table.set_column(number, table.schema.field(name), column)
        else:
            metadata[name] = value
        (path / PART).write_bytes(
            seal(with_metadata(table, {k: v for k, v in metadata.items() if v is not None}))
        )

    return change


def other_encoder(path: Path) -> Path:
    case = frames_case()
    writer = case.writer(path, backbone="other")
    for index in writer.todo():
        case.commit(writer, index)
    writer.close()
    return path


def other_videos(path: Path) -> Path:
    """A store of the same encoder whose slots have the same rows, of other videos."""
    videos = (("ape", 5, 2, 3), ("cat", 4, 2, 3), ("dog", 3, 3, 2), ("eel", 1, 2, 3))
    return frames_case(videos, seed=1).write(path)


#: What is done, the other store, the files that verification names, whether a repair mends it.
MIXTURES = {
    "two shards swapped": (swap_shards, other_encoder, ["tokens/2x3/c.0.0.0.0", SHARD]),
    "shard of other videos": (take(SHARD), other_videos, [SHARD]),
    "shard and part of other videos": (take(SHARD, PART), other_videos, [PART]),
    "shard and part of another encoder": (take(SHARD, PART), other_encoder, [PART]),
    "header of another encoder": (take("zarr.json"), other_encoder, None),
    "manifest of another encoder": (take(MANIFEST), other_encoder, None),
    "manifest of other videos": (take(MANIFEST), other_videos, None),
    "header and manifest of another encoder": (take("zarr.json", MANIFEST), other_encoder, []),
    "rows of another video": (resealed("video_id", "camel"), other_encoder, [PART]),
    "rows of other frames": (resealed("frame", 3), other_encoder, [PART]),
    "rows of another view": (resealed("view", 1), other_encoder, [PART]),
    "rows of another array": (resealed("array", "3x2"), other_encoder, [PART]),
    "no checksums": (resealed("chunk_checksums", None), other_encoder, [PART]),
    "no owner": (resealed("slot_sha256", None), other_encoder, [PART]),
}


@pytest.mark.parametrize("title", MIXTURES)
def test_files_of_other_stores_are_noticed(title: str, tmp_path: Path) -> None:
    damage, make_other, named = MIXTURES[title]
    case = frames_case()
    path, other = case.write(tmp_path / "store.zarr"), make_other(tmp_path / "other.zarr")
    whole = folder_bytes(path)
    damage(path, other)
    with pytest.raises(DamagedStoreError) as caught:
        read_everything(open_store(path))
    text = "\n".join(caught.value.lines())
    if named:
        assert [found.file for found in verify_store(path).damages] == named
        assert any(name in text for name in named), text
        repair_store(path)
        case.write(path)
        assert folder_bytes(path) == whole
    else:
        before = folder_bytes(path)
        with pytest.raises(DamagedStoreError):
            repair_store(path)
        assert folder_bytes(path) == before


def test_a_store_of_the_first_release_has_parts_without_owners(tmp_path: Path) -> None:
    """Such a part is taken in a store of version 0.1, and in no other."""
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parents[1] / "stores/v1/pairs", old)
    assert open_store(old).samples([0]).shape == (1, 3, 2, 2, 4)
    header = json.loads((old / "zarr.json").read_text())["attributes"]["cosettle_cache"]
    assert "part_version" not in header
    assert Header.from_json(header).part_version == 1


def forged(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(header: dict[str, Any]) -> None:
        for key in keys:
            header = header[key]
        header[last] = value
        if value is ...:
            del header[last]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(forged("spec_version", value) for value in (0, -1, "2", True, None, 1.0)),
        *(forged(key, ...) for key in ("spec_version", "fingerprint", "arrays", "encoder")),
        *(forged("fingerprint", key, ...) for key in ("plan", "dtype", "manifest_digest")),
        *(forged("fingerprint", "plan", "kind", value) for value in (..., "x", 1)),
        *(forged("fingerprint", "plan", "every", value) for value in (0, -1, "1", True, 1.5)),
        *(forged("arrays", 0, "n_encodings", value) for value in (0, -4, 10**30, "4", True, 10**18, ...)),
        *(forged("arrays", 0, "slot_encodings", value) for value in (0, -4, 10**30, 10**12, None)),
        *(forged("arrays", 0, "n_channels", value) for value in (0, -1, 10**12, 2**62)),
        *(
            forged("arrays", 0, "grid", value)
            for value in ("0x3", "2x-3", "2", 5, "02x3", "\u0663x3", "9" * 5000)
        ),
        *(forged("arrays", value) for value in ([], {}, "x", None, [1])),
        *(forged("encoder", value) for value in ([], "x", None)),
    ],
)
def test_forged_headers_are_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "store.zarr")
    document = json.loads((path / "zarr.json").read_text())
    header = document["attributes"]["cosettle_cache"]
    del header["digest"]
    change(header)
    header["digest"] = digest(header)
    (path / "zarr.json").write_text(json.dumps(document, indent=2))
    with pytest.raises(DamagedStoreError, match=r"(header|array metadata) .*is damaged"):
        open_store(path)
    repair_store(path)
    assert read_everything(open_store(path))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"attributes":' * 50_000, "9" * 5000, "null", "", '{"attributes":[]}']
)
def test_json_without_end_is_damage(text: str, tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "store.zarr")
    whole = folder_bytes(path)
    for name in ("zarr.json", "tokens/2x3/zarr.json"):
        (path / name).write_text(text)
        with pytest.raises(CosettleError):
            open_store(path)
        assert repair_store(path).restored == (name,)
        assert folder_bytes(path) == whole


def test_keys_of_a_newer_minor_version_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_json = Header.to_json

    def newer(header: Header) -> dict[str, Any]:
        if header.stored is not None:
            return to_json(header)
        document = to_json(header)
        del document["digest"]
        document |= {"new": {"er": 1}, "fingerprint": document["fingerprint"] | {"new": 1}}
        document["arrays"] = [array | {"new": 1} for array in document["arrays"]]
        return {**document, "digest": digest(document)}

    case = frames_case()
    with monkeypatch.context() as patch:
        patch.setattr(Header, "to_json", newer)
        path = case.write(tmp_path / "store.zarr")
    whole = folder_bytes(path)
    wanted = read_everything(open_store(case.write(tmp_path / "plain.zarr")))
    assert read_everything(open_store(path)) == wanted
    assert verify_store(path).damages == ()
    (path / "zarr.json").write_bytes(b"")
    repair_store(path)
    assert folder_bytes(path) == whole, "the copy in the manifest keeps what we do not know"
    with pytest.raises(CosettleError, match="other settings"):
        case.writer(path)


@pytest.mark.parametrize(
    "name", ["shard_bytes", "n_failed", "chunks_crc32c", "chunk_checksums", "rows_sha256"]
)
@pytest.mark.parametrize("value", ["", "-1", "9" * 40, "1e3", "\u0663", "NaN", "00"])
def test_forged_part_fields_are_damage(name: str, value: str, tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "store.zarr")
    resealed(name, value)(path, path)
    assert {found.slot for found in verify_store(path).damages} <= {1}
    with contextlib.suppress(DamagedStoreError):
        read_everything(open_store(path))


@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "zstd")])
def test_forged_offsets_and_sizes_are_damage(dtype: str, codec: str, tmp_path: Path) -> None:
    case = pairs_case(dtype=dtype, codec=codec)
    shard = shard_of(case.write(tmp_path / "store.zarr"))
    data = shard.read_bytes()
    for place in range(4):
        for value in (1, 64, 2**31, 2**40 - 1, 2**62, 2**63, 2**64 - 64, 2**64 - 1):
            entries = np.frombuffer(data[-68:-4], "<u8").copy()
            entries[place] = value
            index = entries.tobytes()
            shard.write_bytes(data[:-68] + index + checksum_bytes(index))
            with pytest.raises(DamagedStoreError):
                open_store(tmp_path / "store.zarr").samples(range(4))


def test_few_bytes_that_say_billions_of_rows_are_not_read(tmp_path: Path) -> None:
    path = frames_case().write(tmp_path / "store.zarr")
    table = pa.table({"row": pa.array(np.zeros(2**22, np.int64))})
    (path / PART).write_bytes(seal(with_metadata(table, {})))
    with pytest.raises(DamagedStoreError, match="has 4194304 rows"):
        read_everything(open_store(path))


def test_odd_files_in_a_store_are_named_or_passed_over(tmp_path: Path) -> None:
    case = frames_case()
    path = case.write(tmp_path / "store.zarr", slots=[0, 1])
    for name in (
        ".index.json",
        "index/2x3/.index.json",
        "tokens/2x3/.index.json",
        "tokens/2x3/c.0",
        "index/2x3/x",
    ):
        (path / name).write_bytes(b"{")
    (path / "index/2x3/1_0.parquet").write_bytes(b"")
    os.mkfifo(path / "tokens/2x3/pipe")
    (path / "tokens/2x3/loop").symlink_to("loop")
    (path / f"tokens/2x3/.x.{'0' * 32}.tmp").mkdir()
    os.mkfifo(path / "index/2x3/000002.parquet")
    report = verify_store(path)
    assert [found.file for found in report.damages] == ["index/2x3/000002.parquet"]
    assert len(report.notes) == 6
    with pytest.raises(DamagedStoreError, match="it is no file"):
        open_store(path).index  # noqa: B018
    with pytest.raises(CosettleError, match="cannot be read whole"):
        repair_store(path)
    (path / "index/2x3/000002.parquet").unlink()
    assert read_everything(open_store(case.write(path)))
