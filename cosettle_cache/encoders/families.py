"""The eight encoder families: what the released forward of each does, and how its files are laid out.

Plain data without torch. Rows come from PROTOCOLS 7.4; what a family does differently from a plain pre-norm
ViT is a named field here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: The released code normalises the images of all eight families with these (PROTOCOLS 7.3).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PositionResize(StrEnum):
    """How the position embedding is brought to another grid; always bicubic, never at its own grid."""

    SCALE_FACTOR = "bicubic by the factor (n + 0.1) / grid"
    ANTIALIAS = "bicubic to the exact size with antialias"


class FinalNorm(StrEnum):
    """Where the released forward applies the final LayerNorm."""

    ALWAYS = "final norm"
    SHIFTED_ONLY = "final norm in shifted encodings only"


@dataclass(frozen=True, slots=True)
class Family:
    """One code base of encoders: the published layout of its files and the released forward.

    `stem` is the name prefix of the encoder's tensors in a published file (looked for after `module.`);
    where no name has it the file is taken as bare. `renames` are (published, timm) pairs of name parts.
    `ignored` are known tensors of the encoder that the forward does not use, `outside` known tensors
    beside the stem (regular expressions, both). A file without `required` (timm name) is of another
    family. `sine_positions`: fixed sine-cosine positions, which tells otherwise equal layouts apart.
    `file_pixels`: positions for another image size are brought to this one when a file is loaded.
    """

    name: str
    title: str
    citation: str
    token_rule: str
    resize: PositionResize
    final_norm: FinalNorm = FinalNorm.ALWAYS
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
            "patch tokens after the final norm",
            PositionResize.SCALE_FACTOR,
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
            final_norm=FinalNorm.SHIFTED_ONLY,
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
            PositionResize.ANTIALIAS,
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
            "patch tokens after the final norm",
            PositionResize.ANTIALIAS,
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
            "patch tokens after the final norm",
            PositionResize.SCALE_FACTOR,
            stem="momentum_encoder.",
            ignored=(_HEAD,),
            outside=(r"^(base_encoder|predictor)\.",),
            sine_positions=True,
            quirks=(
                _SINCOS,
                _SCALE,
                "the momentum encoder is used, not the base encoder",
            ),
        ),
        Family(
            "dino",
            "DINO",
            "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021",
            "patch tokens after the final norm",
            PositionResize.SCALE_FACTOR,
            stem="backbone.",
            ignored=(_HEAD,),
            outside=(_HEAD,),
            quirks=(_SCALE,),
        ),
        Family(
            "ibot",
            "iBOT",
            "Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, ICLR 2022",
            "patch tokens after the final norm",
            PositionResize.SCALE_FACTOR,
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
            PositionResize.ANTIALIAS,
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
