"""Settings of the rooms and the digests that identify them; no defaults live anywhere else.

A settings object is frozen and plain, so it can be printed, compared and written beside a result. A field
made by `setting` is also an option of the command line (`cli.options.exits` makes it): default, help and
unit stand here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cosettle_cache.core.errors import UsageError
from cosettle_cache.core.types import Fingerprint, Provenance

#: Environment variable that names the data root when `--data-root` is absent.
DATA_ROOT_VARIABLE = "COSETTLE_DATA"

#: A size rule that fits any patch of 16, for frames whose own size does not.
FITTING_SIZE = "short:480/16"

#: ImageNet's deviation of the red channel, which `red_std` stands in for, and those of green and blue.
IMAGENET_RED_STD = 0.229
_IMAGENET_OTHER_STD = (0.224, 0.225)

#: Which queries a benchmark asks, and so which frames count (see `scored_frames`).
QUERY_MODES = ("first", "strided")

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

#: Packages whose versions can move a number; recorded with every store and score.
VERSIONED_PACKAGES = ("torch", "timm", "numpy", "opencv-python-headless", "pillow", "av")


def setting(default: Any, help: str, **option: Any) -> Any:
    """Return a dataclass field that is also an option: its default, and one line of help that names the unit.

    A `default` of `dataclasses.MISSING` makes the option a required one.
    `option` may hold `names` (a tuple such as ("--batch",), where the option is not called like the field),
    `choices` (the words allowed), `parse` (text, or a list of texts, to value) and what `typer.Option` takes
    (`min`, `max`, `metavar`).
    """
    return field(default=default, metadata={"help": help, **option})


@dataclass(frozen=True, slots=True)
class PairsSettings:
    """The paper's training recipe: `n_views` samples per clip, each two frames `gap` of the clip apart.

    `size` is pixels per side; crop scale and aspect ranges and the flip probability are the released ones.
    """

    n_views: int = setting(5, "View sets per clip (pairs).", names=("--views",), min=1)
    gap: float = setting(0.15, "Distance of a pair, share of the clip.", min=0, max=1)
    size: int = 224
    scale_min: float = 0.5
    scale_max: float = 1.0
    aspect_min: float = 3 / 4
    aspect_max: float = 4 / 3
    flip_probability: float = 0.5
    shift_ratio: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FramesSettings:
    """Every `every`-th frame once, resized by the size rule, plus `n_shifted` shifted encodings of each."""

    size: str = "480x880"
    every: int = setting(1, "Take every k-th frame (frames).", min=1)
    n_shifted: int = setting(0, "Shifted encodings per frame (frames).", names=("--shifted",), min=0)
    shift_ratio: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Which frozen encoder, and how it computes; `encoders.load_backbone` says what each means.

    `device` None is CUDA where there is one.
    """

    backbone: str = setting(MISSING, "mae_b, timm/MODEL_ID, or a family name with --weights FILE.")
    weights: str | None = setting(None, "Checkpoint file, or 'random'; default: the published weights.")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; default: cuda where there is one.")
    precision: str = setting("fp32", "fp32, bf16 or fp16 arithmetic in the encoder.")
    compiled: bool = setting(False, "Put the encoder through torch.compile.", names=("--compile",))
    red_std: float | None = setting(
        None, "Red deviation instead of ImageNet's 0.229: 0.228 as DINO evaluates."
    )
    heads: int | None = setting(None, "Attention heads, where width/64 is wrong.")


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """How a store is filled. Without `workers` or a `scheduler` this process does the work.

    `batch` and `decode_threads` None depend on the device and the cores, `slot_encodings` None on the bytes.
    """

    batch: int | None = setting(None, "Images per forward pass.", min=1)
    decode_threads: int | None = setting(None, "Threads that prepare images.", min=1)
    slot_encodings: int | None = setting(None, "Encodings per slot (shard).", min=1)
    dtype: str = setting("float16", "Of stored tokens; int8 halves the bytes.", choices=("float16", "int8"))
    codec: str = setting("none", "Compression of stored tokens.", choices=("none", "zstd"))
    workers: int = setting(0, "Processes here, one per GPU; 0: this one.", min=0)
    scheduler: str | None = setting(None, "A dask scheduler whose workers do it, as tcp://host:8786.")
    retry_failed: bool = setting(False, "Encode failed slots again.", names=("--retry-failed",))


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Objective, optimiser, schedule and stream; defaults are the released script's (PROTOCOLS 5.6, 7.1).

    A step takes `batch_size * accumulate` samples, and the learning rate is `base_lr` times that over 256.
    `separability_weight` is a number, or `auto`: then every step scales the separability loss so that its
    gradient is `gradient_ratio` times as long as that of the cycle loss. `clip_gradient` 0 clips nothing.
    `validation` is the share of clips held out; `palindrome` the frames that a walk visits on its way out,
    `gap` their distance as a share of the clip, both for frames stores.
    """

    head: str = "linear"
    regularizer: str = "kl"
    reduction: str = "released"
    temperature: float = 0.03
    separability_weight: float | Literal["auto"] = 3.0
    gradient_ratio: float = 1.0
    window: int = 2
    epochs: int = 5
    warmup_epochs: float = 1.0
    batch_size: int = 512
    accumulate: int = 1
    base_lr: float = 1e-4
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    clip_gradient: float = 0.0
    precision: str = "float32"
    seed: int = 0
    order: str = "samples"
    shard_window: int = 16
    validation: float = 0.0
    palindrome: int = 2
    gap: float = 0.15
    checkpoint_every: int = 100

    @property
    def step_samples(self) -> int:
        """Samples of one optimiser step."""
        return self.batch_size * self.accumulate

    @property
    def lr(self) -> float:
        """Peak learning rate after warm-up."""
        return self.base_lr * self.step_samples / 256


@dataclass(frozen=True, slots=True)
class SpectralSettings:
    """The closed-form head: which tokens correspond, and where the soft threshold of the spectrum lies.

    `correspondence` is `nearest` or `position`. `spectral_lambda` lives on the scale of the eigenvalues of
    the intra-video covariance of unit tokens; None takes, of `n_lambdas` values, the one with the largest
    margin D = D_inter - `gamma` D_intra (PROTOCOLS 5.3) on the clips held out. These are a share `held_out`
    of the clips, at least 2 and at most `max_held_out`, drawn by `seed`; they never enter the covariance.
    """

    correspondence: str = "nearest"
    spectral_lambda: float | None = None
    n_lambdas: int = 32
    gamma: float = 0.3
    held_out: float = 0.2
    max_held_out: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrackSettings:
    """Which queries are asked, and how a point is found again among tokens (docs/tracking.md).

    `query_mode` is `first` or `strided` (every `query_stride` frames). A point is where the token of highest
    cosine lies, refined by a soft-argmax over the tokens within `radius` tokens of it, cosines divided by
    `temperature`. By `occlusion` it is visible when going back from there ends within `cycle_radius` tokens
    of the query (`cycle`), when its cosine is at least `min_cosine` (`cosine`), or always (`never`).
    """

    query_mode: str = "first"
    query_stride: int = 5
    radius: float = 2.0
    temperature: float = 0.05
    occlusion: str = "cycle"
    cycle_radius: float = 6.0
    min_cosine: float = 0.7


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """What the tasks of `probe` are measured with; docs/probe.md says what each means.

    `split` restricts the videos, `official` learns from the split train and asks about test; otherwise there
    are `folds` stratified folds for each of `seeds` seeds. Classes of fewer than `min_videos` videos are left
    out. `unit` gives every token length one before the mean. `neighbors` vote with weight
    exp(cosine / `temperature`) (DINO's k-NN). `penalties` are inverse strengths of the L2 penalty. `n_frames`
    vectors of a video are joined for the order of frames (0: as many as all videos have, at most 8), in
    `pairs` of classes or, without any, forwards against reversed. `bundle` names the split of the frame
    labels, `background` the classes that make no segment, `max_frames` how many frames a probe learns from.
    """

    split: str = ""
    official: bool = False
    folds: int = 5
    seeds: int = 5
    min_videos: int = 1
    unit: bool = False
    neighbors: int = 20
    temperature: float = 0.07
    penalties: tuple[float, ...] = (1.0,)
    n_frames: int = 0
    pairs: tuple[tuple[str, str], ...] = ()
    bundle: str = "split1"
    background: tuple[str, ...] = ()
    max_frames: int = 50_000


@dataclass(frozen=True, slots=True)
class SpritesSettings:
    """The built-in clips: how many of each split, how long, and their size in pixels."""

    n_train: int = 12
    n_val: int = 4
    train_frames: int = 20
    val_frames: int = 24
    height: int = 240
    width: int = 432
    jpeg_quality: int = 90
    seed: int = 0

    @property
    def resolution(self) -> str:
        """Name of the resolution folder."""
        return f"{self.height}p"


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as 500MB or 1.5T means; units count in thousands."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", wanted="a number and kB, MB, GB or TB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def digest(document: Any) -> str:
    """Return the hex SHA-256 of `document` as canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def settings_json(
    settings: PairsSettings | FramesSettings | TrainSettings | SpectralSettings,
) -> dict[str, Any]:
    """Return a settings object as plain JSON types."""
    return asdict(settings)


def package_versions(*others: str) -> dict[str, str]:
    """Return the versions of the packages that can move a number, and of `others`."""
    versions = {}
    for name in (*VERSIONED_PACKAGES, *others):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def make_provenance(
    stage: str, dataset: str, fingerprint: Fingerprint, projection_sha256: str = ""
) -> Provenance:
    """Return where the figures of `stage` (the name of a command) on a store's tokens come from."""
    versions = {"extract": dict(fingerprint.versions), stage: package_versions()}
    return Provenance(
        dataset,
        fingerprint.manifest_digest,
        fingerprint.backbone,
        fingerprint.weights_sha256,
        projection_sha256,
        json.dumps(versions, sort_keys=True),
    )


def cache_folder() -> Path:
    """Return the folder for generated and downloaded files (`$XDG_CACHE_HOME/cosettle-cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cosettle-cache"


def replace_red_std(encoder_std: tuple[float, float, float], red_std: float) -> tuple[float, float, float]:
    """Return `encoder_std` with another red deviation in place of ImageNet's, and any other as it is."""
    red, *others = encoder_std
    # A red that was replaced before is known by its neighbours.
    return (red_std if tuple(others) == _IMAGENET_OTHER_STD else red, *others)  # type: ignore[return-value]


def differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return one line per key in which two origins differ."""
    keys = sorted(wanted.keys() | found.keys())
    pairs = [(key, wanted.get(key, "(absent)"), found.get(key, "(absent)")) for key in keys]
    return [f"{key}: wanted {a}, found {b}" for key, a, b in pairs if a != b]


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested document by dotted key."""
    values: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def flat_text(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a nested document as text by dotted key."""
    return {key: str(value) for key, value in flat(document).items()}
