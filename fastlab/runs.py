"""The run directory: what a training leaves behind, written and read here alone.

`RunDir` holds its paths and writes it; `read_run` reads a finished or unfinished one in full and
checks it, for reports; `RunDir.progress` is a study's glance at a run that is being written.
"""

import base64
import contextlib
import json
import os
import statistics
import tomllib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.files import process_lock, without_nan, write_atomically, write_json
from fastlab.machine import environment

METRICS = ("loss", "top1", "top5")
"""What each epoch records of each split, under names such as `val_top1`."""
EPOCH_KEYS = (
    *(f"{split}_{metric}" for split in ("train", "val") for metric in METRICS),
    "images_per_second",
    "seconds",
)
_LARGEST = 1e300  # a metric beyond it, scaled to percent or subtracted, might overflow
_DEEPEST = 100  # levels of nesting in a file; far more than any page shows

Epoch = dict[str, float | None]
"""`EPOCH_KEYS` and "epoch", which is never None."""


class RunDir:
    """Paths and records of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.dataset = path / "dataset.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions.json"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.tensorboard = path / "tensorboard"
        self.traces = path / "traces"
        self.lock = path / "lock"

    def claim(self) -> None:
        """Make the directory of a new run. Raises `UserError` where it holds something already or
        cannot be written."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._unused():
                raise UserError(
                    f"{self.path}: is not empty; go on with --resume {self.path}, or choose "
                    f"another --out"
                )

    def create(self, config: Config, dataset: dict[str, Any], processes: int) -> None:
        """Turn a claimed and locked directory into a run. `dataset` is its dataset's fingerprint.
        Raises `UserError` where it cannot be written, or became a run before it was locked."""
        self.claim()
        with self._writing():
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.environment, environment(processes))
            write_json(self.dataset, dataset)
            # Last: a directory with a configuration is a run.
            write_atomically(self.config, configs.dump(config))

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the run against other trainings. Raises `UserError` where one of them has it."""
        busy = f"{self.path}: another process trains this run; wait for it or stop it"
        with ExitStack() as held:
            with self._writing():
                held.enter_context(process_lock(self.lock, busy))
            yield

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _unused(self) -> bool:
        """Empty, or with no more than what a `create` that was killed leaves."""
        begun = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        written = {self.checkpoints.name, self.lock.name, self.environment.name, self.dataset.name}
        names = {path.name for path in self.path.iterdir() if path.suffix != ".partial"}
        return not begun and names <= written

    def exists(self) -> bool:
        """Whether this is a run: it has a configuration."""
        return self.config.is_file()

    def load_config(self) -> Config:
        """The configuration, checked. Raises `UserError` where there is none or it is not valid."""
        if not self.exists():
            raise UserError(f"{self.path}: not a run directory (no config.toml)")
        return configs.load(self.config)

    def check_dataset(self, now: dict[str, Any], form: str, path: str) -> None:
        """Raises `UserError` where `now`, the fingerprint of the dataset at `path`, is not that of
        the dataset that the run began with; of the files, those of the format `form` count."""
        try:
            before = json.loads(self.dataset.read_bytes())
            differing = _differences(before, now, form)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.dataset}: damaged ({error!r}); put the file back") from None
        if differing:
            raise UserError(
                f"{path}: is not the dataset that {self.path} was trained on (other "
                f"{', '.join(differing)}); convert that one again, or set data.path in "
                f"{self.config}"
            )

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add an epoch's line, and wait until it is on the disk."""
        line = json.dumps(without_nan(record))
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_metrics(self, epochs: int) -> None:
        """Drop what was written after the checkpoint of `epochs` whole epochs.

        Raises `UserError` where one of those is missing: it was written before its checkpoint.
        """
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines() if epochs else []
            numbers = [json.loads(line)["epoch"] for line in lines[:epochs]]
        except OSError as error:
            raise self._metrics_lost(epochs, error.strerror) from None
        except (ValueError, TypeError, KeyError, RecursionError):  # also bad UTF-8
            raise self._metrics_lost(epochs, "damaged") from None
        if numbers != list(range(1, epochs + 1)):
            raise self._metrics_lost(epochs, f"holds {len(numbers)}")
        write_atomically(self.metrics, "".join(line + "\n" for line in lines[:epochs]))

    def _metrics_lost(self, epochs: int, reason: str | None) -> UserError:
        return UserError(
            f"{self.metrics}: the epochs 1 to {epochs} before the checkpoint are not all there "
            f"({reason}); put the file back, or train anew with another --out"
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)

    def write_predictions(self, predictions: list[dict[str, Any]]) -> None:
        write_json(self.predictions, predictions)

    def progress(self) -> tuple[str, dict[str, Any]]:
        """Status by the summary, and the record of the last whole epoch; "" and {} where they are
        missing or torn by a kill."""
        status, last = "", {}
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            status = json.loads(self.summary.read_bytes()).get("status", "")
        with contextlib.suppress(OSError):
            for line in self.metrics.read_bytes().splitlines()[-2:]:  # the last one may be torn
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    last = record if isinstance(record, dict) else last
        return status, last


def _differences(before: dict[str, Any], now: dict[str, Any], form: str) -> list[str]:
    names = ("classes", "image_size", "images", "mean", "std")
    differing = [name for name in names if before[name] != now[name]]
    # Equal requests give equal images, in files that a later fastlab may lay out otherwise. Equal
    # files may come of another copy of the originals. Formats that are not in use come and go.
    same = before["request"] == now["request"] or form not in before["files"]
    if not same and before["files"][form] != now["files"].get(form):
        differing.append(f"files in {form}/")
    return differing


@dataclass(frozen=True)
class Prediction:
    """One validation image, its true class and the most probable classes, best first."""

    png: str
    """The picture, base64."""
    width: int
    height: int
    label: str
    predicted: list[tuple[str, float | None]]
    """Class and probability, 0 to 1."""

    @property
    def rank(self) -> int | None:
        """The true class's place among `predicted`, from 1; None where it is not among them."""
        names = [name for name, _ in self.predicted]
        return names.index(self.label) + 1 if self.label in names else None


@dataclass(frozen=True)
class Run:
    """What one run directory holds; not-a-number values of a metric are None."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    epochs: list[Epoch]
    predictions: list[Prediction]


def read_run(directory: Path, name: str) -> Run:
    """Read a run directory. Raises UserError where it is none, or a file in it is malformed."""
    run = RunDir(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory: give a run directory")
    if not os.path.exists(run.config):
        raise UserError(
            f"{directory}: not a run directory, it has no config.toml: "
            "give a directory that training wrote"
        )
    return Run(
        name=name,
        config=_read_config(run.config),
        environment=_read_json(run.environment, dict),
        summary=_read_summary(run.summary),
        epochs=_read_metrics(run.metrics),
        predictions=_read_predictions(run.predictions),
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing: give a directory that training wrote") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file") from error


def _malformed(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}: correct the file or leave this run out")


def _check_depth(value: Any, levels: int = _DEEPEST) -> None:
    """Raises ValueError where `value` is nested in more than so many levels."""
    if not levels:
        raise ValueError(f"nested in more than {_DEEPEST} levels")
    children = value.values() if isinstance(value, dict) else value
    for child in children if isinstance(value, dict | list) else ():
        _check_depth(child, levels - 1)


def _parse_json(text: bytes) -> Any:
    """Raises ValueError where it is no JSON or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    _check_depth(value)
    return value


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = _parse_json(_read_bytes(path))
    except ValueError as error:
        raise _malformed(path, f"not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise _malformed(path, f"holds a JSON {type(value).__name__}, not a {kind.__name__}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = tomllib.loads(_read_bytes(path).decode())
        _check_depth(config)
        return config
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"not valid TOML ({error})") from error


def _read_summary(path: Path) -> dict[str, Any]:
    """The summary with its numbers checked; empty where the run has none yet."""
    if not path.exists():
        return {}
    summary = _read_json(path, dict)
    dataset = summary.get("dataset", {})
    if not isinstance(dataset, dict) or not isinstance(dataset.get("counts", {}), dict):
        raise _malformed(path, "'dataset' or its 'counts' is not an object")
    try:
        counts = {split: _finite(n) for split, n in dataset.get("counts", {}).items()}
        return {
            "parameters": _finite(summary.get("parameters")),
            "classes": _finite(dataset.get("classes")),
            "image_size": _finite(dataset.get("image_size")),
            "dataset": dataset.get("path"),
            "counts": counts,
            "skipped": _finite(dataset.get("skipped")),
            "status": summary.get("status"),
            "train_seconds": _finite(summary.get("train_seconds")),
        }
    except TypeError as error:
        raise _malformed(path, str(error)) from error


def _finite(value: Any) -> float | None:
    """The number; None for null, NaN, infinities and numbers that arithmetic on them might turn
    into infinities. Raises TypeError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value if abs(value) < _LARGEST else None


def _read_metrics(path: Path) -> list[Epoch]:
    *lines, last = _read_bytes(path).split(b"\n")
    if last and _is_json(last):
        lines.append(last)  # whole but for its newline; anything less was torn by a kill
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        try:
            epoch = _parse_epoch(line)
            if epochs and epoch["epoch"] <= epochs[-1]["epoch"]:
                raise ValueError(f"epoch {epoch['epoch']} follows epoch {epochs[-1]['epoch']}")
        except (ValueError, TypeError) as error:
            raise _malformed(path, f"line {number} is malformed ({error})") from error
        epochs.append(epoch)
    if not epochs:
        raise UserError(f"{path}: no epoch is recorded yet: wait for one or leave this run out")
    return epochs


def _is_json(text: bytes) -> bool:
    try:
        _parse_json(text)
    except ValueError:
        return False
    return True


def _parse_epoch(line: bytes) -> Epoch:
    """One line of metrics.jsonl. Raises ValueError or TypeError where it is malformed."""
    record = _parse_json(line)
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    epoch = record.get("epoch")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 1 <= epoch < 2**53:
        raise ValueError("'epoch' is not a whole number from 1 to 2^53 - 1")
    absent = [key for key in EPOCH_KEYS if key not in record]
    if absent:
        raise ValueError(f"{absent[0]!r} is absent")
    return {"epoch": epoch, **{key: _finite(record[key]) for key in EPOCH_KEYS}}


def _read_predictions(path: Path) -> list[Prediction]:
    if not path.exists():
        return []
    predictions = []
    for number, record in enumerate(_read_json(path, list), 1):
        try:
            predictions.append(_parse_prediction(record))
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(path, f"prediction {number} is malformed ({error!r})") from error
    return predictions


def _parse_prediction(record: Any) -> Prediction:
    """One entry of predictions.json. Raises KeyError, TypeError or ValueError if malformed."""
    png = base64.b64decode(record["png"], validate=True)
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError("'png' is not a PNG image")
    return Prediction(
        png=record["png"],
        width=int.from_bytes(png[16:20]),
        height=int.from_bytes(png[20:24]),
        label=str(record["label"]),
        predicted=[(str(p["name"]), _finite(p["probability"])) for p in record["predicted"]],
    )


def best_epoch(run: Run) -> Epoch | None:
    """The first epoch with the highest validation top-1; None where none was measured."""
    measured = [epoch for epoch in run.epochs if epoch["val_top1"] is not None]
    return max(measured, key=lambda epoch: epoch["val_top1"], default=None)


def images_per_second(run: Run) -> float | None:
    """Median training rate over the epochs, without the first, which compiles and warms up."""
    epochs = run.epochs[1:] or run.epochs
    rates = [e["images_per_second"] for e in epochs if e["images_per_second"] is not None]
    return statistics.median(rates) if rates else None


def train_seconds(run: Run) -> float | None:
    """The run's training time; while it is not summed up yet, the sum over its epochs."""
    summed = run.summary.get("train_seconds")
    # While a run goes on, and after a kill, the summary is that of its start.
    if summed is not None and run.summary["status"] != "running":
        return summed
    measured = [epoch["seconds"] for epoch in run.epochs if epoch["seconds"] is not None]
    return sum(measured) if measured else None
