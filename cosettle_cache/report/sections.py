"""The sections of figures: scores of `propagate`, the trade-off of `analyze`, curves of `train`, provenance.

What lies in the folders of runs comes in; sections with tables and charts come out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from cosettle_cache.analysis.run import PLANE_SVG
from cosettle_cache.core.errors import CosettleError
from cosettle_cache.heads.kinds import RAW
from cosettle_cache.heads.projection import read_provenance
from cosettle_cache.metrics.rows import (
    CHART_SVG,
    Mean,
    best_gain,
    mean_scores,
    row_origins,
    score_table,
    sequence_means,
)
from cosettle_cache.pictures.charts import PlanePoint, curves_chart, plane_chart, save_chart
from cosettle_cache.propagation.run import write_score_chart
from cosettle_cache.report.page import chart, element, scroll_box, section
from cosettle_cache.report.runs import (
    TRADE_OFF_FIGURES,
    TRADE_OFF_ORIGIN,
    AnalysisRun,
    Runs,
    ScoreRun,
    TrainRun,
)
from cosettle_cache.training.log import RunFiles

_OBJECT_FIGURES = {
    **{"j_mean": "J", "j_recall": "J recall", "j_decay": "J decay"},
    **{"f_mean": "F", "f_recall": "F recall", "f_decay": "F decay", "jf_mean": "J&F"},
}


def score_section(run: ScoreRun, number: int) -> Element:
    """Return table, chart and all further figures of one run."""
    failed = [f"{video_id} failed: {reason}" for video_id, reason in run.failures.items()]
    if not run.scores:
        none = element("p", "Nothing was scored: no video of this run is annotated throughout.")
        return section(f"scores-{number}", "Scores: ", None, none, name=run.name, failures=failed)
    first = run.scores[0]
    videos = len({score.video_id for score in run.scores})
    said = f"{first.task}, {videos} videos, encoder {first.provenance.backbone}, protocol {first.protocol}."
    parts = []
    if gained := best_gain(run.scores, RAW):
        parts.append(element("p", element("strong", gained)))
    if not run.complete:
        text = "This run was interrupted: the figures are of the videos that had their turn."
        strong = element("strong", "Not complete. ")
        parts.append(element("p", strong, text, class_="warning", role="note"))

    label = f"Chart of {run.name}; the table has its figures"
    draw = partial(write_score_chart, run.scores)
    parts += [_main_table(run), chart(run.folder / CHART_SVG, draw, f"chart-{number}", label)]
    parts.append(_details("All figures", *score_table(run.scores), 2))
    if first.object_id is not None:
        header = ["sequence", "object", "tokens", *_OBJECT_FIGURES.values()]
        rows = []
        for score in run.scores:
            figures = [score.figures.get(name) for name in _OBJECT_FIGURES]
            shown = ["–" if value is None else f"{100 * value:.1f}" for value in figures]
            rows.append([score.video_id, str(score.object_id), score.tokens, *shown])
        parts.append(_details("Every object", header, rows, 3))
    return section(f"scores-{number}", "Scores: ", said, *parts, name=run.name, failures=failed)


def _main_table(run: ScoreRun) -> Element:
    totals = mean_scores(run.scores)
    name = totals[0].main_name
    against = RAW in run.tokens and len(run.tokens) > 1
    said = "; ▲ and ▼ are points against raw." if against else "."

    def row(title: str, means: Sequence[Mean]) -> Element:
        figures, cells = _figures(means), []
        for kind in run.tokens:
            cells.append(_figure_cell(kind, figures))
            difference = _against_raw(kind, figures)
            if difference is not None:
                cells[-1].append(_signed(100 * difference, 1))
        return _row(title, cells)

    return _table(
        ["sequence", *run.tokens],
        [row(video_id, means) for video_id, means in sequence_means(run.scores)],
        1,
        f"{name} by sequence",
        caption=f"{name}, percent; ★ is the best of a row" + said,
        foot=row(totals[0].label, totals),
    )


def overview_section(runs: Sequence[ScoreRun]) -> Element:
    """Return one line per run and kind of tokens, each against the raw tokens of its own run."""
    rows = []
    for run in runs:
        means, first = mean_scores(run.scores), run.scores[0]
        figures = _figures(means)
        for mean in means:
            texts = (first.task, first.provenance.backbone, mean.tokens, mean.main_name)
            share = _against_raw(mean.tokens, figures)
            cells = [*map(_text_cell, texts), _figure_cell(mean.tokens, figures)]
            cells.append(_text_cell("") if share is None else _number_cell(share, _signed(100 * share, 1)))
            rows.append(_row(run.name, cells))
    names = ["run", "task", "encoder", "tokens", "main figure", "percent", "against raw"]
    said = "Each kind of tokens against the raw tokens of its own run."
    return section("overview", "All runs", said, _table(names, rows, 5, "All runs"))


def _figures(means: Sequence[Mean]) -> dict[str, float]:
    """Return the main figure by kind of tokens, of those that have one."""
    return {mean.tokens: mean.main for mean in means if mean.main is not None}


def _figure_cell(kind: str, figures: Mapping[str, float]) -> Element:
    """Return the cell of a figure in percent; a star marks the best, as far as people see."""
    if kind not in figures:
        return _text_cell("–")
    shown = f"{100 * figures[kind]:.1f}"
    cell = _number_cell(figures[kind], shown)
    if len(figures) > 1 and shown == f"{100 * max(figures.values()):.1f}":
        cell.append(element("span", "★", class_="best", role="img", aria_label="best of the row"))
    return cell


def _against_raw(kind: str, figures: Mapping[str, float]) -> float | None:
    return figures[kind] - figures[RAW] if kind != RAW and {kind, RAW} <= figures.keys() else None


def plane_section(runs: Sequence[AnalysisRun]) -> Element | None:
    """Return the planes of all rows, one per definition, and their figures; None for none."""
    rows = [row for run in runs for row in run.rows]
    if not rows:
        return None
    said = (
        "Right is less steady within a clip, up is clips further apart; an arrow leads from the raw tokens "
        "of an encoder to each of its projections. Distances are in diameters that cover all tokens."
    )

    def draw(path: Path) -> None:
        several, points = len({row["dataset"] for row in rows}) > 1, []
        for row in rows:
            plane, encoder = f"definition {row['definition']}", row["backbone"]
            encoder += f" {row['dataset']}" if several else ""
            distances = (row["d_intra_100"], row["d_inter_100"])
            points.append(PlanePoint(plane, row["gamma"], encoder, row["tokens"], *distances))
        save_chart(plane_chart(points), path)

    # What a run drew shows that run alone.
    drawn = runs[0].folder / PLANE_SVG if len(runs) == 1 else Path()
    picture = chart(drawn, draw, "planes", "Trade-off; the table has its figures")
    names = ["encoder", "data", "clips", "tokens", "definition"]
    names += ["D inter", "D intra", "margin D", "cycle accuracy", "effective rank"]
    raw = {_compared(row): row for row in rows if row["tokens"] == RAW}
    body = [_trade_off_row(row, raw.get(_compared(row))) for row in rows]
    caption = "Margin D with its difference to the raw tokens."
    table = _table(names, body, 5, "Trade-off", caption=caption)
    return section("trade-off", "Trade-off", said, picture, table)


def _compared(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a row shares with the one of raw tokens that it is compared with."""
    return row["definition"], row["backbone"], row["dataset"]


def _trade_off_row(row: Mapping[str, Any], raw: Mapping[str, Any] | None) -> Element:
    texts = [row["dataset"], str(row["n_videos"]), row["tokens"], row["definition"]]
    cells = [_number_cell(row[name], f"{row[name]:.4f}") for name in TRADE_OFF_FIGURES]
    if raw is not None and raw is not row:
        cells[2].append(_signed(row["margin_100"] - raw["margin_100"], 4))
    return _row(row["backbone"], [*map(_text_cell, texts), *cells])


def curves_section(run: TrainRun, number: int) -> Element:
    """Return the curves of one run, all its projections in each panel."""
    identifier = f"curves-{number}"
    n_steps = max(run.n_steps.values())
    if not n_steps:
        none = element("p", "No step has been taken yet.")
        return section(identifier, "Training: ", None, none, name=run.name)
    epochs = run.report.get("epochs")
    said = f"{n_steps} steps" + (f" in {epochs} epochs." if epochs else ".")

    def draw(path: Path) -> None:
        steps = {name: figures for name, figures in run.steps.items() if figures}
        save_chart(curves_chart(steps, run.epochs), path)

    picture = chart(RunFiles(run.folder).curves_svg, draw, identifier, "Figures of training over the steps")
    return section(identifier, "Training: ", said, picture, name=run.name)


def provenance_section(runs: Runs, explored: Mapping[str, Any]) -> Element:
    """Return everything that decided the figures; `explored` is of the store in the affinity explorer."""
    documents = [(f"Scores {run.name}", _score_origin(run)) for run in runs.scored]
    documents += [
        (f"Training {run.name}, {name}", found) for run in runs.trained for name, found in _trained(run)
    ]
    for run in runs.analyzed:
        rows = [{key: _parsed(row[key]) for key in TRADE_OFF_ORIGIN} for row in run.rows]
        documents.append((f"Trade-off {run.name}", {"folder": str(run.folder), "rows": rows}))
    documents += [("Affinity explorer", dict(explored))] if explored else []
    blocks = []
    for title, found in documents:
        text = json.dumps(found, indent=2, ensure_ascii=False, default=str)
        blocks.append(element("details", element("summary", title), element("pre", text, tabindex="0")))
    return section("provenance", "Provenance", None, *blocks)


def _score_origin(run: ScoreRun) -> dict[str, Any]:
    """Return what the rows of a run say of themselves, each value once."""
    found: dict[str, Any] = {"folder": str(run.folder), "complete": run.complete}
    for name, values in row_origins(run.scores).items():
        parsed = [_parsed(value) if name.endswith("_json") else value for value in values]
        found["versions" if name == "versions_json" else name] = parsed[0] if len(parsed) == 1 else parsed
    found["projection_sha256"] = {score.tokens: score.provenance.projection_sha256 for score in run.scores}
    found["scored_size"] = {score.video_id: score.scored_size for score in run.scores}
    found["boundary_tolerance_px"] = {score.video_id: score.boundary_tolerance_px for score in run.scores}
    return found


def _trained(run: TrainRun) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield what every finished projection of a run says of itself."""
    files = RunFiles(run.folder)
    for name in run.steps:
        paths = (files.member(name).projection, files.projection)
        for path in [path for path in paths if path.is_file()][:1]:
            try:
                found = {key: _parsed(value) for key, value in read_provenance(path).items()}
            except CosettleError as error:
                found = {"unreadable": error.summary}
            yield name, {"file": str(path), **found}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


def _table(
    names: Sequence[str],
    body: Sequence[Element],
    n_texts: int,
    label: str,
    *,
    caption: str | None = None,
    foot: Element | None = None,
) -> Element:
    """Return a table whose heads sort by their column; columns after the first `n_texts` are of numbers."""
    heads = []
    for index, name in enumerate(names):
        button = element("button", element("span", name), type="button")
        look = "number" if index >= n_texts else None
        heads.append(element("th", button, scope="col", class_=look))
    table = element(
        "table",
        *([] if caption is None else [element("caption", caption)]),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        *([] if foot is None else [element("tfoot", foot)]),
        class_="sortable",
    )
    return scroll_box(table, label)


def _details(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], n_texts: int) -> Element:
    """Return a folded table of texts; columns after the first `n_texts` are numbers where they can be."""
    body = []
    for row in rows:
        cells = [_text_cell(text) for text in row[:n_texts]]
        for text in row[n_texts:]:
            try:
                cells.append(_number_cell(float(text), text))
            except ValueError:
                cells.append(element("td", text, class_="number"))
        body.append(element("tr", *cells))
    return element("details", element("summary", title), _table(names, body, n_texts, title))


def _row(title: str, cells: Sequence[Element]) -> Element:
    return element("tr", element("th", title, scope="row", class_="name"), *cells)


def _text_cell(text: str) -> Element:
    return element("td", text, class_="name")


def _number_cell(value: float, shown: Element | str) -> Element:
    """Return a right-aligned cell that sorts by `value`."""
    return element("td", shown, class_="number", data_value=f"{value:.9g}")


def _signed(difference: float, digits: int) -> Element:
    """Return a difference with its sign, and an arrow that says the same."""
    shown = f"{difference:+.{digits}f}"
    if float(shown) == 0:
        return element("span", f"± {0:.{digits}f}", class_="difference")
    arrow, word = ("▲", "up") if difference > 0 else ("▼", "down")
    return element("span", f"{arrow} {shown.replace('-', '−')}", class_=f"difference {word}")
