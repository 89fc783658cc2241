"""Named label-propagation protocols: a preset's name and a task go in, an `EvalProtocol` comes out.

The constants of each code base stand here as data, with their source. Any field can be overridden; the
protocol's name then says which, so that no score row can hide it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.settings import IMAGENET_RED_STD, LEAST_TEMPERATURE
from cosettle_cache.core.types import EvalProtocol
from cosettle_cache.propagation.tasks import TASKS

_T = TypeVar("_T")

#: Fields that are one of a few words.
CHOICES = {
    "window": ("disc", "square"),
    "label_encoding": ("bilinear", "nearest"),
    "decode_size": ("input", "annotation"),
    "resampling": ("linear", "bicubic"),
    "rim": ("shape", "open", "closed"),
    "upsampling": ("bilinear", "nearest"),
    "later_objects": ("fail", "ignore", "inject"),
}

#: Fields that decide which neighbours a query has among given tokens; labels and weights come after.
SEARCH_FIELDS = (
    "top_k",
    "keep_ties",
    "n_context",
    "radius",
    "window",
    "rim",
    "mask_first",
    "first_frame_copies",
)

#: Frames of a queue; no clip is longer.
_MOST_CONTEXT = 100_000

#: Protocols of one task, each with its source.
Presets = tuple[tuple[EvalProtocol, str], ...]

# T-CORE's engine with the values of the paper's Table 8c; the temperature is T-CORE's, the table has none.
_COSETTLE = EvalProtocol(
    name="cosettle",
    size="480x880",
    red_std=IMAGENET_RED_STD,
    top_k=7,
    keep_ties=False,
    n_context=20,
    radius=20.0,
    window="disc",
    mask_first=False,
    first_frame_copies=True,
    temperature=0.7,
    label_encoding="bilinear",
    norm_mask=False,
    decode_size="input",
    keypoint_top_k=5,
)

# 0.228 is a slip of the DINO script that RSP inherited; every score made with either contains it.
_DINO = EvalProtocol(
    name="dino",
    size="short:480/64",
    red_std=0.228,
    top_k=5,
    keep_ties=True,
    n_context=7,
    radius=12.0,
    window="square",
    mask_first=True,
    first_frame_copies=False,
    temperature=0.1,
    label_encoding="nearest",
    norm_mask=True,
    decode_size="input",
    keypoint_top_k=5,
)

_CRW = replace(
    _COSETTLE, name="crw", size="native", top_k=10, radius=12.0, temperature=0.05, keypoint_top_k=3
)

# RSP resizes every clip to 480x880 beforehand, of which DINO's loader leaves 832 columns.
_RSP = replace(_DINO, name="rsp", size="480x832", top_k=7, n_context=30, radius=30.0)

# The notebook takes a short side of 960 pixels for patches of 16: the paper's M. Nothing published is scored
# with it elsewhere than on mask data sets, so there are no values for key points.
_DINOV3 = replace(
    _DINO,
    name="dinov3",
    size="dinov3-m",
    resampling="bicubic",
    red_std=IMAGENET_RED_STD,
    window="disc",
    rim="closed",
    temperature=0.2,
    decode_size="annotation",
    upsampling="nearest",
    later_objects="ignore",
)

_TABLE_8C = "Co-Settle Table 8c; engine and temperature of T-CORE 0ffcabe"
_DINO_SCRIPT = "DINO 7c446df, eval_video_segmentation"
_CRW_README = "videowalk 047f3f4, README"
_CRW_THREAD = "videowalk 047f3f4, commands in its issue 10"
_DINOV3_NOTEBOOK = "DINOv3 6876159, segmentation_tracking notebook; sizes of arXiv 2508.10104 Table 5"
_RSP_SCRIPT = "RSP 5ea2b91 with DINO's script"

_OWN_DINOV3 = (_DINOV3, _DINOV3_NOTEBOOK)
_OTHERS: Presets = ((_COSETTLE, _TABLE_8C), (_DINO, _DINO_SCRIPT), (_CRW, _CRW_README), (_RSP, _RSP_SCRIPT))
#: By the tasks that protocols were published for.
PRESETS: dict[str, Presets] = {
    "davis": (*_OTHERS, _OWN_DINOV3),
    "vip": (
        (replace(_COSETTLE, top_k=10), _TABLE_8C),
        (replace(_CRW, size="560x560", n_context=4), _CRW_THREAD),
    ),
    "jhmdb": (
        (replace(_COSETTLE, size="320x320"), _TABLE_8C),
        (replace(_CRW, size="320x320", n_context=7), _CRW_THREAD),
    ),
}
#: Of every other task, which fixes no size: the DAVIS protocols at the frames' own size; DINOv3's names sizes
#: of its own.
OWN_SIZE: Presets = (
    *((replace(protocol, size="native"), f"{source}; own size") for protocol, source in _OTHERS),
    _OWN_DINOV3,
)


@dataclass(frozen=True, slots=True)
class Preset:
    """A protocol as one code base has it for one task, and where its values were read."""

    task: str
    protocol: EvalProtocol
    source: str


def list_presets(task: str | None = None) -> tuple[Preset, ...]:
    """Return the presets of `task`, or all by protocol; raise `UsageError` for a task that none knows."""
    tasks = TASKS if task is None else [_find(TASKS, task, "task").name]
    known = [Preset(name, *pair) for name in tasks for pair in PRESETS.get(name, OWN_SIZE)]
    names = list(dict.fromkeys(preset.protocol.name for preset in known))
    return tuple(sorted(known, key=lambda preset: names.index(preset.protocol.name)))


def make_protocol(name: str = "cosettle", *, task: str = "davis", **overrides: object) -> EvalProtocol:
    """Return preset `name` for `task` with fields replaced.

    Raises `UsageError` for an unknown preset, task or field (naming the nearest) and for values that no
    propagation can honour.
    """
    by_name: dict[str, dict[str, EvalProtocol]] = {}
    for item in list_presets():
        by_name.setdefault(item.protocol.name, {})[item.task] = item.protocol
    preset = _find(_find(by_name, name, "protocol"), task, f"task of the {name} protocol")
    settable = {key: value for key, value in asdict(preset).items() if key != "name"}
    changed: dict[str, object] = {}
    for key, value in overrides.items():
        default = _find(settable, key, "protocol field")
        typed = float(value) if isinstance(default, float) and type(value) is int else value
        check_field(
            type(typed) is type(default), key, f"a value of type {type(default).__name__}", repr(value)
        )
        if typed != default:
            changed[key] = typed
    title = " ".join([name, *(f"{key}={value}" for key, value in sorted(changed.items()))])
    protocol = replace(preset, name=title, **changed)  # type: ignore[arg-type]
    check_protocol(protocol)
    return protocol


def check_protocol(protocol: EvalProtocol) -> None:
    """Raise `UsageError` unless every field of `protocol` can be honoured."""
    for key in ("top_k", "keypoint_top_k"):
        check_field(getattr(protocol, key) >= 1, key, "at least 1", getattr(protocol, key))
    context = protocol.n_context
    check_field(0 <= context <= _MOST_CONTEXT, "n_context", f"0 to {_MOST_CONTEXT} frames", context)
    for key in ("radius", "temperature", "red_std"):
        value = getattr(protocol, key)
        check_field(math.isfinite(value) and value > 0, key, "a positive number", value)
    # In float32 a cosine divided by much less is infinite, and so is a colour.
    for key, least in (("temperature", LEAST_TEMPERATURE), ("red_std", 0.001)):
        check_field(getattr(protocol, key) >= least, key, f"at least {least}", getattr(protocol, key))
    for key, words in CHOICES.items():
        check_field(getattr(protocol, key) in words, key, " or ".join(words), getattr(protocol, key))
    from cosettle_cache.videos.frames import resolve_size  # decoders come with it, and `--help` passes here

    resolve_size(protocol.size, 480, 854, patch=16)


def check_field(ok: bool, key: str, wanted: str, found: object) -> None:
    """Raise `UsageError` unless a protocol's field is `ok`."""
    if not ok:
        raise UsageError(f"the protocol field {key} has no meaning as given", wanted=wanted, found=found)


def _find(known: Mapping[str, _T], key: str, what: str) -> _T:
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise UsageError(f"{key!r} is no {what}", wanted=", ".join(known), found=key, hint=hint)
