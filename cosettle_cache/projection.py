"""The trained heads: what they compute, how they start, how they lie on disk and what identifies them.

Tokens `[... dim]` go in and come out. Files are our own safetensors with provenance, or checkpoints of the
authors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cosettle_cache.errors import CheckpointError, UsageError
from cosettle_cache.files import write_durably

#: Key of the safetensors metadata under which our own files keep one JSON document. One key, because
#: safetensors writes several in random order and equal projections shall give equal files.
METADATA_KEY = "cosettle-cache.projection.1"


@dataclass(frozen=True, slots=True)
class Head:
    """Linear maps with Tanh between them, Tanh after the last one if `final_tanh`, then LayerNorm."""

    n_linears: int
    final_tanh: bool


#: `linear`, `mlp2`, `mlp3` as released; `affine` is the paper's map, without Tanh (PROTOCOLS 7.1.5).
HEADS: Mapping[str, Head] = {
    "linear": Head(1, final_tanh=True),
    "affine": Head(1, final_tanh=False),
    "mlp2": Head(2, final_tanh=False),
    "mlp3": Head(3, final_tanh=False),
}


class Projection(nn.Module):
    """A per-token map of `dim` channels to `dim` channels.

    The weights are drawn from `seed` alone by the rule named `init` (`released_init` knows a backbone's);
    LayerNorm starts as the identity.
    """

    def __init__(self, dim: int, head: str = "linear", *, init: str = "trunc_normal", seed: int = 0) -> None:
        super().__init__()
        self.dim, self.head = dim, head
        shape = find_head(head)
        self._final_tanh = shape.final_tanh
        # Built without values: PyTorch's own initialisation would draw from (and move) the global generator.
        linears = [nn.Linear(dim, dim, device="meta").to_empty(device="cpu") for _ in range(shape.n_linears)]
        generator = torch.Generator().manual_seed(seed)
        for linear in linears:
            find_init(init)(linear, generator)
        self.linears = nn.ModuleList(linears)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Float[Tensor, "*token dim"]) -> Float[Tensor, "*token dim"]:
        """Project every token on its own."""
        last = len(self.linears) - 1
        for number, linear in enumerate(self.linears):
            tokens = linear(tokens)
            if number < last or self._final_tanh:
                tokens = tokens.tanh()
        normed: Tensor = self.norm(tokens)
        return normed


def find_head(name: str) -> Head:
    """Return the head called `name`; raise `UsageError` when there is none."""
    if name not in HEADS:
        raise UsageError("unknown head", wanted=" or ".join(HEADS), found=name)
    return HEADS[name]


@torch.no_grad()
def _init_trunc_normal(linear: nn.Linear, generator: Generator) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
    nn.init.zeros_(linear.bias)


@torch.no_grad()
def _init_xavier_uniform(linear: nn.Linear, generator: Generator) -> None:
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)


@torch.no_grad()
def _init_pytorch(linear: nn.Linear, generator: Generator) -> None:
    bound = 1 / math.sqrt(linear.in_features)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)


#: How a head can start: truncated normal (0.02), Xavier uniform, or PyTorch's own rule.
INITS: Mapping[str, Callable[[nn.Linear, Generator], None]] = {
    "trunc_normal": _init_trunc_normal,
    "xavier_uniform": _init_xavier_uniform,
    "pytorch": _init_pytorch,
}

_INIT_BY_FAMILY = {"mae": "xavier_uniform", "mocov3": "xavier_uniform", "clip": "pytorch"}


def released_init(backbone: str) -> str:
    """Return the init that the released code gives a head on `backbone` (`mae_b`, say; PROTOCOLS 7.1.6)."""
    family, _, _ = backbone.partition("_")
    return _INIT_BY_FAMILY.get(family, "trunc_normal")


def find_init(name: str) -> Callable[[nn.Linear, Generator], None]:
    """Return the initialisation called `name`; raise `UsageError` when there is none."""
    if name not in INITS:
        raise UsageError("unknown init", wanted=" or ".join(INITS), found=name)
    return INITS[name]


def projection_sha256(projection: Projection) -> str:
    """Return the hex SHA-256 of the head's name and of every tensor's name, shape and bytes."""
    sha = hashlib.sha256(projection.head.encode())
    for name, tensor in sorted(projection.state_dict().items()):
        sha.update(json.dumps([name, list(tensor.shape)]).encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def save_projection(path: Path, projection: Projection, provenance: Mapping[str, str]) -> None:
    """Write our own file: float32 tensors, the head, and where they come from; equal inputs, equal bytes."""
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    document = {"head": projection.head, "provenance": dict(provenance)}
    metadata = {METADATA_KEY: json.dumps(document, sort_keys=True)}
    write_durably(path, [safetensors.torch.save(tensors, metadata)])


def load_projection(path: Path, *, dim: int | None = None) -> Projection:
    """Return the projection in our own file or in a checkpoint of the authors, on the CPU, ready for use.

    Raises `CheckpointError` when the file holds none, or one of another width than `dim` where that is given.
    """
    document = _read_document(path)
    if document is None:
        head, tensors = _from_authors(path)
    else:
        head, tensors = document.head, safetensors.torch.load_file(path)
    projection = _assemble(path, head, tensors)
    if dim is not None and projection.dim != dim:
        raise CheckpointError(f"{path} projects tokens of another width", wanted=dim, found=projection.dim)
    return projection.eval()


def read_provenance(path: Path) -> dict[str, str]:
    """Return what `save_projection` was told of the projection's origin; empty for the authors' files."""
    document = _read_document(path)
    return {} if document is None else dict(document.provenance)


@dataclass(frozen=True, slots=True)
class _Document:
    head: str
    provenance: Mapping[str, str]


def _read_document(path: Path) -> _Document | None:
    """Return what our own file says of itself, or None for any other file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", wanted="a projection or a checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except safetensors.SafetensorError:
        return None
    return None if text is None else _Document(**json.loads(text))


def _from_authors(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return head and tensors under our names; one linear map means `linear`, which is what was released."""
    from cosettle_cache.backbones.checkpoints import adapter_tensors

    tensors = {_our_name(name): tensor for name, tensor in adapter_tensors(path).items()}
    n_linears = sum(name.startswith("linears.") and name.endswith(".weight") for name in tensors)
    head = {1: "linear", 2: "mlp2", 3: "mlp3"}.get(n_linears)
    if head is None:
        raise CheckpointError(f"{path} holds no projection", wanted="one to three adapter_linear tensors")
    return head, tensors


def _our_name(name: str) -> str:
    """`adapter_linear2.bias` is `linears.1.bias`, `adapter_layer_norm1.bias` is `norm.bias`."""
    module, _, leaf = name.rpartition(".")
    if module == "adapter_layer_norm1":
        return f"norm.{leaf}"
    number = module.removeprefix("adapter_linear") or "1"
    return f"linears.{int(number) - 1}.{leaf}" if number.isdigit() else name


def _assemble(path: Path, head: str, tensors: Mapping[str, Tensor]) -> Projection:
    if "norm.weight" not in tensors or head not in HEADS:
        raise CheckpointError(f"{path} holds no projection", wanted="a head and its LayerNorm", found=head)
    projection = Projection(len(tensors["norm.weight"]), head)
    wanted = {name: tuple(tensor.shape) for name, tensor in projection.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise CheckpointError(f"{path} does not fit the {head} head", wanted=wanted, found=found)
    projection.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return projection
