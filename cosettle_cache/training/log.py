"""What a training run writes: a line of figures per step, a checkpoint, and the reports of its members.

A checkpoint knows how many bytes of figures came before it, so that a resumed run continues both where it was
taken. Nothing in a checkpoint is executed when it is read. Reports come in from the run; lines, tables and
JSON go out.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from cosettle_cache.core.errors import CheckpointError, InputError, first_line
from cosettle_cache.core.files import output_errors, parse_json, read_file, write_durably
from cosettle_cache.core.settings import (
    LinearSettings,
    SpectralSettings,
    TrainSettings,
    digest,
    package_versions,
)
from cosettle_cache.core.system import sync_data
from cosettle_cache.store import FeatureStore

#: What to do about a folder that holds something else.
START_OVER = "choose another folder with --out, or remove this one to start over"


class RunFiles:
    """Where the results of a run lie, or of one member of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: What a stopped run goes on from, with all its members.
        self.checkpoint = folder / "checkpoint.pt"
        #: One line of figures per step, and one per epoch on the held-out clips.
        self.metrics, self.validation = folder / "metrics.jsonl", folder / "validation.jsonl"
        #: The picture of the figures.
        self.curves, self.curves_svg = folder / "curves.png", folder / "curves.svg"
        #: The result; there once the run is complete.
        self.projection = folder / "projection.safetensors"
        self.report = folder / "train.json"
        #: The folder for TensorBoard; what other trackers know the run by.
        self.scalars, self.tracker = folder / "tensorboard", folder / "tracker.json"
        #: The figures of every step of every member of a sweep, and the members side by side.
        self.table, self.comparison = folder / "curves.parquet", folder / "sweep.json"

    def kept(self, n_steps: int) -> Path:
        """Return the file of the head after so many steps."""
        return self.folder / f"step-{n_steps:06d}.safetensors"

    def member(self, name: str) -> RunFiles:
        """Return the files of a member of a sweep; without a name, these."""
        return RunFiles(self.folder / name)

    def clear(self) -> None:
        """Remove what an earlier run left, so that nothing of it passes for this one's."""
        own = [path for name, path in vars(self).items() if name not in ("folder", "scalars")]
        kept = self.folder.glob(f"step-{'[0-9]' * 6}.safetensors")
        for path in [*own, *kept, *self.scalars.glob("events.*")]:
            with output_errors(path):
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One line of `metrics.jsonl`: the loss terms of one step (before its update), and its learning rate.

    `separability_weight` is the weight that the step used, `gradient_norm` the length of the gradient before
    clipping.
    """

    step: int
    epoch: int
    lr: float
    total: float
    cycle: float
    separability: float
    cycle_accuracy: float
    identity_cosine: float
    return_probability: float
    separability_weight: float
    gradient_norm: float


@dataclass(frozen=True, slots=True)
class ValidationFigures:
    """One line of `validation.jsonl`: held-out clips after step `step`, the last of `epoch`.

    Distances are between unit tokens at the same place of the grid, in diameters of the unit sphere (0 to 1):
    `inter_distance` of different clips, `intra_distance` of two frames of one; `margin` is the paper's D, the
    first less `core.settings.MARGIN_GAMMA` times the second.
    """

    step: int
    epoch: int
    cycle: float
    separability: float
    cycle_accuracy: float
    inter_distance: float
    intra_distance: float
    margin: float


Figures = TypeVar("Figures", StepFigures, ValidationFigures)


class FiguresLog:
    """Lines of figures, open for appending after the first `n_bytes`; what came later is cut off.

    `n_again` counts the lines that were: the next ones are these once more.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        self._path = path
        with output_errors(path):
            self._file = path.open("a+b")
            found = self._file.seek(0, os.SEEK_END)
            self._file.seek(n_bytes)
            self.n_again = self._file.read().count(b"\n")
            if found >= n_bytes:
                self._file.truncate(n_bytes)
        if found < n_bytes:
            self._file.close()
            raise InputError(
                f"{path} is shorter than when the checkpoint was taken",
                wanted=f"{n_bytes} bytes or more",
                found=f"{found} bytes",
                hint=START_OVER,
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def append(self, figures: StepFigures | ValidationFigures) -> None:
        """Write one line."""
        self.n_again = max(0, self.n_again - 1)
        with output_errors(self._path):
            self._file.write((json.dumps(asdict(figures)) + "\n").encode())
            self._file.flush()

    def sync(self) -> int:
        """Wait until every line is safely on disk; return the bytes written."""
        with output_errors(self._path):
            sync_data(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)


def figure_columns(figures: Sequence[StepFigures | ValidationFigures]) -> dict[str, list[float]]:
    """Return the figures of steps, or of epochs, by name; none for no lines."""
    names = [item.name for item in fields(figures[0])] if figures else []
    return {name: [float(getattr(line, name)) for line in figures] for name in names}


def read_figures(path: Path) -> list[StepFigures]:
    """Return the figures of every step in `metrics.jsonl`; raise `InputError` for a line that holds none."""
    return [_parse_line(StepFigures, line, path) for line in read_file(path).splitlines()]


def read_validation(path: Path) -> list[ValidationFigures]:
    """Return the figures of every epoch in `validation.jsonl`; none where there is no such file."""
    lines = read_file(path).splitlines() if path.exists() else ()
    return [_parse_line(ValidationFigures, line, path) for line in lines]


def _parse_line(kind: type[Figures], line: bytes, path: Path) -> Figures:
    try:
        document = parse_json(line, f"a line of {path}")
    except InputError as error:
        raise InputError(f"{path} is not a journal of training", found=error.found) from error
    names = {item.name for item in fields(kind)}
    numbers = isinstance(document, dict) and all(type(value) in (int, float) for value in document.values())
    if not numbers or document.keys() != names:
        raise InputError(f"{path} is not a journal of training", found=f"a line {str(document)[:100]}")
    return kind(**document)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that the next step depends on.

    `step` counts the steps done; `origin` is what decides the run (settings, stores), flat, by dotted key;
    `n_bytes` the lengths of each member's `metrics.jsonl` and `validation.jsonl` at that moment; `learners`
    the state of each member.
    """

    step: int
    origin: Mapping[str, str]
    n_bytes: Sequence[tuple[int, int]]
    learners: Sequence[dict[str, Any]]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` so that the name always holds a whole one."""
    buffer = io.BytesIO()
    torch.save({name: getattr(checkpoint, name) for name in Checkpoint.__slots__}, buffer)
    write_durably(path, [buffer.getbuffer()])


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; raise `CheckpointError` when it is damaged or none of ours."""
    try:
        data = io.BytesIO(path.read_bytes())
        return Checkpoint(**torch.load(data, map_location="cpu", weights_only=True))
    except Exception as error:  # torch's restricted reader raises anything for a damaged file
        raise CheckpointError(
            f"{path} is not a checkpoint of a training run",
            found=first_line(error)[:120],
            hint=START_OVER,
        ) from error


_ARROW_TYPES = {"int": pa.int64(), "float": pa.float64()}
CURVES_SCHEMA = pa.schema(
    [("member", pa.string()), *((item.name, _ARROW_TYPES[str(item.type)]) for item in fields(StepFigures))]
)


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One projection of a run: figures of its first and last step, and of its first and last validation.

    `projection_sha256` is empty until the run is complete, or when the member diverged at `diverged_at`.
    """

    name: str
    folder: Path
    first: StepFigures | None
    last: StepFigures | None
    first_validation: ValidationFigures | None
    last_validation: ValidationFigures | None
    diverged_at: int | None
    projection_sha256: str


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did. `steps`, `samples`, `read_bytes`, `seconds` are this call's; the rest the whole run's.

    `waiting_share` is the share of `seconds` without a batch to work on.
    """

    folder: Path
    epochs: int
    steps: int
    steps_before: int
    samples: int
    read_bytes: int
    seconds: float
    waiting_share: float
    interrupted: bool
    members: tuple[MemberReport, ...]
    warnings: tuple[str, ...]

    @property
    def samples_per_s(self) -> float:
        """Samples per second of this call."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def first(self) -> StepFigures | None:
        """Figures of the first member's first step, before any update."""
        return self.members[0].first

    @property
    def last(self) -> StepFigures | None:
        """Figures of the first member's last step."""
        return self.members[0].last

    @property
    def projection_sha256(self) -> str:
        """Digest of the first member's projection."""
        return self.members[0].projection_sha256

    @property
    def diverged(self) -> tuple[MemberReport, ...]:
        """Members that could not be trained to the end."""
        return tuple(member for member in self.members if member.diverged_at is not None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        members = [asdict(member) | {"folder": str(member.folder)} for member in self.members]
        changed = {"folder": str(self.folder), "samples_per_s": self.samples_per_s, "members": members}
        return asdict(self) | changed


def report_member(files: RunFiles, name: str, diverged_at: int | None, sha256: str) -> MemberReport:
    """Return the report of a member from what it wrote."""
    figures = read_figures(files.metrics) if files.metrics.exists() else []
    validation = read_validation(files.validation)
    first, last = next(iter(figures), None), next(reversed(figures), None)
    epochs = next(iter(validation), None), next(reversed(validation), None)
    return MemberReport(name, files.folder, first, last, *epochs, diverged_at, sha256)


def comparison(members: Sequence[MemberReport]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of members, the best first.

    The best has the largest margin on held-out clips, or without them the highest cycle accuracy.
    """
    validated = any(member.last_validation for member in members)
    header = ["member", "loss", "cycle", "separability", "weight", "cycle accuracy"]
    header += ["held-out cycle accuracy", "held-out margin"] if validated else []
    return header, [_row(member, len(header)) for member in sorted(members, key=_rank)]


def _rank(member: MemberReport) -> tuple[bool, float]:
    if member.diverged_at is not None or member.last is None:
        return True, 0.0
    return False, -(member.last_validation.margin if member.last_validation else member.last.cycle_accuracy)


def _row(member: MemberReport, n_columns: int) -> list[str]:
    last, held_out, cells = member.last, member.last_validation, [member.name]
    if member.diverged_at is not None:
        cells.append(f"diverged at step {member.diverged_at}")
    elif last:
        names = ("total", "cycle", "separability", "separability_weight", "cycle_accuracy")
        cells += [f"{getattr(last, name):.4g}" for name in names]
        cells += [f"{held_out.cycle_accuracy:.4f}", f"{held_out.margin:.4f}"] if held_out else []
    return cells + [""] * (n_columns - len(cells))


def projection_provenance(
    stores: Sequence[FeatureStore],
    settings: TrainSettings | SpectralSettings | LinearSettings,
    **figures: Any,
) -> dict[str, str]:
    """Return what a projection's file says of its origin; `figures` are kept as JSON under their names."""
    fingerprints = [store.fingerprint for store in stores]
    documents = {"settings": asdict(settings), "versions": package_versions(), **figures}
    return {
        "backbone": fingerprints[0].backbone,
        "weights_sha256": fingerprints[0].weights_sha256,
        "manifest_digest": " ".join(item.manifest_digest for item in fingerprints),
        "store_digest": " ".join(digest(item.to_json()) for item in fingerprints),
        **{name: json.dumps(document, sort_keys=True) for name, document in documents.items()},
    }
