"""Labels from frame to frame: the neighbours of `cosettle_cache.context` turned into label maps.

The tokens of consecutive frames and the first frame's label map go in; one soft label map per frame comes
out. Nothing is read or written, and nothing kept grows with the length of a video.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from cosettle_cache.affinity import transition
from cosettle_cache.context import ContextSearch
from cosettle_cache.errors import InputError
from cosettle_cache.neighbors import Neighbors
from cosettle_cache.protocols import check_protocol
from cosettle_cache.types import EvalProtocol, Grid

#: The first frame is given, so there must be another.
MIN_FRAMES = 2

LabelMap = Float32[Tensor, "row col class"]
_Frame = TypeVar("_Frame", int, Tensor)


class Propagator:
    """Carries the label map of one video's first frame from frame to frame (PROTOCOLS 1.2).

    Feed the tokens of every frame in order, the first included. Memory is bounded by the context.
    """

    def __init__(
        self,
        first_labels: Float[Tensor, "row col class"],
        protocol: EvalProtocol,
        *,
        device: str | torch.device = "cpu",
        search: str = "auto",
    ) -> None:
        check_protocol(protocol)
        self._protocol, self._search_name = protocol, search
        self._device = torch.device(device)
        self._shape = first_labels.shape
        n_cells, n_classes = first_labels[..., 0].numel(), first_labels.shape[2]
        # Place 0 is the first frame's for good; frame t > 0 goes to place 1 + (t - 1) % n_context.
        self._labels = torch.zeros(1 + protocol.n_context, n_cells, n_classes, device=self._device)
        self._labels[0] = first_labels.to(self._labels).flatten(0, 1)
        self._search: ContextSearch | None = None
        self._n_seen = 0

    def step(self, tokens: Float[Tensor, "row col dim"]) -> LabelMap:
        """Return the label map of the next frame; for the first frame that is the given one.

        Raises `InputError` for tokens that do not fit the labels' grid or are not finite.
        """
        if self._search is None:
            self._search = self._make_search(tokens)
        neighbors = self._search.step(tokens)
        labels = self._labels[0] if neighbors is None else self._carry(neighbors)
        self._n_seen += 1
        return labels.view(self._shape)

    def _make_search(self, tokens: Tensor) -> ContextSearch:
        grid = Grid(self._shape[0], self._shape[1])
        return ContextSearch(
            grid, tokens.shape[-1], self._protocol, device=self._device, search=self._search_name
        )

    def _carry(self, neighbors: Neighbors) -> Float32[Tensor, "cell class"]:
        """Return the weighted mean of the neighbours' labels, and keep it as the next frame's context."""
        weights = transition(neighbors.similarity, neighbors.count, self._protocol.temperature)
        labels = self._labels[self._place(neighbors.frame), neighbors.position]
        carried = (weights[:, :, None] * labels).sum(dim=1)
        if self._protocol.n_context:
            self._labels[self._place(self._n_seen)] = carried
        return carried

    def _place(self, frame: _Frame) -> _Frame:
        # n_context may be 0; then every neighbour is in the first frame.
        queued = 1 + (frame - 1) % max(self._protocol.n_context, 1)
        return queued * (frame > 0)


def propagate(
    tokens: Float[Tensor, "frame row col dim"] | Float[np.ndarray, "frame row col dim"],
    first_labels: Float[Tensor, "row col class"],
    protocol: EvalProtocol,
    *,
    device: str | torch.device = "cpu",
    search: str = "auto",
) -> Float32[Tensor, "frame row col class"]:
    """Return the label maps of a video; frame 0 is `first_labels`.

    Raises `InputError` for a video of one frame, which has nothing to propagate to.
    """
    if len(tokens) < MIN_FRAMES:
        raise InputError(
            "the video has nothing to propagate to", wanted=f"at least {MIN_FRAMES} frames", found=len(tokens)
        )
    propagator = Propagator(first_labels, protocol, device=device, search=search)
    return torch.stack([propagator.step(torch.as_tensor(frame)).cpu() for frame in tokens])
