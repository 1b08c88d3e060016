"""Configuration: a TOML file, then ``--set section.key=value`` overrides, into frozen dataclasses.

Strict: an unknown key, a wrong type or an impossible value is a one-line `UserError` that names the
place, the key, what was expected and, for a misspelling, the nearest valid key.
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fastlab.errors import UserError, printable

MODEL_NAMES = ("cnn8", "cnn10", "cnn12", "resnet11", "resnet15", "resnet19", "resnet18")


def _number(default: float, expected: str, check: Callable[[float], bool]) -> Any:
    return field(default=default, metadata={"check": (expected, check)})


def _above(default: float, low: float) -> Any:
    return _number(default, f"above {low}", lambda v: v > low)


def _at_least(default: float, low: float) -> Any:
    return _number(default, f"at least {low}", lambda v: v >= low)


def _fraction(default: float) -> Any:
    """A number in [0, 1)."""
    return _number(default, "at least 0 and below 1", lambda v: 0 <= v < 1)


def _choice(default: str, *options: str) -> Any:
    expected = "one of " + ", ".join(f'"{option}"' for option in options)
    return field(default=default, metadata={"check": (expected, lambda v: v in options)})


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/tiny-imagenet"
    """Dataset directory that `fastlab convert` wrote; relative to the working directory."""
    pipeline: str = _choice("resident", "resident", "ffcv", "dali", "torchvision")
    """What reads, and decodes, the images; pipelines/README.md says which one when."""
    workers: int = _at_least(0, 0)
    """Reading and decoding threads or processes of each process; 0: one for each core."""
    placement: str = _choice("auto", "auto", "device", "stream")
    """Where `resident` keeps the images: "device" holds all of them on the device, "stream" maps
    the file into memory and copies batches ahead of use, "auto" takes "device" where they fit."""
    hardware_load: float = _number(0.9, "from 0 to 1", lambda v: 0 <= v <= 1)
    """Share of the images that the GPU's JPEG hardware decodes (dali)."""


@dataclass(frozen=True)
class AugmentConfig:
    """Training only; everything off by default, as in the reference report."""

    flip: bool = False
    """Flip horizontally with probability 1/2."""
    translate: int = _at_least(0, 0)
    """Shift by up to so many pixels in x and in y; 0: off."""
    padding: str = _choice("reflect", "reflect", "mean")
    """What a translation brings into view: the reflected image, or the channel mean."""
    cutout: int = _at_least(0, 0)
    """Side of a square that is set to the channel mean, pixels; 0: off."""
    crop_scale: float = _number(1.0, "above 0 and at most 1", lambda v: 0 < v <= 1)
    """Random resized crop: smallest share of the image's area; 1: off."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = _choice("resnet11", *MODEL_NAMES)
    width: int = _at_least(64, 1)
    """Channels of the stem; every other width is a multiple of it."""
    batch_norm: bool = True
    shortcuts: bool = True
    """False: the same residual network without its shortcut branches."""
    dropout_conv: float = _fraction(0.2)
    """Dropout in the convolutional part."""
    dropout_stem: float = _fraction(0.15)
    """Dropout after the stem's convolution (residual networks)."""
    dropout_fc: float = _fraction(0.2)
    """Dropout before the classifier, and before the hidden layer of a CNN."""
    sync_batch_norm: bool = False
    """Take batch statistics over all processes."""


@dataclass(frozen=True)
class OptimConfig:
    name: str = _choice("adam", "adam", "adamw", "sgd")
    lr: float = _above(0.015, 0)
    """Initial (plateau, constant) or peak (cosine, onecycle) learning rate."""
    weight_decay: float = _at_least(0.0, 0)
    """Coupled for adam and sgd, decoupled for adamw; not applied to biases and norm parameters."""
    momentum: float = _fraction(0.9)
    """sgd only, with Nesterov's form where it is above 0."""
    beta1: float = _fraction(0.9)
    beta2: float = _fraction(0.999)
    eps: float = _above(1e-8, 0)


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = _choice("plateau", "plateau", "cosine", "onecycle", "constant")
    """plateau: `ReduceLROnPlateau` on validation top-1; cosine, onecycle: stepped every batch."""
    factor: float = _number(0.1, "above 0 and below 1", lambda v: 0 < v < 1)
    """plateau: multiplies the rate."""
    patience: int = _at_least(2, 0)
    """plateau: epochs without improvement that are waited out."""
    threshold: float = _at_least(1e-4, 0)
    """plateau: relative improvement that counts."""
    min_lr: float = _at_least(1e-8, 0)
    """plateau: floor of the rate."""
    warmup: float = _fraction(0.25)
    """cosine, onecycle: share of all steps in which the rate rises, linearly, from lr / 25."""
    final: float = _fraction(0.0)
    """cosine, onecycle: final rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = _at_least(100, 1)
    batch_size: int = _at_least(128, 1)
    """Images a step over all processes; a multiple of their number."""
    eval_batch_size: int = _at_least(1000, 1)
    """Images a validation batch over all processes; no figure depends on it."""
    seed: int = _number(0, "from 0 to 2^31 - 1", lambda v: 0 <= v < 2**31)
    precision: str = _choice("bf16", "fp32", "bf16", "fp16", "fp64")
    """Of the forward and backward pass; weights, optimizer and metrics stay fp32. "fp64" computes
    all in double precision, slowly: for comparing runs without rounding between them."""
    channels_last: bool = True
    compile: bool = True
    step: str = _choice("auto", "auto", "captured", "eager")
    """How a step is launched: "captured", by one CUDA graph; "eager", kernel by kernel. "auto"
    captures on one GPU, unless precision is fp16 or a trace is being recorded."""
    label_smoothing: float = _fraction(0.0)
    grad_clip: float = _at_least(0.0, 0)
    """Largest norm of the gradient; 0: no clipping."""
    ema: float = _fraction(0.0)
    """Decay a step of the moving average of weights that is then validated and saved; 0: off."""
    log_every: int = _at_least(50, 1)
    """Steps between looks at the loss, the clock and the other processes' wish to stop."""
    checkpoint_seconds: float = _at_least(30.0, 0)
    """Seconds between checkpoints, looked at every `log_every` steps and at the end of an epoch;
    0: at the end of every epoch. The end of the training always writes one."""
    checkpoint_every: int = _at_least(0, 0)
    """Steps between checkpoints within an epoch, whatever the clock says; 0: off."""
    deterministic: bool = False
    """On a GPU: True takes deterministic convolutions, so that a resumed run repeats an undisturbed
    one bit for bit; False lets cuDNN choose the fastest by trial. A CPU is always deterministic."""


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of a few training steps, counted from the start of the process."""

    enabled: bool = False
    wait: int = _at_least(10, 0)
    """Steps before anything: compilation and filling of caches."""
    warmup: int = _at_least(5, 0)
    """Steps in which the profiler runs and drops what it sees: its own start is slow."""
    active: int = _at_least(5, 1)
    """Steps recorded; the only synchronisation and the writing come after the last."""
    stacks: bool = False
    """Record Python's stack, for source lines in reviews; slows the recorded steps down."""
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
    profile: ProfileConfig = field(default_factory=ProfileConfig)


# Of earlier versions, in the configurations of their runs: without effect on what a run computes.
_RETIRED = {("train", "compile_mode")}

SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(Config)}


def load(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (None: all defaults) and apply ``section.key=value`` overrides in order.

    Raises `UserError` for anything that is not a valid configuration.
    """
    tables = _read(path) if path else {}
    values = _check_tables(tables, str(path))
    for override in overrides:
        section, key, value = _parse_override(override)
        values.setdefault(section, {})[key] = _check_value(section, key, value, "--set")
    return Config(**{name: SECTIONS[name](**table) for name, table in values.items()})


def dump(config: Config) -> str:
    """The whole configuration as TOML; `load` of it gives an equal configuration."""
    return tomli_w.dumps(dataclasses.asdict(config))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --config") from None
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and too long or too deep values
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _check_tables(tables: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    values = {}
    for section, table in tables.items():
        _known(section, SECTIONS, where, "section", "")
        if not isinstance(table, dict):
            raise UserError(
                f"{where}: {section}: expected a section, [{section}], got {_show(table)}"
            )
        values[section] = {
            key: _check_value(section, key, value, where)
            for key, value in table.items()
            if (section, key) not in _RETIRED
        }
    return values


def _check_value(section: str, key: str, value: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(SECTIONS[section])}
    _known(key, fields, where, "key", f"{section}.")
    kind = fields[key].type
    expected, allowed = fields[key].metadata.get("check", ("", lambda v: True))
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if (
        type(value) is not kind
        or (kind is float and not math.isfinite(value))
        or (kind is int and abs(value) >= 2**63)
        or (kind is str and not _is_text(value))
        or not allowed(value)
    ):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        wanted = expected if kind is str and expected else f"{names[kind]} {expected}".strip()
        raise UserError(f"{where}: {section}.{key}: expected {wanted}, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{printable(value)}"'
    try:
        return repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of tables in each other
        return "a value too long to show"


def _is_text(value: str) -> bool:
    """Whether it can be saved: a shell's argument that is not UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _known(name: str, valid: Iterable[str], where: str, kind: str, prefix: str) -> None:
    valid = list(valid)
    if name in valid:
        return
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"nearest valid {kind}: {prefix}{near[0]}" if near else f"valid: {', '.join(valid)}"
    raise UserError(f"{where}: {prefix}{printable(name)}: unknown {kind}; {hint}")


def _parse_override(text: str) -> tuple[str, str, Any]:
    # On one line: a newline could smuggle a second key into the TOML below.
    match = re.fullmatch(r"([^.=\s]+)\.([^.=\s]+)=(.*)", text)
    if not match:
        raise UserError(
            f"--set {printable(text)}: expected section.key=value, such as optim.lr=0.1"
        )
    section, key, value = match.groups()
    _known(section, SECTIONS, "--set", "section", "")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if not re.fullmatch(r"[\w./~+-]+", value):
            raise UserError(f"--set {printable(text)}: {value!r} is not a TOML value") from None
        parsed = value  # a shell eats the quotes of --set model.name="cnn8"
    return section, key, parsed
