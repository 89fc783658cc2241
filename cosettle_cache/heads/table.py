"""The heads by name: what each computes, whether it is trained; shares. Without torch, for command lines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.files import HUB_PREFIX


@dataclass(frozen=True, slots=True)
class Head:
    """Linear maps with Tanh between them, Tanh after the last one if `final_tanh`, then LayerNorm.

    It starts from random weights by the rule that the released code has for the backbone (`released_init`).
    A head in `closed_form` is one matrix alone, with a `bias` or without, no Tanh or LayerNorm: it starts as
    the identity and is computed, not trained. `released`: checkpoints of the authors may hold it.
    """

    n_linears: int
    final_tanh: bool = False
    closed_form: bool = False
    bias: bool = True
    released: bool = False


#: `linear`, `mlp2`, `mlp3` as released; `affine` is the paper's map, without Tanh (PROTOCOLS 7.1.5);
#: `spectral` is the g(z) = Wz of the paper's analysis, `debias` takes position out, `pca` keeps components,
#: `whiten` gives all of them the same variance (docs/training.md). In a checkpoint of the authors
#: `n_linears` is all that tells the released ones apart.
HEADS: Mapping[str, Head] = {
    "linear": Head(1, final_tanh=True, released=True),
    "affine": Head(1),
    "mlp2": Head(2, released=True),
    "mlp3": Head(3, released=True),
    "spectral": Head(1, closed_form=True, bias=False),
    "debias": Head(1, closed_form=True, bias=False),
    "pca": Head(1, closed_form=True),
    "whiten": Head(1, closed_form=True),
}

RELEASED_HEADS = {row.n_linears: name for name, row in HEADS.items() if row.released}


def find_head(name: str) -> Head:
    """Return the head called `name`; raise `UsageError` when there is none."""
    if name not in HEADS:
        raise UsageError("unknown head", wanted=" or ".join(HEADS), found=name)
    return HEADS[name]


def check_trainable(name: str) -> None:
    """Raise `UsageError` for an unknown head and for one that is computed instead of trained."""
    if find_head(name).closed_form:
        raise UsageError(
            f"the head {name} is computed, not trained",
            wanted=" or ".join(head for head, row in HEADS.items() if not row.closed_form),
            found=name,
            hint="cosettle-cache projection fit --features STORE computes it",
        )


def split_share(path: str | Path) -> tuple[Path, float]:
    """Return file and share of `FILE:SHARE`, a share of 1 where there is none.

    Raises `UsageError` unless the share is above 0 and at most 1.
    """
    file, colon, text = str(path).rpartition(":")
    # What follows a file that is there is meant as one, such as 25%.
    meant = re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", text) or (f"{file}:" != HUB_PREFIX and Path(file).is_file())
    if not colon or not meant or Path(path).exists():
        return Path(path), 1.0
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        wanted = "FILE:SHARE, a number above 0 and at most 1"
        raise UsageError("a share of a projection that is none", wanted=wanted, found=path)
    return Path(file), share
