"""What the report tests share: small runs whose names are hostile, and a reader of the page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from propagation_cases import make_squares

from cosettle_cache.analysis.run import ANALYSIS_FILE, ANALYSIS_SCHEMA, PROVENANCE
from cosettle_cache.core.settings import PropagateSettings
from cosettle_cache.core.tables import make_table, write_table
from cosettle_cache.core.types import Provenance, Score
from cosettle_cache.heads.projection import Projection, save_projection
from cosettle_cache.metrics.rows import write_scores
from cosettle_cache.propagation import propagate_store
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import open_store
from cosettle_cache.training.log import FiguresLog, RunFiles, StepFigures, ValidationFigures

#: Names that would be markup if anybody pasted them.
EVIL = 'one <b>&amp; "two"'
EVIL_KIND = "</script><i onload='x'>"
PLAIN = "walk"

#: A row of scores without figures.
SCORE = Score(
    task="davis",
    video_id="dog",
    object_id=1,
    tokens="raw",
    n_frames=10,
    scored_size="480x854",
    boundary_tolerance_px=8,
    protocol="cosettle",
    protocol_json="{}",
    provenance=Provenance("davis", "m", "mae_b", "w", "", "{}"),
)


@dataclass(frozen=True)
class Made:
    """Folders of a propagation and of two trainings, the store and the projection behind them."""

    scored: Path
    trained: Path
    swept: Path
    store: Path
    projection: Path
    data_root: Path


def make_runs(root: Path, *, overlays: str = "first", n_frames: int = 6) -> Made:
    data = root / "data"
    case = make_squares(data, (EVIL, PLAIN), n_frames=n_frames)
    store = case.write(root / "squares.zarr")
    projection = Projection(3, seed=1)
    save_projection(root / "mine.safetensors", projection, {"backbone": "tiny", "weights_sha256": "0" * 64})
    out = root / "propagated"
    report = propagate_store(
        open_store(store),
        data,
        make_protocol(size="native", top_k=1),
        out,
        projections=[("mine", projection)],
        settings=PropagateSettings(overlays=overlays),
    )
    assert not report.failures
    write_scores(out, report.scores)
    trained, swept = root / "trained", root / "swept"
    write_journal(trained, 40)
    for member in ("weight=1", "weight=3"):
        write_journal(swept / member, 700)
    (swept / "sweep.json").write_text("{}")
    return Made(out, trained, swept, store, root / "mine.safetensors", data)


def write_analysis_table(folder: Path, backbone: str = "tiny") -> Path:
    """Write the table of an analysis by its own schema: two definitions, raw and two projections."""
    figures = {"raw": (0.5, 0.2), "mine": (0.6, 0.25), EVIL_KIND: (0.6, 0.2501)}
    rows = [
        dict.fromkeys(ANALYSIS_SCHEMA.names, None)
        | dict.fromkeys(PROVENANCE, "{}")
        | {"dataset": "clips", "backbone": backbone, "definition_json": '{"gamma": 0.3}'}
        | {"tokens": tokens, "definition": definition, "n_videos": 3, "n_frames": 30}
        | {"d_inter_100": inter, "d_intra_100": intra, "margin_100": inter - 0.3 * intra}
        | {"cycle_accuracy": 0.5, "effective_rank": 0.7}
        for definition in ("released", "paper")
        for tokens, (inter, intra) in figures.items()
    ]
    write_table(folder / ANALYSIS_FILE, make_table(rows, ANALYSIS_SCHEMA))
    return folder


def write_journal(folder: Path, n_steps: int) -> None:
    """Write the journal of a run; the loss of one step is not finite."""
    folder.mkdir(parents=True)
    files = RunFiles(folder)
    steps, epochs = FiguresLog(files.metrics, 0), FiguresLog(files.validation, 0)
    for step in range(n_steps):
        loss = float("nan") if step == 3 else 3.0 / (1 + step)
        steps.append(StepFigures(step, step // 10, 1e-3, loss, 2.0, 1.0, step / n_steps, 1.0, 1.0, 3.0, 1.0))
        if step % 10 == 9:
            epochs.append(ValidationFigures(step, step // 10, 2.0, 1.0, 0.4, 0.5, 0.2, 0.44))
    steps.close()
    epochs.close()


@dataclass
class Page(HTMLParser):
    """Tags, attributes and texts of a page, and the JSON that its scripts read."""

    source: str
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._data = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        found = dict(attrs)
        self._data = found.get("id") or "" if found.get("type") == "application/json" else ""

    def handle_data(self, data: str) -> None:
        if self._data:
            self.documents[self._data] = json.loads(data)
            self._data = ""
        else:
            self.texts.append(data)

    @property
    def headings(self) -> list[str]:
        links = [value for name, value in self.attributes if name == "href"]
        return [link.removeprefix("#") for link in links]

    @property
    def text(self) -> str:
        return "".join(self.texts)
