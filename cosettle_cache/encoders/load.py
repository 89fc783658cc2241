"""From a name and where its weights are to a frozen encoder on its device.

Rows of the registry and files of a family of any size become timm's VisionTransformer by the family's row.
Any ViT of timm loads as `timm/<model id>`, built and, for the published weights, loaded by timm: its own
mean and std, its own position resampling, tokens equal to its `forward_features`. Published weights come from
the hub client's cache, the hub or the publisher's address; `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and the
proxy variables are respected, and what cannot be reached fails within seconds.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cosettle_cache.core import hub
from cosettle_cache.core.errors import CheckpointError, UsageError
from cosettle_cache.core.files import output_errors, sha256_file, write_durably
from cosettle_cache.core.parallel import find_device
from cosettle_cache.core.precision import check_precision
from cosettle_cache.core.settings import cache_folder, replace_red_std
from cosettle_cache.core.types import Grid
from cosettle_cache.encoders.checkpoints import Checkpoint, check_weights, listing, read_checkpoint
from cosettle_cache.encoders.convert import (
    PERIODS,
    EncoderFile,
    check_positions,
    check_tensors,
    dinov3_architecture,
    file_grid,
    infer_architecture,
    looks_like,
    name_lines,
    sort_tensors,
)
from cosettle_cache.encoders.layouts import timm_names
from cosettle_cache.encoders.registry import (
    BACKBONES,
    DINOV3,
    RANDOM,
    TIMM_PREFIX,
    TIMM_TOKENS,
    Architecture,
    BackboneInfo,
    Family,
    PositionResize,
    Source,
    check_no_heads,
    family_of,
    is_timms,
    make_info,
    sizeless,
    split_name,
    weights_file,
)
from cosettle_cache.encoders.vit import PRECISIONS, SHIFT_RULE, Backbone, VitBody, Weights

#: Tensors of a classifier, which a file may have and the encoder has not.
_CLASSIFIER = r"^head(_dist)?\.(weight|bias)$"
#: Seconds without a byte after which a download is given up.
STALL_TIMEOUT_S = 60.0


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    seed: int = 0,
    heads: int | None = None,
    compiled: bool = False,
    red_std: float | None = None,
) -> Backbone:
    """Return a frozen encoder.

    `name` is a row of the table, a family with a weights file of any size, or `timm/<model id>`; with
    `@LAYER` behind it tokens are those of an inner layer (`Backbone.take_layers`). `weights`:
    None for the published ones (cached), "random" for random ones from `seed`, or a file, which may lie on
    the hub (`hf:OWNER/NAME/FILE`). `heads` is for
    files of a family whose width does not give the number of heads. `compiled` puts the blocks through
    torch.compile. `red_std` replaces ImageNet's red deviation, which some protocols have otherwise, where the
    encoder normalises with that.
    """
    if precision not in PRECISIONS:
        raise UsageError("unknown precision", wanted=", ".join(PRECISIONS), found=precision)
    where = torch.device(find_device(device))
    check_precision(precision, where)
    base, layers, norm = split_name(name)
    load = _load_timm if is_timms(base) else _load_family
    backbone = load(base, weights, heads, seed, where, precision)
    if red_std is not None:
        backbone.std = replace_red_std(backbone.std, red_std)
    if layers:
        backbone.take_layers(layers, norm)
    if compiled:
        backbone.compile_blocks()
    return backbone


def _random(name: str, seed: int, make: Callable[[], Any]) -> tuple[Any, Weights]:
    """Return a model with weights drawn from `seed`, and their digest; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    digest = hashlib.sha256(f"{name} {seed}".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return model, Weights(f"{RANDOM}:{seed}", digest.hexdigest())


def _record(source: str, key: str, checkpoint: Checkpoint) -> Weights:
    """Return where the weights of a file come from; a state dict chosen by key is another origin."""
    digest = checkpoint.sha256()
    if key:
        source, digest = f"{source}#{key}", hashlib.sha256(f"{digest}#{key}".encode()).hexdigest()
    return Weights(source, digest, checkpoint.passed_over)


def _load_family(
    name: str, weights: str | Path | None, heads: int | None, seed: int, device: torch.device, precision: str
) -> Backbone:
    """Return an encoder of the registry, or of a family with its sizes from the file."""
    family, named = family_of(name), BACKBONES.get(name)
    is_random = str(weights) == RANDOM
    if named is None and (weights is None or is_random):
        raise sizeless(name)
    if named is not None and heads not in {None, named.architecture.heads} and not is_random:
        raise UsageError(
            f"{name} has its own number of heads",
            wanted=named.architecture.heads,
            found=heads,
            hint=f"--backbone {family.name} takes the sizes from the file",
        )
    if named is not None and is_random:
        architecture = named.architecture
        vit, record = _random(name, seed, partial(make_vit, family, architecture))
    else:
        published = named.source if named is not None and weights is None else None
        path, key = (fetch(name, published), "") if published else weights_file(str(weights))
        checkpoint = read_checkpoint(path, key)
        file = sort_tensors(str(path), family, checkpoint)
        architecture = infer_architecture(file, heads) if named is None else named.architecture
        vit = vit_from_file(file, architecture)
        record = _record(str(published or hub.origin_of(path)), key, checkpoint)
    at_load = f"the file's brought to {family.file_pixels} px; " if family.file_pixels else ""
    return Backbone(
        make_info(name, family, architecture),
        VitBody(vit.eval().requires_grad_(False).to(device), family.resize, family.norm_plain),
        record,
        token_rule=f"{family.token_rule}; {architecture.heads} heads",
        position_rule=f"{at_load}{family.resize}; {SHIFT_RULE}",
        device=device,
        precision=precision,
    )


def make_vit(family: Family, architecture: Architecture) -> VisionTransformer:
    """Return a timm VisionTransformer of these sizes; the position of CLS is folded into the CLS token."""
    size = architecture
    return VisionTransformer(
        img_size=(size.grid.rows * size.patch, size.grid.cols * size.patch),
        patch_size=size.patch,
        num_classes=0,
        global_pool="",
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.hidden / size.width,
        init_values=1e-5 if size.layer_scale else None,
        class_token=family.class_token,
        no_embed_class=True,
        reg_tokens=size.registers,
        pre_norm=family.pre_norm,
        norm_layer=partial(nn.LayerNorm, eps=family.norm_eps),
        act_layer=family.activation,
        dynamic_img_size=True,
    )


def vit_from_file(file: EncoderFile, architecture: Architecture) -> VisionTransformer:
    """Return the encoder with the file's weights in float32, after every tensor was accounted for."""
    with torch.device("meta"):
        vit = make_vit(file.family, architecture)
    shapes = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    in_file = file_grid(file) if "pos_embed" in file.tensors else architecture.grid
    expected = in_file if file.family.file_pixels else architecture.grid
    n_positions = expected.n_tokens + int(file.family.class_token)
    check_tensors(file, shapes | {"pos_embed": (1, n_positions, architecture.width)})
    check_weights(file.path, {file.published[name]: file.tensors[name] for name in shapes})
    check_positions(file)
    state = {name: file.tensors[name].to(torch.float32, copy=True) for name in shapes}
    state |= _folded(file, state, architecture)
    vit.load_state_dict({name: state[name].reshape(shape) for name, shape in shapes.items()}, assign=True)
    return vit


def _folded(file: EncoderFile, state: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return the CLS token with its position added, and the patch positions at the encoder's grid.

    A family of fixed size gets them resized here, bicubic, no antialias, as released (BLIP: 24x24 to 14x14).
    """
    positions = state["pos_embed"].reshape(-1, architecture.width)
    folded: dict[str, Tensor] = {}
    if file.family.class_token:
        folded["cls_token"] = state["cls_token"].reshape(1, 1, -1) + positions[0]
        positions = positions[1:]
    own, grid = file_grid(file), architecture.grid
    if own != grid:
        planes = positions.T.reshape(1, architecture.width, own.rows, own.cols)
        resized = F.interpolate(planes, size=(grid.rows, grid.cols), mode="bicubic", align_corners=False)
        positions = resized[0].flatten(1).T
    return folded | {"pos_embed": positions.contiguous()}


def _load_timm(
    name: str, weights: str | Path | None, heads: int | None, seed: int, device: torch.device, precision: str
) -> Backbone:
    """Return timm's model with published weights (None), random ones, or those of a file."""
    row, model_id = BACKBONES.get(name), name.removeprefix(TIMM_PREFIX)
    is_dinov3 = name == DINOV3.name or (row is not None and row.family is DINOV3)
    tensors: dict[str, Tensor] | None = None
    create: partial[Any]
    if name == DINOV3.name:
        if weights is None or str(weights) == RANDOM:
            raise sizeless(name)
        path, record, tensors = _read_timm(weights)
        sizes = dinov3_architecture(str(path), tensors, heads)
        has_bias = any(name.endswith(".q_bias") for name in tensors)
        info, create = make_info(name, DINOV3, sizes), partial(make_dinov3, sizes, has_bias)
    else:
        check_no_heads(name, heads)
        info = make_info(name, row.family, row.architecture) if row else describe_timm(name)
        model_id = row.model_id if row else model_id
        create = partial(timm.create_model, model_id, num_classes=0, dynamic_img_size=True)
    if str(weights) == RANDOM:
        vit, record = _random(name, seed, create)
    elif weights is None:
        source = row.source if row else _timm_source(name, timm.get_pretrained_cfg(model_id))
        path = fetch(name, source)
        # timm converts and resamples the file as it does for its own downloads.
        vit = create(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        record = Weights(str(source), sha256_file(path))
    else:
        if tensors is None:
            path, record, tensors = _read_timm(weights)
        vit = create()
    if is_dinov3:
        vit.rope.periods.copy_(vit.rope.periods.bfloat16())
    if tensors is not None:
        load = _load_dinov3 if is_dinov3 else _load_strictly
        load(vit, path, tensors)
    body = VitBody(vit.eval().requires_grad_(False).to(device), PositionResize.ANTIALIAS)
    rules = [f"{PositionResize.ANTIALIAS}; {SHIFT_RULE}"] if body.positions else []
    if body.rotary:
        periods = ", periods in bfloat16" if is_dinov3 else ""
        rules.append(
            f"rotary, timm's coordinates{periods}; shift: coordinates refined by (1 + ratio), cropped"
        )
    return Backbone(
        info,
        body,
        record,
        token_rule=TIMM_TOKENS,
        position_rule="; ".join(rules) or "none",
        device=device,
        precision=precision,
    )


def _read_timm(weights: str | Path) -> tuple[Path, Weights, dict[str, Tensor]]:
    """Return a file of weights, where they come from, and its tensors under timm's names."""
    path, key = weights_file(weights)
    checkpoint = read_checkpoint(path, key)  # names a file that cannot be read
    return path, _record(hub.origin_of(path), key, checkpoint), timm_names(checkpoint, has_stem=False)


def make_dinov3(size: Architecture, has_bias: bool) -> Eva:
    """Return timm's model of a DINOv3 encoder of these sizes; `has_bias`: queries and values have biases."""
    return Eva(
        img_size=(size.grid.rows * size.patch, size.grid.cols * size.patch),
        patch_size=size.patch,
        num_classes=0,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        qkv_bias=has_bias,
        mlp_ratio=size.hidden / size.width,
        swiglu_mlp=size.gated,
        swiglu_align_to=int(size.gated),  # above 0 keeps gate and value apart, as the files have them
        init_values=1e-5,
        num_reg_tokens=size.registers,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=DINOV3.norm_eps),
        dynamic_img_size=True,
    )


def describe_timm(name: str) -> BackboneInfo:
    """Return what timm knows of a ViT; it is built without memory (meta device), nothing is downloaded."""
    model_id = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model_id):
        close = difflib.get_close_matches(model_id, timm.list_models("*vit*"), n=1)
        raise UsageError(
            f"timm knows no model {model_id!r}",
            wanted="a model id of timm",
            found=model_id,
            hint=f"did you mean {TIMM_PREFIX}{close[0]}?" if close else None,
        )
    with torch.device("meta"):
        model = timm.create_model(model_id, pretrained=False, num_classes=0)
    if not isinstance(model, VisionTransformer | Eva) or not isinstance(model.patch_embed, PatchEmbed):
        raise UsageError(
            f"{name} is not a Vision Transformer with one grid of patch tokens",
            wanted="a model of timm's VisionTransformer or Eva class",
            found=type(model).__name__,
            hint="python -c 'import timm; print(timm.list_models(\"vit_*\"))'",
        )
    config: Any = model.pretrained_cfg
    rows, cols = model.patch_embed.grid_size
    patch, _ = model.patch_embed.patch_size
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    assert len(mean) == len(std) == 3
    return BackboneInfo(name, "timm", model.embed_dim, patch, Grid(rows, cols), mean, std)


def _load_strictly(vit: Any, path: Path, found: Mapping[str, Tensor], ignored: Sequence[str] = ()) -> None:
    """Load tensors under timm's names; a classifier's and `ignored` ones (patterns) are left out."""
    wanted: dict[str, Tensor] = vit.state_dict()
    unused = re.compile("|".join((_CLASSIFIER, *ignored)))
    tensors = {name: tensor for name, tensor in found.items() if name in wanted or not unused.search(name)}
    missing = [name for name in wanted if name not in tensors]
    left_over = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name}: wanted {tuple(tensor.shape)}, found {tuple(tensors[name].shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if missing or left_over or misshapen:
        raise CheckpointError(
            f"{path} does not fit the timm model: it looks like {looks_like(tensors)}",
            wanted="timm's own layout of the model, every tensor",
            found=listing(tensors),
            details=name_lines(missing, left_over, misshapen),
        )
    check_weights(path, {name: tensors[name] for name in wanted})
    vit.load_state_dict({name: tensors[name].float() for name in wanted})


def _load_dinov3(vit: Any, path: Path, found: Mapping[str, Tensor]) -> None:
    """Load a DINOv3 file; biases that it lacks are zero, rotary periods that it has are used."""
    tensors = dict(found)
    own, periods = vit.rope.periods, tensors.pop(PERIODS, None)
    biases = [name for name in vit.state_dict() if name.endswith((".q_bias", ".v_bias"))]
    if not any(name in tensors for name in biases):
        # timm publishes the sizes whose biases are all zero without them.
        tensors |= {name: torch.zeros_like(vit.get_parameter(name)) for name in biases}
    _load_strictly(vit, path, tensors, DINOV3.ignored)
    if periods is not None:
        check_weights(path, {PERIODS: periods})
        if periods.shape != own.shape:
            fault = f"{PERIODS}: wanted {tuple(own.shape)}, found {tuple(periods.shape)}"
            raise CheckpointError(f"{path} does not fit the dinov3 encoder", details=[fault])
        own.copy_(periods)


def _timm_source(name: str, config: Any) -> Source:
    licence = config.license or "see the model card"
    if config.hf_hub_id:
        return Source(config.hf_hub_filename or "model.safetensors", licence, hub_id=config.hf_hub_id)
    if config.url:
        return Source(config.url.rsplit("/", maxsplit=1)[-1], licence, url=config.url)
    raise CheckpointError(
        f"timm publishes no weights for {name}",
        wanted="a model id with a pretrained tag",
        hint="--weights FILE | --weights random",
    )


def fetch(name: str, source: Source) -> Path:
    """Return the local file of a published encoder, downloading it where it is not cached yet."""
    if source.hub_id:
        try:
            return hub.fetch(source.hub_id, source.file, latest=False)
        except CheckpointError as error:
            raise _unreachable(name, source, error.message) from error
    if not source.url:
        raise _unreachable(name, source, "no public address is known for it")
    path = _from_url(name, source)
    if source.sha256 and sha256_file(path) != source.sha256:
        raise CheckpointError(
            f"{path} is not the published file",
            wanted=f"sha256 {source.sha256}",
            found=f"sha256 {sha256_file(path)}",
            hint=f"remove it and try again, or download {source.url} by hand",
        )
    return path


def _from_url(name: str, source: Source) -> Path:
    path = cache_folder() / "weights" / name / source.file
    if path.is_file():
        return path
    if reason := hub.why_unreachable(source.url):
        raise _unreachable(name, source, reason)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(source.url, timeout=STALL_TIMEOUT_S) as response:  # noqa: S310
            write_durably(path, _body(response))
    except (OSError, EOFError) as error:
        raise _unreachable(name, source, str(error)) from error
    return path


def _body(response: Any) -> Iterator[bytes]:
    """Yield the body of a response; a connection that ends early is an error, not a short file."""
    expected, received = response.headers.get("Content-Length"), 0
    while chunk := response.read(1 << 20):
        received += len(chunk)
        yield chunk
    if expected is not None and received != int(expected):
        raise EOFError(f"the connection ended after {received:,} of {int(expected):,} bytes")


def _unreachable(name: str, source: Source, reason: str) -> CheckpointError:
    address = hub.address_of(source.hub_id, source.file) if source.hub_id else source.url
    where = f"download {address} by hand, then " if address else ""
    return CheckpointError(
        f"the published weights of {name} cannot be fetched: {reason}",
        wanted=str(source),
        hint=f"{where}--weights FILE | --weights random",
    )
