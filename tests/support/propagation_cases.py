"""What the propagation tests share: a dense oracle, random protocols, and a tiny data set with its store."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from store_cases import PATCH, Case
from torch import Tensor
from torch.nn.functional import normalize

from cosettle_cache import propagation
from cosettle_cache.core.settings import FramesSettings, PropagateSettings
from cosettle_cache.core.types import EvalProtocol, Grid, Slot
from cosettle_cache.propagation import PropagationReport
from cosettle_cache.propagation.labels import decode_classes, name_classes
from cosettle_cache.propagation.protocols import make_protocol
from cosettle_cache.store.plan import make_plan
from cosettle_cache.videos import build_manifest
from cosettle_cache.videos.masks import write_mask

#: FAISS is an extra; where it is not installed torch is tested alone.
SEARCHES = ("bf16", "torch", "faiss") if importlib.util.find_spec("faiss") else ("bf16", "torch")

#: Cosines of equal tokens differ by less in float64.
TIE = 1e-12

needs_faiss = pytest.mark.skipif("faiss" not in SEARCHES, reason="faiss is not installed")


def propagate_store(*arguments: Any, **options: Any) -> PropagationReport:
    """As the room's, with the fields of `PropagateSettings` among the keywords."""
    names = {item.name for item in fields(PropagateSettings)} & options.keys()
    settings = PropagateSettings(**{name: options.pop(name) for name in names})
    return propagation.propagate_store(*arguments, settings=settings, **options)


def decode_mask(
    label_map: Tensor,
    object_ids: Sequence[int],
    size: tuple[int, int],
    mask_size: tuple[int, int],
    *,
    stretched: bool = False,
) -> np.ndarray:
    """Return the index mask of a label map, as the task of masks makes it in two steps."""
    classes = decode_classes(label_map, size, stretched=stretched).cpu().numpy()
    return name_classes(classes, object_ids, mask_size, stretched=stretched)


@contextmanager
def single_thread() -> Iterator[None]:
    """Tensors of tests are too small for threads, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense_oracle(
    tokens: Tensor,
    first_labels: Tensor,
    protocol: EvalProtocol,
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, bool]:
    """Return the label maps the plain way, in float64, and whether a tie leaves them open.

    Every frame of the context stands side by side, copies of the first one included (PROTOCOLS 1.1, 1.2).
    """
    n_frames, rows, cols, _ = tokens.shape
    unit = normalize(tokens.double(), dim=-1).flatten(1, 2)
    row, col = (
        cell.flatten() for cell in torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    )
    down, right = (row[:, None] - row).abs(), (col[:, None] - col).abs()
    inside = down**2 + right**2 < protocol.radius**2
    if protocol.window == "square":
        inside = (down <= protocol.radius) & (right <= protocol.radius)
    everywhere = torch.ones_like(inside)
    labels = [first_labels.double().flatten(0, 1)]
    open_tie = False
    for t in range(1, n_frames):
        queue = [max(frame, 0) for frame in range(t - protocol.n_context, t)]
        if not protocol.first_frame_copies:
            queue = [frame for frame in range(t - protocol.n_context, t) if frame > 0]
        context = [(0, inside if protocol.mask_first else everywhere), *((frame, inside) for frame in queue)]
        cosines = torch.cat([(unit[t] @ unit[s].T).where(seen, -torch.inf) for s, seen in context], dim=1)
        identity = torch.cat([torch.arange(rows * cols) + s * rows * cols for s, _ in context])
        best, index = cosines.topk(protocol.top_k, dim=1)
        last = best.where(best.isfinite(), torch.inf).amin(dim=1, keepdim=True)
        near = (cosines - last).abs() < 1e-6
        if protocol.keep_ties:
            open_tie |= bool((near & ((cosines - last).abs() > TIE)).any())
            best = cosines.masked_fill(cosines < last - TIE, -torch.inf)
            index = torch.arange(len(identity)).expand_as(best)
        elif not bool(best.isinf().any()):
            # Copies of one token on the last places have one label, so any of them will do.
            chosen = identity[index[:, -1:]]
            open_tie |= bool((near & (identity != chosen)).any())
        known = torch.cat([labels[s] for s, _ in context])
        labels.append((torch.softmax(best / protocol.temperature, 1)[..., None] * known[index]).sum(1))
        if t in given:  # of objects that appear in this frame
            new = given[t].double().flatten(0, 1)
            labels[-1] = labels[-1] * (1 - new.sum(1, keepdim=True)) + new
    return torch.stack(labels).view(n_frames, rows, cols, -1).float(), open_tie


@dataclass(frozen=True)
class Clip:
    """A random video, `[frame row col dim]`, its first label map `[row col class]`, and a protocol for it."""

    tokens: Tensor
    first_labels: Tensor
    protocol: EvalProtocol

    @property
    def grid(self) -> Grid:
        return Grid(*self.tokens.shape[1:3])


@st.composite
def clips(draw: st.DrawFn, min_frames: int = 2, **fixed: object) -> Clip:
    """Any video on a small grid with any protocol that it can honour; `fixed` fields are as given.

    Where ties are kept, frames and tokens may repeat: real ties, to the last bit.
    """
    n_frames, rows, cols = draw(st.integers(min_frames, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 18))
    fields = {
        "keep_ties": draw(st.booleans()),
        "n_context": draw(st.integers(0, 6)),
        "radius": draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 40.0])),
        "temperature": draw(st.sampled_from([0.05, 0.7, 1.0])),
        "window": draw(st.sampled_from(["disc", "square"])),
        "mask_first": draw(st.booleans()),
        "first_frame_copies": draw(st.booleans()),
        **fixed,
    }
    most = rows * cols * (1 + fields["n_context"] * fields["first_frame_copies"])
    protocol = make_protocol(**{"top_k": draw(st.integers(1, min(12, most))), **fields})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randn(n_frames, rows, cols, draw(st.sampled_from([8, 24])), generator=generator)
    if protocol.keep_ties and draw(st.booleans()):
        kept = torch.randint(0, draw(st.integers(1, n_frames)), (n_frames,), generator=generator)
        tokens = tokens[kept].flatten(1, 2)
        kept = torch.randint(0, draw(st.integers(1, rows * cols)), (rows * cols,), generator=generator)
        tokens = tokens[:, kept].unflatten(1, (rows, cols))
    labels = torch.rand(rows, cols, draw(st.integers(1, 4)), generator=generator)
    return Clip(tokens, labels / labels.sum(-1, keepdim=True), protocol)


@dataclass(frozen=True)
class SquaresCase(Case):
    """Tokens that show what a patch holds: one channel each for background, object 1 and object 2."""

    def slot_tokens(self, slot: Slot) -> np.ndarray:
        frames = [square_mask(slot.grid.rows, slot.grid.cols, encoding.frame) for encoding in slot.encodings]
        return np.stack([np.eye(3, dtype=np.float16)[frame] for frame in frames])


def square_mask(rows: int, cols: int, frame: int) -> np.ndarray:
    """Object 1 walks right and object 2 left, one cell a frame."""
    mask = np.zeros((rows, cols), np.uint8)
    mask[: rows // 2, frame % cols] = 1
    mask[rows // 2 :, -1 - frame % cols] = 2
    return mask


def make_squares(root: Path, names: tuple[str, ...] = ("left", "right"), n_frames: int = 5) -> SquaresCase:
    """Write a DAVIS folder of 64x96 pixels under `root` and return it with its 4x6 tokens."""
    for name in names:
        frames, masks = (root / "DAVIS" / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(n_frames):
            mask = square_mask(4, 6, index).repeat(PATCH, 0).repeat(PATCH, 1)
            Image.fromarray(80 * mask).convert("RGB").save(frames / f"{index:05d}.jpg")
            write_mask(masks / f"{index:05d}.png", mask)
    manifest = build_manifest("davis", root / "DAVIS", root).manifest
    manifest = replace(manifest, videos=tuple(replace(video, fps=12.0) for video in manifest))
    plan = make_plan(manifest, FramesSettings(size="native"), patch=PATCH, dim=3)
    return SquaresCase(manifest, plan)
