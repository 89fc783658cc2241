"""The report as a file: what stands in it, that nothing in it is markup by accident, its size, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from propagation_cases import single_thread
from report_cases import EVIL, EVIL_KIND, PLAIN, Made, Page, make_runs, write_analysis_table, write_journal

from cosettle_cache.cli import run_command
from cosettle_cache.metrics.rows import mean_scores, read_scores, write_scores
from cosettle_cache.pictures.charts import smooth
from cosettle_cache.report.page import SCRIPTS, data_element

N_SCRIPTS = len(SCRIPTS)

#: A chart with everything that must not get into the page.
HOSTILE = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
  viewBox="0 0 9 9" onload="evil()" fill="currentColor"><script>evil()</script><style>evil</style>
  <foreignObject><b>evil</b></foreignObject><image xlink:href="http://evil"/><a href="javascript:evil()"/>
  <defs><path id="m1" d="M0 0" style="stroke: #123456; fill: url(http://evil)" onclick="evil()"/></defs>
  <use xlink:href="#m1" x="1" y="2"/><use xlink:href="http://evil#x"/><animate href="#m1" values="evil"/>
  <text style="font-size: 9px; background: url(evil)" transform="rotate(0 1 2)">what the run drew</text>
</svg>"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_runs(tmp_path_factory.mktemp("report"))


def write(out: Path, *arguments: object) -> Page:
    line = ["report", *map(str, arguments), "--out", str(out), "--quiet"]
    assert run_command(line) == 0
    return Page(out.read_text())


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "r.html"
    return write(out, made.scored, made.trained, made.swept)


def test_sections_appear_where_their_data_are(page: Page, made: Made, tmp_path: Path) -> None:
    assert page.headings == ["scores-0", "overlays-0", "curves-0", "curves-1", "provenance"]
    alone = write(tmp_path / "t.html", made.trained)
    assert alone.headings == ["curves-0", "provenance"]
    assert not alone.documents


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert EVIL in page.text
    assert not {"b", "i"} & set(page.tags)
    assert ("aria-label", f"Frame of {EVIL}") in page.attributes


def test_what_scripts_read_cannot_end_their_element(made: Made, tmp_path: Path) -> None:
    swept = tmp_path / "swept"
    write_journal(swept / "a<b", 5)
    shutil.move(swept / "a<b", swept / "<!--<script>")
    write_journal(swept / "other", 5)
    (swept / "sweep.json").write_text("{}")
    scored = tmp_path / "scored"
    rows = [replace(row, tokens=EVIL_KIND) for row in read_scores(made.scored / "scores.parquet")]
    write_scores(scored, rows)
    page = write(tmp_path / "r.html", swept, scored)
    assert "<!--<script>" in page.texts
    assert json.loads(data_element("x", ["</script>"]).text) == ["</script>"]
    assert "<" not in data_element("x", ["</script>"]).text
    assert EVIL_KIND in page.text
    assert page.tags.count("script") == page.source.count("</script>")
    assert "i" not in page.tags


def test_nothing_is_fetched(page: Page) -> None:
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in sources)
    assert "@import" not in page.source and "url(" not in page.source
    policy = next(value for _, value in page.attributes if "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_the_table_says_what_the_rows_say(page: Page, made: Made) -> None:
    for mean in mean_scores(read_scores(made.scored / "scores.parquet")):
        assert f"{100 * mean.main:.1f}" in page.texts
    assert "★" in page.text and ("▲" in page.text or "▼" in page.text or "± 0.0" in page.text)


def test_curves_are_those_of_all_members_and_gaps_are_kept(page: Page, made: Made) -> None:
    assert {"weight=1", "weight=3", "total loss", "cycle loss (nats)", "separability loss"} <= set(page.texts)
    held_out = [f"{name}, held-out clips" for name in ("cycle accuracy", "margin D", "D inter", "D intra")]
    assert [text for text in page.texts if text in held_out] == 2 * held_out
    assert "700 steps." in page.text and "40 steps." in page.text
    assert np.isnan(smooth([1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], 1)[1:4]).all(), "no number across a gap"
    assert smooth([1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], 1)[[0, 4, 5]].tolist() == [1.5, 5.0, 5.5]
    shapes = [value for name, value in page.attributes if name in ("d", "x", "y", "viewBox")]
    assert shapes and not any("nan" in value for value in shapes)


def test_a_chart_is_the_one_that_the_run_left(made: Made, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.trained, tmp_path / "run"))
    (run / "curves.svg").write_text(HOSTILE)
    page = write(tmp_path / "r.html", run)
    assert "what the run drew" in page.texts and "total loss" not in page.texts
    assert not {"image", "foreignobject", "a", "style", "animate"} & set(page.tags[page.tags.index("svg") :])
    assert page.tags.count("script") == page.source.count("</script>") == N_SCRIPTS
    chart = page.source[page.source.index("<svg") : page.source.index("</svg>")]
    assert all(word not in chart for word in ("onload", "evil", "http", "url(", "style="))
    assert 'fill="currentColor"' in chart and 'stroke="#123456"' in chart
    assert 'id="curves-0-m1"' in chart and 'xlink:href="#curves-0-m1"' in chart
    (run / "curves.svg").write_text("<svg")
    assert run_command(["report", str(run), "--out", str(tmp_path / "n.html")]) == 3


def test_the_same_runs_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    analyzed = write_analysis_table(tmp_path / "analyzed")
    for name in ("a.html", "b.html"):
        write(tmp_path / name, made.scored, made.swept, analyzed)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_size_is_bounded_and_said(made: Made, tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", made.scored, "--max-frames", 2)
    assert [len(item) for item in page.documents["data-overlay-0-0"]["pictures"]] == [2, 2]
    assert page.documents["data-overlay-0-0"]["names"] == ["frame 0", "frame 5"]
    assert "img" not in write(tmp_path / "n.html", made.scored, "--videos", 0).tags
    said = re.search(r"This file: ([\d.]+) kB", page.text)
    assert said and float(said[1]) == pytest.approx((tmp_path / "r.html").stat().st_size / 1000, abs=0.2)


def test_masks_are_drawn_where_no_overlay_was(made: Made, tmp_path: Path) -> None:
    assert page_videos(write(tmp_path / "a.html", made.scored)) == 1
    drawn = ["--features", made.store, "--data-root", made.data_root]
    both = write(tmp_path / "b.html", made.scored, *drawn)
    assert page_videos(both) == 2
    assert PLAIN in both.text


def page_videos(page: Page) -> int:
    return sum(name.startswith("data-overlay") for name in page.documents)


def test_several_runs_are_put_side_by_side(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other"
    rows = read_scores(made.scored / "scores.parquet")
    larger = [replace(row, provenance=replace(row.provenance, backbone="large")) for row in rows]
    write_scores(other, larger, complete=False)
    page = write(tmp_path / "r.html", made.scored, other, made.scored)
    assert page.headings[0] == "overview"
    assert page.text.count("Not complete.") == 1
    assert sum(heading.startswith("scores-") for heading in page.headings) == 2


def test_the_plane_has_a_point_per_encoder_and_kind_of_tokens(tmp_path: Path) -> None:
    one, two = write_analysis_table(tmp_path / "one"), write_analysis_table(tmp_path / "two", "large <ViT>")
    page = write(tmp_path / "r.html", one, two)
    assert page.headings == ["trade-off", "provenance"]
    assert page.texts.count("large <ViT>") == 2 + 6 and page.texts.count("mine") == 4 + 4
    assert page.texts.count("0.5250") == 8, "two projections of two encoders under two definitions"
    assert page.text.count("▲ +0.0850") == 8, "two projections of two encoders under two definitions"
    assert page.texts.count(EVIL_KIND) == 4 + 4 and "i" not in page.tags
    assert {"definition released", "definition paper"} <= set(page.texts)


def test_a_table_of_something_else_is_no_analysis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"tokens": ["raw"]}), tmp_path / "a/analysis.parquet")
    assert run_command(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html")]) == 3
    assert "is not a table of analyze" in capsys.readouterr().err


def test_json_and_dry_run(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["report", str(made.scored), str(made.trained), "--out", str(tmp_path / "r.html")]
    assert run_command([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["runs"]["propagated"]["scores"] == {"videos": 2, "tokens": ["raw", "mine"]}
    assert not (tmp_path / "r.html").exists()
    assert run_command([*line, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == (tmp_path / "r.html").stat().st_size


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "is not a folder"),
        ("empty", "an empty folder"),
        ("projections", "--projection"),
        ("parent", "report {root}/parent/trained"),
        ("broken", "is not a journal of training"),
        ("torn", "is not a readable table"),
    ],
)
def test_a_folder_without_a_run_is_one_clear_error(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    for folder in ("empty", "projections", "parent", "broken", "torn"):
        (tmp_path / folder).mkdir()
    shutil.copy(made.projection, tmp_path / "projections/projection.safetensors")
    shutil.copytree(made.trained, tmp_path / "parent/trained")
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 1')
    (tmp_path / "torn/scores.parquet").write_bytes(b"PAR1")
    assert run_command(["report", str(tmp_path / name), "--out", str(tmp_path / "r.html")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said.format(root=tmp_path) in error
    assert not (tmp_path / "r.html").exists()


#: Files of runs as nobody wrote them: name, content, and what the error says of it.
DEEP = "[" * 100_000
MALFORMED = [
    ("metrics.jsonl", '{"step": "many"}', "is not a journal of training"),
    ("metrics.jsonl", "STEP", "is not a journal of training"),
    ("metrics.jsonl", DEEP, "is not a journal of training"),
    ("metrics.jsonl", "9" * 5000, "is not a journal of training"),
    ("metrics.jsonl", "\udcff", "is not a journal of training"),
    ("validation.jsonl", "[1]", "is not a journal of training"),
    ("train.json", "[]", "train.json holds no fields"),
    ("train.json", DEEP, "train.json is not JSON"),
    ("summary.json", '"complete"', "summary.json holds no fields"),
    ("summary.json", "\udcff", "summary.json is not JSON"),
    (
        "curves.svg",
        "<svg xmlns='http://www.w3.org/2000/svg'>" + "<g>" * 999 + "</g>" * 999 + "</svg>",
        "too deeply",
    ),
    ("curves.svg", "<?xml version='1.0' encoding='elvish'?><svg/>", "is not a readable SVG"),
]


@pytest.mark.parametrize(("name", "text", "said"), MALFORMED)
def test_malformed_files_of_a_run_are_one_clear_error(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    run = shutil.copytree(made.trained, tmp_path / "run")
    shutil.copy(made.scored / "scores.parquet", run)
    # A figure that is no number in a line that is whole otherwise.
    line = (run / "metrics.jsonl").read_text().splitlines()[0].replace("0.001", '"little"')
    (run / name).write_bytes(text.replace("STEP", line).encode(errors="surrogateescape"))
    assert run_command(["report", str(run), "--out", str(tmp_path / "r.html")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    "change",
    [
        {"video_id": pa.array([["list"]])},
        {"counts_json": pa.array([b"\xff"])},
        {"value": pa.array(["high"])},
        {"value": pa.array([None], pa.float64())},
        {"name": pa.array(["fame"])},
        {"name": pa.array(["miou"]), "counts_json": pa.array([DEEP])},
        {"name": pa.array(["visible_share"]), "counts_json": pa.array(['{"inherited": [], "strict": 1}'])},
    ],
)
def test_a_table_of_another_shape_is_no_table_of_scores(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, pa.Array]
) -> None:
    table = pq.read_table(made.scored / "scores.parquet").slice(0, 1)
    for name, column in change.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, tmp_path / "scores.parquet")
    assert run_command(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'scores.parquet'} is not a") and "Traceback" not in error


def test_pipes_and_loops_are_no_files_of_a_run(made: Made, tmp_path: Path) -> None:
    run = shutil.copytree(made.scored, tmp_path / "run")
    for name in ("summary.json", "scores.svg", "train.json", "overlays/one.mp4", f"raw/{PLAIN}/pipe.png"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    (run / "overlays/loop").symlink_to(run / "overlays")
    (run / "validation.jsonl").symlink_to(run / "validation.jsonl")
    page = write(tmp_path / "r.html", run)
    assert page.headings == ["scores-0", "overlays-0", "provenance"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run_command(["report", str(tmp_path / "loop"), "--out", str(tmp_path / "r.html")]) == 3
    assert run_command(["report", str(tmp_path / ("x" * 5000)), "--out", str(tmp_path / "r.html")]) == 2


def test_videos_that_failed_are_named(made: Made, tmp_path: Path) -> None:
    run = shutil.copytree(made.scored, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"failures": {"bear": "no <frames>"}}))
    assert "bear failed: no <frames>" in write(tmp_path / "r.html", run).texts


def test_only_pages_of_ours_are_overwritten(
    made: Made, page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    out.write_text(page.source)
    assert write(out, made.scored).headings == ["scores-0", "overlays-0", "provenance"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine.html").write_text("<!doctype html><p>mine")
    (tmp_path / "link").symlink_to("absent")
    for name in ("mine.html", "pipe", "link", "", "x" * 5000, "s3://bucket/r.html"):
        path = name if name.startswith("s3") else str(tmp_path / name)
        assert run_command(["report", str(made.trained), "--out", path]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error
    assert (tmp_path / "mine.html").read_text() == "<!doctype html><p>mine"
    assert not Path("s3:").exists()


def test_names_of_a_foreign_run_do_not_lead_out_of_its_folder(made: Made, tmp_path: Path) -> None:
    outside = shutil.copytree(made.scored / "overlays" / EVIL, tmp_path / "outside")
    rows = [
        replace(row, video_id=name)
        for row in read_scores(made.scored / "scores.parquet")[:1]
        for name in (str(outside), "../../outside", "nul\0")
    ]
    write_scores(tmp_path / "run", rows)
    (tmp_path / "run/overlays").mkdir()
    assert write(tmp_path / "r.html", tmp_path / "run").headings == ["scores-0", "provenance"]
