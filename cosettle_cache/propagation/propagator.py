"""Labels from frame to frame: the neighbours of `cosettle_cache.propagation.context` turned into label maps.

The tokens of consecutive frames, or their neighbours, and the first frame's label map go in; one soft label
map per frame comes out. Nothing is read or written, and nothing kept grows with the length of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.propagation.context import FRAMES_AT_ONCE, ContextSearch, Neighbors
from cosettle_cache.propagation.labels import LabelMap
from cosettle_cache.propagation.protocols import check_protocol
from cosettle_cache.search.masked import transition

AnyMap = Float[Tensor, "row col class"] | Float[np.ndarray, "row col class"]
_Frame = TypeVar("_Frame", int, Tensor)


#: Lists that are wider, for their many ties, are taken one by one: they are large.
_WIDE = 128


class LabelCarrier:
    """Carries the label map of a video's first frame along neighbour lists (PROTOCOLS 1.1, 1.2).

    Several carriers, for other labels or temperatures, may follow the same lists. `given` returns, for a
    frame's number, the label map of objects that are given in it, None where none are.
    """

    def __init__(
        self,
        first_labels: AnyMap,
        protocol: EvalProtocol,
        *,
        device: str | torch.device = "cpu",
        given: Callable[[int], LabelMap | None] = lambda frame: None,
    ) -> None:
        check_protocol(protocol)
        self._given = given
        self._protocol, self._device = protocol, torch.device(device)
        first_labels = torch.as_tensor(first_labels)
        self._shape = first_labels.shape
        n_cells, n_classes = first_labels[..., 0].numel(), first_labels.shape[2]
        # Place 0 is the first frame's for good; frame t > 0 goes to place 1 + (t - 1) % n_context.
        self._labels = torch.zeros(1 + protocol.n_context, n_cells, n_classes, device=self._device)
        self._labels[0] = first_labels.to(self._labels).flatten(0, 1)
        self._n_seen = 1

    @property
    def first(self) -> LabelMap:
        """The first frame's label map, as given."""
        return self._labels[0].view(self._shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the label maps that are kept."""
        return self._labels.nbytes

    def step(self, neighbors: Neighbors) -> LabelMap:
        """Return the label map of the next frame: the weighted mean of its neighbours' labels.

        Raises `InputError` for neighbours on another grid.
        """
        return next(self.steps([neighbors]))

    def steps(self, neighbors: Iterable[Neighbors | None]) -> Iterator[LabelMap]:
        """Yield the label maps of the next frames; the first frame, which has no neighbours, has its own.

        Weights are computed for frames together: what is left for each is a gather and a product.
        """
        numbered = enumerate(neighbors, start=self._n_seen)
        for width, frames in groupby(numbered, lambda pair: _width(*pair)):
            if width is None:
                yield from (self.first for _ in frames)
            else:
                yield from self._carry([item for _, item in frames if item is not None])

    def _carry(self, frames: Sequence[Neighbors]) -> Iterator[LabelMap]:
        n_queries = self._labels.shape[1]
        for number, item in enumerate(frames, start=self._n_seen):
            if len(item.count) != n_queries:
                what = f"the neighbours of frame {number} are not on the labels' grid"
                raise InputError(what, wanted=f"{n_queries} queries", found=len(item.count))
        frame, position, similarity, count = (
            torch.stack([upload(getattr(item, name), self._device) for item in frames])
            for name in ("frame", "position", "similarity", "count")
        )
        weights = transition(similarity, count, self._protocol.temperature)[..., None]
        for of_frame in zip(weights, self._place(frame), position, strict=True):
            carried = (of_frame[0] * self._labels[of_frame[1:]]).sum(dim=1)
            if (given := self._given(self._n_seen)) is not None:
                new = upload(given, self._device).flatten(0, 1)
                carried = carried * (1 - new.sum(dim=1, keepdim=True)) + new
            if self._protocol.n_context:
                self._labels[self._place(self._n_seen)] = carried
            self._n_seen += 1
            yield carried.view(self._shape)

    def _place(self, frame: _Frame) -> _Frame:
        # n_context may be 0; then every neighbour is in the first frame.
        queued = 1 + (frame - 1) % max(self._protocol.n_context, 1)
        return queued * (frame > 0)


class Propagator:
    """Carries the label map of one video's first frame from frame to frame, searching as it goes.

    Feed the tokens of every frame in order, the first included. Memory is bounded by the context, and by
    `memory_limit` bytes where given: see `ContextSearch`, of `n_at_once` as well.
    """

    def __init__(
        self,
        first_labels: AnyMap,
        protocol: EvalProtocol,
        *,
        device: str | torch.device = "cpu",
        search: str = "auto",
        memory_limit: int | None = None,
        n_at_once: int = 1,
    ) -> None:
        self._carrier = LabelCarrier(first_labels, protocol, device=device)
        self._make_search = partial(
            ContextSearch,
            Grid(*first_labels.shape[:2]),
            protocol=protocol,
            device=torch.device(device),
            search=search,
            memory_limit=memory_limit,
            labels_bytes=self._carrier.nbytes,
            n_at_once=n_at_once,
        )
        self._search: ContextSearch | None = None

    def step(self, tokens: Float[Tensor, "row col dim"]) -> LabelMap:
        """Return the label map of the next frame; for the first frame that is the given one.

        Raises `InputError` for tokens that do not fit the labels' grid or are not finite.
        """
        return next(self.steps([tokens]))

    def steps(self, frames: Iterable[Float[Tensor, "row col dim"]]) -> Iterator[LabelMap]:
        """Yield what `step` returns of each of the next frames; a GPU takes `n_at_once` of them at a time."""
        coming = iter(frames)
        n_taken = 1  # until the first frame has told the number of channels
        while batch := list(islice(coming, n_taken)):
            if self._search is None:
                self._search = self._make_search(dim=batch[0].shape[-1])
            yield from self._carrier.steps(self._search.steps(batch))
            n_taken = self._search.n_at_once


def _width(number: int, item: Neighbors | None) -> tuple[int, int] | None:
    """Return what frames whose weights are computed together have in common; None of the first frame."""
    width = 0 if item is None else item.count.shape[1]
    return None if item is None else (width, number if width > _WIDE else 0)


def propagate(
    tokens: Float[Tensor, "frame row col dim"] | Float[np.ndarray, "frame row col dim"],
    first_labels: AnyMap,
    protocol: EvalProtocol,
    *,
    device: str | torch.device = "cpu",
    search: str = "auto",
    memory_limit: int | None = None,
) -> Float32[Tensor, "frame row col class"] | Float32[np.ndarray, "frame row col class"]:
    """Return the label maps of a video; frame 0 is `first_labels`. They are numpy where that is.

    Raises `InputError` for a video of one frame, which has nothing to propagate to.
    """
    check_length(len(tokens))
    propagator = Propagator(
        first_labels,
        protocol,
        device=device,
        search=search,
        memory_limit=memory_limit,
        n_at_once=FRAMES_AT_ONCE,
    )
    maps = torch.stack(list(propagator.steps(map(torch.as_tensor, tokens)))).cpu()
    return maps.numpy() if isinstance(first_labels, np.ndarray) else maps


def check_length(n_frames: int) -> None:
    """Raise `InputError` for a video of one frame: that is given."""
    if n_frames < 2:
        raise InputError("the video has nothing to propagate to", wanted="at least 2 frames", found=n_frames)
