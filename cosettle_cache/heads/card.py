"""A projection on the hub: one repository each, with a card that says where it comes from and what it scored.

A projection's own file and folders of `propagate` come in; what is pushed, and the card, go out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from cosettle_cache.core import hub
from cosettle_cache.core.errors import CheckpointError, InputError
from cosettle_cache.core.files import HUB_PREFIX, parse_json
from cosettle_cache.core.settings import LinearSettings, SpectralSettings, TrainSettings
from cosettle_cache.encoders.registry import BACKBONES, split_name
from cosettle_cache.heads.projection import ProjectionInfo, describe_projection
from cosettle_cache.metrics.rows import SCORES_FILE, mean_scores, read_scores

#: What a projection is called in its repository.
FILE = "projection.safetensors"

#: What a projection's file must say of its origin.
_ORIGIN = {"backbone", "weights_sha256", "manifest_digest", "store_digest"}

#: By this line a card is known as ours, and its repository as one that may be written again.
MARK = "<!-- made by cosettle-cache projection push -->"


def push_projection(
    path: str | Path, repository: str, runs: Sequence[Path] = (), *, private: bool = False
) -> str:
    """Write a projection with its card to a repository of the hub; return its name there, with the commit.

    The repository is made if it is not there. Raises what `make_card` does, `UsageError` for a repository of
    something else, `OutputError` where the hub refuses.
    """
    card = make_card(path, repository, runs)
    files = {FILE: hub.local_file(path).read_bytes(), "README.md": card.encode()}
    commit = hub.push(repository, files, MARK, f"Projection by cosettle-cache: {FILE}", private=private)
    return f"{HUB_PREFIX}{repository}/{FILE}@{commit}"


def make_card(path: str | Path, repository: str, runs: Sequence[Path] = ()) -> str:
    """Return the card (Markdown) of our own file of a projection, with its means in folders of `propagate`.

    Raises `CheckpointError` for another file, `InputError` for a folder without scores of this projection.
    """
    name = f"{HUB_PREFIX}{repository}/{FILE}"
    info = describe_projection(path)
    settings = parse_json(info.provenance.get("settings", "0"), f"the settings in {path}")
    if not isinstance(settings, dict) or not info.provenance.keys() >= _ORIGIN:
        wanted = "a projection that `train` or `projection fit` wrote"
        raise CheckpointError(f"{path} does not say where it comes from", wanted=wanted, found=info.layout)
    backbone = info.provenance["backbone"]
    row = BACKBONES.get(split_name(backbone)[0])
    facts: dict[str, Any] = {"library_name": "cosettle-cache", "tags": ["co-settle", "video"]}
    if row and row.source.hub_id:
        facts["base_model"] = row.source.hub_id
    origin = {
        key: parse_json(text, key) if text.startswith("{") else text for key, text in info.provenance.items()
    }
    return f"""{hub.card_header(**facts)}
{MARK}

# {repository.rpartition("/")[2]}

A projection of patch tokens of the frozen encoder `{backbone}`: head `{info.head}`, {info.dim} channels,
{info.n_parameters:,} parameters, digest `{info.sha256}`.

    cosettle-cache propagate --task davis --backbone {backbone} --projection {name}

## Scores

{_scores(info, runs)}

## How it was made

    {_command(info, settings)}

STORE holds tokens of `{backbone}` with weights of SHA-256 `{info.provenance["weights_sha256"]}`, of videos
whose manifest has the digest `{info.provenance["manifest_digest"]}`.

```json
{json.dumps(origin, indent=2)}
```
"""


def _scores(info: ProjectionInfo, runs: Sequence[Path]) -> str:
    tables = [_table(info, folder) for folder in runs]
    return "\n\n".join(tables) or "None were given."


def _table(info: ProjectionInfo, folder: Path) -> str:
    """Return the means of raw tokens and of this projection's in one folder, in percent, as a table."""
    scores = read_scores(folder / SCORES_FILE)
    ours = [score for score in scores if score.provenance.projection_sha256 in ("", info.sha256)]
    if not any(score.provenance.projection_sha256 for score in ours):
        found = ", ".join(dict.fromkeys(score.tokens for score in scores))
        raise InputError(f"{folder} has no scores of this projection", wanted=info.sha256, found=found)
    means, first = mean_scores(ours), ours[0]
    rows = [["tokens", *means[0].titles.values()], ["---"] * (1 + len(means[0].titles))]
    rows += [[mean.tokens, *mean.cells()] for mean in means]
    said = f"{first.provenance.dataset}, {means[0].n_videos} videos, protocol {first.protocol}; "
    said += f"percent, {means[0].label}:"
    return "\n".join([said, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _command(info: ProjectionInfo, settings: dict[str, Any]) -> str:
    """Return the command that makes such a projection: options with another value than their default."""
    words = ["cosettle-cache", "train"]
    kinds: list[Any] = [TrainSettings]
    if "base_lr" not in settings:
        words, kinds = ["cosettle-cache", "projection", "fit"], [LinearSettings, SpectralSettings]
    words += ["--features STORE"] * len(info.provenance["store_digest"].split())
    if settings.get("head") != info.head or info.head != "linear":
        words.append(f"--head {info.head}")
    for item in (item for kind in kinds for item in fields(kind)):
        value = settings.get(item.name, item.default)
        if item.name == "head" or value in (item.default, MISSING, None):
            continue
        option = "--batch" if item.name == "batch_size" else "--" + item.name.replace("_", "-")
        words.append(f"{option} {value}")
    return " ".join(words)
