"""Configuration: a TOML file, then ``--set section.key=value`` overrides, into frozen dataclasses.

Strict: an unknown key, a wrong type or an impossible value is a one-line `UserError` that names the
place, the key, what was expected and, for a misspelling, the nearest valid key. A section checks
its values whenever one is made, from a file or in Python.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import tomli_w

from fastlab import shipped
from fastlab.console import UserError, printable
from fastlab.fields import (
    AboveZero,
    Angle,
    Count,
    Factor,
    Fraction,
    HalfTurn,
    NotNegative,
    Positive,
    PositiveShare,
    Section,
    Seed,
    Share,
    SizeStages,
    Trackers,
    checked,
    field_types,
    show,
)
from fastlab.model_config import ModelConfig


@dataclass(frozen=True)
class DataConfig(Section):
    path: str = "data/tiny-imagenet"
    """Dataset directory that `fastlab convert` wrote, relative to the working directory; for
    "stream" also its URL, such as s3://bucket/dataset."""
    pipeline: Literal["resident", "ffcv", "dali", "torchvision", "stream"] = "resident"
    """What reads and decodes the images; pipelines/README.md says which engine suits what."""
    workers: Count = 0
    """Threads or processes that read and decode for each training process; 0: one per core."""
    placement: Literal["auto", "device", "stream"] = "auto"
    """Where `resident` keeps the images: "device" holds all of them on the device, "stream" maps
    the file into memory and copies batches ahead of use, "auto" takes "device" where they fit."""
    hardware_load: Share = 0.9
    """Share of the images that the GPU's JPEG hardware decodes (dali)."""
    window: Positive = 8
    """stream: successive shards of an epoch whose images are shuffled together."""
    lanes: Positive = 1
    """stream: equal parts into which an epoch's sequence of shards is cut; each batch takes an
    equal share from every part. With as many machines, or a divisor of it, each machine reads only
    its own parts. The batches depend on this number, but not on that of the machines."""
    cache: str = ""
    """stream: folder of this machine for the shards of a URL; "": fastlab-stream-UID in the
    temporary folder."""
    cache_gib: AboveZero = 20.0
    """stream: GiB that the cache may hold; the shards that were used longest ago are removed."""


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Augmentation of training images; everything is off by default, as in the reference report."""

    flip: bool = False
    """Flip horizontally with probability 1/2."""
    translate: Count = 0
    """Largest shift in x and in y, pixels; 0: off."""
    padding: Literal["reflect", "mean"] = "reflect"
    """What fills the area that a translation uncovers: the reflected image, or the channel mean."""
    cutout: Count = 0
    """Side of the square that is set to the channel mean, pixels; 0: off."""
    crop_scale: PositiveShare = 1.0
    """Random resized crop: smallest share of the image's area; 1: off."""
    mixup: NotNegative = 0.0
    """MixUp: alpha of the Beta distribution from which each image's share of the mixture is drawn;
    0: off. With `cutmix`, each image takes one of the two with probability 1/2."""
    cutmix: NotNegative = 0.0
    """CutMix: alpha of the Beta distribution from which the share that each image keeps is drawn;
    0: off."""
    erasing: Share = 0.0
    """Probability that a rectangle of 2 to 33 % of the area is set to the channel mean."""
    rotation: Angle = 0.0
    """Largest angle of a rotation either way, degrees; 0: off. The nearest pixels are taken, and
    the channel mean outside of the image."""
    brightness: Share = 0.0
    """Colour jitter: multiply by a factor in [1 - x, 1 + x]; 0: off. The four parts of the jitter
    are applied in this order; torchvision's ColorJitter draws the order for each image."""
    contrast: Share = 0.0
    """The same for the distance to the image's mean grey value."""
    saturation: Share = 0.0
    """The same for the distance to each pixel's grey value."""
    hue: HalfTurn = 0.0
    """Turn hues by a share of the circle in [-x, x]; 0: off."""
    trivial: bool = False
    """TrivialAugment "wide" (Müller and Hutter, 2021): one of 14 operations at one of 31 strengths
    on each image."""


@dataclass(frozen=True)
class OptimConfig(Section):
    name: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    lr: AboveZero = 0.015
    """Initial (plateau, constant) or peak (cosine, onecycle) learning rate."""
    weight_decay: NotNegative = 0.0
    """Coupled for adam and sgd, decoupled for adamw and muon; not applied to biases and norm
    parameters."""
    momentum: Fraction = 0.9
    """sgd, muon: Nesterov momentum; 0: none."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: AboveZero = 1e-8


@dataclass(frozen=True)
class ScheduleConfig(Section):
    name: Literal["plateau", "cosine", "onecycle", "constant"] = "plateau"
    """plateau: `ReduceLROnPlateau` on validation top-1. cosine, onecycle: a new rate every step."""
    factor: Factor = 0.1
    """plateau: multiplies the rate where validation has stopped improving."""
    patience: Count = 2
    """plateau: epochs without improvement before the rate is reduced."""
    threshold: NotNegative = 1e-4
    """plateau: smallest relative improvement that counts as one."""
    min_lr: NotNegative = 1e-8
    """plateau: lowest rate."""
    floor_patience: Count = 0
    """plateau: the training ends where the rate can fall no further and so many epochs brought no
    better validation top-1; 0: it trains all epochs."""
    warmup: Fraction = 0.25
    """cosine, onecycle: share of all steps during which the rate rises linearly from lr / 25."""
    final: Fraction = 0.0
    """cosine, onecycle: final rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig(Section):
    epochs: Positive = 100
    batch_size: Positive = 128
    """Images per step over all processes; a multiple of the number of processes."""
    eval_batch_size: Positive = 1000
    """Images per validation batch over all processes; no figure depends on it."""
    seed: Seed = 0
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Precision of the forward and backward pass; weights, optimizer and metrics stay fp32. "fp64"
    computes everything in double precision, slowly: for comparing runs without rounding errors."""
    channels_last: bool = True
    compile: bool = True
    step: Literal["auto", "captured", "eager"] = "auto"
    """How a step is launched: "captured" as one CUDA graph, "eager" kernel by kernel. "auto"
    captures on one GPU, unless precision is fp16 or a trace is being recorded."""
    image_size: SizeStages = ()
    """Progressive resizing: [[0.4, 32], [0.7, 48]] trains on images averaged down to 32 pixels a
    side until 40 % of the epochs are done, on 48 until 70 %, then on whole ones; validation always
    takes whole ones."""
    label_smoothing: Fraction = 0.0
    grad_clip: NotNegative = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Fraction = 0.0
    """Decay per step of the moving average of weights, which is what is validated; 0: off."""
    log_every: Positive = 50
    """Steps between checks of the loss, the clock and stop signals on any process."""
    checkpoint_seconds: NotNegative = 30.0
    """Seconds between checkpoints, checked every `log_every` steps and at the end of an epoch; 0:
    at the end of every epoch. The end of the training always writes one."""
    checkpoint_every: Count = 0
    """Steps between checkpoints within an epoch, whatever the clock says; 0: off."""
    trackers: Trackers = ("tensorboard",)
    """Where curves and sample predictions go besides the run's own files: any of "tensorboard",
    "wandb", "mlflow" and "trackio"."""
    deterministic: bool = False
    """On a GPU, True takes deterministic convolutions, so that a resumed run repeats an
    uninterrupted one bit for bit; False lets cuDNN choose the fastest by trial. A CPU is always
    deterministic."""


Tta = Literal["none", "flip"]


@dataclass(frozen=True)
class EvaluateConfig(Section):
    tta: Tta = "none"
    """Test-time augmentation: "flip" averages the logits of each image and of its mirror image."""


@dataclass(frozen=True)
class ProfileConfig(Section):
    """A trace of a few training steps, counted from the start of the process."""

    enabled: bool = False
    wait: Count = 10
    """Steps before the profiler starts: they compile and fill caches."""
    warmup: Count = 5
    """Steps whose recording is discarded: the profiler's own start is slow."""
    active: Positive = 5
    """Recorded steps. The device is synchronised, and the trace written, only after the last."""
    stacks: bool = False
    """Record Python's stack, for source lines in reviews; this slows the recorded steps."""
    memory: bool = False
    """Record allocations; on a GPU also a snapshot for https://pytorch.org/memory_viz."""


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


def tta_label(tta: str) -> str:
    """What follows the name of figures: empty for plain ones."""
    return "" if tta == "none" else f" (tta={tta})"


WITHOUT_EFFECT = {"train.trackers"}
"""Settings on which no figure of a run depends: they tell no runs apart."""

# Keys of earlier versions, ignored in files: they had no effect on what a run computes.
_RETIRED = {("train", "compile_mode")}

SECTIONS: dict[str, type] = get_type_hints(Config)

# Bytes of a file. tomllib takes minutes for a dotted key of some hundred kilobytes.
_LARGEST = 1 << 16


def load(path: Path | str | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (None: all defaults) and apply ``section.key=value`` overrides in order.

    Raises `UserError` for anything that is not a valid configuration.
    """
    tables = read_toml(Path(path)) if path else {}
    values = _check_tables(tables, str(path))
    overrides = list(overrides)
    for override in overrides:
        section, key, value = _parse_override(override)
        table = values.setdefault(section, {})
        if isinstance(value, _Argument):
            value = {**table.get(key, {}), value.name: value.value}
        table[key] = _checked_in("--set", section, key, value)
    try:
        return Config(**{name: SECTIONS[name](**table) for name, table in values.items()})
    except UserError as error:  # settings that contradict each other
        sources = [*([str(path)] if path else []), *(["--set"] if overrides else [])]
        raise UserError(f"{' with '.join(sources)}: {error}") from None


def changed(config: Config, sections: Mapping[str, Any]) -> Config:
    """`config` with the values in `sections` (section -> key -> value) in place of its own. Raises
    `UserError` as `load` does."""
    values = check_sections(sections)
    parts = {name: replace(getattr(config, name), **table) for name, table in values.items()}
    return replace(config, **parts)


def check_sections(sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values in `sections`, each checked alone. Raises `UserError` as `load` does."""
    return _check_tables(sections, "")


def dump(config: Config) -> str:
    """The whole configuration as TOML; `load` of it gives an equal configuration."""
    return tomli_w.dumps(dataclasses.asdict(config))


def differences(before: Config, after: Config) -> dict[str, Any]:
    """``section.key`` -> the value in `before`, for every value that is another in `after`."""
    new = dataclasses.asdict(after)
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(before).items()
        for key, value in values.items()
        if new[section][key] != value
    }


def read_toml(path: Path, advice: str = "check --config") -> dict[str, Any]:
    """Raises `UserError`, with `advice` where the file cannot be read."""
    try:
        return parse_toml(path)
    except OSError as error:
        what_to_do = shipped.advice(path) or advice
        raise UserError(f"{path}: cannot be read ({error.strerror}); {what_to_do}") from None
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and too long or too deep values
        raise UserError(f"{path}: not valid TOML: {error}") from None


def parse_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises OSError; and ValueError or RecursionError where the content
    is not valid or is larger than any configuration."""
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"larger than {_LARGEST} bytes")
    return tomllib.loads(content.decode())


def _check_tables(tables: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The checked values of the sections, which stand in the file `where`; empty: in Python."""
    values = {}
    for section, table in tables.items():
        if section not in SECTIONS and not isinstance(table, dict):
            raise _unknown_key(where, "", section)
        if section not in SECTIONS:
            near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0.5)
            hint = f"nearest valid section: {near[0]}" if near else f"valid: {', '.join(SECTIONS)}"
            raise UserError(f"{_in(where)}{printable(section)}: unknown section; {hint}")
        if not isinstance(table, dict):
            raise UserError(
                f"{_in(where)}{section}: expected a section, [{section}], got {show(table)}"
            )
        values[section] = {
            key: _checked_in(where, section, key, value)
            for key, value in table.items()
            if (section, key) not in _RETIRED
        }
    return values


def _in(where: str) -> str:
    """What precedes the name of a section or key in a message."""
    return f"{where}: " if where else ""


def _checked_in(where: str, section: str, key: str, value: Any) -> Any:
    """Check here, and not only when the section is made, since here it is known where it stands."""
    kinds = field_types(SECTIONS[section]) if section in SECTIONS else {}
    if key not in kinds:
        raise _unknown_key(where, section, key)
    return checked(f"{_in(where)}{section}.{key}", kinds[key], value)


def _unknown_key(where: str, section: str, key: str) -> UserError:
    """The error for a key that does not exist. It names the nearest valid keys: of this section, or
    of any where the section is missing or unknown, or where another section has this very key."""
    keys = {f"{name}.{each}": each for name in SECTIONS for each in field_types(SECTIONS[name])}
    if section in SECTIONS and key not in keys.values():
        keys = {f"{section}.{each}": each for each in field_types(SECTIONS[section])}
    given = f"{section}.{key}" if section else key
    nearest = difflib.get_close_matches(key, keys.values(), n=1, cutoff=0.5)
    names = [name for name, each in keys.items() if each in nearest]
    if section:  # several sections may have it: "name"
        names = difflib.get_close_matches(given, names, n=1, cutoff=0)
    valid = ", ".join(keys.values() if section in SECTIONS else SECTIONS)
    hint = f"nearest valid key: {' or '.join(names)}" if names else f"valid: {valid}"
    return UserError(f"{_in(where)}{printable(given)}: unknown key; {hint}")


class _Argument(NamedTuple):
    """The value of one of `model.arguments`."""

    name: str
    value: Any


def _parse_override(text: str) -> tuple[str, str, Any]:
    """Section, key and value, or `_Argument`."""
    # On one line: a newline could smuggle a second key into the TOML below.
    match = re.fullmatch(r"(?:(model\.arguments)\.|([^.=\s]+)\.)?([^.=\s]+)=(.*)", text)
    if not match:
        raise UserError(
            f"--set {printable(text)}: expected section.key=value, such as optim.lr=0.1"
        )
    arguments, section, key, value = match.groups(default="")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if not re.fullmatch(r"[\w.:/~+-]+", value):
            raise UserError(f"--set {printable(text)}: {value!r} is not a TOML value") from None
        parsed = value  # a shell eats the quotes of --set model.name="cnn8"
    return ("model", "arguments", _Argument(key, parsed)) if arguments else (section, key, parsed)
