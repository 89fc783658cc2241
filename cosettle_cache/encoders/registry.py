"""The table of published encoders: their sizes, and where their weights and licences are.

Plain data without torch, so that listing and planning cost nothing.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import Grid
from cosettle_cache.encoders.families import FAMILIES, IMAGENET_MEAN, IMAGENET_STD, Family

#: Prefix of the names of timm's own models.
TIMM_PREFIX = "timm/"
#: The value of `weights` that asks for seeded random ones.
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a ViT; `grid` is the position embedding's own, `hidden` the width of the MLP."""

    width: int
    depth: int
    heads: int
    patch: int
    grid: Grid
    hidden: int
    registers: int = 0
    layer_scale: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Where a published file lies: a repository of the Hugging Face hub, or an address.

    Neither: the file is not published at a public address, and `file` says what it is called. `sha256` is
    checked where its publisher states it.
    """

    file: str
    licence: str
    hub_id: str = ""
    url: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"{self.hub_id}/{self.file}" if self.hub_id else self.url or f"{self.file} (no public address)"


@dataclass(frozen=True, slots=True)
class NamedBackbone:
    """A published encoder that loads by name."""

    name: str
    family: Family
    architecture: Architecture
    source: Source

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the encoder, position embedding included."""
        return n_parameters(self.family, self.architecture)


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What is known of an encoder before its weights are loaded; `grid` is that of its default image size."""

    name: str
    family: str
    dim: int
    patch: int
    grid: Grid
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def image_size(self) -> tuple[int, int]:
        """Default height and width in pixels."""
        return self.grid.rows * self.patch, self.grid.cols * self.patch


def _vit(
    width: int, depth: int, heads: int, patch: int, side: int, registers: int = 0, layer_scale: bool = False
) -> Architecture:
    return Architecture(
        width, depth, heads, patch, Grid(side, side), 4 * width, registers=registers, layer_scale=layer_scale
    )


_S16, _B16, _L16 = _vit(384, 12, 6, 16, 14), _vit(768, 12, 12, 16, 14), _vit(1024, 24, 16, 16, 14)
_S8, _B8 = _vit(384, 12, 6, 8, 28), _vit(768, 12, 12, 8, 28)
#: Both MAE's and I-JEPA's ViT-H have 16 heads of 80 channels, not width / 64.
_H14, _H16_448 = _vit(1280, 32, 16, 14, 16), _vit(1280, 32, 16, 16, 28)

#: MoCo v3's ViT-S has 12 heads of 32 channels.
_MOCO_S16 = _vit(384, 12, 12, 16, 14)
#: The paper's own DINOv2.
_DINOV2_B16 = _vit(768, 12, 12, 16, 14, registers=4, layer_scale=True)

_META = "https://dl.fbaipublicfiles.com/"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/"
_BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
_CLIP = "https://openaipublic.azureedge.net/clip/models/"
_CLIP_B16 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_NC, _APACHE, _BSD, _MIT = "CC-BY-NC-4.0", "Apache-2.0", "BSD-3-Clause", "MIT"

Row = tuple[str, str, Architecture, Source]


def _hub(model: str, licence: str) -> Source:
    return Source("model.safetensors", licence, hub_id=f"timm/{model}")


def _url(base: str, path: str, licence: str, sha256: str = "") -> Source:
    return Source(path.rsplit("/", maxsplit=1)[-1], licence, url=base + path, sha256=sha256)


def _clip(sha256: str, file: str) -> Source:
    return _url(_CLIP, f"{sha256}/{file}", _MIT, sha256)


def _metas_dinov2(size: str, width: int, depth: int, registers: int = 0) -> Row:
    sizes = _vit(width, depth, width // 64, 14, 37, registers, layer_scale=True)
    suffix, file = ("_reg", f"_reg{registers}") if registers else ("", "")
    path = f"dinov2/dinov2_vit{size}/dinov2_vit{size}{file}_pretrain.pth"
    return f"dinov2_{size}{suffix}", "dinov2", sizes, _url(_META, path, _APACHE)


_ROWS: tuple[Row, ...] = (
    ("mae_b", "mae", _B16, _hub("vit_base_patch16_224.mae", _NC)),
    ("mae_l", "mae", _L16, _hub("vit_large_patch16_224.mae", _NC)),
    ("mae_h", "mae", _H14, _hub("vit_huge_patch14_224.mae", _NC)),
    ("ijepa_b", "ijepa", _B16, Source("ijepa-ep800.pth.tar", "not stated")),
    ("ijepa_h14", "ijepa", _H14, _url(_META, "ijepa/IN1K-vit.h.14-300e.pth.tar", _NC)),
    ("ijepa_h16_448", "ijepa", _H16_448, _url(_META, "ijepa/IN1K-vit.h.16-448px-300e.pth.tar", _NC)),
    ("clip_b", "clip", _B16, _clip(_CLIP_B16, "ViT-B-16.pt")),
    ("clip_l14", "clip", _vit(1024, 24, 16, 14, 16), _clip(_CLIP_L14, "ViT-L-14.pt")),
    ("blip_b", "blip", _B16, _url(_BLIP, "model_base_retrieval_coco.pth", _BSD)),
    ("blip_l", "blip", _L16, _url(_BLIP, "model_large_retrieval_coco.pth", _BSD)),
    ("mocov3_b", "mocov3", _B16, _url(_META, "moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", _NC)),
    ("mocov3_s", "mocov3", _MOCO_S16, _url(_META, "moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", _NC)),
    ("dino_b", "dino", _B16, _hub("vit_base_patch16_224.dino", _APACHE)),
    ("dino_b8", "dino", _B8, _hub("vit_base_patch8_224.dino", _APACHE)),
    ("dino_s", "dino", _S16, _hub("vit_small_patch16_224.dino", _APACHE)),
    ("dino_s8", "dino", _S8, _hub("vit_small_patch8_224.dino", _APACHE)),
    ("ibot_b", "ibot", _B16, _url(_IBOT, "vitb_16/checkpoint_teacher.pth", _APACHE)),
    ("ibot_s", "ibot", _S16, _url(_IBOT, "vits_16/checkpoint_teacher.pth", _APACHE)),
    ("ibot_l", "ibot", _L16, _url(_IBOT, "vitl_16/checkpoint_teacher.pth", _APACHE)),
    ("dinov2_b", "dinov2", _DINOV2_B16, Source("checkpoint.pth", "not stated")),
    _metas_dinov2("s14", 384, 12),
    _metas_dinov2("b14", 768, 12),
    _metas_dinov2("l14", 1024, 24),
    _metas_dinov2("s14", 384, 12, registers=4),
    _metas_dinov2("b14", 768, 12, registers=4),
    _metas_dinov2("l14", 1024, 24, registers=4),
)
BACKBONES: dict[str, NamedBackbone] = {
    name: NamedBackbone(name, FAMILIES[family], architecture, source)
    for name, family, architecture, source in _ROWS
}


def n_parameters(family: Family, architecture: Architecture) -> int:
    """Return the number of parameters of an encoder, with its own position embedding."""
    width, hidden = architecture.width, architecture.hidden
    block = 4 * width * width + 2 * width * hidden + 9 * width + hidden
    block += 2 * width if architecture.layer_scale else 0
    embed = 3 * architecture.patch**2 * width + (0 if family.pre_norm else width)
    prefix = int(family.class_token) + architecture.registers
    positions = architecture.grid.n_tokens + prefix
    norms = 4 * width if family.pre_norm else 2 * width
    return architecture.depth * block + embed + positions * width + norms


def make_info(name: str, family: Family, architecture: Architecture) -> BackboneInfo:
    """Return the description of an encoder of a family."""
    sizes = architecture
    return BackboneInfo(name, family.name, sizes.width, sizes.patch, sizes.grid, IMAGENET_MEAN, IMAGENET_STD)


def family_of(name: str) -> Family:
    """Return the family of a published encoder's name or of a family's own name."""
    if name in BACKBONES:
        return BACKBONES[name].family
    if name in FAMILIES:
        return FAMILIES[name]
    close = difflib.get_close_matches(name, [*BACKBONES, *FAMILIES], n=1)
    raise UsageError(
        f"there is no backbone named {name!r}",
        wanted="a name of the table, a family with a weights file, or timm/<model id>",
        found=name,
        hint=f"did you mean {close[0]}?" if close else "cosettle-cache backbones lists them",
    )


def sizeless(name: str) -> UsageError:
    """Return the error for a family's name without a weights file to take the sizes from."""
    sizes = [row.name for row in BACKBONES.values() if row.family.name == name]
    return UsageError(
        f"{name} is a family: its sizes come from a weights file",
        wanted=f"{name} with --weights FILE, or one of {', '.join(sizes)}",
        found=name,
    )
