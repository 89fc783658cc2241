"""Labels from frame to frame: the neighbours of `cosettle_cache.propagation.context` turned into label maps.

The tokens of consecutive frames, or their neighbours, and the first frame's label map go in; one soft label
map per frame comes out. Nothing is read or written, and nothing kept grows with the length of a video.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.types import EvalProtocol, Grid
from cosettle_cache.propagation.context import ContextSearch, Neighbors
from cosettle_cache.propagation.labels import LabelMap
from cosettle_cache.propagation.protocols import check_protocol
from cosettle_cache.search.masked import transition

AnyMap = Float[Tensor, "row col class"] | Float[np.ndarray, "row col class"]
_Frame = TypeVar("_Frame", int, Tensor)


class LabelCarrier:
    """Carries the label map of a video's first frame along neighbour lists (PROTOCOLS 1.1, 1.2).

    Several carriers, for other labels or temperatures, may follow the same lists.
    """

    def __init__(
        self, first_labels: AnyMap, protocol: EvalProtocol, *, device: str | torch.device = "cpu"
    ) -> None:
        check_protocol(protocol)
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
        wanted, given = self._labels.shape[1], len(neighbors.count)
        if wanted != given:
            what = f"the neighbours of frame {self._n_seen} are not on the labels' grid"
            raise InputError(what, wanted=f"{wanted} queries", found=given)
        frame, position, similarity, count = (
            upload(part, self._device)
            for part in (neighbors.frame, neighbors.position, neighbors.similarity, neighbors.count)
        )
        weights = transition(similarity, count, self._protocol.temperature)
        carried = (weights[:, :, None] * self._labels[self._place(frame), position]).sum(dim=1)
        if self._protocol.n_context:
            self._labels[self._place(self._n_seen)] = carried
        self._n_seen += 1
        return carried.view(self._shape)

    def _place(self, frame: _Frame) -> _Frame:
        # n_context may be 0; then every neighbour is in the first frame.
        queued = 1 + (frame - 1) % max(self._protocol.n_context, 1)
        return queued * (frame > 0)


class Propagator:
    """Carries the label map of one video's first frame from frame to frame, searching as it goes.

    Feed the tokens of every frame in order, the first included. Memory is bounded by the context, and by
    `memory_limit` bytes where given: see `ContextSearch`.
    """

    def __init__(
        self,
        first_labels: AnyMap,
        protocol: EvalProtocol,
        *,
        device: str | torch.device = "cpu",
        search: str = "auto",
        memory_limit: int | None = None,
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
        )
        self._search: ContextSearch | None = None

    def step(self, tokens: Float[Tensor, "row col dim"]) -> LabelMap:
        """Return the label map of the next frame; for the first frame that is the given one.

        Raises `InputError` for tokens that do not fit the labels' grid or are not finite.
        """
        if self._search is None:
            self._search = self._make_search(dim=tokens.shape[-1])
        neighbors = self._search.step(tokens)
        return self._carrier.first if neighbors is None else self._carrier.step(neighbors)


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
    propagator = Propagator(first_labels, protocol, device=device, search=search, memory_limit=memory_limit)
    maps = torch.stack([propagator.step(torch.as_tensor(frame)).cpu() for frame in tokens])
    return maps.numpy() if isinstance(first_labels, np.ndarray) else maps


def check_length(n_frames: int) -> None:
    """Raise `InputError` for a video of one frame: that is given."""
    if n_frames < 2:
        raise InputError("the video has nothing to propagate to", wanted="at least 2 frames", found=n_frames)
