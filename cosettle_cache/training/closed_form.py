"""Linear maps without training beside the spectral one: position removed, principal components, whitening.

A store comes in; a folder with the projection, its spectrum and a report goes out. `debias` needs the encoder
for one black image, the others one pass over the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from cosettle_cache.core.console import SILENT, Progress, counting
from cosettle_cache.core.errors import FingerprintError, InputError, UsageError
from cosettle_cache.core.files import own_folder
from cosettle_cache.core.parallel import upload
from cosettle_cache.core.settings import LinearSettings
from cosettle_cache.core.tables import write_json, write_table
from cosettle_cache.core.types import PlanKind
from cosettle_cache.heads.projection import Projection, projection_sha256, save_projection
from cosettle_cache.search.masked import unit_tokens
from cosettle_cache.store import FeatureStore
from cosettle_cache.training.log import projection_provenance

Matrix = Float64[Tensor, "dim dim"]
Directions = Float64[Tensor, "dim direction"]

#: Eigenvalues below this share of the largest are not amplified by whitening: rounding, not variance.
SMALLEST_SHARE = 1e-6
#: Bytes of tokens in float64 at a time.
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was computed from `n_tokens` tokens.

    `share` of the variance lies in the components: of the black image's for `debias`, else of the tokens'.
    """

    folder: Path
    head: str
    n_components: int
    dim: int
    share: float
    n_tokens: int
    seconds: float
    projection_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"folder": str(self.folder)}


def fit_linear(
    store: FeatureStore,
    settings: LinearSettings,
    out: Path,
    *,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> LinearReport:
    """Write the head `settings.head` of `store` into the folder `out`.

    * `debias` (INSID3, arXiv 2603.28480): unit tokens of one black image per grid, less their mean; its first
      K left singular vectors are taken out of every token.
    * `pca`: tokens less their mean, on their first K principal components.
    * `whiten`: the same, every component divided by its standard deviation, in the tokens' own axes.

    Raises `UsageError` for more components than the tokens have, `FingerprintError` for weights that are not
    the store's, `InputError` for tokens that are not finite.
    """
    started = time.perf_counter()
    found = linear_map(store, settings, device, progress)
    projection = Projection(len(found.matrix), settings.head)
    state = {"linears.0.weight": found.matrix, "linears.0.bias": found.bias}
    projection.load_state_dict({name: state[name] for name in projection.state_dict()})
    with own_folder(out, "projection fit"):
        report = LinearReport(
            folder=out,
            head=settings.head,
            n_components=found.n_components,
            dim=len(found.matrix),
            share=float(found.variances[: found.n_components].sum() / found.variances.sum()),
            n_tokens=found.n_tokens,
            seconds=time.perf_counter() - started,
            projection_sha256=projection_sha256(projection),
        )
        write_table(out / "spectrum.parquet", pa.table({"variance": found.variances.numpy()}))
        write_json(out / f"{settings.head}.json", report.to_json())
        figures = {"n_components": report.n_components, "share": report.share}
        provenance = projection_provenance([store], settings, **{settings.head: figures})
        save_projection(out / "projection.safetensors", projection, provenance)
    return report


class LinearMap(NamedTuple):
    """`matrix @ token + bias`, and what it was computed from."""

    matrix: Matrix
    bias: Float64[Tensor, " dim"]
    variances: Float64[Tensor, " component"]
    n_components: int
    n_tokens: int


def linear_map(
    store: FeatureStore, settings: LinearSettings, device: str, progress: Progress = SILENT
) -> LinearMap:
    """Return the map that `fit_linear` writes; raise what it raises."""
    dim = store.arrays[0].n_channels
    check_components(settings, dim)
    if settings.head == "debias":
        tokens = black_tokens(store, settings.weights, device)
        basis, values, mean = _positions(tokens)
        n_tokens = sum(len(part) for part in tokens)
    else:
        n_tokens, mean, covariance = covariance_of(store, device, progress)
        values, basis = (part.flip(-1) for part in torch.linalg.eigh(covariance))
        values = values.clamp_min(0)
    count = min(settings.components or DEFAULT_COMPONENTS[settings.head] or dim, len(values))
    kept, scale = basis[:, :count], torch.ones(count, dtype=torch.float64)
    if settings.head == "whiten":
        scale = values[:count].clamp_min(SMALLEST_SHARE * values[0]).rsqrt()
    matrix = (kept * scale) @ kept.T
    if settings.head == "debias":
        matrix = torch.eye(dim, dtype=torch.float64) - matrix
    return LinearMap(matrix, -(matrix @ mean), values, count, n_tokens)


#: Components where none are asked for: None is all.
DEFAULT_COMPONENTS: dict[str, int | None] = {"debias": 20, "pca": 128, "whiten": None}


def check_components(settings: LinearSettings, dim: int) -> None:
    """Raise `UsageError` for an unknown head or more components than tokens have channels."""
    if settings.head not in DEFAULT_COMPONENTS:
        raise UsageError("unknown head", wanted=" or ".join(DEFAULT_COMPONENTS), found=settings.head)
    if settings.components is not None and settings.components > dim:
        raise UsageError("more components than channels", wanted=f"at most {dim}", found=settings.components)


def black_tokens(store: FeatureStore, weights: str | None, device: str) -> list[Float32[Tensor, "token dim"]]:
    """Return the unit tokens of a black image at every grid of the store, less their mean per grid.

    The encoder is the store's own: the same name, weights, arithmetic and normalisation. Raises
    `FingerprintError` when the weights found are others.
    """
    # Only here: an encoder brings in timm and torchvision, seconds that no other head or training needs.
    from cosettle_cache.encoders import load_backbone

    encoder, fingerprint = store.encoder, store.fingerprint
    backbone = load_backbone(
        fingerprint.backbone,
        weights=weights or encoder.get("weights_argument"),
        heads=encoder.get("heads_argument"),
        device=device,
    )
    if backbone.weights_sha256 != fingerprint.weights_sha256:
        raise FingerprintError(
            f"these are not the weights that {store.path} was made with",
            wanted=f"weights {fingerprint.weights_sha256[:12]} ({fingerprint.backbone})",
            found=f"weights {backbone.weights_sha256[:12]}",
            hint="--weights FILE",
        )
    found = []
    for grid in {layout.grid: None for layout in store.arrays}:
        black = -torch.tensor(backbone.mean) / torch.tensor(backbone.std)
        image = black.view(1, 3, 1, 1).expand(1, 3, grid.rows * backbone.patch, grid.cols * backbone.patch)
        tokens = unit_tokens(backbone.encode(image.contiguous()).flatten(0, 2).float()).cpu()
        found.append(tokens - tokens.mean(0))
    return found


def _positions(tokens: list[Float32[Tensor, "token dim"]]) -> tuple[Directions, Tensor, Tensor]:
    """Return the left singular vectors of the centred tokens, the variance along each, and no mean."""
    vectors, values, _ = torch.linalg.svd(torch.cat(tokens).double().T, full_matrices=False)
    return vectors, values.square(), torch.zeros(len(vectors), dtype=torch.float64)


def covariance_of(
    store: FeatureStore, device: str, progress: Progress
) -> tuple[int, Float64[Tensor, " dim"], Matrix]:
    """Return the number of plain tokens in the store, their mean and their covariance, summed in float64."""
    dim = store.arrays[0].n_channels
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    products = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    n_tokens = 0
    for tokens in _plain_tokens(store, progress):
        part = upload(torch.from_numpy(tokens), torch.device(device)).flatten(0, -2).double()
        total += part.sum(0)
        products += part.T @ part
        n_tokens += len(part)
    if n_tokens < 2:
        raise InputError(f"{store.path} holds no two tokens", hint="run the extract command to its end")
    mean, products = (total / n_tokens).cpu(), products.cpu()
    covariance = products / n_tokens - torch.outer(mean, mean)
    if not covariance.isfinite().all():
        raise InputError(f"{store.path} holds tokens that are not finite", hint="cosettle-cache store verify")
    return n_tokens, mean, (covariance + covariance.T) / 2


def _plain_tokens(store: FeatureStore, progress: Progress) -> Iterator[np.ndarray]:
    """Yield the plain tokens of the store, a few encodings at a time, in an order that it alone decides."""
    size = max(1, _BATCH_BYTES // (8 * store.arrays[0].n_channels * store.arrays[0].grid.n_tokens))
    if store.plan_kind is PlanKind.PAIRS:
        ids = store.sample_ids
        with counting(progress, len(ids), "samples") as advance:
            for start in range(0, len(ids), size):
                chosen = ids[start : start + size]
                yield store.samples(chosen)[:, :2]
                advance(len(chosen))
    else:
        with counting(progress, len(store.video_ids), "videos") as advance:
            for video_id in store.video_ids:
                yield from store.stream_tokens(video_id)
                advance()
