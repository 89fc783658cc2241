"""Where the neighbours of a video's frames come from: a search, or the lists that an earlier one kept.

A kind of tokens goes in; out comes a function that takes the tokens of the next frame and returns its
neighbours. Neighbours do not depend on labels, so lists serve other labels, temperatures and tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.settings import digest
from cosettle_cache.core.types import Video
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.propagation.context import ContextSearch
from cosettle_cache.propagation.neighbor_files import NeighborsKey, load_neighbors, neighbor_writer
from cosettle_cache.propagation.neighbors import Neighbors
from cosettle_cache.propagation.work import VideoWork

Tokens = Float[Tensor, "row col dim"]
#: Takes the tokens of the next frame and returns its neighbours, None for the first frame.
FindNeighbors = Callable[[Tokens | None], Neighbors | None]


@dataclass(frozen=True, slots=True)
class Source:
    """Neighbours frame by frame; with `kept` ones no tokens are needed."""

    find: FindNeighbors
    kept: bool = False


def open_source(
    work: VideoWork, kind: TokenKind, number: int, labels_bytes: int, open_files: ExitStack
) -> Source:
    """Return the neighbours of one kind of tokens; lists that are to be kept are open in `open_files`."""
    if work.neighbors is None:
        return Source(_search(work, kind, number, labels_bytes))
    key = _key(work, kind, number)
    path = _path(work.neighbors, key)
    kept = _load(path, key)
    if kept is not None:
        lists = chain([None], kept)
        return Source(lambda tokens: next(lists), kept=True)
    write = open_files.enter_context(neighbor_writer(path, key))
    return Source(partial(_find_and_keep, _search(work, kind, number, labels_bytes), write))


def _search(work: VideoWork, kind: TokenKind, number: int, labels_bytes: int) -> FindNeighbors:
    device, grid = work.torch_device(), work.setting(number).grid
    search = ContextSearch(
        grid,
        work.store.arrays[0].n_channels,
        work.protocol,
        device=device,
        search=work.search,
        memory_limit=work.search_bytes,
        labels_bytes=labels_bytes,
    )
    there = kind.on(device)

    def find(tokens: Tokens | None) -> Neighbors | None:
        assert tokens is not None
        return search.step(there.apply(tokens))

    return find


def _find_and_keep(
    find: FindNeighbors, write: Callable[[Neighbors], None], tokens: Tokens | None
) -> Neighbors | None:
    found = find(tokens)
    if found is not None:
        write(found)
    return found


def _key(work: VideoWork, kind: TokenKind, number: int) -> NeighborsKey:
    video: Video = work.videos[number]
    return NeighborsKey.of(
        work.protocol,
        video_id=video.video_id,
        tokens=digest([work.store.fingerprint.to_json(), kind.sha256]),
        n_frames=video.n_frames,
        grid=work.setting(number).grid,
    )


def _path(folder: Path, key: NeighborsKey) -> Path:
    """Return the file of a video's lists; tokens and searches have folders of their own."""
    return folder / digest([key.tokens, dict(key.search)])[:16] / f"{key.video_id}.parquet"


def _load(path: Path, key: NeighborsKey) -> Iterator[Neighbors] | None:
    """Return kept lists; None where there are none, or none that can be used: then they are made anew."""
    try:
        return load_neighbors(path, key)
    except InputError:
        return None
