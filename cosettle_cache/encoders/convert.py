"""From a published file's tensors to the names of timm's VisionTransformer, with every tensor accounted for.

One path for all families, driven by the family's row: take the stem off, rename, ignore what is known, and
name whatever is missing, left over or of another shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cosettle_cache.core.errors import CheckpointError, InputError
from cosettle_cache.core.types import Grid
from cosettle_cache.encoders.checkpoints import listing
from cosettle_cache.encoders.layouts import is_transformers, timm_names
from cosettle_cache.encoders.registry import BACKBONES, DINOV3, FAMILIES, Architecture, Family

#: The authors' projection lies beside the encoder in their files.
_PROJECTION = re.compile(r"(^|\.)adapter\.")
#: The tensors whose shapes give the sizes, and how many axes they may have.
_SIZED = {"patch_embed.proj.weight": (4,), "pos_embed": (2, 3), "blocks.0.mlp.fc1.weight": (2,)}
#: Meta's rotary periods of DINOv3.
PERIODS = "rope_embed.periods"
#: Relative error of a squared length that half precision may cause.
SINE_TOLERANCE = 0.01
_PLAIN = "a plain ViT (mae, dino, ibot, or the encoder of blip or mocov3 alone)"
_LOOKS: tuple[tuple[str, str], ...] = (
    (r"^visual\.layer1\.", "CLIP with a ResNet"),
    (r"^visual\.(class_embedding|transformer\.)|^norm_pre\.", "clip"),
    (r"(^|\.)(storage_tokens|gamma_1)$", "dinov3"),
    (r"^visual_encoder\.", "blip"),
    (r"^(momentum_encoder|base_encoder)\.", "mocov3"),
    (r"(^|\.)(embed_tokens|lm_head|word_embeddings|tok_embeddings|wte)\.", "a language model"),
    (r"(^|\.)encoder\.layers?\.\d+\.", "a file of the transformers or torchvision library"),
    (r"(^|\.)layer1\.0\.conv1\.|^features\.\d+\.", "a convolutional network"),
    (r"\.ls1\.gamma$|^(backbone\.)?(register_tokens|reg_token)$", "dinov2"),
)


@dataclass(frozen=True, slots=True)
class EncoderFile:
    """The encoder's tensors of one file under timm's names, their published names, and what nobody knows."""

    path: str
    family: Family
    tensors: Mapping[str, Tensor]
    published: Mapping[str, str]
    left_over: tuple[str, ...]
    all_names: tuple[str, ...]
    #: In transformers' layout, which one class has for all plain ViTs: the family is what the user says.
    renamed: bool = False


def sort_tensors(path: str, family: Family, tensors: Mapping[str, Tensor]) -> EncoderFile:
    """Sort the tensors of a file into the encoder's, the known-ignored and the left over."""
    renamed = is_transformers(tensors)
    tensors = timm_names(tensors)
    originals = {name.removeprefix("module."): name for name in tensors}
    has_stem = any(name.startswith(family.stem) for name in originals)
    own: dict[str, str] = {}
    left_over: list[str] = []
    for name, original in originals.items():
        inside = name.startswith(family.stem) or not has_stem
        short = name.removeprefix(family.stem)
        known = family.ignored if inside else family.outside
        if _PROJECTION.search(name) or any(re.search(pattern, short) for pattern in known):
            continue
        if inside:
            own[_timm_name(short, family)] = original
        else:
            left_over.append(original)
    encoder = {name: tensors[original] for name, original in own.items()}
    return EncoderFile(path, family, encoder, own, tuple(left_over), tuple(originals), renamed)


def infer_architecture(file: EncoderFile, heads: int | None = None) -> Architecture:
    """Return the sizes that the shapes of the tensors give; `heads` defaults to width / 64.

    Named encoders of the family with the same width and depth keep their own number of heads (MAE's ViT-H has
    16 heads of 80 channels).
    """
    tensors = file.tensors
    missing = [published_name(name, file) for name in _SIZED if name not in tensors]
    misshapen = [
        f"{file.published[name]}: wanted {max(axes)} axes, found {_shape(tensors[name].shape)}"
        for name, axes in _SIZED.items()
        if name in tensors and (tensors[name].ndim not in axes or not tensors[name].numel())
    ]
    if missing or misshapen:
        raise _misfit(file, missing, misshapen=misshapen)
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    own, pixels = file_grid(file), file.family.file_pixels
    depth = _depth(tensors)
    return Architecture(
        width,
        depth,
        _heads(file, width, depth, heads),
        patch,
        own if pixels is None else Grid(pixels // patch, pixels // patch),
        tensors["blocks.0.mlp.fc1.weight"].shape[0],
        registers=tensors["reg_token"].numel() // width if "reg_token" in tensors else 0,
        layer_scale="blocks.0.ls1.gamma" in tensors,
    )


def dinov3_architecture(path: str, tensors: Mapping[str, Tensor], heads: int | None = None) -> Architecture:
    """Return the sizes of a DINOv3 encoder from tensors under timm's names.

    `heads` defaults to what the length of the rotary periods says where a file has them, then to width / 64.
    """
    file = EncoderFile(path, DINOV3, tensors, {name: name for name in tensors}, (), tuple(tensors))
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    inner = f"blocks.0.mlp.fc1{'_g' if gated else ''}.weight"
    missing = [name for name in ("patch_embed.proj.weight", "reg_token", inner) if name not in tensors]
    if missing or tensors["patch_embed.proj.weight"].ndim != 4 or tensors[inner].ndim != 2:
        raise _misfit(file, missing)
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = _depth(tensors)
    periods = tensors.get(PERIODS)
    if heads is None and periods is not None and 0 < 4 * periods.numel() <= width:
        heads = width // (4 * periods.numel())
    return Architecture(
        width,
        depth,
        _heads(file, width, depth, heads),
        patch,
        Grid(16, 16),  # rotary positions have no grid of their own; timm's default image has this one
        tensors[inner].shape[0],
        registers=tensors["reg_token"].numel() // max(width, 1),
        layer_scale=True,
        gated=gated,
    )


def _depth(tensors: Iterable[str]) -> int:
    return len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})


def file_grid(file: EncoderFile) -> Grid:
    """Return the grid of the file's position embedding."""
    embedding = file.tensors["pos_embed"]
    n_positions = embedding.shape[-2] - int(file.family.class_token) if embedding.ndim > 1 else 0
    side = math.isqrt(max(n_positions, 0))
    if side == 0 or side * side != n_positions:
        wanted = f"a square number of positions{' and one for CLS' if file.family.class_token else ''}"
        found = f"{file.published['pos_embed']}: wanted {wanted}, found {_shape(tuple(embedding.shape))}"
        raise _misfit(file, misshapen=[found])
    return Grid(side, side)


def check_tensors(file: EncoderFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an error that names every missing, left-over and wrongly shaped tensor.

    `wanted` has the shapes by timm name; shapes that differ by leading ones only are equal.
    """
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    left_over = [*file.left_over, *(file.published[name] for name in found if name not in wanted)]
    missing = [published_name(name, file) for name in wanted if name not in found]
    misshapen = [
        f"{file.published[name]}: wanted {_shape(shape)}, found {_shape(found[name])}"
        for name, shape in wanted.items()
        if name in found and _squeezed(found[name]) != _squeezed(shape)
    ]
    if missing or left_over or misshapen or file.family.required not in {"", *found}:
        raise _misfit(file, missing, left_over, misshapen)


def check_positions(file: EncoderFile) -> None:
    """Raise an error for fixed positions where the family learns them, or the reverse; all else is alike."""
    has_sines = has_sine_positions(file.tensors["pos_embed"])
    if has_sines == file.family.sine_positions or file.renamed:
        return
    kinds = {True: "fixed sine-cosine positions", False: "learned positions"}
    alike = [name for name, family in FAMILIES.items() if family.sine_positions == has_sines]
    raise CheckpointError(
        f"{file.path} is not a checkpoint of the {file.family.name} family",
        wanted=kinds[file.family.sine_positions],
        found=f"{kinds[has_sines]}, as in {', '.join(alike)}",
        hint="--backbone NAME chooses the family; timm/MODEL_ID loads any plain ViT in timm's layout",
    )


def has_sine_positions(positions: Tensor) -> bool:
    """Say whether rows hold pairs of sine and cosine (squared length: half the width), zeros (CLS) aside."""
    rows = positions.float().flatten(0, -2)
    squares = rows[rows.abs().amax(1) > 0].square().sum(1)
    half = positions.shape[-1] / 2
    return len(squares) > 0 and bool(((squares - half).abs() <= SINE_TOLERANCE * half).all())


def looks_like(names: Iterable[str]) -> str:
    """Say in words what kind of file has tensors of these names."""
    listed = [name.removeprefix("module.") for name in names]
    if listed and all(_PROJECTION.search(name) for name in listed):
        return "Co-Settle's projection alone, without an encoder"
    for pattern, description in _LOOKS:
        if any(re.search(pattern, name) for name in listed):
            return description
    bare = {name.removeprefix("backbone.") for name in listed}
    if "blocks.0.attn.qkv.weight" not in bare:
        return "no known encoder"
    return _PLAIN if "cls_token" in bare else "ijepa"


def published_name(name: str, file: EncoderFile) -> str:
    """Return what the tensor with timm's `name` would be called in this file."""
    for published, timm_name in file.family.renames:
        name = name.replace(timm_name, published)
    stem = file.family.stem
    return f"{stem}{name}" if any(original.startswith(stem) for original in file.all_names) else name


def name_lines(missing: Sequence[str], left_over: Sequence[str], misshapen: Sequence[str]) -> list[str]:
    """Return one line per kind of misfit that occurs, for an error's details."""
    groups = (("missing", missing), ("left over", left_over), ("another shape", misshapen))
    return [f"{title}: {listing(names)}" for title, names in groups if names]


def _misfit(
    file: EncoderFile,
    missing: Sequence[str] = (),
    left_over: Sequence[str] = (),
    misshapen: Sequence[str] = (),
) -> CheckpointError:
    family, looks = file.family, looks_like(file.all_names)
    known = (*FAMILIES, DINOV3.name)
    details = name_lines(missing, left_over, misshapen)
    if family.name not in looks:
        return CheckpointError(
            f"{file.path} is not a checkpoint of the {family.name} family: it looks like {looks}",
            wanted=f"the layout of {family.title}",
            found=listing(file.all_names),
            details=details,
            hint=f"--backbone {looks if looks in known else 'NAME'} chooses the family; "
            "cosettle-cache backbones lists them",
        )
    return CheckpointError(
        f"{file.path} does not fit the {family.name} encoder",
        wanted="every tensor of the encoder, of its shape, and no unknown ones",
        found=f"{len(missing)} missing, {len(left_over)} left over, {len(misshapen)} of another shape",
        details=details,
        hint=f"--backbone {family.name} takes the sizes from the file" if misshapen else None,
    )


def _timm_name(name: str, family: Family) -> str:
    # DINOv2's training files number blocks within chunks: blocks.<chunk>.<block>.
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    for published, timm_name in family.renames:
        name = name.replace(published, timm_name)
    return name


def _heads(file: EncoderFile, width: int, depth: int, heads: int | None) -> int:
    for named in BACKBONES.values() if heads is None else ():
        sizes = named.architecture
        if (named.family.name, sizes.width, sizes.depth) == (file.family.name, width, depth):
            return sizes.heads
    if heads is None and width % 64:
        raise CheckpointError(
            f"the number of attention heads of {file.path} does not follow from its width",
            wanted="a width that is a multiple of 64",
            found=f"width {width}",
            hint="--heads N",
        )
    heads = width // 64 if heads is None else heads
    if heads < 1 or width % heads:
        raise InputError("the heads do not divide the width", wanted=f"a divisor of {width}", found=heads)
    return heads


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    start = next((i for i, length in enumerate(shape) if length != 1), len(shape))
    return shape[start:]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape) or "scalar"
