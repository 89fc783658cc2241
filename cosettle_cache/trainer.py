"""One optimiser step after another: the released schedule, AdamW with decay on matrices, and the objective.

Batches of float16 samples go in, figures come out; the projection changes in place. Nothing touches disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from cosettle_cache.config import TrainSettings
from cosettle_cache.errors import InputError
from cosettle_cache.feeding import Batch, Ids
from cosettle_cache.losses import LossTerms, transfer_loss
from cosettle_cache.projection import Projection
from cosettle_cache.run_state import StepFigures

#: Samples that go through the objective at a time; gradients add up over the parts of a batch. Bounds the
#: memory (some ten float32 copies of a part) whatever the batch size.
PART_SAMPLES = 64


def learning_rate(settings: TrainSettings, position: float) -> float:
    """Return the rate at `position` in epochs: linear from 0 in the warm-up, then half a cosine to `min_lr`.

    It follows fractions of epochs, step by step, and starts at exactly 0 (released schedule).
    """
    if position < settings.warmup_epochs:
        return settings.lr * position / settings.warmup_epochs
    share = (position - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(projection: Projection, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only (no biases, no LayerNorm)."""
    matrices = [item for item in projection.parameters() if item.ndim > 1]
    vectors = [item for item in projection.parameters() if item.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2))


class Trainer:
    """A projection in training: where it is, so is the work. `name_sample` names samples in errors."""

    def __init__(
        self, projection: Projection, settings: TrainSettings, name_sample: Callable[[int], str] = str
    ) -> None:
        self.projection = projection
        self.settings = settings
        self.optimizer = make_optimizer(projection, settings)
        self._name_sample = name_sample
        self._device = next(projection.parameters()).device

    def step(self, batch: Batch) -> StepFigures:
        """Do one step; raise `InputError` and change nothing when the loss or its gradient is not finite.

        The device has finished with `batch` on return: the figures were copied from it.
        """
        lr = learning_rate(self.settings, batch.step.position)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        terms = self._accumulate(batch.samples.to(self._device, non_blocking=True))
        *values, finite = torch.cat([terms, self._gradients_finite()]).tolist()
        if not finite or not all(map(math.isfinite, values)):
            raise self._not_finite(batch)
        self.optimizer.step()
        return StepFigures(batch.step.number, batch.step.epoch, lr, *values)

    def _accumulate(self, samples: Float16[Tensor, "n 3 row col dim"]) -> Float[Tensor, " term"]:
        """Add up gradients over the parts; return the means of the terms, in the order of `LossTerms`."""
        means = torch.zeros(len(LossTerms.__slots__), device=self._device)
        for part in torch.split(samples, PART_SAMPLES):
            share = len(part) / len(samples)
            terms = self._loss(part)
            torch.autograd.backward(terms.total * share)
            means += share * torch.stack([getattr(terms, name).detach() for name in LossTerms.__slots__])
        return means

    def _loss(self, samples: Float16[Tensor, "n 3 row col dim"]) -> LossTerms:
        return transfer_loss(
            self.projection,
            samples,
            temperature=self.settings.temperature,
            separability_weight=self.settings.separability_weight,
            window=self.settings.window,
            regularizer=self.settings.regularizer,
        )

    def _gradients_finite(self) -> Float[Tensor, "1"]:
        gradients = [item.grad for item in self.projection.parameters() if item.grad is not None]
        return torch.stack([item.isfinite().all() for item in gradients]).all().float()[None]

    def _not_finite(self, batch: Batch) -> InputError:
        where = f"at step {batch.step.number} (epoch {batch.step.epoch})"
        finite = batch.samples.isfinite().flatten(1).all(1).numpy()
        if finite.all():
            return InputError(
                f"training diverged {where}: the loss or its gradient is not finite, the tokens are",
                details=self._names(batch.step.ids),
                hint="lower base_lr or raise the temperature; the last checkpoint is kept",
            )
        bad = batch.step.ids[~finite]
        return InputError(
            f"{len(bad)} samples of the batch {where} hold tokens that are not finite",
            details=self._names(bad),
            hint="extract these clips again into another store",
        )

    def _names(self, ids: Ids, limit: int = 8) -> list[str]:
        more = [f"... and {len(ids) - limit} more"] if len(ids) > limit else []
        return [self._name_sample(int(item)) for item in ids[:limit]] + more
