"""Any ViT of timm as `timm/<model id>`: built and, for the published weights, loaded by timm itself.

The images are normalised with the model's own mean and std, tokens equal timm's `forward_features`, and other
sizes follow timm's own position resampling.
"""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cosettle_cache.core.errors import CheckpointError, UsageError
from cosettle_cache.core.types import Grid
from cosettle_cache.encoders.body import VitBody
from cosettle_cache.encoders.checkpoints import read_checkpoint
from cosettle_cache.encoders.convert import listing, looks_like, name_lines
from cosettle_cache.encoders.encoder import SHIFT_RULE, Backbone
from cosettle_cache.encoders.families import PositionResize
from cosettle_cache.encoders.hub import fetch
from cosettle_cache.encoders.registry import RANDOM, TIMM_PREFIX, BackboneInfo, Source
from cosettle_cache.encoders.weights import Weights, file_weights, random_weights, seeded


def load_timm(
    name: str, weights: str | Path | None, device: torch.device, precision: str, seed: int
) -> Backbone:
    """Return timm's model with published weights (None), random ones, or those of a file in timm's layout."""
    model_id = name.removeprefix(TIMM_PREFIX)
    info = describe(name)
    if str(weights) == RANDOM:
        vit = seeded(seed, partial(_create, model_id))
        record = random_weights(name, seed, vit)
    elif weights is None:
        vit, record = _pretrained(name, model_id)
    else:
        vit = _create(model_id)
        load_strictly(vit, Path(weights))  # names a file that cannot be read
        record = file_weights(Path(weights))
    body = VitBody(vit.eval().requires_grad_(False).to(device), PositionResize.ANTIALIAS)
    return Backbone(
        info,
        body,
        record,
        token_rule="patch tokens of timm's forward_features",  # noqa: S106
        position_rule=_timm_position_rule(body),
        device=device,
        precision=precision,
    )


def describe(name: str) -> BackboneInfo:
    """Return what timm knows of a model; it is built without memory (meta device), nothing is downloaded."""
    model = _outline(name)
    config = model.pretrained_cfg
    rows, cols = model.patch_embed.grid_size
    patch, _ = model.patch_embed.patch_size
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    assert len(mean) == len(std) == 3
    return BackboneInfo(name, "timm", model.embed_dim, patch, Grid(rows, cols), mean, std)


def _timm_position_rule(body: VitBody) -> str:
    rules = [f"{PositionResize.ANTIALIAS}; {SHIFT_RULE}"] if body.positions else []
    if body.rotary:
        rules.append("rotary, timm's coordinates; shift: coordinates refined by (1 + ratio), cropped")
    return "; ".join(rules) or "none"


def load_strictly(vit: VisionTransformer | Eva, path: Path) -> None:
    """Load a state dict in timm's layout; only a classifier's tensors may be left over."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_checkpoint(path).items()}
    wanted, classifier = vit.state_dict(), {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    missing = [name for name in wanted if name not in tensors]
    left_over = [name for name in tensors if name not in wanted and name not in classifier]
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
    state: dict[str, Tensor] = {name: tensors[name].float() for name in wanted}
    vit.load_state_dict(state)


def _outline(name: str) -> Any:
    """Return the model without memory for its weights, after checking that it is a ViT of square patches."""
    model_id = name.removeprefix(TIMM_PREFIX)
    _check_known(model_id)
    with torch.device("meta"):
        model = timm.create_model(model_id, pretrained=False, num_classes=0)
    if not isinstance(model, VisionTransformer | Eva) or not isinstance(model.patch_embed, PatchEmbed):
        raise UsageError(
            f"{name} is not a Vision Transformer with one grid of patch tokens",
            wanted="a model of timm's VisionTransformer or Eva class",
            found=type(model).__name__,
            hint="python -c 'import timm; print(timm.list_models(\"vit_*\"))'",
        )
    return model


def _create(model_id: str, **options: Any) -> Any:
    return timm.create_model(model_id, num_classes=0, dynamic_img_size=True, **options)


def _pretrained(name: str, model_id: str) -> tuple[Any, Weights]:
    config = timm.get_pretrained_cfg(model_id)
    source = _source(name, config)
    path = fetch(name, source)
    # timm converts and resamples the file as it does for its own downloads.
    vit = _create(model_id, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return vit, file_weights(path, str(source))


def _source(name: str, config: Any) -> Source:
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


def _check_known(model_id: str) -> None:
    if timm.is_model(model_id):
        return
    close = difflib.get_close_matches(model_id, timm.list_models("*vit*"), n=1)
    raise UsageError(
        f"timm knows no model {model_id!r}",
        wanted="a model id of timm",
        found=model_id,
        hint=f"did you mean {TIMM_PREFIX}{close[0]}?" if close else None,
    )
