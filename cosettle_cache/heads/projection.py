"""Projections: what they compute, how they start, how they lie on disk and what identifies them.

Tokens `[... dim]` go in and come out. Files are our own safetensors with provenance, or checkpoints of the
authors, into whose layout a projection can also be exported.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from cosettle_cache.core.errors import CheckpointError, UsageError
from cosettle_cache.core.files import own_file, parse_json, write_durably
from cosettle_cache.core.hub import local_file
from cosettle_cache.encoders.checkpoints import adapter_tensors, check_weights
from cosettle_cache.heads.table import HEADS, RELEASED_HEADS, find_head, split_share
from cosettle_cache.search.masked import unit_tokens

#: Key of the safetensors metadata under which our own files keep one JSON document. One key, because
#: safetensors writes several in random order and equal projections shall give equal files.
METADATA_KEY = "cosettle-cache.projection.1"

#: Layouts that a projection can be exported to.
_FORMATS = ("cosettle",)

#: How a head can start: truncated normal (0.02), Xavier uniform, PyTorch's own rule, or the identity.
INITS = ("trunc_normal", "xavier_uniform", "pytorch", "identity")

_INIT_BY_FAMILY = {"mae": "xavier_uniform", "mocov3": "xavier_uniform", "clip": "pytorch"}


class Projection(nn.Module):
    """A per-token map of `dim` channels to `dim` channels.

    The weights are drawn from `seed` alone by the rule named `init` (`released_init` knows a backbone's);
    LayerNorm starts as the identity, and so does a head in closed form, which draws nothing.

    With a `share` below 1 the result has `width` 2 dim channels, the unit raw token times sqrt(1 - share)
    and the unit projected one times sqrt(share): its cosines are the raw and the projected ones, blended.
    """

    share = 1.0

    def __init__(self, dim: int, head: str = "linear", *, init: str = "trunc_normal", seed: int = 0) -> None:
        super().__init__()
        self.dim, self.head = dim, head
        row = find_head(head)
        self._final_tanh = row.final_tanh
        # Built without values: PyTorch's own initialisation would draw from (and move) the global generator.
        self.linears = nn.ModuleList(
            nn.Linear(dim, dim, bias=row.bias, device="meta").to_empty(device="cpu")
            for _ in range(row.n_linears)
        )
        self.norm = nn.Identity() if row.closed_form else nn.LayerNorm(dim)
        if init not in INITS:
            raise UsageError("unknown init", wanted=" or ".join(INITS), found=init)
        generator = torch.Generator().manual_seed(seed)
        for linear in self.linears:
            _start(linear, "identity" if row.closed_form else init, generator)

    @property
    def width(self) -> int:
        """Channels of a projected token."""
        return self.dim if self.share == 1 else 2 * self.dim

    def forward(
        self, tokens: Float[Tensor, "*token dim"], first: Float[Tensor, "*token dim"] | None = None
    ) -> Float[Tensor, "*token width"]:
        """Project every token on its own; `first` is what the first linear map gives, if that is known."""
        raw, last = tokens, len(self.linears) - 1
        for number, linear in enumerate(self.linears):
            assert isinstance(linear, nn.Linear)
            tokens = first if first is not None and number == 0 else _map(linear, tokens)
            if number < last or self._final_tanh:
                tokens = tokens.tanh()
        normed: Tensor = self.norm(tokens)
        if self.share == 1:
            return normed
        parts = [math.sqrt(1 - self.share) * unit_tokens(raw), math.sqrt(self.share) * unit_tokens(normed)]
        return torch.cat(parts, -1)


def _map(linear: nn.Linear, tokens: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
    """Apply a linear map; in float32 on a CPU as the convolution that it is, with a kernel of one token.

    That goes to oneDNN, which uses AVX-512 on any CPU that has it; the library behind `linear` does not on
    some, and takes twice as long.
    """
    convolve = tokens.device.type == "cpu" and tokens.dtype == torch.float32 and tokens.numel() > 0
    if not convolve or not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu"):
        return F.linear(tokens, linear.weight, linear.bias)
    images = tokens.reshape(1, -1, 1, linear.in_features).permute(0, 3, 1, 2)
    mapped = F.conv2d(images, linear.weight[:, :, None, None], linear.bias)
    return mapped.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], linear.out_features)


@torch.no_grad()
def _start(linear: Any, init: str, generator: Generator) -> None:
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    if init == "identity":
        nn.init.eye_(linear.weight)
    elif init == "trunc_normal":
        nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
    elif init == "xavier_uniform":
        nn.init.xavier_uniform_(linear.weight, generator=generator)
    else:
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)


def released_init(backbone: str) -> str:
    """Return the init that the released code gives a head on `backbone` (`mae_b`, say; PROTOCOLS 7.1.6)."""
    return _INIT_BY_FAMILY.get(backbone.partition("_")[0], "trunc_normal")


def projection_sha256(projection: Projection) -> str:
    """Return the hex SHA-256 of the head's name and share and of every tensor's name, shape and bytes."""
    blend = "" if projection.share == 1 else f":{projection.share}"
    sha = hashlib.sha256(f"{projection.head}{blend}".encode())
    for name, tensor in sorted(projection.state_dict().items()):
        sha.update(json.dumps([name, list(tensor.shape)]).encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def save_projection(path: str | Path, projection: Projection, provenance: Mapping[str, str]) -> None:
    """Write our own file: float32 tensors, the head, and where they come from; equal inputs, equal bytes."""
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    document = {"head": projection.head, "provenance": dict(provenance)}
    metadata = {METADATA_KEY: json.dumps(document, sort_keys=True)}
    write_durably(Path(path), [safetensors.torch.save(tensors, metadata)])


def load_projection(path: str | Path, *, dim: int | None = None, blended: bool = True) -> Projection:
    """Return the projection in our own file or in a checkpoint of the authors, on the CPU, ready for use.

    `FILE:SHARE` blends it with the raw tokens. Here and in every function that reads one, an `hf:` name is a
    file of the hub. Raises `CheckpointError` when the file holds none, or one of another width than `dim`
    where that is given, `UsageError` for a share that is none, and for a blend, which is wider than raw
    tokens, unless one may be `blended`.
    """
    named, (path, share) = path, split_share(path)
    if share < 1 and not blended:
        raise UsageError("a blend is wider than raw tokens", wanted="a whole projection", found=named)
    document = _read_document(path)
    if document is None:
        head, tensors = _from_authors(path)
    else:
        head, tensors = document["head"], safetensors.torch.load_file(local_file(path))
        check_weights(path, tensors)
    first = tensors.get("linears.0.weight")
    if first is None or first.ndim != 2 or head not in HEADS:
        raise CheckpointError(f"{path} holds no projection", wanted="a head and its linear maps", found=head)
    projection = Projection(first.shape[1], head)
    wanted = {name: tuple(tensor.shape) for name, tensor in projection.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise CheckpointError(f"{path} does not fit the {head} head", wanted=wanted, found=found)
    if dim is not None and projection.dim != dim:
        raise CheckpointError(f"{path} projects tokens of another width", wanted=dim, found=projection.dim)
    projection.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    projection.share = share
    return projection.eval()


def read_provenance(path: str | Path) -> dict[str, str]:
    """Return what `save_projection` was told of the projection's origin; empty for the authors' files."""
    document = _read_document(split_share(path)[0])
    return {} if document is None else dict(document["provenance"])


@dataclass(frozen=True, slots=True)
class SingularValues:
    """The singular values of one linear map in three figures, and how many are not numerically zero."""

    largest: float
    median: float
    smallest: float
    rank: int


@dataclass(frozen=True, slots=True)
class ProjectionInfo:
    """What a projection file holds; `layout` is whose file it is (`cosettle-cache` or `cosettle`)."""

    layout: str
    head: str
    dim: int
    n_parameters: int
    sha256: str
    singular_values: tuple[SingularValues, ...]
    provenance: Mapping[str, str]


@torch.no_grad()
def describe_projection(path: str | Path) -> ProjectionInfo:
    """Return what is in our own file or in a checkpoint of the authors."""
    projection, values = load_projection(path, blended=False), []
    for matrix in (item for item in projection.parameters() if item.ndim == 2):
        found = torch.linalg.svdvals(matrix.double())
        rank = int((found > found[0] * len(matrix) * torch.finfo(matrix.dtype).eps).sum())
        values.append(SingularValues(found[0].item(), found.median().item(), found[-1].item(), rank))
    return ProjectionInfo(
        layout="cosettle" if _read_document(path) is None else "cosettle-cache",
        head=projection.head,
        dim=projection.dim,
        n_parameters=sum(item.numel() for item in projection.parameters()),
        sha256=projection_sha256(projection),
        singular_values=tuple(values),
        provenance=read_provenance(path),
    )


def export_projection(path_in: str | Path, path_out: str | Path, format: str = "cosettle") -> None:
    """Write the projection of one file in another layout, the projection alone; the values stay bit for bit.

    `cosettle` is the authors' checkpoint: a dictionary whose `model` holds the tensors by their names. Raises
    `UsageError` for an unknown layout and where there is another file, `CheckpointError` for a head that the
    layout has no names for.
    """
    buffer = io.BytesIO()
    torch.save({"model": exported_tensors(path_in, format)}, buffer)
    own_file(
        Path(path_out),
        "the same projection",
        lambda file: file.read_bytes() == buffer.getbuffer(),
        [Path(path_in)],
    )
    write_durably(Path(path_out), [buffer.getbuffer()])


def exported_tensors(path: str | Path, format: str = "cosettle") -> dict[str, Tensor]:
    """Return the tensors that `export_projection` would write, by their names there."""
    if format not in _FORMATS:
        raise UsageError(f"there is no layout {format!r}", wanted=" or ".join(_FORMATS), found=format)
    projection = load_projection(path, blended=False)
    if not HEADS[projection.head].released:
        raise CheckpointError(
            f"{path} holds the head {projection.head}, which the authors' layout cannot tell from theirs",
            wanted=" or ".join(RELEASED_HEADS.values()),
            found=projection.head,
            hint="load it with cosettle_cache.load_projection, or train one of these heads",
        )
    # The authors' CLIP keeps its projection inside the visual tower (PROTOCOLS 7.5).
    is_clip = read_provenance(path).get("backbone", "").partition("_")[0] == "clip"
    prefix = "visual.adapter.adapter." if is_clip else "adapter.adapter."
    several = len(projection.linears) > 1
    state = projection.state_dict().items()
    return {prefix + _authors_name(name, several): tensor.contiguous() for name, tensor in state}


def _authors_name(name: str, several: bool) -> str:
    """`linears.1.bias` is `adapter_linear2.bias`, `norm.bias` is `adapter_layer_norm1.bias`.

    A linear map that is alone has no number.
    """
    if name.startswith("norm."):
        return f"adapter_layer_norm1.{name.removeprefix('norm.')}"
    _, number, leaf = name.split(".")
    return f"adapter_linear{int(number) + 1 if several else ''}.{leaf}"


def _our_name(name: str) -> str:
    """Return the inverse of `_authors_name`."""
    module, _, leaf = name.rpartition(".")
    if module == "adapter_layer_norm1":
        return f"norm.{leaf}"
    number = module.removeprefix("adapter_linear") or "1"
    return f"linears.{int(number) - 1}.{leaf}" if number.isdigit() else name


def _read_document(path: str | Path) -> Mapping[str, Any] | None:
    """Return what our own file says of itself (`head`, `provenance`), or None for any other file."""
    local = local_file(path)
    if not local.is_file():
        raise CheckpointError(f"{path} does not exist", wanted="a projection or a checkpoint")
    try:
        with safetensors.safe_open(local, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except safetensors.SafetensorError:
        return None
    if text is None:
        return None
    document: dict[str, Any] = parse_json(text, f"the description in {path}")
    origin = document.get("provenance") if isinstance(document, dict) else None
    whole = isinstance(origin, dict) and all(isinstance(text, str) for text in origin.values())
    if not whole or not isinstance(document.get("head"), str):
        raise CheckpointError(f"{path} holds no projection", wanted="head and provenance", found=text[:100])
    return document


def _from_authors(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return head and tensors under our names; one linear map means `linear`, which is what was released."""
    tensors = {_our_name(name): tensor for name, tensor in adapter_tensors(path).items()}
    n_linears = sum(name.startswith("linears.") and name.endswith(".weight") for name in tensors)
    if n_linears not in RELEASED_HEADS:
        raise CheckpointError(f"{path} holds no projection", wanted="one to three adapter_linear tensors")
    return RELEASED_HEADS[n_linears], tensors
