"""The affinity explorer: pick a patch of the first frame, see where later frames answer, raw and projected.

A store, projections and the frames behind them come in; a section whose canvases the page's scripts draw
comes out.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from cosettle_cache.core.errors import CosettleError, InputError
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.report.elements import data_element, element
from cosettle_cache.report.explored import STEP, TOP_K, Explored, ExploredKind, affordable_frames, explore
from cosettle_cache.report.images import data_uri
from cosettle_cache.report.marks import swatch
from cosettle_cache.report.media import Media, Shown
from cosettle_cache.report.runs import ScoreRun
from cosettle_cache.report.slider import slider
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.davis import VOID, read_mask
from cosettle_cache.videos.frames import iter_frames, natural_key

#: What a map can show: cosines, or softmax weights at the temperatures in use (PROTOCOLS 1.1, 1.2, 7.1).
MAPS = (
    ("cosine", "cosine"),
    ("0.03", "soft affinity, temperature 0.03 (training)"),
    ("0.1", "soft affinity, temperature 0.1 (protocol dino)"),
    ("0.7", "soft affinity, temperature 0.7 (protocol cosettle)"),
)
DEFAULT_MAP = "0.1"

_KEYS = "Arrow keys move the patch, Page Up and Page Down the frame."


@dataclass(frozen=True, slots=True)
class Tokens:
    """What there is to explore: a store of frames, and the kinds of tokens that are made from it."""

    store: FeatureStore
    kinds: Sequence[TokenKind]

    def affordable_frames(self, video_id: str, n_videos: int) -> int:
        """Return how many frames of a video the page has room for."""
        dim = self.store.arrays[0].n_channels
        return affordable_frames(self.store.grid(video_id), dim, n_videos * len(self.kinds))

    def provenance(self) -> dict[str, Any]:
        """Return what decides these tokens."""
        return {
            "store": str(self.store.path),
            "fingerprint": self.store.fingerprint.to_json(),
            "projection_sha256": {kind.name: kind.sha256 for kind in self.kinds},
        }


def make_tokens(store: FeatureStore, projections: Sequence[tuple[str, Projection]]) -> Tokens:
    """Return raw tokens of `store` and those of every projection.

    Raises `InputError` for a store without a whole video or of another plan than frames, `UsageError` for a
    projection of another width and for names that are not each one's own.
    """
    if not store.video_ids:
        raise InputError(
            f"{store.path} does not hold all tokens of any video", found=dict(store.slot_states())
        )
    store.n_frames(store.video_ids[0])
    return Tokens(store, make_kinds(projections, store.arrays[0].n_channels))


def explorer_section(
    tokens: Tokens, media: Media, runs: Sequence[ScoreRun], n_videos: int, max_frames: int
) -> Shown:
    """Return the explorer of up to `n_videos` videos, those of `runs` first, and which could not be read."""
    present = tokens.store.video_ids
    scored = (score.video_id for run in runs for score in run.scores)
    ordered = list(dict.fromkeys([*(name for name in scored if name in present), *present]))
    chosen, figures, failed = ordered[:n_videos], [], []
    for number, video_id in enumerate(chosen):
        n_frames = min(max_frames, tokens.affordable_frames(video_id, len(chosen)))
        try:
            found = explore(tokens.store, video_id, tokens.kinds, n_frames)
            pictures = _pictures(found, tokens.store, media)
            figures.append(_figure(found, pictures, _start(found, runs), f"explorer-{number}"))
        except CosettleError as error:
            failed.append(f"{video_id}: {error.summary}")
    if not figures and not failed:
        return Shown(None)
    section = element(
        "section",
        element("h2", "Affinity explorer"),
        element("p", _about(len(figures), len(ordered), tokens.store.fingerprint.backbone), class_="about"),
        *(element("p", text, class_="warning", role="note") for text in failed),
        *figures,
        id="explorer",
    )
    return Shown(section, tuple(failed))


def _about(n_shown: int, n_videos: int, backbone: str) -> str:
    return (
        f"{n_shown} of {n_videos} videos, tokens of {backbone}. Pick a patch of the first frame; the later "
        f"frame shows how much each of its patches resembles it, and numbers the nearest. {_KEYS}"
    )


def _pictures(found: Explored, store: FeatureStore, media: Media) -> list[str]:
    every = int(store.fingerprint.plan.get("every", 1))
    frames = [every * frame for frame in found.frames]
    return [data_uri(image) for image in iter_frames(media.videos[found.video_id], media.root, frames)]


def _start(found: Explored, runs: Sequence[ScoreRun]) -> int:
    """Return the patch that is picked at first: amid the first object of the first mask, or of the frame."""
    folders = (run.folder / run.tokens[0] / found.video_id for run in runs if run.tokens)
    masks = [sorted(folder.glob("*.png"), key=lambda path: natural_key(path.name)) for folder in folders]
    row, col = 0.5, 0.5
    for path in [paths[0] for paths in masks if paths][:1]:
        mask = read_mask(path)
        objects = np.argwhere(mask == mask[mask > 0].min(initial=VOID))
        row, col = np.median(objects, axis=0) / mask.shape if len(objects) else (row, col)
    return int(row * found.grid.rows) * found.grid.cols + int(col * found.grid.cols)


def _figure(found: Explored, pictures: Sequence[str], start: int, identifier: str) -> Element:
    names = [f"frame {frame}" for frame in found.frames[1:]]
    views = [_pick(found), *(_view(found, kind, number) for number, kind in enumerate(found.kinds))]
    return element(
        "figure",
        element("figcaption", element("span", found.video_id, class_="name"), f", {found.grid} patches"),
        element(
            "div",
            _choice(identifier),
            slider(f"Later frame of {found.video_id}", names or ["no later frame"]),
            class_="controls",
        ),
        element("div", *views, class_="views"),
        element("details", element("summary", "What is shown"), _explained(found)),
        data_element(f"data-{identifier}", _document(found, pictures, names, start)),
        class_="overlay explorer",
        data_explorer=identifier,
    )


def _choice(identifier: str) -> Element:
    options = [element("option", text, value=value, selected=value == DEFAULT_MAP) for value, text in MAPS]
    label = element("label", "Map ", for_=f"map-{identifier}")
    return element("div", label, element("select", *options, id=f"map-{identifier}"), class_="choice")


def _pick(found: Explored) -> Element:
    canvas = element(
        "canvas",
        f"The first frame of {found.video_id}",
        class_="pick",
        tabindex="0",
        role="application",
        aria_label=f"First frame of {found.video_id}. {_KEYS}",
    )
    reading = element("output", "", aria_live="polite", class_="reading")
    return element("figure", canvas, element("figcaption", "first frame"), reading)


def _view(found: Explored, kind: ExploredKind, number: int) -> Element:
    canvas = element("canvas", role="img", aria_label=f"Affinity of {kind.name} in the later frame")
    caption = element("figcaption", swatch(number), element("span", kind.name, class_="name"))
    return element("figure", canvas, caption, element("output", "", aria_live="polite", class_="reading"))


def _explained(found: Explored) -> Element:
    said = (
        f"The outlined patches are the {TOP_K} nearest by cosine in the whole later frame: exact, by the "
        "search that propagate uses, without its spatial window. A map is made in the page from rounded "
        "tokens; its colours run from its least to its largest value. Soft affinity is the softmax of the "
        "cosines over the whole later frame."
    )
    errors = [
        element("li", element("span", kind.name, class_="name"), f": {kind.small.error:.3f}")
        for kind in found.kinds
    ]
    checked = element("p", "Largest difference of a cosine in a map to the exact one, on patches checked:")
    return element("div", element("p", said), checked, element("ul", *errors))


def _document(found: Explored, pictures: Sequence[str], names: Sequence[str], start: int) -> dict[str, Any]:
    return {
        "rows": found.grid.rows,
        "cols": found.grid.cols,
        "start": start,
        "names": list(names),
        "pictures": list(pictures),
        "kinds": [_kind_document(kind) for kind in found.kinds],
    }


def _kind_document(kind: ExploredKind) -> dict[str, Any]:
    return {
        "step": STEP,
        "tokens": [_packed(frame) for frame in kind.small.values],
        "k": kind.position.shape[2],
        "position": [_packed(frame.astype("<u2")) for frame in kind.position],
        "cosine": [_packed(frame.astype("<i2")) for frame in kind.cosine],
    }


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), level=9)).decode()
