"""The sections of figures: scores of `propagate`, the trade-off of `analyze`, curves of `train`, provenance.

What lies in the folders of runs comes in; sections with tables and charts come out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from cosettle_cache.analysis.run import PLANE_SVG
from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.types import Score
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.heads.projection import read_provenance
from cosettle_cache.metrics.rows import CHART_SVG, Mean, mean_scores, row_origins, score_table, sequence_means
from cosettle_cache.pictures.charts import Plane, PlanePoint, curves_chart, plane_chart, save_chart
from cosettle_cache.propagation.run import write_score_chart
from cosettle_cache.report.page import Child, chart, element
from cosettle_cache.report.runs import AnalysisRun, Runs, ScoreRun, TradeOffRow, TrainRun
from cosettle_cache.training.log import RunFiles

_OBJECT_FIGURES = ("j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay", "jf_mean")


def score_section(run: ScoreRun, number: int) -> Element:
    """Return table, chart and all further figures of one run."""
    heading = element("h2", "Scores: ", element("span", run.name, class_="name"))
    if not run.scores:
        none = element("p", "Nothing was scored: no video of this run is annotated throughout.")
        return element("section", heading, none, id=f"scores-{number}")
    first = run.scores[0]
    videos = len({score.video_id for score in run.scores})
    said = f"{first.task}, {videos} videos, encoder {first.provenance.backbone}, protocol {first.protocol}."
    warning = [] if run.complete else [_incomplete()]

    def draw(path: Path) -> None:
        write_score_chart(path, run.scores)

    return element(
        "section",
        heading,
        element("p", said, class_="about"),
        *warning,
        _main_table(run),
        chart(
            run.folder / CHART_SVG, draw, f"chart-{number}", f"Chart of {run.name}; the table has its figures"
        ),
        *_further(run),
        id=f"scores-{number}",
    )


def overview_section(runs: Sequence[ScoreRun]) -> Element:
    """Return one line per run and kind of tokens, each against the raw tokens of its own run."""
    rows = []
    for run in runs:
        means = mean_scores(run.scores)
        rows += [_overview_row(run, mean, _figures(means)) for mean in means]
    head = sortable_head(["run", "task", "encoder", "tokens", "main figure", "percent", "against raw"], 5)
    table = element("table", element("thead", head), element("tbody", *rows), class_="sortable")
    heading = element("h2", "All runs")
    said = element("p", "Each kind of tokens against the raw tokens of its own run.", class_="about")
    return element("section", heading, said, scrollable(table, "All runs"), id="overview")


def _overview_row(run: ScoreRun, mean: Mean, figures: Mapping[str, float]) -> Element:
    first = run.scores[0]
    texts = [text_cell(text) for text in (first.task, first.provenance.backbone, mean.tokens, mean.main_name)]
    value, raw = figures.get(mean.tokens), figures.get(RAW)
    against = None if value is None or raw is None or mean.tokens == RAW else value - raw
    difference = text_cell("") if against is None else number_cell(against, _difference(against))
    return element(
        "tr", element("th", run.name, scope="row", class_="name"), *texts, _plain(value, figures), difference
    )


def _plain(value: float | None, figures: Mapping[str, float]) -> Element:
    """Return the cell of a figure, with a star for the best of `figures`."""
    if value is None:
        return text_cell("–")
    return number_cell(value, f"{100 * value:.1f}", *_star(_is_best(value, figures)))


def _is_best(value: float, figures: Mapping[str, float]) -> bool:
    """Say whether nothing is larger, as far as people see."""
    return len(figures) > 1 and f"{100 * value:.1f}" == f"{100 * max(figures.values()):.1f}"


def _figures(means: Sequence[Mean]) -> dict[str, float]:
    """Return the main figure by kind of tokens, of those that have one."""
    return {mean.tokens: mean.main for mean in means if mean.main is not None}


def _incomplete() -> Element:
    text = "This run was interrupted: the figures are of the videos that had their turn."
    return element("p", element("strong", "Not complete. "), text, class_="warning", role="note")


def _main_table(run: ScoreRun) -> Element:
    totals = mean_scores(run.scores)
    name = totals[0].main_name
    against = RAW in run.tokens and len(run.tokens) > 1
    said = f"{name}, percent; ★ is the best of a row" + (
        "; ▲ and ▼ are points against raw." if against else "."
    )
    head = sortable_head(["sequence", *run.tokens], 1)
    body = [_row(video_id, means, run.tokens) for video_id, means in sequence_means(run.scores)]
    foot = _row(totals[0].label, totals, run.tokens)
    table = element(
        "table",
        element("caption", said),
        element("thead", head),
        element("tbody", *body),
        element("tfoot", foot),
        class_="sortable",
    )
    return scrollable(table, f"{name} by sequence")


def _row(title: str, means: Sequence[Mean], kinds: Sequence[str]) -> Element:
    figures = _figures(means)
    cells = [_cell(kind, figures) for kind in kinds]
    return element("tr", element("th", title, scope="row", class_="name"), *cells)


def _cell(kind: str, figures: Mapping[str, float]) -> Element:
    cell = _plain(figures.get(kind), figures)
    if kind != RAW and RAW in figures and kind in figures:
        cell.append(_difference(figures[kind] - figures[RAW]))
    return cell


def _star(is_best: bool) -> list[Child]:
    star = element("span", "★", class_="best", role="img", aria_label="best of the row")
    return [star] if is_best else []


def _difference(share: float) -> Element:
    return signed(100 * share, 1)


def _further(run: ScoreRun) -> list[Element]:
    header, rows = score_table(run.scores)
    everything = element(
        "details", element("summary", "All figures"), simple_table(header, rows, 2, "All figures")
    )
    if run.scores[0].object_id is None:
        return [everything]
    header = ["sequence", "object", "tokens", "J", "J recall", "J decay", "F", "F recall", "F decay", "J&F"]
    table = simple_table(header, [_object_row(score) for score in run.scores], 3, "Every object")
    return [everything, element("details", element("summary", "Every object"), table)]


def _object_row(score: Score) -> list[str]:
    figures = [score.figures.get(name) for name in _OBJECT_FIGURES]
    shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
    return [score.video_id, str(score.object_id), score.tokens, *shown]


def plane_section(runs: Sequence[AnalysisRun]) -> Element | None:
    """Return the planes of all rows, one per definition, and their figures; None for none."""
    rows = [row for run in runs for row in run.rows]
    if not rows:
        return None
    said = (
        "Right is less steady within a clip, up is clips further apart; an arrow leads from the raw tokens "
        "of an encoder to each of its projections. Distances are in diameters that cover all tokens."
    )
    # What a run drew shows that run alone.
    drawn = runs[0].folder / PLANE_SVG if len(runs) == 1 else Path()
    return element(
        "section",
        element("h2", "Trade-off"),
        element("p", said, class_="about"),
        chart(drawn, lambda path: _draw_planes(rows, path), "planes", "Trade-off; the table has its figures"),
        _table(rows),
        id="trade-off",
    )


def _draw_planes(rows: Sequence[TradeOffRow], path: Path) -> None:
    several, planes = len({row.dataset for row in rows}) > 1, []
    for name in dict.fromkeys(row.definition for row in rows):
        chosen = [row for row in rows if row.definition == name]
        names = [f"{row.backbone} {row.dataset}" if several else row.backbone for row in chosen]
        points = [
            PlanePoint(name, row.tokens, row.d_intra, row.d_inter)
            for name, row in zip(names, chosen, strict=True)
        ]
        planes.append(Plane(f"definition {name}", chosen[0].gamma, points))
    save_chart(plane_chart(planes), path)


def _raw_rows(rows: Sequence[TradeOffRow]) -> Mapping[tuple[str, str, str], TradeOffRow]:
    return {(row.definition, row.backbone, row.dataset): row for row in rows if row.tokens == RAW}


def _table(rows: Sequence[TradeOffRow]) -> Element:
    names = ["encoder", "data", "clips", "tokens", "definition"]
    names += ["D inter", "D intra", "margin D", "cycle accuracy", "effective rank"]
    raw = _raw_rows(rows)
    body = [_table_row(row, raw.get((row.definition, row.backbone, row.dataset))) for row in rows]
    table = element(
        "table",
        element("caption", "Margin D with its difference to the raw tokens."),
        element("thead", sortable_head(names, len(names) - 5)),
        element("tbody", *body),
        class_="sortable",
    )
    return scrollable(table, "Trade-off")


def _table_row(row: TradeOffRow, raw: TradeOffRow | None) -> Element:
    texts = [row.dataset, str(row.n_videos), row.tokens, row.definition]
    margin = number_cell(row.margin, f"{row.margin:.4f}")
    if raw is not None and raw is not row:
        margin.append(signed(row.margin - raw.margin, 4))
    figures = [row.d_inter, row.d_intra]
    others = [row.cycle_accuracy, row.effective_rank]
    return element(
        "tr",
        element("th", row.backbone, scope="row", class_="name"),
        *map(text_cell, texts),
        *(number_cell(value, f"{value:.4f}") for value in figures),
        margin,
        *(number_cell(value, f"{value:.4f}") for value in others),
    )


def curves_section(run: TrainRun, number: int) -> Element:
    """Return the curves of one run, all its projections in each panel."""
    heading = element("h2", "Training: ", element("span", run.name, class_="name"))
    identifier = f"curves-{number}"
    n_steps = max(member.n_steps for member in run.members)
    if not n_steps:
        return element("section", heading, element("p", "No step has been taken yet."), id=identifier)
    epochs = run.report.get("epochs")
    about = element("p", f"{n_steps} steps" + (f" in {epochs} epochs." if epochs else "."), class_="about")

    def draw(path: Path) -> None:
        held_out = {member.name: member.epochs for member in run.members}
        steps = {member.name: member.steps for member in run.members if member.steps}
        save_chart(curves_chart(steps, held_out), path)

    picture = chart(RunFiles(run.folder).curves_svg, draw, identifier, "Figures of training over the steps")
    return element("section", heading, about, picture, id=identifier)


def provenance_section(runs: Runs, explored: Mapping[str, Any]) -> Element:
    """Return everything that decided the figures; `explored` is of the store in the affinity explorer."""
    documents = [(f"Scores {run.name}", _score_origin(run)) for run in runs.scored]
    documents += [
        (f"Training {run.name}, {name}", found) for run in runs.trained for name, found in _trained(run)
    ]
    documents += [(f"Trade-off {run.name}", _analysis_origin(run)) for run in runs.analyzed]
    documents += [("Affinity explorer", dict(explored))] if explored else []
    blocks = [element("details", element("summary", title), _block(found)) for title, found in documents]
    return element("section", element("h2", "Provenance"), *blocks, id="provenance")


def _block(document: Mapping[str, Any]) -> Element:
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    return element("pre", text, tabindex="0")


def _score_origin(run: ScoreRun) -> dict[str, Any]:
    """Return what the rows of a run say of themselves, each value once."""
    found: dict[str, Any] = {"folder": str(run.folder), "complete": run.complete}
    for name, values in row_origins(run.scores).items():
        parsed = [_parsed(value) if name.endswith("_json") else value for value in values]
        found[name.removesuffix("_json") if name == "versions_json" else name] = (
            parsed[0] if len(parsed) == 1 else parsed
        )
    found["projection_sha256"] = {score.tokens: score.provenance.projection_sha256 for score in run.scores}
    found["scored_size"] = {score.video_id: score.scored_size for score in run.scores}
    found["boundary_tolerance_px"] = {score.video_id: score.boundary_tolerance_px for score in run.scores}
    return found


def _analysis_origin(run: AnalysisRun) -> dict[str, Any]:
    rows = [{key: _parsed(value) for key, value in row.items()} for row in run.provenance]
    return {"folder": str(run.folder), "rows": rows}


def _trained(run: TrainRun) -> list[tuple[str, dict[str, Any]]]:
    """Return what every finished projection of a run says of itself."""
    files = RunFiles(run.folder)
    candidates = [(member.name, _member_file(files, member.name).projection) for member in run.members]
    return [(name, _projection_origin(path)) for name, path in candidates if path.is_file()]


def _member_file(files: RunFiles, name: str) -> RunFiles:
    member = files.member(name)
    return member if member.projection.is_file() else files


def _projection_origin(path: Path) -> dict[str, Any]:
    try:
        found = read_provenance(path)
    except CosettleError as error:
        return {"file": str(path), "unreadable": error.summary}
    return {"file": str(path), **{key: _parsed(value) for key, value in found.items()}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, TypeError):
        return text


def text_cell(text: str) -> Element:
    """Return a cell of text."""
    return element("td", text, class_="name")


def number_cell(value: float, shown: Child, *more: Child) -> Element:
    """Return a right-aligned cell that sorts by `value`."""
    return element("td", shown, *more, class_="number", data_value=f"{value:.9g}")


def signed(difference: float, digits: int) -> Element:
    """Return a difference with its sign, and an arrow that says the same."""
    shown = f"{difference:+.{digits}f}"
    if float(shown) == 0:
        return element("span", f"± {0:.{digits}f}", class_="difference")
    arrow, word = ("▲", "up") if difference > 0 else ("▼", "down")
    return element("span", f"{arrow} {shown.replace('-', '−')}", class_=f"difference {word}")


def sortable_head(names: Sequence[str], n_texts: int) -> Element:
    """Return a row of column heads, each a button; those after the first `n_texts` are of numbers."""
    return element("tr", *(_head(name, is_number=index >= n_texts) for index, name in enumerate(names)))


def simple_table(header: Sequence[str], rows: Sequence[Sequence[str]], n_texts: int, label: str) -> Element:
    """Return a sortable table of texts; columns after the first `n_texts` are numbers where they can be."""
    body = [
        element("tr", *(_table_cell(cell, index >= n_texts) for index, cell in enumerate(row)))
        for row in rows
    ]
    head = element("thead", sortable_head(header, n_texts))
    table = element("table", head, element("tbody", *body), class_="sortable")
    return scrollable(table, label)


def scrollable(table: Element, label: str) -> Element:
    """Return a table in a box that scrolls sideways on narrow screens, by keyboard too."""
    return element("div", table, class_="scroll", tabindex="0", role="group", aria_label=label)


def _head(name: str, *, is_number: bool) -> Element:
    button = element("button", element("span", name), type="button")
    return element("th", button, scope="col", class_="number" if is_number else None)


def _table_cell(text: str, is_number: bool) -> Element:
    if not is_number:
        return text_cell(text)
    try:
        return number_cell(float(text), text)
    except ValueError:
        return element("td", text, class_="number")
