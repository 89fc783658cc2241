"""Validation: which clips are held out, and how learners do on them.

Held-out samples go in, are read once for all learners, and figures of each come out; nothing is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.settings import MARGIN_GAMMA
from cosettle_cache.training.batches import Ids, Step
from cosettle_cache.training.learner import Learner
from cosettle_cache.training.log import ValidationFigures
from cosettle_cache.training.losses import Originals, transfer_loss
from cosettle_cache.training.samples import Samples

#: Clips that are read and compared with each other at a time; distances are of pairs among them.
GROUP_CLIPS = 16


@dataclass(frozen=True)
class HeldOut:
    """Marks the samples of held-out clips: those whose hash of seed and video id falls below `share`."""

    samples: Samples
    share: float
    seed: int
    _known: dict[str, bool] = field(default_factory=dict, compare=False)

    def __call__(self, ids: Ids) -> Bool[np.ndarray, " n"]:
        """Return whether each sample is held out."""
        videos = self.samples.videos(ids)
        for video in set(videos) - self._known.keys():
            word = hashlib.sha256(f"{self.seed}\0{video}".encode()).digest()[:8]
            self._known[video] = int.from_bytes(word, "big") < self.share * 2**64
        return np.array([self._known[video] for video in videos], bool)

    @cached_property
    def ids(self) -> Ids:
        """The held-out samples of the first epoch, by which all epochs are measured."""
        first = self.samples.epoch_ids(0)
        held_out: Ids = first[self(first)]
        return held_out


@torch.no_grad()
def validate(
    learners: Sequence[Learner], samples: Samples, ids: Ids, step: Step
) -> list[ValidationFigures | None]:
    """Return the figures of every learner on the samples `ids` after `step`; none for one that diverged.

    Clips are taken in groups of up to 16, and distances between clips are those within a group.
    """
    active = [learner for learner in learners if learner.diverged_at is None]
    groups = np.array_split(ids, -(-len(ids) // GROUP_CLIPS))
    buffer = np.empty((len(groups[0]), *samples.shape), np.float16)
    means = torch.zeros(len(active), 5)
    for group in groups:
        samples.read_into(group, buffer[: len(group)])
        originals = Originals(torch.from_numpy(buffer[: len(group)]).to(active[0].device).float())
        figures = []
        for learner in active:
            terms = transfer_loss(learner.project, originals, **learner.objective(originals))
            distances = token_distances(learner.project(originals.tokens))
            figures.append(torch.stack([terms.cycle, terms.separability, terms.cycle_accuracy, *distances]))
        means += len(group) / len(ids) * torch.stack(figures).cpu()
    found: dict[int, ValidationFigures] = {}
    for learner, line in zip(active, means.tolist(), strict=True):
        margin = line[-2] - MARGIN_GAMMA * line[-1]
        found[id(learner)] = ValidationFigures(step.number, step.epoch, *[*line, margin])
    return [found.get(id(learner)) for learner in learners]


def token_distances(
    tokens: Float[Tensor, "n view row col dim"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean distance of unit tokens at equal places: between clips, and along a clip's plain views.

    Distances are in diameters of the unit sphere (0 to 1), as in the paper's tables. With one clip there is
    nothing between clips, and the first is 0.
    """
    places = F.normalize(tokens, dim=-1).flatten(2, 3).permute(1, 2, 0, 3)
    plain = places[:-1]
    within = torch.stack([(a - b).norm(dim=-1).mean() / 2 for a, b in pairwise(plain)]).mean()
    n = places.shape[2]
    distances = torch.cdist(plain[0], plain[0], compute_mode="donot_use_mm_for_euclid_dist")
    between = distances.sum() / max(2 * n * (n - 1) * plain.shape[1], 1)
    return between, within
