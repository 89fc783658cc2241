"""Neighbour lists on disk: reuse equals a fresh run, and lists of anything else are refused."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from propagation_cases import clips, single_thread

from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.core.tables import write_json
from cosettle_cache.core.types import Grid
from cosettle_cache.propagation.context import ContextSearch
from cosettle_cache.propagation.neighbor_files import (
    load_neighbors,
    neighbor_writer,
    neighbors_key,
)
from cosettle_cache.propagation.propagator import LabelCarrier, propagate
from cosettle_cache.propagation.protocols import make_protocol

PROTOCOL = make_protocol(top_k=3, n_context=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def make_key(protocol=PROTOCOL, **changed):
    fields = {"video_id": "dog", "tokens": "store 1, raw", "content": "1", **changed}
    fields = {"n_frames": 4, "grid": Grid(3, 5), **fields}
    return neighbors_key(protocol, **fields)


def save(path, key, tokens, protocol):
    rows, cols, dim = tokens.shape[1:]
    search = ContextSearch(Grid(rows, cols), dim, protocol, device=torch.device("cpu"))
    with neighbor_writer(path, key) as write:
        for found in map(search.step, tokens):
            if found is not None:
                write(found)


def carry(lists, first_labels, protocol):
    carrier = LabelCarrier(first_labels, protocol)
    return torch.stack([carrier.first, *map(carrier.step, lists)])


@pytest.fixture
def saved(tmp_path):
    tokens = torch.randn(4, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    save(tmp_path / "dog.parquet", make_key(), tokens, PROTOCOL)
    return tmp_path / "dog.parquet", tokens


@settings(max_examples=40, deadline=None)
@given(clips())
def test_reuse_with_other_labels_and_temperature_equals_a_fresh_run(tmp_path_factory, clip):
    path = tmp_path_factory.mktemp("neighbors") / "clip.parquet"
    key = make_key(clip.protocol, n_frames=len(clip.tokens), grid=clip.grid)
    save(path, key, clip.tokens, clip.protocol)
    other = replace(clip.protocol, temperature=0.3)
    labels = clip.first_labels.flip(0).sqrt()
    reused = carry(load_neighbors(path, key), labels, other)
    assert torch.equal(reused, propagate(clip.tokens, labels, other))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"tokens": "store 2, raw"}, "tokens: wanted store 2, raw, found store 1, raw"),
        ({"content": "2"}, "content: wanted 2, found 1"),
        ({"video_id": "cat"}, "video_id: wanted cat, found dog"),
        ({"grid": Grid(5, 3)}, "grid: wanted 5x3, found 3x5"),
        ({"n_frames": 5}, "n_frames: wanted 5, found 4"),
        ({"protocol": replace(PROTOCOL, radius=2.0)}, "radius: wanted 2.0, found 20.0"),
        ({"protocol": replace(PROTOCOL, keep_ties=True)}, "keep_ties: wanted True, found False"),
    ],
)
def test_lists_of_other_tokens_or_another_search_are_refused(saved, changed, line):
    with pytest.raises(FingerprintError) as caught:
        load_neighbors(saved[0], make_key(**changed))
    assert caught.value.details == (line,)


def test_what_comes_after_the_search_may_differ(saved):
    protocol = replace(PROTOCOL, temperature=0.1, norm_mask=True, label_encoding="nearest", name="mine")
    assert len(list(load_neighbors(saved[0], make_key(protocol)))) == 3


def test_an_incomplete_file_never_gets_its_name(tmp_path, saved):
    lists = list(load_neighbors(saved[0], make_key()))
    path = tmp_path / "other.parquet"
    with pytest.raises(InputError, match="not complete"), neighbor_writer(path, make_key()) as write:
        write(lists[0])
    assert [file.name for file in tmp_path.iterdir()] == ["dog.parquet"]


def test_files_that_hold_no_neighbours_are_refused(tmp_path, saved):
    with pytest.raises(InputError, match="does not exist"):
        load_neighbors(tmp_path / "none.parquet", make_key())
    write_json(tmp_path / "json.parquet", {})
    with pytest.raises(InputError, match="not a readable table"):
        load_neighbors(tmp_path / "json.parquet", make_key())


def rewrite(path, **changed):
    """Write the lists anew with other columns, a row group per frame."""
    file = pq.ParquetFile(path)
    with pq.ParquetWriter(path.with_suffix(".new"), file.schema_arrow) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            for name, change in changed.items():
                number = table.schema.get_field_index(name)
                values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
                table = table.set_column(number, table.schema.field(name), values)
            writer.write_table(table)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"neighbor_position": lambda rows: [[15] * len(row) for row in rows]},
        {"neighbor_position": lambda rows: [[-1] * len(row) for row in rows]},
        {"neighbor_frame": lambda rows: [[3] * len(row) for row in rows]},
        {"similarity": lambda rows: [[float("nan")] * len(row) for row in rows]},
        {"count": lambda rows: [[0] * len(row) for row in rows]},
        {"count": lambda rows: [row[1:] for row in rows]},
        {"neighbor_frame": lambda rows: [None] * len(rows)},
    ],
)
def test_lists_that_lead_nowhere_are_damaged(saved, changed):
    rewrite(saved[0], **changed)
    with pytest.raises(InputError, match="damaged"):
        list(load_neighbors(saved[0], make_key()))


@pytest.mark.parametrize("key", [b"{", b"[]", b"3", b"\xff", b""])
def test_a_key_that_is_none_is_no_list(saved, key):
    table = pq.read_table(saved[0]).replace_schema_metadata({b"cosettle_neighbors": key})
    pq.write_table(table, saved[0])
    with pytest.raises(InputError, match="holds no neighbours"):
        load_neighbors(saved[0], make_key())


def test_flipped_bytes_are_found_or_change_nothing_that_leads_nowhere(saved):
    data = saved[0].read_bytes()
    for place in range(4, len(data), 7):
        saved[0].write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        with suppress(InputError):
            carry(load_neighbors(saved[0], make_key()), torch.rand(3, 5, 2), PROTOCOL)


def test_labels_of_another_grid_are_refused(saved):
    with pytest.raises(InputError, match="not on the labels' grid"):
        carry(load_neighbors(saved[0], make_key()), torch.rand(3, 4, 2), PROTOCOL)
