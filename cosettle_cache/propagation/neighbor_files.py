"""Neighbour lists on disk: one Parquet file per video, for other labels and temperatures without a search.

Lists of consecutive frames come in and, from a file that was made for the same tokens and the same search, go
out again to the last bit. Files are written and read frame by frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor

from cosettle_cache.core.errors import FingerprintError, InputError
from cosettle_cache.core.files import inside
from cosettle_cache.core.settings import digest
from cosettle_cache.core.tables import open_table, stream_table
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.propagation.context import FRAMES_AT_ONCE, Neighbors
from cosettle_cache.propagation.protocols import SEARCH_FIELDS

#: Of the file layout below; raised when that changes.
VERSION = 1

#: One row per query of every frame but the first, frame by frame and row by row over the grid.
SCHEMA = pa.schema(
    [
        ("frame", pa.int32()),
        ("query", pa.int32()),
        ("neighbor_frame", pa.list_(pa.int32())),
        ("neighbor_position", pa.list_(pa.int32())),
        ("similarity", pa.list_(pa.float32())),
        ("count", pa.list_(pa.int32())),
    ]
)
_LISTS = ("neighbor_frame", "neighbor_position", "similarity", "count")
_KEY = b"cosettle_neighbors"


def neighbors_key(
    protocol: EvalProtocol, *, video_id: str, tokens: str, content: str, n_frames: int, grid: Grid
) -> dict[str, object]:
    """Return what one video's lists depend on: the tokens and the protocol's fields that play a part.

    `tokens` is free text: digests of the store's fingerprint and of the projection, say; `content` is one of
    the video's stored tokens, which may have been made from other frames of the same names and sizes.
    """
    search = {name: getattr(protocol, name) for name in SEARCH_FIELDS}
    size = {"n_frames": n_frames, "grid": str(grid)}
    made_of = {"tokens": tokens, "content": content}
    return {"version": VERSION, "video_id": video_id, **made_of, **size, **search}


def neighbors_path(folder: Path, key: Mapping[str, object]) -> Path:
    """Return where lists are kept; tokens and searches have folders of their own."""
    name = digest([key["tokens"], {name: key[name] for name in SEARCH_FIELDS}])[:16]
    return inside(folder / name, f"{key['video_id']}.parquet")


@contextmanager
def neighbor_writer(path: Path, key: Mapping[str, object]) -> Iterator[Callable[[Neighbors], None]]:
    """Give a function that takes the lists frame by frame; the file is there when all have come."""
    schema = SCHEMA.with_metadata({_KEY: json.dumps(key)})
    n_written, waiting = 0, list[Neighbors]()
    with stream_table(path, schema) as write_rows:

        def write_waiting() -> None:
            nonlocal n_written
            for neighbors in _to_host(waiting):
                n_written += 1
                write_rows(_to_rows(neighbors, n_written, schema))
            waiting.clear()

        def write(neighbors: Neighbors) -> None:
            waiting.append(neighbors)
            if neighbors.count.device.type == "cpu" or len(waiting) == FRAMES_AT_ONCE:
                write_waiting()

        yield write
        write_waiting()
        wanted = int(str(key["n_frames"])) - 1
        if n_written != wanted:
            what = f"the neighbours of {key['video_id']} are not complete"
            raise InputError(what, wanted=f"{wanted} frames", found=n_written)


def load_neighbors(path: Path, key: Mapping[str, object]) -> Iterator[Neighbors]:
    """Return the lists of a video's second to last frame, read as they are asked for.

    Raises `FingerprintError` when the file is of other tokens or of another search, and `InputError` when it
    is damaged, which may be noticed only when a frame is read.
    """
    file = open_table(path)
    try:
        found = json.loads((file.schema_arrow.metadata or {}).get(_KEY, b""))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not file.schema_arrow.equals(SCHEMA):
        raise InputError(f"{path} holds no neighbours", wanted="a file that --save-neighbors wrote")
    if keys := [name for name in {**key, **found} if key.get(name) != found.get(name)]:
        raise FingerprintError(
            f"{path} holds neighbours of other tokens or of another search",
            details=[f"{name}: wanted {key.get(name)}, found {found.get(name)}" for name in keys],
            hint="search again, and keep the lists in another folder",
        )
    n_frames, top_k = int(found["n_frames"]), int(found["top_k"])
    n_tokens = Grid.parse(found["grid"]).n_tokens
    if file.num_row_groups != n_frames - 1:
        raise _damaged(path, f"{file.num_row_groups + 1} frames, not {n_frames}")

    def read(frame: int) -> Neighbors:
        try:
            neighbors = _from_rows(file.read_row_group(frame - 1), top_k)
        except (pa.ArrowException, OSError, ValueError, RuntimeError) as error:
            raise _damaged(path, f"frame {frame}: {error}") from error
        right = neighbors.similarity.isfinite() == (neighbors.count > 0)
        for part, limit in ((neighbors.frame, frame), (neighbors.position, n_tokens)):
            right &= (part >= 0) & (part < limit)
        if not right.all():
            raise _damaged(path, f"frame {frame} has neighbours that are nowhere")
        return neighbors

    return map(read, range(1, n_frames))


def _damaged(path: Path, found: str) -> InputError:
    return InputError(f"{path} is damaged", found=found, hint="remove it: what it held is searched again")


def _to_host(lists: Sequence[Neighbors]) -> list[Neighbors]:
    """Return lists on the host; the device is waited for once."""
    parts = [getattr(item, field.name) for item in lists for field in fields(Neighbors)]
    if not parts or parts[0].device.type == "cpu":
        return list(lists)
    moved = torch.cat([part.view(torch.int32).flatten() for part in parts]).cpu()
    shaped = zip(torch.split(moved, [part.numel() for part in parts]), parts, strict=True)
    found = iter([values.view(part.dtype).view(part.shape) for values, part in shaped])
    return [Neighbors(*islice(found, len(fields(Neighbors)))) for _ in lists]


def _to_rows(neighbors: Neighbors, frame: int, schema: pa.Schema) -> pa.RecordBatch:
    there = neighbors.count > 0
    n_queries = len(there)
    ends = np.concatenate([[0], there.sum(dim=1).cumsum(dim=0).numpy()]).astype(np.int32)
    parts = (neighbors.frame, neighbors.position, neighbors.similarity, neighbors.count)
    lists = [pa.ListArray.from_arrays(ends, pa.array(part[there].numpy())) for part in parts]
    queries = np.arange(n_queries, dtype=np.int32)
    return pa.record_batch([np.full(n_queries, frame, np.int32), queries, *lists], schema=schema)


def _from_rows(rows: pa.Table, top_k: int) -> Neighbors:
    columns = [rows[name].combine_chunks() for name in _LISTS]
    lengths = torch.from_numpy(columns[0].value_lengths().to_numpy().copy())
    # As wide as when it was found, so that sums over it round alike.
    there = torch.arange(max(top_k, int(lengths.max()))) < lengths[:, None]
    frame, position, similarity, count = (_padded(column, there) for column in columns)
    return Neighbors(frame, position, similarity.masked_fill(~there, -torch.inf), count)


def _padded(column: pa.ListArray, there: Bool[Tensor, "query k"]) -> Tensor:
    values = torch.from_numpy(column.flatten().to_numpy().copy())
    padded = torch.zeros(there.shape, dtype=values.dtype)
    padded[there] = values
    return padded
