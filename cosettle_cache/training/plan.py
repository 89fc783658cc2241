"""What a training run will do, before it does it: members, stream of batches, what is worth a warning.

Stores, settings and the axes of a sweep (`temperature=0.02,0.03`) go in; a plan and a stream come out, or the
error that the run would meet. A run without axes is a sweep of one member, in the run's own folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.settings import TrainSettings, digest, flat_text
from cosettle_cache.core.types import Grid
from cosettle_cache.heads import check_trainable
from cosettle_cache.heads.projection import released_init
from cosettle_cache.metrics.cycle import check_window
from cosettle_cache.store import FeatureStore, SlotState
from cosettle_cache.training.batches import (
    EpochOrder,
    Portion,
    Replicas,
    ShuffleShards,
    announced,
    make_portions,
    make_steps,
    shuffle_samples,
)
from cosettle_cache.training.learner import PRECISIONS
from cosettle_cache.training.losses import find_regularizer
from cosettle_cache.training.samples import HeldOut, JoinedSamples, make_samples

Value = str | int | float

#: Settings that decide the stream of batches or how it is worked through: all members share them.
_STREAM_SETTINGS = {"epochs", "batch_size", "accumulate", "precision", "seed", "order", "shard_window"}
_STREAM_SETTINGS |= {"validation", "palindrome", "gap", "checkpoint_every", "keep_every"}

#: Type of every setting, and those that may differ between the members of a sweep.
_KINDS: dict[str, type[Value]] = {name: type(value) for name, value in asdict(TrainSettings()).items()}
SWEEPABLE = tuple(name for name in _KINDS if name not in _STREAM_SETTINGS)


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and the values that it takes."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """One combination: its name (a folder; empty without axes) and its complete settings."""

    name: str
    settings: TrainSettings


def parse_axis(text: str) -> Axis:
    """Return the axis written as `name=value,value`; raise `UsageError` when it means nothing."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name in _STREAM_SETTINGS:
        raise UsageError(
            f"{name} cannot be swept: all members of a sweep learn from the same batches",
            wanted=", ".join(SWEEPABLE),
            found=name,
            hint="train once per value, each with its own --out",
        )
    if name not in SWEEPABLE:
        close = difflib.get_close_matches(name, SWEEPABLE, n=1)
        hint = f"did you mean {close[0]}?" if close else None
        raise UsageError(
            "a sweep over an unknown setting", wanted=", ".join(SWEEPABLE), found=name, hint=hint
        )
    parsed = tuple(_parse_value(name, value.strip()) for value in values.split(","))
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"the sweep over {name} names a value twice", found=values)
    return Axis(name, parsed)


def _parse_value(name: str, text: str) -> Value:
    kind = _KINDS[name]
    try:
        return text if name == "separability_weight" and text == "auto" else kind(text)
    except ValueError as error:
        wanted = f"{kind.__name__} values"
        raise UsageError(f"{name} cannot be {text!r}", wanted=wanted, found=text) from error


def make_members(settings: TrainSettings, axes: Sequence[Axis]) -> tuple[Member, ...]:
    """Return all combinations of the axes' values, the last axis fastest."""
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UsageError("a setting is swept twice", found=", ".join(names))
    members = []
    for values in product(*(axis.values for axis in axes)):
        change: dict[str, Any] = dict(zip(names, values, strict=True))
        texts = (f"{value:.12g}" if isinstance(value, float) else str(value) for value in values)
        name = ",".join(f"{key}={text}" for key, text in zip(names, texts, strict=True))
        members.append(Member(name, replace(settings, **change)))
    return tuple(members)


#: Tokens of a sample over channels in the released setting: what the default separability weight is made for.
_RELEASED_TOKENS_PER_DIM = 588 / 768
_RELEASED_FORM = ("kl", "released")

#: How linear maps start: by the rule of the released code for the backbone, or so that they change little.
RELEASED = "released"
STARTS = (RELEASED, "identity", "pca")

#: How an epoch is shuffled: all samples, or shards and then samples within a window of shards.
ORDERS = ("samples", "shards")

#: Numbers without limits of their own that are never negative, and what they stay below.
_BOUNDS = {
    **dict.fromkeys(("separability_weight", "gradient_ratio", "base_lr", "min_lr", "weight_decay"), math.inf),
    **dict.fromkeys(("beta1", "beta2"), 1.0),
}


@dataclass(frozen=True)
class Stream:
    """The samples of some stores in the order of a run; `held_out` clips stay outside of it."""

    stores: tuple[FeatureStore, ...]
    settings: TrainSettings
    samples: JoinedSamples

    @cached_property
    def held_out(self) -> HeldOut:
        """Which samples validation keeps for itself."""
        return HeldOut(self.samples, self.settings.validation, self.settings.seed)

    @cached_property
    def order(self) -> EpochOrder:
        """The batches of every epoch."""
        settings, samples = self.settings, self.samples
        by_shard = ShuffleShards(samples.slots, settings.shard_window)
        return EpochOrder(
            samples.epoch_ids,
            settings.step_samples,
            settings.seed,
            by_shard if settings.order == "shards" else shuffle_samples,
            self.held_out if settings.validation else None,
            samples.arrange if len(self.stores) > 1 else None,
        )

    def portions(self, start: int, replicas: Replicas) -> Iterator[Portion]:
        """Yield this process's reads from step `start` on."""
        steps = make_steps(self.order, self.settings.epochs, start)
        portions = make_portions(steps, self.settings.accumulate, replicas.share)
        if self.settings.order != "shards":
            return portions
        return announced(portions, self.settings.shard_window, self.samples.slots, self.samples.will_need)

    def capacity(self, replicas: Replicas) -> int:
        """Return the size of the largest portion."""
        share = math.ceil(max(map(len, self.order(0))) / replicas.count)
        return math.ceil(share / self.settings.accumulate)

    def origin(self, members: Sequence[Member]) -> dict[str, str]:
        """Return what decides the parameters of a run; how often it saves does not.

        Samples are listed as well: a store of the same fingerprint may have been half-written.
        """
        document: dict[str, Any] = {}
        for member in members:
            settings = asdict(member.settings)
            del settings["checkpoint_every"], settings["keep_every"]
            if settings["init"] == RELEASED:  # what runs of before there was a choice say nothing of
                del settings["init"]
            document[member.name or "settings"] = settings
        for number, store in enumerate(self.stores):
            document[f"store{number or ''}"] = store.fingerprint.to_json()
        rounds = [self.samples.epoch_ids(epoch) for epoch in range(self.samples.n_rounds)]
        listed = [self.samples.videos(rounds[0]), [ids.tolist() for ids in rounds]]
        document["samples"] = {"n": sum(map(len, rounds)), "digest": digest(listed)}
        return flat_text(document)


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do; `n_dropped` counts samples that fill no batch in the epochs that pass them by.

    `batch_size` is samples per step, `read_bytes` the tokens of all samples, read once for all members.
    """

    members: tuple[str, ...]
    n_clips: int
    n_held_out: int
    n_views: int
    epochs: int
    batch_size: int
    n_steps: int
    n_samples: int
    n_dropped: int
    grid: Grid
    sample_shape: tuple[int, int, int, int]
    lr: float
    released_init: str
    read_bytes: int
    warnings: tuple[str, ...]

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's tokens."""
        return self.read_bytes // self.n_samples

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"grid": str(self.grid)}


def make_stream(stores: FeatureStore | Sequence[FeatureStore], settings: TrainSettings) -> Stream:
    """Return the stream of a run; raise what `make_samples` raises."""
    stores = (stores,) if isinstance(stores, FeatureStore) else tuple(stores)
    return Stream(stores, settings, make_samples(stores, settings))


def make_train_plan(
    stores: FeatureStore | Sequence[FeatureStore],
    settings: TrainSettings,
    sweep: Sequence[Axis] = (),
    *,
    must_fill: bool = False,
) -> TrainPlan:
    """Return what `train` would do; raise what it would raise before its first step.

    With `must_fill` a batch that no epoch can fill raises `UsageError`; else an epoch is one smaller step.
    """
    plan = plan_stream(make_stream(stores, settings), make_members(settings, sweep))
    if must_fill and plan.batch_size < settings.step_samples:
        raise UsageError(
            "the batch is larger than an epoch, which visits one sample of every clip",
            wanted=f"--batch times --accumulate of at most {plan.batch_size}",
            found=settings.step_samples,
        )
    return plan


def plan_stream(stream: Stream, members: Sequence[Member]) -> TrainPlan:
    """Return the plan of training `members` on `stream`."""
    _, rows, cols, _ = shape = stream.samples.shape
    for member in members:
        _check_settings(member.settings, rows, cols)
    epochs = range(stream.settings.epochs)
    sizes = [[len(ids) for ids in stream.order(epoch)] for epoch in epochs]
    if not all(sizes):
        raise InputError("validation holds out every clip of this store", hint="lower --validation")
    n_samples = sum(map(sum, sizes))
    visited = sum(len(stream.order.visited(epoch)) for epoch in epochs)
    return TrainPlan(
        members=tuple(member.name for member in members),
        n_clips=max(len(stream.samples.epoch_ids(epoch)) for epoch in epochs),
        n_held_out=len(stream.held_out.ids) if stream.settings.validation else 0,
        n_views=stream.samples.n_rounds,
        epochs=stream.settings.epochs,
        batch_size=max(map(max, sizes)),
        n_steps=sum(map(len, sizes)),
        n_samples=n_samples,
        n_dropped=visited - n_samples,
        grid=Grid(rows, cols),
        sample_shape=shape,
        lr=stream.settings.lr,
        released_init=released_init(stream.stores[0].fingerprint.backbone),
        read_bytes=n_samples * math.prod(shape) * 2,
        warnings=tuple(_warnings(stream, members)),
    )


def _check_settings(settings: TrainSettings, rows: int, cols: int) -> None:
    check_trainable(settings.head)
    find_regularizer(settings.regularizer, settings.reduction)
    check_window(rows, cols, settings.window)
    for name, names in (("order", ORDERS), ("precision", PRECISIONS), ("init", STARTS)):
        if getattr(settings, name) not in names:
            raise UsageError(f"unknown {name}", wanted=" or ".join(names), found=getattr(settings, name))
    if not 0 <= settings.validation < 1:
        raise UsageError("validation is a share of the clips", wanted="0 to 1", found=settings.validation)
    if not settings.temperature > 0:
        raise UsageError("the temperature divides cosines", wanted="above 0", found=settings.temperature)
    for name, bound in _BOUNDS.items():
        value = getattr(settings, name)
        if value != "auto" and not 0 <= value < bound:
            wanted = "a number, 0 or above" if math.isinf(bound) else f"a number from 0 to below {bound:g}"
            raise UsageError(f"no such {name}", wanted=wanted, found=value)


def _warnings(stream: Stream, members: Sequence[Member]) -> Iterator[str]:
    settings = stream.settings
    views, rows, cols, dim = stream.samples.shape
    ratio = views * rows * cols / dim / _RELEASED_TOKENS_PER_DIM
    all_settings = [member.settings for member in members]
    released = [item for item in all_settings if (item.regularizer, item.reduction) == _RELEASED_FORM]
    for weight in dict.fromkeys(item.separability_weight for item in released):
        if weight != "auto" and abs(ratio - 1) > 0.01:
            yield (
                f"the separability weight acts {ratio:.3g} times as strongly on these tokens as on the "
                f"released 588 of 768 channels; {weight / ratio:.3g} would act as {weight:.3g} did there"
            )
    smallest = min(len(stream.order.visited(epoch)) for epoch in range(settings.epochs))
    if smallest < settings.step_samples:
        yield (
            f"a view set has {smallest} samples, fewer than the batch of {settings.step_samples}: each is "
            f"one step, {settings.epochs} steps in all, at the learning rate of the full batch"
        )
    for warmup in sorted({item.warmup_epochs for item in all_settings}):
        if settings.epochs <= warmup:
            yield f"the warm-up of {warmup:g} epochs is never left in {settings.epochs} epochs"
    if settings.validation and len(stream.held_out.ids) < 2:
        yield f"validation holds out {len(stream.held_out.ids)} clips, too few to compare with each other"
    for store in stream.stores:
        states = store.slot_states()
        todo, failed = states.get(SlotState.TODO, 0), states.get(SlotState.FAILED, 0)
        if todo or failed:
            yield f"the store is not complete: {todo} slots to do, {failed} with failed clips"
