"""What a training run did: of every member its figures and its projection, and the members side by side.

Reports come in from the room, lines and tables go out: for people, as JSON, and as one Parquet of all curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from cosettle_cache.core.tables import make_table
from cosettle_cache.training.run_state import (
    RunFiles,
    StepFigures,
    ValidationFigures,
    read_figures,
    read_validation,
)

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
        return asdict(self) | {
            "folder": str(self.folder),
            "samples_per_s": self.samples_per_s,
            "members": members,
            "warnings": list(self.warnings),
        }


def report_member(files: RunFiles, name: str, diverged_at: int | None, sha256: str) -> MemberReport:
    """Return the report of a member from what it wrote."""
    figures = read_figures(files.metrics) if files.metrics.exists() else []
    validation = read_validation(files.validation)
    return MemberReport(
        name=name,
        folder=files.folder,
        first=figures[0] if figures else None,
        last=figures[-1] if figures else None,
        first_validation=validation[0] if validation else None,
        last_validation=validation[-1] if validation else None,
        diverged_at=diverged_at,
        projection_sha256=sha256,
    )


def curves_table(figures: Mapping[str, Sequence[StepFigures]]) -> pa.Table:
    """Return the figures of every step of every member, members in order."""
    rows = [{"member": name, **asdict(item)} for name, items in figures.items() for item in items]
    return make_table(rows, CURVES_SCHEMA)


def comparison(members: Sequence[MemberReport]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of members, the best first.

    The best has the largest margin on held-out clips, or without them the highest cycle accuracy.
    """
    validated = any(member.last_validation for member in members)
    header = ["member", "loss", "cycle", "separability", "weight", "cycle accuracy"]
    header += ["held-out cycle accuracy", "held-out margin"] if validated else []
    return header, [_row(member, validated) for member in sorted(members, key=_rank)]


def _rank(member: MemberReport) -> tuple[bool, float]:
    if member.diverged_at is not None or member.last is None:
        return True, 0.0
    return False, -(member.last_validation.margin if member.last_validation else member.last.cycle_accuracy)


def _row(member: MemberReport, validated: bool) -> list[str]:
    if member.diverged_at is not None:
        return [member.name, f"diverged at step {member.diverged_at}", *[""] * (6 if validated else 4)]
    last, held_out = member.last, member.last_validation
    names = ("total", "cycle", "separability", "separability_weight", "cycle_accuracy")
    cells = [f"{getattr(last, name):.4g}" if last else "" for name in names]
    if validated:
        cells += [f"{held_out.cycle_accuracy:.4f}", f"{held_out.margin:.4f}"] if held_out else ["", ""]
    return [member.name, *cells]
