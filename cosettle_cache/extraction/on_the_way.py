"""A store made on the way, for commands that were given none: by which encoder, at which size, where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_cache.core.console import Talk
from cosettle_cache.core.settings import FramesSettings, digest

if TYPE_CHECKING:
    from cosettle_cache.videos.find import Data

#: Where `extract` leaves its result when nothing else is said.
DEFAULT_STORE = Path("store.zarr")
DEFAULT_BACKBONE = "mae_b"
#: A size that fits any patch of 16, for frames whose own size does not.
FITTING_SIZE = "short:480/16"


@dataclass(frozen=True, slots=True)
class StoreWish:
    """The frames store that a task needs, as far as it was said; `red_std` as in `StoreJob`."""

    task: str
    size: str
    backbone: str | None
    weights: str | None
    data_root: Path | None
    device: str | None
    precision: str
    workers: int = 0
    scheduler: str | None = None
    red_std: float | None = None


def make_store(wish: StoreWish, data: Data, talk: Talk) -> tuple[str, dict[str, str]]:
    """Return the path of the store of `data`, filled if it is not there yet, and what failed on the way.

    Raises `KeyboardInterrupt` when filling it was interrupted.
    """
    from cosettle_cache.extraction.jobs import StoreJob, run_job
    from cosettle_cache.videos.manifest import manifest_digest

    backbone, weights, heads = _encoder(wish, talk)
    # The same task with other videos, weights or normalisation is another store.
    mark = digest([manifest_digest(data.manifest), weights, heads, wish.red_std])[:8]
    name = re.sub("[/:]", "-", f"{wish.task}-{backbone}-{wish.size}-{mark}.zarr")
    talk.note(f"no --features given: encoding {data.origin} with {backbone} into {name}")
    job = StoreJob(
        data,
        backbone,
        weights,
        FramesSettings(size=wish.size),
        str(Path(name).absolute()) if wish.workers or wish.scheduler else name,
        device=wish.device,
        precision=wish.precision,
        heads=heads,
        workers=wish.workers,
        scheduler=wish.scheduler,
        red_std=wish.red_std,
    )
    report = run_job(job, talk)
    if report.interrupted:
        raise KeyboardInterrupt
    return job.out, {**data.failures, **report.failures}


def _encoder(wish: StoreWish, talk: Talk) -> tuple[str, str | None, int | None]:
    """Return name, weights and heads: as asked for, of the store `extract` leaves, or the default."""
    from cosettle_cache.extraction.jobs import find_weights
    from cosettle_cache.store import open_store

    if wish.backbone is not None or not DEFAULT_STORE.exists():
        return wish.backbone or DEFAULT_BACKBONE, find_weights(wish.weights, wish.data_root), None
    encoder = open_store(DEFAULT_STORE).encoder
    talk.note(f"encoder of {DEFAULT_STORE}: {encoder['name']}, weights {encoder['weights_argument']}")
    weights = find_weights(wish.weights or encoder["weights_argument"], wish.data_root)
    return encoder["name"], weights, encoder["heads_argument"]
