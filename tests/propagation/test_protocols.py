"""Presets hold the published values; everything that cannot be honoured is refused by name."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from cosettle_cache.cli import run_command
from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import replace_red_std
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.protocols import check_protocol, list_presets, make_protocol

#: What the code bases have in one table (PROTOCOLS 1.4): size, top_k, n_context, radius, window, temperature.
PUBLISHED = {
    ("cosettle", "davis"): ("480x880", 7, 20, 20, "disc", 0.7),
    ("cosettle", "vip"): ("480x880", 10, 20, 20, "disc", 0.7),
    ("cosettle", "jhmdb"): ("320x320", 7, 20, 20, "disc", 0.7),
    ("dino", "davis"): ("short:480/64", 5, 7, 12, "square", 0.1),
    ("rsp", "davis"): ("480x832", 7, 30, 30, "square", 0.1),
    ("dinov3", "davis"): ("dinov3-m", 5, 7, 12, "disc", 0.2),
    ("crw", "davis"): ("native", 10, 20, 12, "disc", 0.05),
    ("crw", "vip"): ("560x560", 10, 4, 12, "disc", 0.05),
    ("crw", "jhmdb"): ("320x320", 10, 7, 12, "disc", 0.05),
}


@pytest.mark.parametrize(("key", "values"), PUBLISHED.items())
def test_presets_hold_the_published_values(key, values):
    protocol = make_protocol(key[0], task=key[1])
    found = (protocol.size, protocol.top_k, protocol.n_context, protocol.radius, protocol.window)
    assert (*found, protocol.temperature) == values


def test_the_two_families_differ_in_their_rules():
    keys = ("mask_first", "first_frame_copies", "keep_ties", "label_encoding", "norm_mask", "red_std")
    for name in ("cosettle", "crw"):
        protocol = make_protocol(name)
        assert [getattr(protocol, key) for key in keys] == [False, True, False, "bilinear", False, 0.229]
    for name in ("dino", "rsp"):
        protocol = make_protocol(name)
        assert [getattr(protocol, key) for key in keys] == [True, False, True, "nearest", True, 0.228]
    dinov3 = make_protocol("dinov3")
    assert [getattr(dinov3, key) for key in keys] == [True, False, True, "nearest", True, 0.229]
    assert (dinov3.rim, dinov3.resampling, dinov3.upsampling) == ("closed", "bicubic", "nearest")
    assert make_protocol(task="jhmdb").keypoint_top_k == 5
    assert make_protocol("crw", task="jhmdb").keypoint_top_k == 3


def test_own_clips_follow_davis_at_their_own_size():
    for name in ("cosettle", "dino", "crw", "rsp"):
        for task in ("sprites", "masks"):
            assert make_protocol(name, task=task) == replace(make_protocol(name), size="native")
    assert make_protocol("dinov3", task="masks") == make_protocol("dinov3")


def test_every_preset_is_listed_with_its_source_and_can_be_made():
    for preset in list_presets():
        assert preset.source
        assert make_protocol(preset.protocol.name, task=preset.task) == preset.protocol
    assert {preset.task for preset in list_presets("vip")} == {"vip"}
    with pytest.raises(UsageError, match="no task"):
        list_presets("driving")


def test_the_slip_in_red_replaces_imagenets_deviation_only():
    imagenet, own = (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)
    dino, cosettle = make_protocol("dino").red_std, make_protocol().red_std
    assert replace_red_std(imagenet, dino) == (0.228, 0.224, 0.225)
    assert replace_red_std(imagenet, cosettle) == imagenet
    assert replace_red_std(own, dino) == own
    assert replace_red_std((0.228, 0.224, 0.225), cosettle) == imagenet


def test_the_command_lists_every_field_of_every_preset(capsys):
    assert run_command(["protocols"]) == 0
    text = capsys.readouterr().out
    shown = [item.name for item in fields(EvalProtocol) if item.name != "name"]
    assert all(text.count(name) >= 5 for name in shown)
    assert all(preset.source in text for preset in list_presets())
    assert run_command(["protocols", "--task", "jhmdb", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["protocol"] for row in rows] == [item.protocol.to_json() for item in list_presets("jhmdb")]
    assert run_command(["protocols", "--task", "jhmbd"]) == 2
    assert "did you mean jhmdb" in capsys.readouterr().err


def test_overrides_show_in_the_name_unless_they_change_nothing():
    assert make_protocol(top_k=7).name == "cosettle"
    assert make_protocol(top_k=5, radius=12).name == "cosettle radius=12.0 top_k=5"
    assert make_protocol(radius=12).radius == 12.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosetle"}, "'cosetle' is no protocol"),
        ({"task": "driving"}, "is no task"),
        ({"name": "dino", "task": "jhmdb"}, "is no task of the dino protocol"),
        ({"topk": 5}, "'topk' is no protocol field"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"n_context": -1}, "n_context"),
        ({"n_context": 10**20}, "n_context"),
        ({"temperature": 1e-300}, "temperature"),
        ({"red_std": 1e-300}, "red_std"),
        ({"radius": 0}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"temperature": 0.0}, "temperature"),
        ({"window": "ring"}, "window"),
        ({"label_encoding": "bicubic"}, "label_encoding"),
        ({"decode_size": "480x880"}, "decode_size"),
        ({"keypoint_top_k": 0}, "keypoint_top_k"),
        ({"red_std": -1.0}, "red_std"),
        ({"norm_mask": 1}, "norm_mask"),
        ({"size": "large"}, "no size"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_protocol(**arguments)


def test_the_nearest_name_is_offered():
    for arguments, nearest in (({"name": "cosetle"}, "cosettle"), ({"topk": 5}, "top_k")):
        with pytest.raises(UsageError) as caught:
            make_protocol(**arguments)
        assert nearest in caught.value.hint


def test_a_protocol_made_by_hand_is_checked_as_well():
    with pytest.raises(UsageError):
        check_protocol(replace(make_protocol(), window="ring"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "480x832"),
        ("top_k", 5),
        ("n_context", 7),
        ("radius", 12.0),
        ("temperature", 0.1),
        ("window", "square"),
        ("mask_first", True),
        ("first_frame_copies", False),
        ("red_std", 0.228),
        ("keep_ties", True),
        ("label_encoding", "nearest"),
        ("norm_mask", True),
        ("decode_size", "annotation"),
        ("keypoint_top_k", 3),
    ],
)
def test_every_field_shows_in_name_and_json(field, value):
    changed, preset = make_protocol(**{field: value}), make_protocol()
    assert changed.name == f"cosettle {field}={value}"
    differing = {key for key, item in changed.to_json().items() if item != preset.to_json()[key]}
    assert differing == {"name", field}
