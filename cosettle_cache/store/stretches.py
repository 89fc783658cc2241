"""Stretches: neighbouring chunks of one shard that one read fetches, where reads cost a round trip each.

In come chunk numbers and the memory for each; out go groups of them. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float16

Tokens = Float16[np.ndarray, " value"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive chunks of one shard from number `first` of the array on, and where their tokens go."""

    first: int
    outs: list[Tokens]


def stretches(
    chunks: Sequence[int], outs: Sequence[Tokens], *, longest: int, per_shard: int
) -> Iterator[Stretch]:
    """Yield the chunks in their order, up to `longest` of them together where they follow each other."""
    first, group = -1, list[Tokens]()
    for chunk, out in zip(chunks, outs, strict=True):
        if group and (chunk != first + len(group) or chunk % per_shard == 0 or len(group) == longest):
            yield Stretch(first, group)
            group = []
        if not group:
            first = chunk
        group.append(out)
    if group:
        yield Stretch(first, group)


def sorted_stretches(
    chunks: Sequence[int], outs: Sequence[Tokens], *, longest: int, per_shard: int
) -> Iterator[Stretch]:
    """Yield the chunks as stretches, in ascending order."""
    order = sorted(range(len(chunks)), key=chunks.__getitem__)
    ordered = [outs[place] for place in order]
    return stretches([chunks[place] for place in order], ordered, longest=longest, per_shard=per_shard)


def runs(chunks: Sequence[int], per_shard: int) -> list[tuple[int, int]]:
    """Return first and number of chunks that follow each other within a shard."""
    bounds = [
        place
        for place, chunk in enumerate(chunks)
        if place == 0 or chunk != chunks[place - 1] + 1 or chunk % per_shard == 0
    ]
    return [(chunks[a], b - a) for a, b in pairwise([*bounds, len(chunks)])]


def shard_starts(parts: Sequence[Stretch], per_shard: int) -> frozenset[int]:
    """Return the numbers of the stretches that lie in another shard than the one before."""
    shards = [part.first // per_shard for part in parts]
    return frozenset(number for number in range(1, len(shards)) if shards[number] != shards[number - 1])
