"""The propagation room on a tiny DAVIS folder: files, scores, overlays, failures, and what does not fit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from threading import Event

import av
import numpy as np
import pytest
import torch
from PIL import Image
from propagation_cases import make_squares, propagate_store, single_thread, square_mask
from store_cases import PATCH, folder_bytes, frames_case, pairs_case

from cosettle_cache.core.errors import FingerprintError, InputError, OutputError, UsageError
from cosettle_cache.core.files import own_folder
from cosettle_cache.heads.projection import Projection, projection_sha256
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store import open_store
from cosettle_cache.videos.masks import PALETTE, read_mask

PROTOCOL = make_protocol(size="native", top_k=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture
def squares(tmp_path):
    case = make_squares(tmp_path / "data")
    return open_store(case.write(tmp_path / "squares.zarr"))


@pytest.fixture
def run(squares, tmp_path):
    def propagate(**options):
        arguments = {"protocol": PROTOCOL, "overlays": "none", **options}
        return propagate_store(squares, tmp_path / "data", out=tmp_path / "out", **arguments)

    return propagate


def test_objects_are_followed_and_scored(run, squares, tmp_path):
    report = run()
    assert report.failures == {} and not report.interrupted
    assert report.n_frames == 10
    assert [(score.video_id, score.object_id) for score in report.scores] == [
        ("left", 1),
        ("left", 2),
        ("right", 1),
        ("right", 2),
    ]
    assert all(score.figures["j_mean"] > 0.7 for score in report.scores)
    mask = square_mask(4, 6, 3).repeat(PATCH, 0).repeat(PATCH, 1)
    found = read_mask(tmp_path / "out/raw/left/00003.png")
    assert np.array_equal(found[8::16, 8::16], mask[8::16, 8::16])
    assert report.seconds > 0
    assert report.peak_memory_bytes > 50e6


@pytest.mark.parametrize(
    "rules",
    [{"label_encoding": "nearest"}, {"norm_mask": True}, {"decode_size": "annotation"}, {"keep_ties": True}],
    ids=lambda rules: next(iter(rules)),
)
def test_the_protocol_decides_how_labels_are_made_and_read(squares, tmp_path, rules):
    protocol = make_protocol(size="native", top_k=1, **rules)
    arguments = {"out": tmp_path / "out", "overlays": "none"}
    report = propagate_store(squares, tmp_path / "data", protocol, **arguments)
    assert next(iter(rules)) in report.scores[0].protocol
    assert all(score.figures["j_mean"] > 0.6 for score in report.scores)


def test_images_normalised_otherwise_are_refused(tmp_path):
    case = make_squares(tmp_path / "data")
    path = replace(case, encoder={"std": [0.229, 0.224, 0.225]}).write(tmp_path / "squares.zarr")
    dino = make_protocol("dino", size="native", top_k=1)
    with pytest.raises(FingerprintError, match="normalised") as caught:
        propagate_store(open_store(path), tmp_path / "data", dino, tmp_path / "out")
    assert "red_std=0.229" in str(caught.value.hint)


def test_a_score_row_says_where_it_comes_from(run, squares):
    projection = Projection(3, seed=1)
    rows = {score.tokens: score for score in run(projections=[("mine", projection)]).scores}
    assert list(rows) == ["raw", "mine"]
    row = rows["mine"]
    assert row.provenance.projection_sha256 == projection_sha256(projection)
    assert rows["raw"].provenance.projection_sha256 == ""
    assert json.loads(row.protocol_json) == PROTOCOL.to_json()
    assert json.loads(row.protocol_json)["later_objects"] == "fail"
    assert row.provenance.manifest_digest == squares.fingerprint.manifest_digest
    assert (row.scored_size, row.boundary_tolerance_px, row.n_frames) == ("64x96", 1, 5)
    assert json.loads(row.provenance.versions_json).keys() == {"extract", "propagate"}


def test_files_are_what_the_benchmark_reads(run, tmp_path):
    run(projections=[("mine", Projection(3, seed=1))])
    for kind in ("raw", "mine"):
        files = sorted(path.name for path in (tmp_path / "out" / kind / "left").iterdir())
        assert files == [f"{index:05d}.png" for index in range(5)]
    with Image.open(tmp_path / "out/mine/right/00004.png") as image:
        assert (image.mode, image.size) == ("P", (96, 64))
        assert np.array_equal(np.reshape(image.getpalette(), (-1, 3))[:3], PALETTE[:3])


def test_projected_beside_raw_equals_alone(run, squares, tmp_path):
    projection = Projection(3, seed=1)
    together = run(projections=[("a", projection), ("b", projection)])
    by_kind = {}
    for score in together.scores:
        by_kind.setdefault(score.tokens, []).append((score.figures["j_mean"], score.figures["f_mean"]))
    alone = run(restart=True)
    assert by_kind["a"] == by_kind["b"]
    assert by_kind["raw"] == [(score.figures["j_mean"], score.figures["f_mean"]) for score in alone.scores]


@pytest.mark.parametrize(
    ("overlays", "drawn"), [("none", []), ("first", ["left"]), ("all", ["left", "right"])]
)
def test_overlays(run, tmp_path, overlays, drawn):
    assert run(overlays=overlays).failures == {}
    folder = tmp_path / "out/overlays"
    assert sorted(path.name for path in folder.glob("*")) == drawn
    for name in drawn:
        stills = sorted(path.name for path in (folder / name).glob("*.png"))
        kinds = ("raw", "side_by_side")
        assert stills == [f"{kind}_{index:05d}.png" for kind in kinds for index in (0, 1, 3, 4)]
        with av.open(str(folder / name / "raw.mp4")) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert video.streams.video[0].average_rate == 12
        # Enlarged eight times; beside the truth, both fitted to panels.
        assert len(frames) == 5 and frames[0].shape == (512, 768, 3)
        assert Image.open(folder / name / "side_by_side_00003.png").size == (2 * 640 + 4, 427 + 34)


def test_a_video_that_fails_is_named_and_the_rest_goes_on(run, tmp_path):
    (tmp_path / "data/DAVIS/Annotations/480p/left/00002.png").unlink()
    report = run(overlays="first")
    assert list(report.failures) == ["left"] and not report.complete
    assert json.loads((tmp_path / "out/summary.json").read_text())["complete"] is False
    assert "00002.png" in report.failures["left"]
    assert {score.video_id for score in report.scores} == {"right"}
    assert [path.name for path in (tmp_path / "out/overlays").iterdir()] == ["right"]


def test_a_damaged_video_is_named_and_the_rest_goes_on(tmp_path):
    case = make_squares(tmp_path / "data")
    path = case.write(tmp_path / "squares.zarr")
    shard = path / "tokens/4x6/c.0.0.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.write_bytes(damaged)
    report = propagate_store(open_store(path), tmp_path / "data", PROTOCOL, tmp_path / "out", overlays="none")
    assert list(report.failures) == ["left"]
    assert {score.video_id for score in report.scores} == {"right"}


def test_frames_that_cannot_be_drawn_do_not_lose_the_scores(run, tmp_path):
    (tmp_path / "data/DAVIS/JPEGImages/480p/left/00002.jpg").write_bytes(b"not a picture")
    report = run(overlays="all")
    assert "overlays" in report.failures["left"]
    assert len(report.scores) == 4


def test_first_mask_alone_gives_masks_and_no_scores(run, tmp_path):
    for index in range(1, 5):
        (tmp_path / f"data/DAVIS/Annotations/480p/left/{index:05d}.png").unlink()
    report = run()
    assert report.failures == {}
    assert {score.video_id for score in report.scores} == {"right"}
    assert len(list((tmp_path / "out/raw/left").iterdir())) == 5


def test_tokens_that_are_not_there_are_a_failure(tmp_path):
    case = make_squares(tmp_path / "data", names=("left", "right", "middle"))
    store = open_store(case.write(tmp_path / "squares.zarr", slots=[]))
    report = propagate_store(store, tmp_path / "data", PROTOCOL, tmp_path / "out", overlays="none")
    assert len(report.failures) == 3 and report.scores == ()


def test_stop_ends_after_the_video_in_hand(run):
    class StopAtOnce:
        def start(self, total, unit):
            assert (total, unit) == (10, "frames")

        def advance(self, n=1, **figures):
            stop.set()

        def finish(self):
            pass

    stop = Event()
    report = run(stop=stop, progress=StopAtOnce())
    assert report.interrupted
    assert {score.video_id for score in report.scores} == {"left"}


def test_a_store_of_another_plan_or_size_is_refused(tmp_path, run):
    pairs = open_store(pairs_case().write(tmp_path / "pairs.zarr"))
    sparse = open_store(frames_case(every=2).write(tmp_path / "sparse.zarr"))
    for store, message in ((pairs, "pairs plan"), (sparse, "one frame in 2")):
        with pytest.raises(FingerprintError) as caught:
            propagate_store(store, tmp_path, PROTOCOL, tmp_path / "out")
        assert message in caught.value.found
    with pytest.raises(FingerprintError) as caught:
        run(protocol=make_protocol())
    assert "480x880" in caught.value.wanted


@pytest.mark.parametrize(
    "options",
    [
        {"overlays": "some"},
        {"search": "annoy"},
        {"projections": [("raw", Projection(3))]},
        {"projections": [("overlays", Projection(3))]},
        {"projections": [("a", Projection(3)), ("a", Projection(3))]},
        {"projections": [("a", Projection(4))]},
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path, options):
    with pytest.raises(UsageError):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_ends_the_run(run, tmp_path):
    (tmp_path / "out").write_text("a file in the way")
    report = run()
    assert isinstance(report.error, OutputError)
    assert (report.scores, report.interrupted) == ((), False)


def test_what_was_scored_before_the_disk_was_full_is_kept(run, tmp_path):
    videos = [video.video_id for video in run().scores]
    last = tmp_path / "out" / "raw" / videos[-1]
    shutil.rmtree(last)
    last.write_text("a file in the way of the last video")
    report = run()
    assert isinstance(report.error, OutputError)
    assert {score.video_id for score in report.scores} == set(videos) - {videos[-1]}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("settings", [None, "{", '{"origin": {}, "kinds": ["../kept"]}'])
def test_a_folder_of_another_origin_is_left_as_it_is(run, tmp_path, restart, settings):
    (tmp_path / "out/raw").mkdir(parents=True)
    shutil.copytree(tmp_path / "data/DAVIS/Annotations/480p/left", tmp_path / "out/raw/left")
    (tmp_path / "kept").mkdir()
    if settings is not None:
        (tmp_path / "out/progress").mkdir()
        (tmp_path / "out/progress/run.json").write_text(settings)
    before = folder_bytes(tmp_path)
    if settings is None:
        with pytest.raises(UsageError, match="holds something else"):
            run(restart=restart)
    else:
        assert isinstance(run(restart=restart).error, InputError)
    assert folder_bytes(tmp_path) == before and (tmp_path / "kept").is_dir()


@pytest.mark.parametrize("settings", ["[]", "{", '{"origin": {}}', "ABSOLUTE", '["../kept"]', "[1]", '"raw"'])
def test_settings_that_were_tampered_with_remove_nothing(run, tmp_path, settings):
    run()
    path, kept = tmp_path / "out/progress/run.json", tmp_path / "kept"
    kept.mkdir()
    document = json.loads(path.read_text())
    if settings in ('["../kept"]', "[1]", '"raw"'):
        settings = json.dumps({**document, "kinds": json.loads(settings)})
    elif settings == "ABSOLUTE":
        settings = json.dumps({**document, "kinds": [str(kept)]})
    path.write_text(settings)
    before = folder_bytes(tmp_path / "out")
    assert isinstance(run(restart=True).error, InputError)
    assert folder_bytes(tmp_path / "out") == before and kept.is_dir()


def test_a_folder_has_one_run_at_a_time(run, tmp_path):
    with (
        own_folder(tmp_path / "out", "propagate"),
        pytest.raises(UsageError, match="another run writes") as caught,
    ):
        run()
    assert f"process {os.getpid()} on" in caught.value.found
    assert run().error is None


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a/", "../a", "/a", "a\nb", "a\0"])
def test_names_that_leave_their_folder_or_share_one_are_refused(run, tmp_path, name):
    with pytest.raises((UsageError, InputError)):
        run(projections=[(name, Projection(3))])
    assert not (tmp_path / "out").exists()


def test_propagating_leaves_the_projection_as_it_was(run):
    projection = Projection(3, seed=1)
    before = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    run(projections=[("mine", projection)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in projection.state_dict().items())
