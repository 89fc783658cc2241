"""The affinity explorer: pick a patch of the first frame, see where later frames answer, raw and projected.

A store, projections and frames come in; a section whose canvases the page's scripts draw comes out. It holds
exact neighbours of every patch of a first frame, by the search that `propagate` uses, and 8-bit tokens from
which a browser computes whole affinity maps, with the error it makes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int16, UInt16
from torch import Tensor

from cosettle_cache.core.errors import CosettleError, InputError
from cosettle_cache.core.types import Grid
from cosettle_cache.heads.kinds import TokenKind, make_kinds
from cosettle_cache.heads.projection import Projection
from cosettle_cache.report.page import Media, data_element, data_uri, element, section, slider
from cosettle_cache.report.runs import ScoreRun
from cosettle_cache.search.masked import TorchRanker, unit_tokens
from cosettle_cache.store import FeatureStore
from cosettle_cache.videos.frames import iter_frames
from cosettle_cache.videos.masks import VOID, read_mask

#: Neighbours listed per patch, as many as the protocol cosettle follows.
TOP_K = 7

#: Components of small tokens are multiples of this: cosines are then right to about 0.005 in the mean.
STEP = 1 / 64

#: Cosines are kept in steps of one over this.
COSINE_STEPS = 32767

#: Frames per video, the first included, and what the explorer may take in the page: fewer frames where they
#: are large. Measured on ViT-Tiny tokens: 92 bytes for the 192 components of a token, 20 for its neighbours.
MAX_FRAMES = 7
_BUDGET_BYTES = 8_000_000
_COMPONENT_BYTES, _LIST_BYTES = 0.48, 20
_BASE64 = 4 / 3

#: Patches whose maps are compared with exact cosines.
_CHECKED = 64

#: What a map can show: cosines, or softmax weights at the temperatures in use (PROTOCOLS 1.1, 1.2, 7.1).
_MAPS = (
    ("cosine", "cosine"),
    ("0.03", "soft affinity, temperature 0.03 (training)"),
    ("0.1", "soft affinity, temperature 0.1 (protocol dino)"),
    ("0.7", "soft affinity, temperature 0.7 (protocol cosettle)"),
)
_DEFAULT_MAP = "0.1"

Small = Int8[np.ndarray, "frame channel patch"]

_KEYS = "Arrow keys move the patch, Page Up and Page Down the frame."


@dataclass(frozen=True, slots=True)
class ExploredKind:
    """One kind of tokens: each first patch's nearest in later frames, best first; and what `shrink` gives."""

    name: str
    position: UInt16[np.ndarray, "later patch k"]
    cosine: Int16[np.ndarray, "later patch k"]
    small: Small
    error: float


@dataclass(frozen=True, slots=True)
class Explored:
    """One video: the chosen frames, the first of all included, and its tokens by kind."""

    video_id: str
    grid: Grid
    frames: tuple[int, ...]
    kinds: tuple[ExploredKind, ...]


def chosen_frames(n_frames: int, at_most: int) -> list[int]:
    """Return the first frame and later ones, ever farther apart up to the last."""
    n_later = min(n_frames, at_most, MAX_FRAMES) - 1
    later = np.geomspace(1, n_frames - 1, n_later).tolist() if n_later > 0 else []
    return sorted({0, *map(round, later)})


@torch.inference_mode()
def explore(store: FeatureStore, video_id: str, kinds: Sequence[TokenKind], max_frames: int) -> Explored:
    """Return what to explore in a video, by encodings; raise `InputError` or `DamagedStoreError`."""
    frames = chosen_frames(store.n_frames(video_id), max_frames)
    tokens = torch.from_numpy(store.tokens(video_id, frames)).flatten(1, 2)
    explored = tuple(_explore_kind(kind.name, kind.apply(tokens)) for kind in kinds)
    return Explored(video_id, store.grid(video_id), tuple(frames), explored)


def _explore_kind(name: str, tokens: Float[Tensor, "frame patch dim"]) -> ExploredKind:
    unit = unit_tokens(tokens)
    ranker = TorchRanker()
    k = min(TOP_K, unit.shape[1])
    ranked = [ranker.rank(unit[0], later[:, None], None, k) for later in unit[1:]]
    position = np.array([index.numpy() for _, index in ranked], np.uint16).reshape(-1, unit.shape[1], k)
    cosine = np.array([(values * COSINE_STEPS).round().numpy() for values, _ in ranked]).astype(np.int16)
    return ExploredKind(name, position, cosine.reshape(position.shape), *shrink(unit))


def shrink(unit: Float32[Tensor, "frame patch dim"]) -> tuple[Small, float]:
    """Return unit tokens along their principal directions, strongest first, as multiples of `STEP`.

    The directions are those of the uncentred second moment. One step for all keeps dot products best at a
    given size, as weak directions become runs of zeros. The error is the largest difference to an exact
    cosine with the first frame, found on patches spread over the grid.
    """
    flat = unit.flatten(0, 1).double()
    _, directions = torch.linalg.eigh(flat.T @ flat)
    values = (unit @ directions.flip(1).float() / STEP).round().to(torch.int8)
    small = values * STEP
    some = torch.linspace(0, unit.shape[1] - 1, min(_CHECKED, unit.shape[1])).long()
    differences = [
        (unit[0, some] @ exact.T - small[0, some] @ short.T).abs().max()
        for exact, short in zip(unit, small, strict=True)
    ]
    error = float(torch.stack(differences).max())
    return values.transpose(1, 2).contiguous().numpy(), error


def affordable_frames(grid: Grid, dim: int, n_series: int) -> int:
    """Return how many frames, at least three, of each of `n_series` videos and kinds fit the budget."""
    frame_bytes = _BASE64 * grid.n_tokens * (_COMPONENT_BYTES * dim + _LIST_BYTES)
    return max(3, int(_BUDGET_BYTES / (frame_bytes * max(n_series, 1))))


@dataclass(frozen=True, slots=True)
class Tokens:
    """What there is to explore: a store of frames, and the kinds of tokens that are made from it."""

    store: FeatureStore
    kinds: Sequence[TokenKind]

    def to_json(self) -> dict[str, Any]:
        """Return where the tokens are, and of which kinds they are."""
        return {"features": str(self.store.path), "tokens": [kind.name for kind in self.kinds]}

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
) -> tuple[Element | None, list[str]]:
    """Return the explorer of up to `n_videos` videos, those of `runs` first, and which could not be read."""
    store = tokens.store
    scored = (score.video_id for run in runs for score in run.scores if score.video_id in store.video_ids)
    ordered = list(dict.fromkeys([*scored, *store.video_ids]))
    chosen, figures, failed = ordered[:n_videos], [], []
    n_series, dim = len(chosen) * len(tokens.kinds), store.arrays[0].n_channels
    every = int(store.fingerprint.plan.get("every", 1))
    for number, video_id in enumerate(chosen):
        n_frames = min(max_frames, affordable_frames(store.grid(video_id), dim, n_series))
        try:
            found = explore(store, video_id, tokens.kinds, n_frames)
            frames = [every * frame for frame in found.frames]
            pictures = [data_uri(image) for image in iter_frames(media.videos[video_id], media.root, frames)]
            figures.append(_figure(found, pictures, _start(found, runs), f"explorer-{number}"))
        except CosettleError as error:
            failed.append(f"{video_id}: {error.summary}")
    if not figures and not failed:
        return None, failed
    weights = " with random weights" if store.encoder.get("weights_argument") == "random" else ""
    about = (
        f"{len(figures)} of {len(ordered)} videos, tokens of {store.fingerprint.backbone}{weights}. Pick a "
        "patch of the first frame; the later frame shows how much each of its patches resembles it, and "
        f"numbers the nearest. {_KEYS}"
    )
    heads = {(score.tokens, score.provenance.projection_sha256) for run in runs for score in run.scores}
    names = {name for name, _ in heads}
    others = [
        kind.name for kind in tokens.kinds if kind.name in names and (kind.name, kind.sha256) not in heads
    ]
    if others:
        about += f" Not the projection that was scored under this name: {', '.join(others)}."
    return section("explorer", "Affinity explorer", about, *figures, failures=failed), failed


def _start(found: Explored, runs: Sequence[ScoreRun]) -> int:
    """Return the patch that is picked at first: amid the first object of the first mask, or of the frame."""
    masks = (path for run in runs if run.tokens for path in run.masks(run.tokens[0], found.video_id))
    row, col = 0.5, 0.5
    for path in islice(masks, 1):
        mask = read_mask(path)
        objects = np.argwhere(mask == mask[mask > 0].min(initial=VOID))
        row, col = np.median(objects, axis=0) / mask.shape if len(objects) else (row, col)
    return int(row * found.grid.rows) * found.grid.cols + int(col * found.grid.cols)


def _figure(found: Explored, pictures: Sequence[str], start: int, identifier: str) -> Element:
    names = [f"frame {frame}" for frame in found.frames[1:]]
    options = [element("option", text, value=value, selected=value == _DEFAULT_MAP) for value, text in _MAPS]
    choice = [
        element("label", "Map ", for_=f"map-{identifier}"),
        element("select", *options, id=f"map-{identifier}"),
    ]
    first = element(
        "canvas",
        f"The first frame of {found.video_id}",
        class_="pick",
        tabindex="0",
        role="application",
        aria_label=f"First frame of {found.video_id}. {_KEYS}",
    )
    views = [_view(first, element("figcaption", "first frame"))]
    for kind in found.kinds:
        canvas = element("canvas", role="img", aria_label=f"Affinity of {kind.name} in the later frame")
        views.append(_view(canvas, element("figcaption", kind.name, class_="name")))
    document = {
        "rows": found.grid.rows,
        "cols": found.grid.cols,
        "start": start,
        "names": names,
        "pictures": pictures,
        "kinds": [_kind_document(kind) for kind in found.kinds],
    }
    return element(
        "figure",
        element("figcaption", element("span", found.video_id, class_="name"), f", {found.grid} patches"),
        element(
            "div",
            element("div", *choice, class_="choice"),
            slider(f"Later frame of {found.video_id}", names or ["no later frame"]),
            class_="controls",
        ),
        element("div", *views, class_="views"),
        element("details", element("summary", "What is shown"), _explained(found)),
        data_element(f"data-{identifier}", document),
        class_="overlay explorer",
        data_explorer=identifier,
    )


def _view(canvas: Element, caption: Element) -> Element:
    return element("figure", canvas, caption, element("output", "", aria_live="polite", class_="reading"))


def _explained(found: Explored) -> Element:
    said = (
        f"The outlined patches are the {TOP_K} nearest by cosine in the whole later frame: exact, by the "
        "search that propagate uses, without its spatial window. A map is made in the page from rounded "
        "tokens; its colours run from its least to its largest value. Soft affinity is the softmax of the "
        "cosines over the whole later frame."
    )
    errors = [
        element("li", element("span", kind.name, class_="name"), f": {kind.error:.3f}")
        for kind in found.kinds
    ]
    checked = element("p", "Largest difference of a cosine in a map to the exact one, on patches checked:")
    return element("div", element("p", said), checked, element("ul", *errors))


def _kind_document(kind: ExploredKind) -> dict[str, Any]:
    return {
        "step": STEP,
        "tokens": [_packed(frame) for frame in kind.small],
        "k": kind.position.shape[2],
        "position": [_packed(frame.astype("<u2")) for frame in kind.position],
        "cosine": [_packed(frame.astype("<i2")) for frame in kind.cosine],
    }


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), level=9)).decode()
