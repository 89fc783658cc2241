"""What a slot must hold by the plan, for slots whose index part cannot say it any more.

In come header, manifest and slot; out go the videos, frames and rows that were planned.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby

from cosettle_cache.core.errors import CosettleError
from cosettle_cache.core.settings import FramesSettings, PairsSettings
from cosettle_cache.core.types import Encoding, Manifest, PlanKind
from cosettle_cache.store.format import SlotPlace
from cosettle_cache.store.header import Header
from cosettle_cache.store.parts import VideoRows
from cosettle_cache.store.plan import Plan, make_plan


def planned_rows(header: Header, manifest: Manifest | None, place: SlotPlace) -> tuple[VideoRows, ...]:
    """Return the encodings planned for a slot; none where the plan cannot be made again."""
    plan = None if manifest is None else _remake_plan(header, manifest)
    if plan is None:
        return ()
    items = enumerate(plan.slot(place.index).encodings, start=place.rows.start)
    groups = groupby(items, key=lambda item: item[1].video_id)
    return tuple(_video_rows(video_id, list(group)) for video_id, group in groups)


def _remake_plan(header: Header, manifest: Manifest) -> Plan | None:
    """Return the plan that gives the header's arrays; slots had their default size or all the same one."""
    patch = header.encoder.get("patch")
    if not isinstance(patch, int):
        return None
    first = header.arrays[0]
    kinds = {"dtype": first.dtype, "codec": first.codec}
    for size in (None, max(layout.slot_encodings for layout in header.arrays)):
        try:
            plan = make_plan(
                manifest, _settings(header), patch=patch, dim=first.n_channels, slot_encodings=size, **kinds
            )
        except (CosettleError, TypeError, ValueError):
            return None
        if plan.arrays == header.arrays:
            return plan
    return None


def _settings(header: Header) -> PairsSettings | FramesSettings:
    plan = header.fingerprint.plan
    kind = PairsSettings if PlanKind(plan["kind"]) is PlanKind.PAIRS else FramesSettings
    return kind(**{item.name: plan[item.name] for item in fields(kind) if item.name in plan})


def _video_rows(video_id: str, items: list[tuple[int, Encoding]]) -> VideoRows:
    frames = tuple(sorted({encoding.frame for _, encoding in items}))
    return VideoRows(video_id, frames, tuple(row for row, _ in items))
