"""Recipes become exact command lines; score rows survive the disk and average as the benchmark does."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_cases import SCORE

from cosettle_cache.cli import run_command
from cosettle_cache.cli.recipes import check_expectations, read_recipe
from cosettle_cache.core.errors import InputError, OutputError
from cosettle_cache.core.files import write_durably
from cosettle_cache.core.types import Provenance, Score
from cosettle_cache.metrics.rows import (
    best_gain,
    mean_scores,
    read_scores,
    remove_scores,
    score_table,
    sequence_means,
    write_scores,
)

RECIPE = """
title = "T"
about = "A"
[[step]]
command = "manifest build"
arguments = ["folder", "clips"]
out = "c.parquet"
[[step]]
command = "train"
features = "s.zarr"
base_lr = 1e-3
quiet = true
[[step]]
command = "propagate"
projection = ["a b.st", "c.st"]
[expect]
summary = "SUMMARY"
hardware = "two cores"
[expect.raw]
jf_mean = { value = 0.5, tolerance = 0.01 }
"""

RECALL_AND_DECAY = {"j_recall": 0.6, "j_decay": 0.1, "f_mean": 0.7, "f_recall": 0.8, "f_decay": 0.2}


def scored(j_mean: float, **more: Any) -> Score:
    figures = {"jf_mean": (j_mean + 0.7) / 2, "j_mean": j_mean, **RECALL_AND_DECAY}
    return replace(SCORE, figures=figures, **more)


SCORES = [
    scored(0.5),
    scored(0.1, video_id="bmx"),
    scored(0.3, video_id="bmx", object_id=2),
    scored(0.9, tokens="mine", provenance=Provenance("davis", "m", "mae_b", "w", "p", "{}")),
]


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text.replace("SUMMARY", str(folder / "summary.json")))
    return path


def test_steps_are_the_lines_one_would_type(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, RECIPE), Path("/data"))
    assert [step.line for step in recipe.steps] == [
        "cosettle-cache manifest build folder clips --out c.parquet --data-root /data",
        "cosettle-cache train --features s.zarr --base-lr 0.001 --quiet",
        "cosettle-cache propagate --projection 'a b.st' --projection c.st --data-root /data",
    ]
    assert recipe.option("features") == "s.zarr"
    assert "--features" not in recipe.with_option("features", False).steps[1].arguments
    other = recipe.with_option("features", "t.zarr")
    assert other.option("features") == "t.zarr" and not other.expectations
    assert [len(step.options) for step in other.steps] == [len(step.options) for step in recipe.steps]


@pytest.mark.parametrize(("measured", "met"), [(0.505, True), (0.495, True), (0.52, False)])
def test_expectations_are_compared_with_the_summary(tmp_path: Path, measured: float, met: bool) -> None:
    recipe = read_recipe(write_recipe(tmp_path, RECIPE))
    (tmp_path / "summary.json").write_text(json.dumps({"means": {"raw": {"jf_mean": measured}}}))
    assert [outcome.met for outcome in check_expectations(recipe)] == [met]


PUBLISHED = """
[[step]]
command = "backbones"
family = "mae"
quiet = false
[[expect]]
summary = "SUMMARY"
[expect.raw]
jf_mean = { value = 0.5, tolerance = 0.01 }
[[expect]]
summary = "SUMMARY"
published = true
source = "a paper, Table 1"
[expect."mine+ours"]
miou = { value = 0.25, tolerance = 0.01 }
"""


def test_published_figures_are_told_from_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, PUBLISHED)
    means = {"raw": {"jf_mean": 0.5}, "mine+ours": {"miou": 0.3}}
    (tmp_path / "summary.json").write_text(json.dumps({"means": means}))
    assert run_command(["run", str(path)]) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert "0.5000 ± 0.0100" in lines[0]
    assert "published" not in lines[0]
    assert "0.2500 ± 0.0100 (published, not measured here: a paper, Table 1)" in lines[1]
    assert run_command(["run", str(path), "--json"]) == 4
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [(item["published"], item["source"], item["met"]) for item in figures] == [
        (False, "", True),
        (True, "a paper, Table 1", False),
    ]


STEP = "[[step]]\ncommand = 'train'\n"
ODD_STEPS = [
    "arguments = 'x'",
    "arguments = 3",
    "arguments = [[1]]",
    "out = {a = 1}",
    "out = []",
    "out = [{}]",
]
ODD_EXPECTATIONS = [
    *(" = 3", " = 0", " = [1]", " = [{}]"),
    ".summary = 's'\nexpect.published = true\nexpect.raw.j = { value = 1, tolerance = 0 }",  # by whom?
    ".summary = 's'\nexpect.published = 1\nexpect.raw.j = { value = 1, tolerance = 0 }",
    ".raw.j = { value = 1, tolerance = 0 }",  # without a summary nothing would be checked
    ".summary = 's.json'",
    ".summary = 3\nexpect.raw.j = { value = 1, tolerance = 0 }",
    *(f".summary = 's'\nexpect.raw.j = {entry}" for entry in ["1", "[]", "{}", "{ value = 1 }"]),
    *(
        f".summary = 's'\nexpect.raw.j = {{ value = {value}, tolerance = {tolerance} }}"
        for value, tolerance in [("nan", 1), ("'1'", 1), ("true", 1), (1, -1), (1, "inf"), ("1" * 400, 1)]
    ),
]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "is not TOML"),
        ("title = 'x'", "is not a recipe"),
        ("[[step]]\nout = 'x'", "has no command"),
        ("[[step]]\ncommand = 3", "has no command"),
        ("[[step]]\ncommand = ' '", "has no command"),
        ("[[step]]\ncommand = 'run r.toml'", "runs a recipe"),
        ("[[step]]\ncommand = 'demo'", "runs a recipe"),
        ("step = 'train'", "is not a recipe"),
        ("step = ['train']", "is not a recipe"),
        ("a = " + "[" * 50_000, "is not TOML"),
        ("a = " + "9" * 5_000, "is not TOML"),
        ("a" + ".a" * 50_000 + " = 1", "is not TOML"),  # minutes and gigabytes
        *((f"{STEP}{text}", "the step train of .* is malformed") for text in ODD_STEPS),
        *((f"expect{text}\n{STEP}", "expect") for text in ODD_EXPECTATIONS),
    ],
)
def test_bad_recipes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_recipe(write_recipe(tmp_path, text))
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("option", "said"),
    [("epoch = 3", "No such option: --epoch"), ("epochs = 0", "Invalid value for '--epochs'")],
)
def test_options_of_all_steps_are_checked_before_the_first_one(
    option: str, said: str, dry_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sprites.parquet"
    text = f"""
    [[step]]
    command = "manifest build"
    arguments = ["sprites"]
    out = "{out}"
    [[step]]
    command = "train"
    features = "later.zarr"
    {option}
    """
    assert run_command(["run", str(write_recipe(tmp_path, text)), *dry_run]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "nothing was done\n  found:  cosettle-cache train --features later.zarr --epoch" in told
    assert not out.exists()


def test_a_folder_or_a_pipe_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert run_command(["run", str(path)]) == 3
        assert capsys.readouterr().err == f"error: {path} is not a file\n"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        *(
            ({"means": means}, "has no jf_mean of raw")
            for means in ({}, {"raw": 3}, {"raw": {"jf_mean": None}})
        ),
        *((document, "is no summary") for document in ([], {}, {"means": []})),
    ],
)
def test_a_summary_without_the_figure_is_named(tmp_path: Path, document: Any, said: str) -> None:
    recipe = read_recipe(write_recipe(tmp_path, RECIPE))
    (tmp_path / "summary.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=said):
        check_expectations(recipe)


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    rows, summary = write_scores(tmp_path, SCORES)
    assert read_scores(rows) == SCORES
    document = json.loads(summary.read_text())
    assert document["means"]["raw"]["jf_mean"] == pytest.approx((0.6 + 0.4 + 0.5) / 3)
    assert document["projections"] == {"raw": "", "mine": "p"}
    assert document["provenance"]["weights_sha256"] == "w"


def test_means_are_over_objects_not_over_videos() -> None:
    raw, mine = mean_scores(SCORES)
    assert (raw.tokens, raw.figures["n_objects"], raw.n_videos) == ("raw", 3, 2)
    assert raw.figures["j_mean"] == pytest.approx(0.3)
    assert mine.figures["jf_mean"] == pytest.approx(0.8)
    assert [video for video, _ in sequence_means(SCORES)] == ["bmx", "dog"]
    header, rows = score_table(SCORES)
    assert len(rows) == 3 + 2
    assert all(len(row) == len(header) for row in rows)


def test_what_was_gained_is_one_sentence() -> None:
    both = [scored(0.5), scored(0.1, video_id="bmx")]
    both += [scored(0.9, tokens="a"), scored(0.06, video_id="bmx", tokens="a")]
    assert best_gain(both, "raw") == (
        "a gains 9.0 points of J&F over raw tokens (50.0 to 59.0); 1 of 2 videos are better."
    )
    worse = [scored(0.5), scored(0.1, tokens="a"), scored(0.3, tokens="b")]
    assert best_gain(worse, "raw") == (
        "b loses 10.0 points of J&F over raw tokens (60.0 to 50.0); 0 of 1 videos are better."
    )
    assert best_gain(SCORES[:2], "raw") is None and best_gain(SCORES[3:], "raw") is None


PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").glob("*.toml"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_committed_recipe_runs_dry_anywhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no data, no weights, no hub
    recipe = read_recipe(path, Path("/data"))
    assert run_command(["run", str(path), "--dry-run", "--data-root", "/data"]) == 0
    assert capsys.readouterr().err.count("$ cosettle-cache ") == len(recipe.steps)
    for step in recipe.steps:
        assert run_command([*step.arguments, "--help"]) == 0, step.line  # every option is one
        # A file of weights is found under the data root by a step that is told of it.
        given = step.options.get("weights", "random")
        assert given.startswith(("random", "hf:")) or "data_root" in step.options, step.line
    assert not list(tmp_path.iterdir())


def test_the_papers_rows_are_the_papers() -> None:
    """PROTOCOLS 5.2 and 5.5: Tables 1 and 14b."""
    found = {
        (path.stem, item.tokens, item.metric): item.value
        for path in PIPELINES
        for item in read_recipe(path).expectations
        if item.published
    }
    rows = {
        "dino": (0.632, 0.391, 0.444, 0.642, 0.398, 0.462),
        "mae": (0.524, 0.293, 0.416, 0.596, 0.338, 0.484),
    }
    for name, values in rows.items():
        recipe = f"paper_{name}_b16"
        keys = [
            (recipe, tokens, metric)
            for tokens in ("raw", f"{name}+ours")
            for metric in ("jf_mean", "miou", "pck_0_1")
        ]
        assert tuple(found[key] for key in keys) == values
    assert found["paper_dinov2_s14", "raw", "jf_mean"] == 0.647
    assert found["paper_dinov2_s14", "ours", "jf_mean"] == 0.651


@pytest.mark.parametrize(
    "path", [path for path in PIPELINES if "paper" in path.stem], ids=lambda path: path.stem
)
def test_the_papers_steps_run_dry_without_data_weights_or_hub(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (step for step in read_recipe(path).steps if step.command == "propagate"):
        for name in (step.options["manifest"], step.options["projection"]):
            if not name.startswith("hf:"):  # an earlier step makes it
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
        assert run_command([*step.arguments, "--dry-run"]) == 0
        told = json.loads(capsys.readouterr().out)
        size = {"davis": "480x880", "vip": "480x880", "jhmdb": "320x320"}[told["task"]]
        assert told["protocol"]["size"] == ("476x882" if "s14" in path.stem else size)
        assert (told["backbone"], told["weights"]) == (step.options["backbone"], step.options.get("weights"))


def test_a_file_in_the_way_of_scores_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        remove_scores(tmp_path / "runs" / "davis")


@pytest.mark.parametrize("path", [".", ".."])
def test_a_folder_is_no_file_to_write(path: str) -> None:
    with pytest.raises(OutputError, match="there is a folder of that name"):
        write_durably(Path(path), [b"x"])
