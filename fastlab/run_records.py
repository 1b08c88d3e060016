"""What a run directory says of its training, read and checked: for reports and studies."""

import base64
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastlab.files import is_locked
from fastlab.runs import COMPARED, NotYetARun, RunDir, damaged, read_object, reading

EPOCH_KEYS = (
    *(f"{split}_{metric}" for split in ("train", "val") for metric in ("loss", "top1", "top5")),
    "images_per_second",
    "seconds",
)
"""What each epoch records."""
_LARGEST = 1e300  # larger metrics might overflow when they are scaled to percent or subtracted

Epoch = dict[str, float | None]
"""The values of `EPOCH_KEYS` and "lr", the learning rate of the first step, None where they are not
finite; and "epoch", which is never None."""


@dataclass(frozen=True)
class Prediction:
    """One validation image, its true class and the most probable classes, best first."""

    png: str
    """The image as PNG, in base64."""
    width: int
    height: int
    label: str
    predicted: list[tuple[str, float | None]]
    """Class and probability, 0 to 1."""

    @property
    def rank(self) -> int | None:
        """The rank of the true class within `predicted`, from 1; None where it is absent."""
        names = [name for name, _ in self.predicted]
        return names.index(self.label) + 1 if self.label in names else None


class ClassCount(NamedTuple):
    """How many of a class's validation images are right."""

    name: str
    images: int
    correct: int

    @property
    def share(self) -> float:
        """Top-1, 0 to 1; the class must have images."""
        return self.correct / self.images


class Confusion(NamedTuple):
    """How many validation images of the class `label` were taken for `predicted`."""

    label: str
    predicted: str
    count: int


@dataclass(frozen=True)
class Errors:
    """What the best weights get wrong on the validation split, without flips."""

    classes: list[ClassCount]
    confused: list[Confusion]
    """The most frequent first."""
    worst: list[Prediction]
    """The wrong answers of highest probability, highest first."""


@dataclass(frozen=True)
class Run:
    """The content of one run directory."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    epochs: list[Epoch]
    predictions: list[Prediction]
    dataset: dict[str, Any] = field(default_factory=dict)
    """The dataset's fingerprint; empty where an earlier version wrote none."""
    errors: Errors | None = None
    """None where the run has not ended, or an earlier version wrote none."""


def read_run(directory: Path | str, name: str) -> Run:
    """Read a run directory. Raises `NotYetARun` where no epoch has ended, and UserError where a
    file of it is missing or malformed."""
    run = RunDir(directory)
    config, summary = run.settings(), _read_summary(run.summary)
    if summary.get("status") == "running" and not is_locked(run.lock):
        # A killed training left the summary that it wrote at its start.
        summary.update(status="interrupted", train_seconds=None)
    return Run(
        name=name,
        config=config,
        environment=read_object(run.environment),
        summary=summary,
        epochs=_read_metrics(run.metrics),
        predictions=_read_predictions(run.predictions),
        dataset=_read_fingerprint(run),
        errors=read_errors(run.errors),
    )


def _read_fingerprint(run: RunDir) -> dict[str, Any]:
    if not run.dataset.exists():
        return {}
    fingerprint = run.fingerprint()
    with reading(run.dataset):
        return {key: fingerprint[key] for key in COMPARED} | {"files": dict(fingerprint["files"])}


def _read_summary(path: Path) -> dict[str, Any]:
    """The summary with its numbers checked; empty where the run has not written one yet."""
    if not path.exists():
        return {}
    summary = read_object(path)
    with reading(path):
        dataset = summary.get("dataset", {})
        return {
            "parameters": _finite(summary.get("parameters")),
            "classes": _finite(dataset.get("classes")),
            "image_size": _finite(dataset.get("image_size")),
            "dataset": dataset.get("path"),
            "counts": {split: _finite(n) for split, n in dataset.get("counts", {}).items()},
            "skipped": _finite(dataset.get("skipped")),
            "skipped_epochs": str(summary.get("skipped_epochs") or ""),
            "status": summary.get("status"),
            "train_seconds": _finite(summary.get("train_seconds")),
        }


def _finite(value: Any) -> float | None:
    """The number; None for null, NaN, infinities and numbers so large that arithmetic might turn
    them into infinities. Raises TypeError for anything else."""
    if value is None:
        return None
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
    return value if abs(value) < _LARGEST else None


def _read_metrics(path: Path) -> list[Epoch]:
    with reading(path):
        *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    if last.endswith(b"}"):  # any other line was cut short by a kill
        lines.append(last)
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(_parse_epoch(line, epoch_number(epochs[-1]) if epochs else 0))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(f"{path}: line {number} is", error) from error
    if not epochs:
        raise NotYetARun(f"{path}: no epoch is recorded yet; wait for one or leave this run out")
    return epochs


def _parse_epoch(line: bytes, before: int) -> Epoch:
    record = json.loads(line)
    number = _finite(record["epoch"])
    if type(number) is not int or number <= before:
        raise ValueError(f"'epoch' is not a whole number above {before}")
    values = {key: _finite(record[key]) for key in EPOCH_KEYS}
    return {"epoch": number, "lr": _finite(record.get("lr")), **values}


def _read_predictions(path: Path) -> list[Prediction]:
    if not path.exists():
        return []
    with reading(path):
        return [_parse_prediction(record) for record in json.loads(path.read_bytes())]


def _parse_prediction(record: dict[str, Any]) -> Prediction:
    png = base64.b64decode(record["png"], validate=True)
    if not png.startswith(b"\x89PNG") or len(png) < 24:
        raise ValueError("'png' is not a PNG image")
    return Prediction(
        png=record["png"],
        width=int.from_bytes(png[16:20]),
        height=int.from_bytes(png[20:24]),
        label=str(record["label"]),
        predicted=[(str(p["name"]), _finite(p["probability"])) for p in record["predicted"]],
    )


def read_errors(path: Path) -> Errors | None:
    """The content of a run's errors.json; None where there is none. Raises `UserError` where it is
    damaged."""
    if not path.exists():
        return None
    record = read_object(path)
    with reading(path):
        return Errors(
            [_class_count(each) for each in record["classes"]],
            [
                Confusion(str(pair["label"]), str(pair["predicted"]), _count(pair["count"]))
                for pair in record["confused"]
            ],
            [_parse_prediction(each) for each in record["worst"]],
        )


def _class_count(record: dict[str, Any]) -> ClassCount:
    images, correct = _count(record["images"]), _count(record["correct"])
    if correct > images:
        raise ValueError(f"{correct} of {images} images are right")
    return ClassCount(str(record["name"]), images, correct)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{value!r} is not a number of images")
    return value


def epoch_number(epoch: Epoch) -> int:
    number = epoch["epoch"]
    assert number is not None
    return int(number)


def best_epoch(run: Run) -> Epoch | None:
    """The first epoch with the highest validation top-1; None where no epoch has a value."""
    rated = [(top1, epoch) for epoch in run.epochs if (top1 := epoch["val_top1"]) is not None]
    return max(rated, key=lambda pair: pair[0], default=(None, None))[1]


def images_per_second(run: Run) -> float | None:
    """The median training rate over the epochs, without the first, which compiles and warms up."""
    epochs = run.epochs[1:] or run.epochs
    rates = [e["images_per_second"] for e in epochs if e["images_per_second"] is not None]
    return statistics.median(rates) if rates else None


def train_seconds(run: Run) -> float | None:
    """The training time in the summary; before the run has ended, the sum over its epochs."""
    total = run.summary.get("train_seconds")
    # While a run is under way, the summary dates from its start.
    if total is not None and run.summary["status"] != "running":
        return total
    measured = [seconds for epoch in run.epochs if (seconds := epoch["seconds"]) is not None]
    return sum(measured) if measured else None
