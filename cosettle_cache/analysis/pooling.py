"""One vector per frame from stored tokens: the mean over the frame's tokens, raw and through projections.

A frames store and kinds of tokens come in; per video an array of frame vectors, one layer per kind, goes out.
Every token is read once, however many projections there are, a few frames at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from cosettle_cache.core.errors import InputError
from cosettle_cache.core.types import PlanKind
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore

#: Tokens in memory at a time; 100 MB in float32 at ViT-B width.
BATCH_TOKENS = 32 * 1024

#: Frame vectors of one video, one layer per kind of tokens.
FrameVectors = Float32[np.ndarray, "kind frame dim"]


def check_frames_plan(store: FeatureStore, what: str) -> None:
    """Raise `InputError` for a store of training samples, which holds no video from start to end."""
    if store.plan_kind is not PlanKind.FRAMES:
        raise InputError(
            f"{what} needs the frames of whole videos, and {store.path} holds training samples",
            wanted="a frames plan",
            found=f"a {store.plan_kind} plan",
            hint="cosettle-cache extract --plan frames --every K --size 224x224 makes one",
        )


@dataclass(frozen=True, slots=True)
class FramePooler:
    """Reads videos and averages their tokens frame by frame.

    The paper does not say how its video vectors are pooled (PROTOCOLS 5.4); the plain mean is the rule here.
    With `unit` every token counts with length one.
    """

    store: FeatureStore
    kinds: tuple[TokenKind, ...]
    unit: bool = False
    device: str = "cpu"

    @torch.inference_mode()
    def pool(self, video_id: str) -> FrameVectors:
        """Return the vectors of all stored frames of a video, in order.

        Raises `InputError` for a video that is not all there and for tokens that are not finite.
        """
        grid, n_frames = self.store.grid(video_id), self.store.n_frames(video_id)
        dim = self.store.arrays[0].n_channels
        out = np.empty((len(self.kinds), n_frames, dim), np.float32)
        size = min(max(1, BATCH_TOKENS // grid.n_tokens), n_frames)
        buffer = np.empty((size, grid.rows, grid.cols, dim), np.float16)
        filled = 0
        for number, frame in enumerate(self.store.stream_tokens(video_id), start=1):
            buffer[filled] = frame
            filled += 1
            if filled == size or number == n_frames:
                out[:, number - filled : number] = self._means(buffer[:filled])
                filled = 0
        if not np.isfinite(out).all():
            raise InputError(
                f"{video_id} has tokens that are not finite", hint="extract it again into another store"
            )
        return out

    def _means(self, frames: Float16[np.ndarray, "frame row col dim"]) -> FrameVectors:
        tokens = torch.from_numpy(frames).to(self.device).flatten(1, 2).float()
        return torch.stack([self._mean(kind.apply(tokens)) for kind in self.kinds]).cpu().numpy()

    def _mean(self, tokens: Float[Tensor, "frame token dim"]) -> Float32[Tensor, "frame dim"]:
        return (unit_tokens(tokens) if self.unit else tokens).mean(1)
