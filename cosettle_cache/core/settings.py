"""Settings of the rooms and the digests that identify them; no defaults live anywhere else.

A settings object is frozen and plain, so it can be printed, compared and written beside a result. A field
made by `setting` is also an option of the command line (`cli.options.exits` makes it): default, help and
unit stand here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from numbers import Integral, Real
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

#: Which videos get pictures.
OVERLAYS = ("none", "first", "all")
#: Who ranks the context.
SEARCHES = ("auto", "bf16", "faiss", "torch", "triton")

#: Pixels of a side that anything is encoded at; more than any camera takes.
MOST_PIXELS = 16_384
#: What whole numbers hold where nothing less is meant.
_MOST_WHOLE = 2**63 - 1
#: Softmaxes divide by no less: float32 ends at 1e-38.
LEAST_TEMPERATURE = 1e-6

#: Packages whose versions can move a number; recorded with every store and score.
VERSIONED_PACKAGES = ("torch", "timm", "numpy", "opencv-python-headless", "pillow", "av")

#: Weight of the distance within clips in the paper's margin D = D_inter - gamma D_intra (PROTOCOLS 5.3).
MARGIN_GAMMA = 0.3


def setting(default: Any, help: str, **option: Any) -> Any:
    """Return a dataclass field that is also an option: its default, and one line of help that names the unit.

    A `default` of `dataclasses.MISSING` makes the option a required one, one of False a flag.
    `option` may hold `names` (a tuple such as ("--batch",), where the option is not called like the field),
    `choices` (the words allowed), `table` (`package:NAME`, a room's table whose words are added to the help),
    `parse` (text, or a list of texts, to value), `positive` (True for a number above 0) and what
    `typer.Option` takes (`min`, `max`, `metavar`).
    """
    return field(default=default, metadata={"help": help, **option})


class Settings:
    """What the settings classes inherit: no object holds a number or a word that its field does not take.

    Raises `UsageError` for a number outside the limits, for one that is not finite, for a fraction or a truth
    value where a whole number is wanted, and for a word that is none of the choices.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            found = getattr(self, item.name)
            if wanted := _number_fault(str(item.type), item.metadata, found):
                raise UsageError(f"{item.name} must be {wanted}", found=found)
            choices = item.metadata.get("choices", ())
            if choices and found not in choices:
                words = item.name.replace("_", " ")
                raise UsageError(f"unknown {words} {found!r}", wanted=" or ".join(choices), found=found)


def _number_fault(kind: str, limits: Mapping[str, Any], value: Any) -> str:
    """Return what the value of a field of type `kind` must be; nothing where it is, or is no number."""
    kinds = kind.split(" | ")
    word = (value is None and "None" in kinds) or (value == "auto" and len(kinds) > 1)
    if word or not {"int", "float"}.intersection(kinds):
        return ""
    whole, positive = "int" in kinds, limits.get("positive", False)
    is_huge = isinstance(value, Integral) and abs(int(value)) > _MOST_WHOLE
    if is_huge and not whole:  # no floating-point number
        return "a number of 64 bits"
    least, most = limits.get("min", -math.inf), limits.get("max", _MOST_WHOLE if whole else math.inf)
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if (
        number
        and not is_huge
        and math.isfinite(value)
        and least <= value <= most
        and (value > 0 or not positive)
    ):
        return ""
    words = ["a whole number"] if whole else []
    words += ["positive"] if positive else []
    words += [f"at least {least}"] if math.isfinite(least) else []
    words += [f"at most {most}"] if "max" in limits or (number and value > most) else []
    return ", ".join(words) or "a finite number"


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as 500MB or 1.5T means; units count in thousands."""
    match = _SIZE.fullmatch(text.strip())
    size = math.inf if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if not math.isfinite(size):
        raise UsageError(f"{text[:100]!r} is not a size", wanted="a number and kB, MB, GB or TB")
    return int(size)


@dataclass(frozen=True, slots=True)
class PairsSettings(Settings):
    """The paper's training recipe: `n_views` samples per clip, each two frames `gap` of the clip apart.

    `size` is pixels per side; crop scale and aspect ranges and the flip probability are the released ones.
    """

    n_views: int = setting(5, "View sets per clip (pairs).", names=("--views",), min=1, max=10_000)
    gap: float = setting(0.15, "Distance of a pair, share of the clip.", positive=True, max=1)
    size: int = field(default=224, metadata={"min": 1, "max": MOST_PIXELS})
    scale_min: float = 0.5
    scale_max: float = 1.0
    aspect_min: float = 3 / 4
    aspect_max: float = 4 / 3
    flip_probability: float = 0.5
    shift_ratio: float = 10.0
    seed: int = 0


#: How frames were resized before there was a choice.
LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class FramesSettings(Settings):
    """Every `every`-th frame once, resized by the size rule, plus `n_shifted` shifted encodings of each.

    `resampling` is `linear` (OpenCV's bilinear of the float image) or `bicubic` (Pillow's, as DINOv3 does).
    """

    size: str = "480x880"
    every: int = setting(1, "Take every k-th frame (frames).", min=1)
    n_shifted: int = setting(
        0, "Shifted encodings a frame (frames).", names=("--shifted",), min=0, max=10_000
    )
    shift_ratio: float = 10.0
    seed: int = 0
    resampling: str = setting(LINEAR, "Bicubic as DINOv3 does.", choices=(LINEAR, "bicubic"))


def parse_weight(text: str) -> float | Literal["auto"]:
    """Return a separability weight: a number, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise UsageError("no separability weight", wanted="a number or auto", found=text) from error


@dataclass(frozen=True, slots=True)
class EncoderSettings(Settings):
    """Which frozen encoder, and how it computes; `encoders.load_backbone` says what each means.

    `device` None is CUDA where there is one.
    """

    backbone: str = setting(MISSING, "mae_b, timm/MODEL_ID, or a family name with --weights FILE.")
    weights: str | None = setting(None, "FILE, FILE#KEY, hf:OWNER/NAME/FILE or 'random'; default: published.")
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; default: cuda where there is one.")
    precision: str = setting("fp32", "fp32, bf16 or fp16 arithmetic in the encoder.")
    compiled: bool = setting(False, "Put the encoder through torch.compile.", names=("--compile",))
    red_std: float | None = setting(
        None, "Red deviation instead of ImageNet's 0.229: 0.228 as DINO evaluates.", positive=True
    )
    heads: int | None = setting(None, "Attention heads, where width/64 is wrong.", min=1, max=65_536)


@dataclass(frozen=True, slots=True)
class ExtractSettings(Settings):
    """How a store is filled. Without `workers` or a `scheduler` this process does the work.

    `batch` and `decode_threads` None depend on the device and the cores, `slot_encodings` None on the bytes.
    """

    batch: int | None = setting(None, "Images per forward pass.", min=1, max=1_000_000)
    decode_threads: int | None = setting(None, "Threads that prepare images.", min=1, max=1000)
    slot_encodings: int | None = setting(None, "Encodings per slot (shard).", min=1, max=1_000_000)
    dtype: str = setting("float16", "Of stored tokens; int8 halves the bytes.", choices=("float16", "int8"))
    codec: str = setting("none", "Compression of tokens.", choices=("none", "zstd"))
    workers: int = setting(0, "Processes here, one per GPU; 0: this one.", min=0, max=1000)
    scheduler: str | None = setting(None, "A dask scheduler whose workers do it, as tcp://host:8786.")
    retry_failed: bool = setting(False, "Encode failed slots again.")
    verify_media: bool = setting(False, "Compare every byte of the media.")


@dataclass(frozen=True, slots=True)
class TrainSettings(Settings):
    """Objective, optimiser, schedule and stream; defaults are the released script's (PROTOCOLS 5.6, 7.1).

    `init` is how the linear maps start: `released` draws random weights by the rule that the released code
    has for the backbone, `identity` leaves tokens as they are, `pca` lets the first map keep the principal
    components of the first store's tokens. A step takes `batch_size * accumulate` samples, and the learning
    rate is `base_lr` times that over 256. `separability_weight` is a number, or `auto`: then every step
    scales the separability loss so that its gradient is `gradient_ratio` times as long as that of the cycle
    loss. `clip_gradient` 0 clips nothing. `validation` is the share of clips held out; `palindrome` the
    frames that a walk visits on its way out, `gap` their distance as a share of the clip, both for frames
    stores.
    """

    head: str = setting("linear", "", table="cosettle_cache.heads:HEADS")
    init: str = setting("released", "Start of its linear maps: released, identity, pca.")
    regularizer: str = setting("kl", "kl, mse or cosine.")
    reduction: str = setting("released", "released or token-mean.")
    temperature: float = setting(0.03, "Of the cycle's transitions.")
    separability_weight: float | Literal["auto"] = setting(3.0, "Of its loss, or auto.", parse=parse_weight)
    gradient_ratio: float = setting(1.0, "With auto.")
    window: int = setting(2, "Tokens pooled per side.", min=1)
    epochs: int = setting(5, "One sample of every clip each.", min=1, max=1_000_000)
    warmup_epochs: float = setting(1.0, "Linear warm-up.", min=0)
    batch_size: int = 512  # its option is --batch of `train`, which knows whether it was typed
    accumulate: int = setting(1, "Batches per step.", min=1)
    base_lr: float = setting(1e-4, "Per 256 samples of a step.")
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = setting(0.05, "On matrices only.")
    clip_gradient: float = setting(0.0, "Its length; 0: any.", min=0)
    precision: str = setting("float32", "float32, tf32 (GPU), bf16 or fp16.")
    seed: int = setting(0, "Of initialisation and order.", min=0)
    order: str = setting("samples", "samples, or shards (URLs).")
    shard_window: int = setting(16, "Shards to mix.", min=1)
    validation: float = setting(0.0, "Share of clips held out.")
    palindrome: int = setting(2, "Frames of a walk.", min=2)
    gap: float = setting(0.15, "Share of a clip, in frames stores.", positive=True, max=1)
    checkpoint_every: int = setting(100, "Steps; at most one a minute.", min=1)
    keep_every: int = setting(0, "Steps after which heads are kept as well; 0: none.", min=0)

    @property
    def step_samples(self) -> int:
        """Samples of one optimiser step."""
        return self.batch_size * self.accumulate

    @property
    def lr(self) -> float:
        """Peak learning rate after warm-up."""
        return self.base_lr * self.step_samples / 256


@dataclass(frozen=True, slots=True)
class SpectralSettings(Settings):
    """The closed-form head: which tokens correspond, and where the soft threshold of the spectrum lies.

    `correspondence` is `nearest` or `position`. `spectral_lambda` lives on the scale of the eigenvalues of
    the intra-video covariance of unit tokens; None takes, of `n_lambdas` values, the one with the largest
    margin D = D_inter - `gamma` D_intra (PROTOCOLS 5.3) on the clips held out. These are a share `held_out`
    of the clips, at least 2 and at most `max_held_out`, drawn by `seed`; they never enter the covariance.
    """

    correspondence: str = setting(
        "nearest", "Which tokens of two frames belong together: nearest or position."
    )
    spectral_lambda: float | None = setting(None, "Soft threshold, in eigenvalues; default: by the margin.")
    n_lambdas: int = setting(32, "Lambdas to try.", min=2)
    gamma: float = setting(MARGIN_GAMMA, "Of the margin D_inter - gamma D_intra.")
    held_out: float = setting(0.2, "Share of clips to choose by.")
    max_held_out: int = 64
    seed: int = setting(0, "Which clips are held out.", min=0)


@dataclass(frozen=True, slots=True)
class LinearSettings(Settings):
    """Which head is computed without training, and for all but `spectral` how many components it has.

    `components` None: 20 of the black image's are taken out (`debias`), 128 of the tokens' are kept (`pca`),
    all are (`whiten`). `weights` is the encoder's file, which `debias` needs where the store's was moved.
    """

    head: str = setting("spectral", "What is computed.", choices=("spectral", "debias", "pca", "whiten"))
    components: int | None = setting(None, "Principal components, of debias, pca and whiten.", min=1)
    weights: str | None = setting(None, "Of debias: the encoder's FILE, where it has moved.")


@dataclass(frozen=True, slots=True)
class PropagateSettings(Settings):
    """How `propagate_store` works; the protocol decides what comes out.

    `memory_limit` bounds the search of all kinds of tokens together, in bytes. `neighbors` is a folder where
    neighbour lists are kept, and used again for other labels and temperatures.
    """

    restart: bool = setting(False, "Remove earlier results in --out first.")
    overlays: str = setting("first", "Pictures of no, one or all videos.", choices=OVERLAYS)
    search: str = setting("auto", "All are exact.", choices=SEARCHES)
    memory_limit: int | None = setting(
        None, "Most bytes that the search takes, as 500MB.", metavar="SIZE", parse=parse_bytes
    )
    neighbors: Path | None = setting(  # noqa: RUF009 - frozen
        None, "Folder to keep neighbour lists in, and to take them from.", names=("--save-neighbors",)
    )


@dataclass(frozen=True, slots=True)
class TrackSettings(Settings):
    """Which queries are asked, and how a point is found again among tokens (docs/tracking.md).

    `query_mode` is `first` or `strided` (every `query_stride` frames). A point is where the token of highest
    cosine lies, refined by a soft-argmax over the tokens within `radius` tokens of it, cosines divided by
    `temperature`. By `occlusion` it is visible when going back from there ends within `cycle_radius` tokens
    of the query (`cycle`), when its cosine is at least `min_cosine` (`cosine`), or always (`never`).
    """

    query_mode: str = setting(
        "first", "first: each point once; strided: again and again.", choices=QUERY_MODES
    )
    query_stride: int = setting(5, "Frames between, if strided.", min=1)
    radius: float = setting(2.0, "Of the soft-argmax, in tokens.", min=0)
    temperature: float = setting(0.05, "Of the soft-argmax.", positive=True)
    occlusion: str = setting(
        "cycle",
        "Visible: if the way back ends near, by cosine, always.",
        choices=("cycle", "cosine", "never"),
    )
    cycle_radius: float = setting(6.0, "What is near, in tokens.", positive=True)
    min_cosine: float = setting(0.7, "Least cosine, for cosine.")


@dataclass(frozen=True, slots=True)
class AnalyzeSettings(Settings):
    """Which definitions `analyze` measures by (docs/analysis.md), and the weight in their margins."""

    compat: bool = setting(False, "Draw tokens, batch and skip clips as the authors' script does.")
    gamma: float = setting(MARGIN_GAMMA, "Of the margin D_inter - gamma D_intra.")


def _parse_pairs(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(part.strip() for part in text.split(",", 1)) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(set(pair)) < 2 or not all(pair):
            raise UsageError(f"{text!r} is no pair of classes", wanted="FIRST,SECOND")
    return tuple((first, second) for first, second in pairs)


@dataclass(frozen=True, slots=True)
class ProbeSettings(Settings):
    """What the tasks of `probe` are measured with; docs/analysis.md says what each means.

    `official` learns from the split train and asks about test; otherwise there are `folds` stratified folds
    for each of `seeds` seeds. Neighbours vote with weight exp(cosine / `temperature`) (DINO's k-NN);
    `neighbors` None are 20 of knn, 30 of segmentation, whose `memory` of tokens is drawn with `memory_seed`.
    Without `pairs` of classes the order of frames is that of videos forwards against reversed. The probe of
    single frames learns from at most `max_frames`. Raises `UsageError` for a penalty that is not positive.
    """

    split: str = setting("", "Only the videos of this split; of spair its pairs, default test.")
    official: bool = setting(False, "Learn from split train, ask about test; no folds.")
    folds: int = setting(5, "Folds of linear and order.")
    seeds: int = setting(5, "Shuffles of the folds.")
    min_videos: int = setting(1, "Leave out classes with fewer videos.")
    neighbors: int | None = setting(
        None, "Neighbours; default 20 of knn, 30 of segmentation.", names=("--k",), min=1
    )
    temperature: float = 0.07
    memory: int = setting(0, "Tokens in the memory of segmentation; 0: all.", min=0)
    memory_seed: int = setting(0, "Which tokens these are.", min=0)
    penalties: tuple[float, ...] = setting(
        (1.0,), "Inverse L2 penalty; of several the best inside each fold.", names=("--c",)
    )
    n_frames: int = setting(
        0, "Frames that order joins; 0: as all have, 8 at most.", names=("--frames",), min=0
    )
    pairs: tuple[tuple[str, str], ...] = setting(
        (), "FIRST,SECOND: classes for order; default: reversal.", names=("--pair",), parse=_parse_pairs
    )
    bundle: str = setting("split1", "Split of the frame labels.")
    background: tuple[str, ...] = setting((), "Class that makes no segment; repeatable.")
    unit: bool = setting(False, "Give tokens length one before the mean.", names=("--unit-tokens",))
    search: str = setting("auto", "All are exact.", choices=("auto", "faiss", "torch"))
    max_frames: int = 50_000

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if not all(0 < penalty < math.inf for penalty in self.penalties):
            raise UsageError("an inverse penalty is a positive number", found=min(self.penalties))


@dataclass(frozen=True, slots=True)
class ExportSettings(Settings):
    """How `export frames` makes vectors and lays them out; `axes` is their order in .npy and HDF5.

    `dim-frame` is what FACT (for Breakfast) and MS-TCN expect. `repeat` writes every vector as often as the
    store skips frames, so that there is one per frame of the video.
    """

    format: str = setting(
        "npy",
        "A file per video; one table; one file (needs h5py).",
        names=("--format",),
        choices=("npy", "parquet", "hdf5"),
    )
    axes: str = setting(
        "dim-frame",
        "dim-frame: FACT on Breakfast, MS-TCN; frame-dim: FACT on new data.",
        choices=("dim-frame", "frame-dim"),
    )
    repeat: bool = setting(False, "One vector per frame of the video, where the store skips frames.")
    unit: bool = setting(False, "Give tokens length one before the mean.", names=("--unit-tokens",))


@dataclass(frozen=True, slots=True)
class PcaSettings(Settings):
    """Whose tokens share their components, which side of the first component is drawn, and what is written.

    `foreground` `none` draws all tokens, `auto` takes the side of the middle of the frames.
    """

    per: str = setting(
        "video", "Components of each video, or one set for the store.", choices=("video", "store")
    )
    foreground: str = setting(
        "none",
        "One side of the first component alone; auto: that of the middle.",
        choices=("none", "auto", "high", "low"),
    )
    film: str = setting("mp4", "Frame and colours beside each other.", choices=("mp4", "webp", "none"))
    stills: bool = setting(True, "A PNG per frame and kind of tokens.")


@dataclass(frozen=True, slots=True)
class SpritesSettings(Settings):
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


def draw_mark(seed: int, name: str) -> bytes:
    """Return by what a name is drawn: those with the smallest marks are, whatever other names there are."""
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def digest(document: Any) -> str:
    """Return the hex SHA-256 of `document` as canonical JSON."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    stage: str,
    dataset: str,
    fingerprint: Fingerprint,
    projection_sha256: str = "",
    packages: Sequence[str] = (),
) -> Provenance:
    """Return where the figures of `stage` (the name of a command) on a store's tokens come from.

    `packages` are those that move these figures besides the usual ones.
    """
    versions = {"extract": dict(fingerprint.versions), stage: package_versions(*packages)}
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
        inner = isinstance(value, Mapping)
        values |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return values


def flat_text(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a nested document as text by dotted key."""
    return {key: str(value) for key, value in flat(document).items()}
