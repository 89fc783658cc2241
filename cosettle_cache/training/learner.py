"""One optimiser step after another: the released schedule, AdamW with decay on matrices, and the objective.

Batches of float16 samples go in, figures come out, on a GPU one step late, so that nobody waits for it; the
projections change in place, unless held-out samples measure them. Several projections may learn from one
stream: every batch is copied and cast once. Nothing touches disk.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosettle_cache.core.parallel import upload
from cosettle_cache.core.precision import exact_float32, tf32_products
from cosettle_cache.core.settings import MARGIN_GAMMA, TrainSettings
from cosettle_cache.heads.projection import Projection
from cosettle_cache.training.batches import ALONE, Batch, Ids, Replicas, Step
from cosettle_cache.training.log import StepFigures, ValidationFigures
from cosettle_cache.training.losses import LossTerms, Originals, transfer_loss
from cosettle_cache.training.samples import JoinedSamples, walk_of

#: Bytes of float32 tokens that go through the objective at a time; gradients add up over the parts of a
#: batch. Bounds the memory, and on a CPU keeps the half dozen arrays of a part within reach of its caches.
PART_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}

#: Heads of a sweep whose first linear maps are one product on a GPU, at most; bounds the memory.
WIDE_HEADS = 8

#: Options of glibc's `mallopt` (malloc.h) and what training sets them to, once in a process: blocks up to 32
#: MiB (its limit) come from the heap, and the heap keeps 1 GiB that are free, validation's too. Otherwise
#: every array of every part goes back to the system and is faulted in anew: 150,000 pages and a sixth of a
#: step's time.
_MALLOC_OPTIONS = {"M_MMAP_THRESHOLD": (-3, 32 * 2**20), "M_TRIM_THRESHOLD": (-1, 2**30)}

#: Clips that validation reads and compares with each other at a time; distances are of pairs among them.
GROUP_CLIPS = 16

#: Number formats of the projection's arithmetic; parameters and the loss stay in float32.
PRECISIONS = {
    **{"float32": torch.float32, "tf32": torch.float32},
    **{"bf16": torch.bfloat16, "fp16": torch.float16},
}

_TERMS = tuple(field.name for field in fields(LossTerms))
_TOTAL, _CYCLE, _SEPARABILITY, _COSINE, _RETURN = map(
    _TERMS.index, ("total", "cycle", "separability", "identity_cosine", "return_probability")
)
_OPTIONS = ("temperature", "window", "regularizer", "reduction")


def learning_rate(settings: TrainSettings, position: float) -> float:
    """Return the rate at `position` in epochs: linear from 0 in the warm-up, then half a cosine to `min_lr`.

    It follows fractions of epochs, step by step, and starts at exactly 0 (released schedule).
    """
    if position < settings.warmup_epochs:
        return settings.lr * position / settings.warmup_epochs
    share = (position - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share)) / 2


@cache
def _keep_freed_memory() -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in _MALLOC_OPTIONS.values():
            mallopt(option, value)


class Learner:
    """A projection in training: its settings, optimiser and schedule; where it is, so is the work.

    `diverged_at` is the step whose loss or gradient was not finite; from there on it learns nothing. A GPU
    sees to that itself (`is_late`), as the host hears of it when the next step is under way.
    """

    def __init__(self, projection: Projection, settings: TrainSettings) -> None:
        self.projection, self.settings = projection, settings
        self._parameters = list(projection.parameters())
        # Weight decay on matrices only: no biases, no LayerNorm.
        matrices = [item for item in self._parameters if item.ndim > 1]
        vectors = [item for item in self._parameters if item.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.diverged_at: int | None = None
        self.device = self._parameters[0].device
        self.is_late = self.device.type == "cuda"
        betas = (settings.beta1, settings.beta2)
        # Fused, it leaves out a step where the device says so.
        self.optimizer: Any = torch.optim.AdamW(groups, settings.lr, betas, fused=self.is_late or None)
        self._stopped = torch.zeros((), device=self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self._auto = settings.separability_weight == "auto"
        self._cycle_gradients = [torch.zeros_like(item) for item in self._parameters] if self._auto else []
        self._means = torch.zeros(len(_TERMS), device=self.device)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as a checkpoint keeps it."""
        return {
            "projection": self.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "diverged_at": self.diverged_at,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; raises `RuntimeError` for a state of another shape."""
        self.projection.load_state_dict(state["projection"])
        for group in state["optimizer"]["param_groups"]:  # it may come from another kind of device
            group["fused"] = self.is_late or None
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.diverged_at = state["diverged_at"]
        self._stopped.fill_(self.diverged_at is not None)

    def start_step(self) -> None:
        """Set the gradients and figures of a step to zero."""
        for item in self._parameters:
            item.grad = torch.zeros_like(item) if item.grad is None else item.grad.zero_()
        self._means.zero_()
        if self._auto:
            torch._foreach_zero_(self._cycle_gradients)

    def objective(self, originals: Originals) -> dict[str, Any]:
        """Return the options of `transfer_loss`; with an automatic weight its parts alone count."""
        options = {name: getattr(self.settings, name) for name in _OPTIONS}
        weight = 1.0 if self._auto else self.settings.separability_weight
        return options | {"separability_weight": weight, "walk": walk_of(originals.tokens.shape[1])}

    def add(self, originals: Originals, share: float, wide: _WideMap | None = None) -> None:
        """Add the gradients and figures of a part that is `share` of the step's samples.

        Those of a first linear map that `wide` computes are left to it.
        """
        first = None if wide is None else wide.outputs[self]
        leaves, n_wide = (self._parameters, 0) if first is None else ([first, *self._parameters[2:]], 2)
        project = partial(self.project, first=first)
        terms = transfer_loss(project, originals, **self.objective(originals))
        if self._auto:
            cycle = self._scaler.scale(terms.cycle * share)
            with self._products():
                found = list(torch.autograd.grad(cycle, leaves, retain_graph=True))
            if wide is not None:
                wide.give(found.pop(0), self._cycle_gradients)
            torch._foreach_add_(self._cycle_gradients[n_wide:], found)
        objective = terms.separability if self._auto else terms.total
        with self._products():
            torch.autograd.backward(self._scaler.scale(objective * share))
        if wide is not None and first is not None and first.grad is not None:
            wide.give(first.grad, self._gradients())
        values = torch.stack([getattr(terms, name).detach() for name in _TERMS])
        # Means of parts add up to those of the step, but cosines do not: their squared lengths do. Where no
        # walk of a part returns at all, both are 0, and its length is not known.
        values[_COSINE] = (values[_RETURN] / values[_COSINE]).nan_to_num(0.0).square()
        self._means += share * values

    def measure(self, originals: Originals) -> Float[Tensor, " figure"]:
        """Return cycle loss, separability loss, cycle accuracy, and distances between and within clips."""
        projected = self.project(originals.tokens)
        terms = transfer_loss(lambda _: projected, originals, **self.objective(originals))
        distances = token_distances(projected)
        return torch.stack([terms.cycle, terms.separability, terms.cycle_accuracy, *distances])

    def sums(self) -> list[Tensor]:
        """Return what processes add up before the step ends."""
        return [*self._gradients(), *self._cycle_gradients, self._means]

    def finish_gradient(self) -> Float[Tensor, " figure"]:
        """Weigh, measure and clip the gradient; return the terms, the separability weight and the norm.

        An automatic weight makes the separability's gradient `gradient_ratio` times as long as the cycle's.
        """
        means, gradients = self._means, self._gradients()
        means[_COSINE] = (means[_RETURN] / means[_COSINE].sqrt()).nan_to_num(0.0)
        if self._auto:
            length = torch.nn.utils.get_total_norm(gradients).clamp(min=torch.finfo(torch.float32).tiny)
            wanted = self.settings.gradient_ratio * torch.nn.utils.get_total_norm(self._cycle_gradients)
            weight = wanted / length
            for gradient, cycle in zip(gradients, self._cycle_gradients, strict=True):
                gradient.mul_(weight).add_(cycle)
            means[_TOTAL] = means[_CYCLE] + weight * means[_SEPARABILITY]
        else:
            weight = means.new_full((), float(self.settings.separability_weight))
        if self.is_late and self._scaler.is_enabled():
            self._stop_unless_finite(means[_CYCLE : _SEPARABILITY + 1])
            # What is not finite the scaler leaves out.
            torch._foreach_mul_(gradients, torch.where(self._stopped > 0, math.nan, 1.0))
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip_gradient:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.settings.clip_gradient, norm)
        values = torch.cat([means, weight.view(1), norm.view(1)])
        if self.is_late and not self._scaler.is_enabled():
            self._stop_unless_finite(values)
            self.optimizer.grad_scale, self.optimizer.found_inf = None, self._stopped
        return values

    def _stop_unless_finite(self, values: Float[Tensor, " figure"]) -> None:
        self._stopped.copy_(torch.maximum(self._stopped, values.isfinite().all().logical_not().float()))

    def move(self, step: Step) -> None:
        """Move the parameters; on a GPU they stay once a figure was not finite.

        In fp16 a gradient may overflow: the scaler leaves the step out and lowers its scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step.position)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def read(self, step: Step, values: Sequence[float]) -> StepFigures | None:
        """Return the figures of a step; or, when one is not finite, mark the learner and return nothing."""
        needed = (values[_CYCLE], values[_SEPARABILITY]) if self._scaler.is_enabled() else values
        if self.diverged_at is None and not all(map(math.isfinite, needed)):
            self.diverged_at = step.number
        if self.diverged_at is not None:
            return None
        return StepFigures(step.number, step.epoch, learning_rate(self.settings, step.position), *values)

    def project(
        self, tokens: Float[Tensor, "*token dim"], first: Float[Tensor, "*token dim"] | None = None
    ) -> Float[Tensor, "*token dim"]:
        """Project tokens in the precision of the settings; the result is float32. `first` as in the head."""
        with self.arithmetic():
            projected: Tensor = self.projection(tokens, first)
        return projected.float()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Compute products in the precision of the settings inside."""
        dtype = PRECISIONS[self.settings.precision]
        with self._products(), torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            yield

    def _products(self) -> AbstractContextManager[None]:
        return tf32_products() if self.settings.precision == "tf32" else nullcontext()

    def _gradients(self) -> list[Tensor]:
        return [item.grad for item in self._parameters if item.grad is not None]


class _WideMap:
    """The first linear maps of several heads as one product, [token dim] x [dim head*dim], and back.

    The tokens are read once for all heads. `outputs` are what each head goes on with; the gradients in them
    that `give` collects reach the gradients of weights and biases, the first two of a head, in `backward`.
    """

    def __init__(self, tokens: Float[Tensor, "*token dim"], learners: Sequence[Learner]) -> None:
        self._tokens, self._arithmetic = tokens, learners[0].arithmetic
        maps: list[Any] = [learner.projection.linears[0] for learner in learners]
        weights, biases = ([getattr(item, name) for item in maps] for name in ("weight", "bias"))
        with torch.no_grad(), self._arithmetic():
            mapped = F.linear(tokens, torch.cat(weights), torch.cat(biases))
        parts = [part.detach().requires_grad_() for part in torch.split(mapped, tokens.shape[-1], -1)]
        self.outputs = dict(zip(learners, parts, strict=True))
        self._given: list[tuple[Tensor, Sequence[Tensor]]] = []

    def give(self, gradient: Float[Tensor, "*token dim"], to: Sequence[Tensor]) -> None:
        """Keep the gradient in an output for the gradients that begin with those of weight and bias."""
        self._given.append((gradient, to))

    def backward(self) -> None:
        """Add up the gradients of all weights and biases, by one product."""
        dim = self._tokens.shape[-1]
        wide = torch.cat([gradient for gradient, _ in self._given], -1).flatten(0, -2)
        with self._arithmetic():
            products = wide.T @ self._tokens.flatten(0, -2)
        sums = wide.sum(0, dtype=torch.float32)
        for (_, (weight, bias, *_)), product, total in zip(
            self._given, torch.split(products, dim), torch.split(sums, dim), strict=True
        ):
            weight.add_(product)
            bias.add_(total)


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that is over: figures of every learner, none of one that diverged.

    `stopped` says whether any process was asked to stop.
    """

    step: Step
    figures: list[StepFigures | None]
    stopped: bool


class Trainer:
    """Learners on one stream of batches, which is copied to their device and cast once for all of them."""

    def __init__(
        self, learners: Sequence[Learner], replicas: Replicas = ALONE, part_bytes: int | None = None
    ) -> None:
        self.learners = tuple(learners)
        self.replicas, self._part_bytes = replicas, part_bytes
        self._device = learners[0].device
        self._started = False
        #: On a GPU: the last step, its learners, their figures on the way to the host, and the event of that.
        self._pending: tuple[Step, Sequence[Learner], Tensor, Any] | None = None
        self._held_out: NDArray[np.float16] | None = None
        _keep_freed_memory()

    def feed(self, batch: Batch, stop: bool = False) -> list[Finished]:
        """Learn from a batch; return the step that is over: the one that it ends, on a GPU the one before.

        `stop` asks all processes to stop.
        """
        active = [learner for learner in self.learners if learner.diverged_at is None]
        step, samples = batch.portion.step, batch.samples.to(self._device)
        limit = self._part_bytes or PART_BYTES.get(samples.device.type, PART_BYTES["cpu"])
        n_part = max(limit // (4 * math.prod(samples.shape[1:])), 1)
        with exact_float32(self._device.type):
            if not self._started:
                for learner in active:
                    learner.start_step()
            for part in torch.split(samples, n_part) if len(samples) else ():
                originals, share = Originals(part.float()), len(part) / len(step.ids)
                if len(active) == 1 or self._device.type != "cuda":
                    # On a CPU one product for all gains nothing, and moves the last bits.
                    for learner in active:
                        learner.add(originals, share)
                    continue
                for start in range(0, len(active), WIDE_HEADS):
                    some = active[start : start + WIDE_HEADS]
                    wide = _WideMap(originals.tokens, some)
                    for learner in some:
                        learner.add(originals, share, wide)
                    wide.backward()
            self._started = not batch.portion.ends_step
            return [] if self._started else self._finish(step, active, stop)

    def flush(self) -> list[Finished]:
        """Return the step whose figures were not read yet, if there is one."""
        if self._pending is None:
            return []
        (step, active, values, arrived), self._pending = self._pending, None
        arrived.synchronize()
        return [self._read(step, active, values)]

    def _finish(self, step: Step, active: Sequence[Learner], stop: bool) -> list[Finished]:
        wanted = torch.full((1,), float(stop), device=self._device)
        self.replicas.add_up([*(tensor for learner in active for tensor in learner.sums()), wanted])
        values = torch.cat([wanted, *(learner.finish_gradient() for learner in active)])
        if not active[0].is_late:
            finished = self._read(step, active, values)
            for learner in active:
                if learner.diverged_at is None:
                    learner.move(step)
            return [finished]
        for learner in active:
            learner.move(step)
        before = self.flush()
        on_host = values.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(self._device).record_event()
        self._pending = (step, active, on_host, arrived)
        return before

    def _read(self, step: Step, active: Sequence[Learner], values: Tensor) -> Finished:
        wanted, *rest = values.tolist()
        lines = np.array_split(rest, len(active))
        found = {a: a.read(step, line.tolist()) for a, line in zip(active, lines, strict=True)}
        return Finished(step, [found.get(learner) for learner in self.learners], wanted > 0)

    @torch.no_grad()
    def validate(self, samples: JoinedSamples, ids: Ids, step: Step) -> list[ValidationFigures | None]:
        """Return the figures of every learner on the samples `ids` after `step`; none for one that diverged.

        Clips are taken in groups of up to 16, and distances between clips are those within a group. Processes
        share the groups: none waits long for the others.
        """
        active = [learner for learner in self.learners if learner.diverged_at is None]
        groups = np.array_split(ids, -(-len(ids) // GROUP_CLIPS))
        if self._held_out is None:
            self._held_out = np.empty((len(groups[0]), *samples.shape), np.float16)
        rows = torch.zeros(len(groups), len(active), 5, device=self._device)
        for number in range(self.replicas.rank, len(groups), self.replicas.count):
            tokens = self._held_out[: len(groups[number])]
            samples.read_into(groups[number], tokens)
            with exact_float32(self._device.type):
                originals = Originals(upload(torch.from_numpy(tokens), self._device).float())
                for learner, row in zip(active, rows[number], strict=True):
                    row.copy_(learner.measure(originals))
        self.replicas.add_up([rows])
        means = torch.zeros_like(rows[0])
        for group, row in zip(groups, rows, strict=True):
            means += len(group) / len(ids) * row
        found = {}
        for learner, line in zip(active, means.tolist(), strict=True):
            margin = line[-2] - MARGIN_GAMMA * line[-1]
            found[learner] = ValidationFigures(step.number, step.epoch, *[*line, margin])
        return [found.get(learner) for learner in self.learners]


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
