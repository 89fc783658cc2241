"""Run folders of version 0.1 are gone on with: written once by that version, never made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from propagation_cases import make_squares, propagate_store, single_thread
from safetensors.numpy import load_file
from store_cases import folder_bytes

from cosettle_cache.core.settings import TrainSettings, package_versions
from cosettle_cache.metrics.rows import read_scores
from cosettle_cache.propagation.folder import labels_stamp
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import open_store, verify_store
from cosettle_cache.training.run import train

OLD = Path(__file__).parents[1] / "runs" / "v0_1"
SETTINGS = TrainSettings(separability_weight=0.02, epochs=3, batch_size=3, base_lr=0.3, checkpoint_every=2)


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


def test_a_training_goes_on_to_the_same_projection(tmp_path: Path) -> None:
    """Stopped after 4 of 9 steps by version 0.1, which also trained the one to compare with, in one go."""
    shutil.copytree(OLD / "train", tmp_path / "train")
    assert verify_store(OLD / "pairs").damages == ()
    report = train(open_store(OLD / "pairs"), SETTINGS, tmp_path / "train")
    assert (report.steps_before, report.steps, report.interrupted) == (4, 5, False)
    lines = (tmp_path / "train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(9))
    assert lines[:4] == (OLD / "train/metrics.jsonl").read_text().splitlines()
    found, wanted = (
        load_file(path) for path in (report.folder / "projection.safetensors", OLD / "finished.safetensors")
    )
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(
            torch.from_numpy(found[name]), torch.from_numpy(values), rtol=1e-5, atol=1e-6
        )


def test_a_propagation_goes_on_with_the_video_that_is_left(tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(OLD / "propagate", out)
    make_squares(data)
    store = open_store(OLD / "squares")
    # What rightly starts a video anew elsewhere: other versions of packages, annotations with other dates.
    document = json.loads((out / "progress/run.json").read_text())
    document["origin"] |= {f"versions.{name}": version for name, version in package_versions().items()}
    (out / "progress/run.json").write_text(json.dumps(document))
    mark = json.loads((out / "progress/videos/left.json").read_text())
    mark["labels"] = labels_stamp(store.manifest.videos[0], data)
    (out / "progress/videos/left.json").write_text(json.dumps(mark))
    before = folder_bytes(out / "raw")
    protocol = make_protocol(size="native", top_k=1)
    report = propagate_store(store, data, protocol, out, overlays="none")
    assert (report.n_videos_before, report.n_frames, report.failures) == (1, 5, {})
    assert before.items() <= folder_bytes(out / "raw").items()
    assert [row.video_id for row in report.scores] == ["left", "left", "right", "right"]
    fresh = propagate_store(store, data, protocol, tmp_path / "fresh", overlays="none")
    for row, again in zip(report.scores, fresh.scores, strict=True):
        # NumPy's sums differ in the last bit from version to version.
        assert row.figures == pytest.approx(again.figures, rel=1e-12)
        # Rows that were kept say with which versions they were made.
        made = replace(row.provenance, versions_json=again.provenance.versions_json)
        assert replace(row, figures={}, provenance=made) == replace(again, figures={})
    assert folder_bytes(out / "raw") == folder_bytes(tmp_path / "fresh/raw")


def test_a_table_of_scores_is_read() -> None:
    rows = read_scores(OLD / "propagate/scores.parquet")
    summary = json.loads((OLD / "propagate/summary.json").read_text())
    assert [(row.video_id, row.object_id, row.tokens) for row in rows] == [
        ("left", 1, "raw"),
        ("left", 2, "raw"),
    ]
    assert sum(row.figures["jf_mean"] for row in rows) / 2 == pytest.approx(
        summary["means"]["raw"]["jf_mean"]
    )
