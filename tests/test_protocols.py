"""Presets hold the published values; everything that cannot be honoured is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cosettle_cache.errors import UsageError
from cosettle_cache.protocols import check_protocol, list_protocols, make_protocol


def test_the_cosettle_preset_is_table_8c():
    protocol = make_protocol()
    assert (protocol.size, protocol.top_k, protocol.n_context, protocol.radius) == ("480x880", 7, 20, 20)
    assert (protocol.temperature, protocol.window) == (0.7, "disc")
    assert protocol.first_frame_copies and not protocol.mask_first
    assert protocol in list_protocols()


def test_overrides_show_in_the_name_unless_they_change_nothing():
    assert make_protocol(top_k=7).name == "cosettle"
    assert make_protocol(top_k=5, radius=12).name == "cosettle radius=12.0 top_k=5"
    assert make_protocol(radius=12).radius == 12.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosetle"}, "'cosetle' is no protocol"),
        ({"task": "driving"}, "is no task"),
        ({"topk": 5}, "'topk' is no protocol field"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"n_context": -1}, "n_context"),
        ({"radius": 0}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"temperature": 0.0}, "temperature"),
        ({"window": "ring"}, "window"),
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
    ],
)
def test_every_field_shows_in_name_and_json(field, value):
    changed, preset = make_protocol(**{field: value}), make_protocol()
    assert changed.name == f"cosettle {field}={value}"
    differing = {key for key, item in changed.to_json().items() if item != preset.to_json()[key]}
    assert differing == {"name", field}
