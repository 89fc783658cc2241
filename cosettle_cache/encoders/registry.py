"""The encoder families and the published encoders; plain data, nothing here needs torch.

A `Family` row says what the released forward does (PROTOCOLS 7.4) and how its files are laid out; what it
does differently from a plain pre-norm ViT is a named field here and nowhere else. A `NamedBackbone` row adds
sizes, weights and licence. Co-Settle's eight families are computed as released; those of `TIMM_FAMILIES`
came later and are computed as timm does.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import Grid

#: The released code normalises the images of all eight families with these (PROTOCOLS 7.3).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PositionResize(StrEnum):
    """How the position embedding is brought to another grid; always bicubic, never at its own grid."""

    SCALE_FACTOR = "bicubic by the factor (n + 0.1) / grid"
    ANTIALIAS = "bicubic to the exact size with antialias"


@dataclass(frozen=True, slots=True)
class Family:
    """One code base of encoders: the published layout of its files and the released forward.

    `stem` is the name prefix of the encoder's tensors in a published file (looked for after `module.`);
    where no name has it the file is taken as bare. `renames` are (published, timm) pairs of name parts.
    `ignored` are known tensors of the encoder that the forward does not use, `outside` known tensors
    beside the stem (regular expressions, both). A file without `required` (timm name) is of another
    family. `sine_positions`: fixed sine-cosine positions, which tells otherwise equal layouts apart.
    `file_pixels`: positions for another image size are brought to this one when a file is loaded.
    `norm_plain`: plain encodings pass the final LayerNorm, as shifted ones always do.
    """

    name: str
    title: str
    citation: str
    token_rule: str = "patch tokens after the final norm"  # noqa: S105
    resize: PositionResize = PositionResize.ANTIALIAS
    norm_plain: bool = True
    class_token: bool = True
    pre_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    stem: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    required: str = ""
    sine_positions: bool = False
    file_pixels: int | None = None
    quirks: tuple[str, ...] = ()


_HEAD = r"^head\."
_CLIP_RENAMES = (
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("conv1.weight", "patch_embed.proj.weight"),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
)
_CLIP_TEXT = (
    r"^(transformer|token_embedding|ln_final)\.",
    r"^(positional_embedding|text_projection|logit_scale|input_resolution|context_length|vocab_size)$",
)
_SINCOS = "positions are fixed sine-cosine values, read from the file"
_SCALE = "other sizes: positions by scale factor (n + 0.1) / grid, bicubic, no antialias"
_EXACT = "other sizes: positions to the exact size, bicubic with antialias"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mae",
            "MAE",
            "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
            resize=PositionResize.SCALE_FACTOR,
            ignored=(_HEAD, r"^decoder_", r"^mask_token$"),
            sine_positions=True,
            quirks=(
                _SINCOS,
                _SCALE,
                "the authors' adapter path keeps CLS and cannot leave 224 px; neither is followed here",
            ),
        ),
        Family(
            "ijepa",
            "I-JEPA",
            "Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive "
            "Architecture, CVPR 2023",
            "patch tokens without the final norm; shifted encodings with it",
            PositionResize.SCALE_FACTOR,
            norm_plain=False,
            class_token=False,
            ignored=(_HEAD,),
            sine_positions=True,
            quirks=(
                _SINCOS,
                _SCALE,
                "no CLS token",
                "the final norm is missing in plain encodings and present in shifted ones",
            ),
        ),
        Family(
            "clip",
            "CLIP",
            "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, "
            "ICML 2021",
            "patch tokens after ln_post, without the projection",
            pre_norm=True,
            activation="quick_gelu",
            norm_eps=1e-5,
            stem="visual.",
            renames=_CLIP_RENAMES,
            ignored=(r"^proj$",),
            outside=_CLIP_TEXT,
            required="norm_pre.weight",
            quirks=(
                _EXACT,
                "ln_post on patch tokens, no projection to the joint space",
                "QuickGELU, ln_pre, patch embedding without bias",
                "weights computed in float32 (the released GPU path is half precision)",
                "ImageNet mean and std instead of CLIP's own, as released",
            ),
        ),
        Family(
            "blip",
            "BLIP",
            "Li et al., BLIP: Bootstrapping Language-Image Pre-training, ICML 2022",
            stem="visual_encoder.",
            ignored=(_HEAD,),
            outside=(
                r"^(text_encoder|text_encoder_m|text_decoder|visual_encoder_m)\.",
                r"^(vision_proj|text_proj)(_m)?\.|^itm_head\.",
                r"^(temp|image_queue|text_queue|ptr_queue|idx_queue|queue_ptr)$",
            ),
            file_pixels=224,
            quirks=(
                "the file's 24x24 positions (384 px) become 14x14 at load: bicubic, no antialias",
                _EXACT,
                "the published file is the COCO retrieval model",
                "ImageNet mean and std instead of BLIP's own, as released",
            ),
        ),
        Family(
            "mocov3",
            "MoCo v3",
            "Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021",
            resize=PositionResize.SCALE_FACTOR,
            stem="momentum_encoder.",
            ignored=(_HEAD,),
            outside=(r"^(base_encoder|predictor)\.",),
            sine_positions=True,
            quirks=(_SINCOS, _SCALE, "the momentum encoder is used, not the base encoder"),
        ),
        Family(
            "dino",
            "DINO",
            "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021",
            resize=PositionResize.SCALE_FACTOR,
            stem="backbone.",
            ignored=(_HEAD,),
            outside=(_HEAD,),
            quirks=(_SCALE,),
        ),
        Family(
            "ibot",
            "iBOT",
            "Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, ICLR 2022",
            resize=PositionResize.SCALE_FACTOR,
            stem="backbone.",
            ignored=(_HEAD, r"^masked_embed$"),
            outside=(_HEAD,),
            quirks=(_SCALE, "the teacher; masked modelling off"),
        ),
        Family(
            "dinov2",
            "DINOv2",
            "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR 2024; "
            "Darcet et al., Vision Transformers Need Registers, ICLR 2024",
            "patch tokens after the final norm, registers dropped",
            stem="backbone.",
            renames=(("register_tokens", "reg_token"),),
            ignored=(_HEAD, r"^mask_token$"),
            outside=(r"^(dino_head|ibot_head)\.",),
            required="blocks.0.ls1.gamma",
            quirks=(
                _EXACT,
                "registers (4 in the paper's model): in attention, without position, not returned",
                "LayerScale",
                "the paper's model is the authors' own ViT-B/16, not Meta's ViT-B/14",
            ),
        ),
    )
}


TIMM_TOKENS = "patch tokens of timm's forward_features"
_OWN_MEAN = "normalised with its own mean and std"
DINOV3 = Family(
    "dinov3",
    "DINOv3",
    "Siméoni et al., DINOv3, 2025 (arXiv 2508.10104)",
    TIMM_TOKENS,
    norm_eps=1e-5,
    ignored=(_HEAD, r"^mask_token$", r"^local_cls_norm\.", r"\.bias_mask$", r"^(dino|ibot)_head\."),
    quirks=(
        "rotary positions; their periods are rounded to bfloat16 as in Meta's files, timm's own are not",
        "the weights that timm publishes are open; Meta's own repositories ask for a form",
    ),
)


def _series(name: str, title: str, citation: str, *quirks: str) -> Family:
    return Family(name, title, citation, TIMM_TOKENS, quirks=quirks)


#: Families that are computed by timm's model; only `dinov3` takes its sizes from a file.
TIMM_FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        DINOV3,
        _series(
            "dinov2_giant",
            "DINOv2 ViT-g",
            "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, TMLR 2024",
            "SwiGLU; timm's forward",
        ),
        _series(
            "eupe",
            "EUPE",
            "Efficient Universal Perception Encoder (EUPE), Meta, 2026",
            "DINOv3's architecture; rotary positions with timm's float32 periods",
        ),
        _series(
            "radio",
            "C-RADIOv3",
            "Heinrich et al., RADIOv2.5: Improved Baselines for Agglomerative Vision Foundation Models, "
            "CVPR 2025",
            _OWN_MEAN,
            "no final norm; eight prefix tokens",
        ),
        _series(
            "tipsv2",
            "TIPSv2",
            "Cao et al., TIPSv2: Advancing Vision-Language Pretraining with Enhanced Patch-Text Alignment, "
            "CVPR 2026",
            "pixels from 0 to 1, no mean",
        ),
        _series(
            "pe_spatial",
            "PE-spatial",
            "Bolya et al., Perception Encoder: The best visual embeddings are not at the output of the "
            "network, 2025",
            _OWN_MEAN,
            "no final norm; absolute and rotary positions",
        ),
        _series(
            "siglip2", "SigLIP 2", "Tschannen et al., SigLIP 2, 2025 (arXiv 2502.14786)", _OWN_MEAN, "no CLS"
        ),
        _series(
            "aimv2",
            "AIMv2",
            "Fini et al., Multimodal Autoregressive Pre-training of Large Vision Encoders, CVPR 2025",
            _OWN_MEAN,
            "no CLS",
        ),
    )
}

#: Prefix of the names of timm's own models.
TIMM_PREFIX = "timm/"
#: The value of `weights` that asks for seeded random ones.
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a ViT; `grid` is its positions' own, `hidden` the width of the MLP, `gated` a SwiGLU."""

    width: int
    depth: int
    heads: int
    patch: int
    grid: Grid
    hidden: int
    registers: int = 0
    layer_scale: bool = False
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """Where a published file lies: a repository of the Hugging Face hub, or an address.

    Neither: no public address is known for `file`. `sha256` is checked where its publisher states it.
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
    """A published encoder that loads by name; `model_id` is timm's, where timm's model computes it."""

    name: str
    family: Family
    architecture: Architecture
    source: Source
    model_id: str = ""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    parameters: int = 0

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the encoder, its own position embedding included."""
        if self.parameters:
            return self.parameters
        family, size = self.family, self.architecture
        width, hidden = size.width, size.hidden
        block = 4 * width * width + 2 * width * hidden + 9 * width + hidden + 2 * width * size.layer_scale
        embed = 3 * size.patch**2 * width + (0 if family.pre_norm else width)
        positions = size.grid.n_tokens + family.class_token + size.registers
        return size.depth * block + embed + positions * width + (4 if family.pre_norm else 2) * width


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
    return Architecture(width, depth, heads, patch, Grid(side, side), 4 * width, registers, layer_scale)


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

_NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "satellite": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_LICENCES = {
    "apache": _APACHE,
    "apple": "Apple sample code licence",
    "dinov3": "DINOv3 licence",
    "fair": "FAIR noncommercial research licence",
    "nvidia": "NVIDIA open model licence",
}
#: Columns: name, family, timm's model id, width, depth, heads, patch, side of the grid, parameters,
#: normalisation, licence.
_TIMM_ROWS = """
dinov3_s dinov3 vit_small_patch16_dinov3_qkvb.lvd1689m 384 12 6 16 16 21596160 imagenet dinov3
dinov3_splus dinov3 vit_small_plus_patch16_dinov3_qkvb.lvd1689m 384 12 6 16 16 28692480 imagenet dinov3
dinov3_b dinov3 vit_base_patch16_dinov3_qkvb.lvd1689m 768 12 12 16 16 85659648 imagenet dinov3
dinov3_l dinov3 vit_large_patch16_dinov3_qkvb.lvd1689m 1024 24 16 16 16 303128576 imagenet dinov3
dinov3_l_sat dinov3 vit_large_patch16_dinov3_qkvb.sat493m 1024 24 16 16 16 303128576 satellite dinov3
dinov3_hplus dinov3 vit_huge_plus_patch16_dinov3_qkvb.lvd1689m 1280 32 20 16 16 840591360 imagenet dinov3
dinov3_7b dinov3 vit_7b_patch16_dinov3.lvd1689m 4096 40 32 16 16 6716030976 imagenet dinov3
dinov2_g14 dinov2_giant vit_giant_patch14_dinov2.lvd142m 1536 40 24 14 37 1136479232 imagenet apache
dinov2_g14_reg dinov2_giant vit_giant_patch14_reg4_dinov2.lvd142m 1536 40 24 14 37 1136483840 imagenet apache
eupe_t eupe vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m 192 12 3 16 16 5489664 imagenet fair
eupe_s eupe vit_small_patch16_dinov3_qkvb.eupe_lvd1689m 384 12 6 16 16 21596160 imagenet fair
eupe_b eupe vit_base_patch16_dinov3_qkvb.eupe_lvd1689m 768 12 12 16 16 85659648 imagenet fair
radio_v3_b radio vit_base_patch16_radio_v3.c_radio 768 12 12 16 32 86456064 clip nvidia
radio_v3_l radio vit_large_patch16_radio_v3.c_radio 1024 24 16 16 32 304202752 clip nvidia
radio_v3_h radio vit_huge_patch16_radio_v3.c_radio 1280 32 16 16 32 631983360 clip nvidia
radio_v3_g radio vit_giant_patch16_radio_v3.c_radio 1536 40 24 16 32 1136027136 clip nvidia
tipsv2_b tipsv2 vit_base_patch14_reg1_tipsv2.webli 768 12 12 14 32 86314752 none apache
tipsv2_l tipsv2 vit_large_patch14_reg1_tipsv2.webli 1024 24 16 14 32 304014336 none apache
tipsv2_so400m tipsv2 vit_so400m_patch14_reg1_tipsv2.webli 1152 27 16 14 32 413391600 none apache
tipsv2_g tipsv2 vit_giant_patch14_reg1_tipsv2.webli 1536 40 24 14 32 1135949312 none apache
pe_spatial_t pe_spatial vit_pe_spatial_tiny_patch16_512.fb 192 12 3 16 32 5683200 half apache
pe_spatial_s pe_spatial vit_pe_spatial_small_patch16_512.fb 384 12 6 16 32 21983232 half apache
pe_spatial_b pe_spatial vit_pe_spatial_base_patch16_512.fb 768 12 12 16 32 86433792 half apache
pe_spatial_l pe_spatial vit_pe_spatial_large_patch14_448.fb 1024 24 16 14 32 303964160 half apache
pe_spatial_g pe_spatial vit_pe_spatial_gigantic_patch14_448.fb 1536 50 16 14 32 1851887104 half apache
siglip2_b siglip2 vit_base_patch16_siglip_224.v2_webli 768 12 12 16 14 92884224 half apache
siglip2_b_512 siglip2 vit_base_patch16_siglip_512.v2_webli 768 12 12 16 32 93520128 half apache
siglip2_l_512 siglip2 vit_large_patch16_siglip_512.v2_webli 1024 24 16 16 32 316742656 half apache
siglip2_so400m_512 siglip2 vit_so400m_patch16_siglip_512.v2_webli 1152 27 16 16 32 428772800 half apache
siglip2_g_384 siglip2 vit_giantopt_patch16_siglip_384.v2_webli 1536 40 16 16 24 1163659776 half apache
aimv2_l aimv2 aimv2_large_patch14_224.apple_pt 1024 24 8 14 16 309197824 clip apple
aimv2_h aimv2 aimv2_huge_patch14_224.apple_pt 1536 24 12 14 16 680851968 clip apple
aimv2_1b aimv2 aimv2_1b_patch14_224.apple_pt 2048 24 16 14 16 1234958336 clip apple
aimv2_3b aimv2 aimv2_3b_patch14_224.apple_pt 3072 24 24 14 16 2720658432 clip apple
"""


def _timm_row(line: str) -> NamedBackbone:
    name, family, model_id, *numbers, normalisation, licence = line.split()
    width, depth, heads, patch, side, parameters = map(int, numbers)
    return NamedBackbone(
        name,
        TIMM_FAMILIES[family],
        Architecture(width, depth, heads, patch, Grid(side, side), 0),
        _hub(model_id, _LICENCES[licence]),
        model_id,
        *_NORMALISATIONS[normalisation],
        parameters,
    )


BACKBONES |= {row.name: row for row in map(_timm_row, _TIMM_ROWS.strip().splitlines())}


def make_info(name: str, family: Family, architecture: Architecture) -> BackboneInfo:
    """Return the description of an encoder of a family."""
    row, sizes = BACKBONES.get(name), architecture
    mean, std = (row.mean, row.std) if row else (IMAGENET_MEAN, IMAGENET_STD)
    return BackboneInfo(name, family.name, sizes.width, sizes.patch, sizes.grid, mean, std)


def family_of(name: str) -> Family:
    """Return the family of a published encoder's name or of a family's own name."""
    if name in BACKBONES:
        return BACKBONES[name].family
    if name in FAMILIES or name == DINOV3.name:
        return FAMILIES.get(name, DINOV3)
    close = difflib.get_close_matches(name, [*BACKBONES, *FAMILIES, DINOV3.name], n=1)
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


#: What the encoder's final norm is applied to: the last layer's tokens, those of each layer, or none.
NORMS = ("last", "each", "none")


def split_name(name: str) -> tuple[str, tuple[int, ...], str]:
    """Return name, layers (from 0) and norm of `NAME@LAYER,LAYER:NORM`; raise `UsageError` for other text."""
    base, at, rest = name.partition("@")
    numbers, colon, norm = rest.partition(":")
    layers = [int(number) for number in numbers.split(",") if number.isdecimal() and len(number) < 6]
    is_known = len(layers) == numbers.count(",") + 1 and (norm in NORMS if colon else True)
    if at and not (is_known and sorted(set(layers)) == layers):
        wanted = f"layers from 0, ascending, and a norm ({', '.join(NORMS)}), as NAME@5,8,11:each"
        raise UsageError(f"{name!r} names no layers and norm", wanted=wanted, found=rest)
    return base, tuple(layers) if at else (), norm or NORMS[0]


def join_name(base: str, layers: Sequence[int], norm: str) -> str:
    """Return the name that `split_name` takes apart."""
    named = ",".join(map(str, layers))
    return f"{base}@{named}{'' if norm == NORMS[0] else f':{norm}'}" if layers else base


def is_timms(name: str) -> bool:
    """Say whether timm's model computes the encoder of this name: its own names, later rows, `dinov3`."""
    row = BACKBONES.get(name)
    return name.startswith(TIMM_PREFIX) or name == DINOV3.name or bool(row and row.model_id)


def weights_file(weights: str | Path) -> tuple[Path, str]:
    """Return the file, and the key of `FILE#KEY`, which chooses among several state dicts in one file.

    The file may be an `hf:` name, whose `#sha256=` is no key.
    """
    path = Path(weights)
    name, mark, key = path.name.rpartition("#")
    if not mark or key.startswith("sha256=") or path.exists():
        return path, ""
    return path.with_name(name) if name else path, key


def check_no_heads(name: str, heads: int | None) -> None:
    """Raise `UsageError` when heads are given for an encoder that has its own."""
    if heads is not None:
        raise UsageError(f"{name} has its own number of heads", wanted="no --heads", found=heads)
