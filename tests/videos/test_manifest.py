"""Manifests survive both file formats; unsafe and malformed rows are refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import LabelKind, Manifest, MediaKind, Video
from cosettle_cache.videos.manifest import (
    SCHEMA,
    manifest_digest,
    manifest_from_table,
    manifest_table,
    read_manifest,
    write_manifest,
)

VIDEO = Video("a", "clips/a.mp4", MediaKind.FILE, 20, 240, 320, fps=25.0)
MASKED = Video(
    "b",
    "JPEGImages/480p/b",
    MediaKind.FRAMES,
    7,
    480,
    854,
    dataset="davis",
    split="val",
    labels="Annotations/480p/b",
    label_kind=LabelKind.MASKS,
    labelled_frames=7,
    n_objects=2,
)
MANIFEST = Manifest((VIDEO, MASKED), {"built_from": "a test"})


@pytest.mark.parametrize("name", ["m.parquet", "m.csv"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / name, MANIFEST)
    again = read_manifest(tmp_path / name)
    assert again.videos == MANIFEST.videos
    assert manifest_digest(again) == manifest_digest(MANIFEST)
    if name.endswith("parquet"):
        assert again.provenance == MANIFEST.provenance


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/", exclude_categories=["C", "Zl", "Zp"]),
    min_size=1,
    max_size=50,  # 200 bytes, the most that a name may have
)


@given(st.lists(names.filter(lambda n: n not in (".", "..")), min_size=1, max_size=5, unique=True))
def test_any_names_survive(video_ids: list[str]) -> None:
    videos = tuple(replace(VIDEO, video_id=name, media=f"x/{name}") for name in video_ids)
    assert manifest_from_table(manifest_table(Manifest(videos))).videos == videos


def test_csv_keeps_names_that_look_like_numbers(tmp_path: Path) -> None:
    manifest = Manifest((replace(VIDEO, video_id="0001", media="0001", class_name="7"),))
    write_manifest(tmp_path / "m.csv", manifest)
    assert read_manifest(tmp_path / "m.csv").videos == manifest.videos
    (tmp_path / "m.csv").write_text((tmp_path / "m.csv").read_text().replace('"0001","0001"', ',"0001"', 1))
    with pytest.raises(InputError, match=r"row 1 of .* has no video_id"):
        read_manifest(tmp_path / "m.csv")


def test_every_damaged_byte_of_a_manifest_is_an_input_error(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", MANIFEST)
    whole = (tmp_path / "m.parquet").read_bytes()
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "m.parquet").write_bytes(damaged)
        with contextlib.suppress(InputError):
            read_manifest(tmp_path / "m.parquet")


def test_the_digest_sees_rows_not_provenance() -> None:
    assert manifest_digest(Manifest(MANIFEST.videos)) == manifest_digest(MANIFEST)
    seen = Manifest((replace(VIDEO, content="0a", stamp="1-b"), MASKED))
    assert manifest_digest(seen) == manifest_digest(MANIFEST)
    changed = Manifest((replace(VIDEO, n_frames=21), MASKED))
    assert manifest_digest(changed) != manifest_digest(MANIFEST)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"media": "/etc/passwd"}, "unsafe path"),
        ({"video_id": "../../x"}, "unsafe path"),
        ({"media": "../x"}, "unsafe path"),
        ({"labels": "a/../../b"}, "unsafe path"),
        ({"media": "c:\\x"}, "unsafe path"),
        ({"video_id": "./x"}, "unsafe path"),
        ({"video_id": "x/"}, "unsafe path"),
        ({"video_id": "a//b"}, "unsafe path"),
        ({"video_id": "."}, "unsafe path"),
        ({"video_id": "a\0b"}, "unsafe path"),
        ({"video_id": "a\nb"}, "unsafe path"),
        ({"media": "a\x1b[2Jb"}, "unsafe path"),
        ({"video_id": "é" * 101}, "unsafe path: a part of it has more than 200 bytes"),
        ({"media": "a/" * 1500 + "a"}, "unsafe path: it has more than 2000 letters"),
        ({"fps": float("inf")}, "malformed"),
        ({"n_frames": 0}, "no frames"),
        ({"first_frame": -1}, "no frames"),
        ({"height": 0}, "no size"),
        ({"media_kind": "tape"}, "malformed"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, object], said: str) -> None:
    row = asdict(VIDEO) | changes
    with pytest.raises(InputError, match=said) as caught:
        manifest_from_table(pa.Table.from_pylist([row], schema=SCHEMA))
    assert "row 1" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_frames": 6.7}, "6.7 is no whole number"),
        ({"n_frames": True}, "True is no whole number"),
        ({"height": float("inf")}, "inf is no whole number"),
        ({"width": 2**40}, "is no whole number"),
        ({"video_id": ["a"]}, "is no text"),
        ({"labels": b"a"}, "is no text"),
        ({"media_kind": {"a": 1}}, "is not a valid MediaKind"),
    ],
)
def test_cells_of_other_types_are_named(changes: dict[str, object], said: str) -> None:
    table = pa.Table.from_pylist([asdict(VIDEO) | {"media_kind": "file"} | changes])
    with pytest.raises(InputError, match="row 1 of the manifest is malformed") as caught:
        manifest_from_table(table)
    assert said in caught.value.found


def test_a_column_given_twice_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", MANIFEST)
    head, *rows = (tmp_path / "m.csv").read_text().splitlines()
    (tmp_path / "m.csv").write_text("\n".join([f'{head},"media"', *(f"{row},b" for row in rows)]))
    with pytest.raises(InputError, match="has the column media twice"):
        read_manifest(tmp_path / "m.csv")


def test_missing_columns_twins_and_emptiness(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks the column media"):
        manifest_from_table(pa.table({"video_id": ["a"]}))
    with pytest.raises(InputError, match="lists a twice"):
        manifest_from_table(manifest_table(Manifest((VIDEO, VIDEO))))
    with pytest.raises(InputError, match="no videos"):
        manifest_from_table(manifest_table(Manifest(())))
    with pytest.raises(InputError, match="does not exist"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(InputError, match="not a readable table"):
        read_manifest(tmp_path / "text.parquet")
