"""Pictures: what is drawn where, films that play, and charts in which everything fits."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cosettle_cache.core.errors import OutputError
from cosettle_cache.pictures.charts import (
    MAX_NAMED,
    PlanePoint,
    curves_chart,
    plane_chart,
    save_chart,
    score_chart,
)
from cosettle_cache.pictures.drawing import (
    COLOURS,
    PANEL_SIDE,
    canvas_scale,
    draw_joints,
    draw_mask,
    enlarge,
    side_by_side,
)
from cosettle_cache.pictures.film import Film, still_frames

GREY = np.full((480, 640, 3), 100, np.uint8)


def joints():
    x = np.array([320, 320, 320, 280, 360, 290, 350, 240, 400, 280, 360, 200, 440, 270, 370.0])
    y = np.array([150, 300, 80, 150, 150, 300, 300, 200, 200, 370, 370, 250, 250, 440, 440.0])
    return np.stack([x, y])


def test_a_veil_leaves_the_background_alone():
    mask = np.zeros((480, 640), np.uint8)
    mask[200:300, 200:300], mask[200:300, 300:400] = 1, 2
    drawn = draw_mask(GREY, mask)
    far = np.ones(mask.shape, bool)
    far[196:304, 196:404] = False
    assert (drawn[far] == 100).all()
    inner = [drawn[250, 250].astype(int), drawn[250, 350].astype(int)]
    for pixel, colour in zip(inner, COLOURS[[1, 2]].astype(int), strict=True):
        assert (np.abs(pixel - (0.55 * 100 + 0.45 * colour)) <= 1).all()
    assert (drawn[250, 201] != drawn[250, 250]).any()
    assert (GREY == 100).all()


def test_colours_tell_the_twenty_parts_apart():
    distances = np.linalg.norm(COLOURS[1:20, None].astype(int) - COLOURS[None, 1:20].astype(int), axis=2)
    assert distances[~np.eye(19, dtype=bool)].min() > 50


def test_small_frames_are_enlarged_with_their_masks_and_joints():
    assert canvas_scale(240, 320) == 2 and canvas_scale(480, 854) == 1 and canvas_scale(64, 96) == 8
    small = np.full((240, 320, 3), 100, np.uint8)
    mask = np.zeros((240, 320), np.uint8)
    mask[50:150, 50:150] = 3
    assert draw_mask(enlarge(small, 2), mask, 2).shape == (480, 640, 3)
    assert np.array_equal(
        draw_joints(enlarge(small, 2), (joints() - 0.5) / 2, 2), draw_joints(GREY, joints(), 1)
    )


def test_lost_joints_and_their_bones_are_left_out():
    points = joints()
    whole = draw_joints(GREY, points)
    points[:, 11] = -1
    without = draw_joints(GREY, points)
    assert (whole[250, 200] != 100).any() and (whole[225, 220] != 100).any()
    assert (without[250, 200] == 100).all() and (without[225, 220] == 100).all()
    assert (without[:20, :20] == 100).all()
    assert np.array_equal(whole[:, 320:], without[:, 320:])
    assert np.array_equal(draw_joints(GREY, np.full((2, 15), -1.0)), GREY)


def test_joints_outside_the_image_do_not_stop_the_drawing():
    points = joints()
    points[:, 13] = 5000, 9000
    assert (draw_joints(GREY, points) != GREY).any()


@pytest.mark.parametrize(
    ("n_panels", "rows", "cols"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 2, 3)]
)
@pytest.mark.parametrize("size", [(480, 854), (640, 360), (480, 481)])
def test_panels_stand_in_rows(n_panels, rows, cols, size):
    panels = {f"kind {number} " + "x" * 200: np.full((*size, 3), 90, np.uint8) for number in range(n_panels)}
    picture = side_by_side(panels)
    height, width = (round(side * min(1, PANEL_SIDE / max(size))) for side in size)
    assert picture.shape == (rows * (height + 34) + 4 * (rows - 1), cols * width + 4 * (cols - 1), 3)


def test_films_play_and_have_stills(tmp_path):
    with Film(tmp_path, "raw", 9, 12.0) as writer:
        for index in range(9):
            writer.add(np.full((65, 97, 3), 20 * index, np.uint8))
    with av.open(str(tmp_path / "raw.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 12
    assert len(frames) == 9 and frames[0].shape == (64, 96, 3)
    assert abs(int(frames[8].mean()) - 160) < 8
    assert still_frames(9) == [0, 3, 5, 8] and still_frames(1) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "raw.mp4",
        *(f"raw_{index:05d}.png" for index in still_frames(9)),
    ]
    assert Image.open(tmp_path / "raw_00003.png").size == (97, 65)


def test_a_film_that_breaks_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Film(tmp_path, "raw", 9, None) as writer:
        writer.add(np.zeros((64, 96, 3), np.uint8))
        raise ZeroDivisionError
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob(".*"))
    with pytest.raises(OutputError), Film(tmp_path / "absent", "raw", 9, None):
        pass


@pytest.mark.parametrize("n_sequences", [1, 30, MAX_NAMED + 8])
def test_nothing_in_a_chart_is_cut_off(n_sequences, tmp_path):
    whole = {"raw": 50.0, "a projection with a name that is far too long for any legend": 55.5, "x": 1.0}
    sequences = {
        f"class {number}/" + "a very long name " * 4 + str(number): dict.fromkeys(whole, 1.0 * number)
        for number in range(n_sequences)
    }
    sequences["nothing was annotated"] = {"raw": float("nan")}
    title = "davis, protocol cosettle " + " ".join(f"field{number}={number}" for number in range(20))
    picture = score_chart(title, "J&F, percent", sequences, whole)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    width, height = canvas.get_width_height()
    drawn = picture.get_tightbbox(canvas.get_renderer())
    assert drawn.x0 >= 0 and drawn.y0 >= 0
    assert drawn.x1 <= picture.get_figwidth() and drawn.y1 <= picture.get_figheight()
    save_chart(picture, tmp_path / "chart.png", tmp_path / "chart.svg")
    assert "class 0/" in (tmp_path / "chart.svg").read_text() or n_sequences > MAX_NAMED
    assert Image.open(tmp_path / "chart.png").size == (width, height)


#: Names that are no words, and formulas that matplotlib would set or stumble over.
ODD = ("$x^$", "a\x1b[31mred\x07", "two\nlines", "bell \x00", "half \udc80", "日本　語", r"\frac{$")


@pytest.mark.parametrize("value", [math.nan, 1e308])
def test_odd_names_and_numbers_are_drawn(tmp_path, value):
    names = ["total", "cycle", "separability", "cycle_accuracy", "margin", "inter_distance", "intra_distance"]
    columns = {"step": [0.0, 1.0], **{name: [value, 1.0] for name in names}}
    figures = {ODD[1]: value, ODD[2]: 50.0}
    points = [PlanePoint(ODD[0], gamma, ODD[1], "raw", value, 0.5) for gamma in (0.3, value)]
    charts = (
        score_chart(ODD[0], "percent", dict.fromkeys(ODD, figures), figures),
        curves_chart(dict.fromkeys(ODD, columns), dict.fromkeys(ODD, columns)),
        plane_chart([*points, PlanePoint(ODD[0], 0.3, ODD[1], ODD[2], 0.5, 0.5)]),
    )
    for chart in charts:
        save_chart(chart, tmp_path / "chart.svg")
        ElementTree.parse(tmp_path / "chart.svg")
        text = (tmp_path / "chart.svg").read_text()
        assert "$x^$" in text and r"a\x1b[31mred\x07" in text
    side_by_side(dict.fromkeys(ODD, GREY))
