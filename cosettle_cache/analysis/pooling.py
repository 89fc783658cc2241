"""What every pass over the videos of a frames store shares: checks, one loop, and one vector per frame.

A frames store and kinds of tokens come in; per video an array of frame vectors (means over the tokens of each
frame), one layer per kind, goes out. Every token is read once, a few frames at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import islice
from threading import Event
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from cosettle_cache.core.console import Progress, counting
from cosettle_cache.core.errors import DamagedStoreError, InputError
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.types import PlanKind
from cosettle_cache.heads.kinds import TokenKind
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore

#: Tokens in memory at a time; 100 MB in float32 at ViT-B width.
_BATCH_TOKENS = 32 * 1024

#: Frame vectors of one video, one layer per kind of tokens.
FrameVectors = Float32[np.ndarray, "kind frame dim"]
Result = TypeVar("Result")


def check_frames_plan(store: FeatureStore, what: str) -> None:
    """Raise `InputError` for a store of training samples, which holds no video from start to end."""
    if store.plan_kind is not PlanKind.FRAMES:
        raise InputError(
            f"{what} needs the frames of whole videos, and {store.path} holds training samples",
            wanted="a frames plan",
            found=f"a {store.plan_kind} plan",
            hint="cosettle-cache extract --plan frames --every K --size 224x224 makes one",
        )


def missing_videos(
    store: FeatureStore, video_ids: Iterable[str], pending: str = "not extracted yet"
) -> dict[str, str]:
    """Return by id why the store lacks tokens of these videos; those that are all there are left out."""
    present, failures = set(store.video_ids), store.failures
    return {name: failures.get(name, pending) for name in video_ids if name not in present}


def each_video(
    video_ids: Sequence[str],
    do: Callable[[str], Result],
    failures: MutableMapping[str, str],
    progress: Progress,
    stop: Event | None = None,
) -> Iterator[tuple[str, Result]]:
    """Yield (id, `do(id)`) until `stop` is set; of a video that cannot be read `failures` gets the reason."""
    if not video_ids:
        return
    with counting(progress, len(video_ids), "videos") as advance:
        for video_id in video_ids:
            if stop is not None and stop.is_set():
                break
            try:
                result = do(video_id)
            except (InputError, DamagedStoreError) as error:
                failures[video_id] = error.summary
            else:
                yield video_id, result
            advance()


def stream_batches(
    store: FeatureStore, video_id: str, device: str
) -> Iterator[Float32[Tensor, "_ row col dim"]]:
    """Yield the tokens of a few frames at a time, in order: a GPU gets them at once."""
    size, stream = max(1, _BATCH_TOKENS // store.grid(video_id).n_tokens), store.stream_tokens(video_id)
    while frames := list(islice(stream, size)):
        yield upload(torch.from_numpy(np.stack(frames)), torch.device(device)).float()


@torch.inference_mode()
def pool_frames(
    store: FeatureStore, kinds: Sequence[TokenKind], video_id: str, *, unit: bool = False, device: str = "cpu"
) -> FrameVectors:
    """Return the mean over the tokens of every stored frame of a video; with `unit` tokens have length one.

    The paper does not say how its video vectors are pooled (PROTOCOLS 5.4); the plain mean is the rule here.
    Raises `InputError` for a video that is not all there and for tokens that are not finite.
    """
    means = list[Tensor]()
    for batch in stream_batches(store, video_id, device):
        of_kinds = (kind.apply(batch.flatten(1, 2)) for kind in kinds)
        means.append(torch.stack([(unit_tokens(tokens) if unit else tokens).mean(1) for tokens in of_kinds]))
    out = torch.cat(means, dim=1).cpu().numpy()
    if not np.isfinite(out).all():
        hint = "extract it again into another store"
        raise InputError(f"{video_id} has tokens that are not finite", hint=hint)
    return out
