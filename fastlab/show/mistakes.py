"""What a model gets wrong on the validation split: counted here, or as its training recorded it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fastlab.config import Config
from fastlab.console import UserError, first_line, tell
from fastlab.dataset.manifest import Manifest
from fastlab.predict import Predictor, open_run
from fastlab.run_records import Errors, Prediction, read_errors
from fastlab.runs import RunDir, reading
from fastlab.training import setup
from fastlab.training.evaluate import probabilities
from fastlab.training.review import Seen, batches, confused, samples, validation_images

PAGE = 24
"""Mistakes that are shown together."""


@dataclass(frozen=True)
class Choice:
    """Which mistakes to show: those of the class `label`, those taken for `guess`, or both; None:
    of any class. Those before number `start` are left out."""

    label: int | None = None
    guess: int | None = None
    start: int = 0


class Source(Protocol):
    """Where the page's mistakes come from."""

    def overview(self) -> dict[str, Any]:
        """The keys

        - classes: name, images and correct of each class, in the model's order;
        - confused: label, guess and count of the most frequent wrong answers, classes by number.
        """
        ...

    def chosen(self, choice: Choice) -> dict[str, Any]:
        """The keys total and, for at most `PAGE` of those mistakes, images: png (base64), label and
        predicted, the most probable classes. The wrong answer of highest probability comes first.

        Raises `UserError` where the dataset can no longer be read.
        """
        ...


class Mistakes:
    """The mistakes of a run: first none, then those that a thread has counted. Where the dataset is
    not at hand, those in the run's errors.json."""

    def __init__(
        self, run: RunDir, data: str | None, predictor: Predictor, model_lock: threading.Lock
    ) -> None:
        """`model_lock` is held while the model computes."""
        self._run, self._data, self._predictor, self._lock = run, data, predictor, model_lock
        self._source: Source | None = None
        self._note = "The validation images are being evaluated."
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._find, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the images that it evaluates at this moment."""
        self._closing.set()
        self._thread.join()

    def overview(self) -> dict[str, Any]:
        """The overview of the source with the keys ready and note, a sentence for the reader."""
        source = self._source
        found = source.overview() if source else {"classes": [], "confused": []}
        return {"ready": source is not None, "note": self._note, **found}

    def chosen(self, choice: Choice) -> dict[str, Any]:
        return self._source.chosen(choice) if self._source else {"total": 0, "images": []}

    def _find(self) -> None:
        try:
            found = self._count()
            self._note = ""
        except Exception as error:  # the page must not wait for ever
            if not isinstance(error, UserError):
                tell(f"the validation images cannot be evaluated: {first_line(error)}")
            found, self._note = self._recorded(first_line(error))
        self._source = found

    def _count(self) -> "Counted | None":
        """None where the server ends."""
        cfg, manifest = open_run(self._run, self._data)
        parts = []
        for images, labels in batches(cfg, manifest, self._predictor.device):
            if self._closing.is_set():
                return None
            with self._lock, setup.torch_settings(cfg):
                shares, guesses = probabilities(self._predictor.model, images).max(dim=1)
                parts.append((labels, guesses.cpu().numpy(), shares.cpu().numpy()))
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Counted(cfg, manifest, self._predictor, self._lock, *columns)

    def _recorded(self, reason: str) -> tuple["Recorded", str]:
        """What the training recorded, and a note that says so; without a record, nothing."""
        try:
            errors = read_errors(self._run.errors)
            if errors is None:
                return Recorded(Errors([], [], []), []), f"No mistakes to show: {reason}"
            with reading(self._run.errors):
                names = [each.name for each in errors.classes]
                pairs = [
                    {"label": names.index(a), "guess": names.index(b), "count": count}
                    for a, b, count in errors.confused
                ]
        except UserError as error:
            return Recorded(Errors([], [], []), []), f"No mistakes to show: {reason}; {error}"
        note = (
            f"The training recorded these counts, and the pictures of only the "
            f"{len(errors.worst)} worst mistakes, with its best weights. The other pictures are "
            f"missing because the dataset cannot be read: {reason}"
        )
        return Recorded(errors, pairs), note


@dataclass(frozen=True)
class Counted:
    """The model's answers to all validation images, a `Source`. Images are read again when they are
    shown."""

    cfg: Config
    manifest: Manifest
    predictor: Predictor
    model_lock: threading.Lock
    labels: np.ndarray
    """int64 [images], in the order in which the pipeline gives them, as are these:"""
    guesses: np.ndarray
    """int64 [images]: the most probable class."""
    shares: np.ndarray
    """fp32 [images]: its probability."""

    def overview(self) -> dict[str, Any]:
        classes = self.manifest.classes
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(confusion, (self.labels, self.guesses), 1)
        return {
            "classes": [
                {"name": each.words, "images": int(row.sum()), "correct": int(row[index])}
                for index, (each, row) in enumerate(zip(classes, confusion, strict=True))
            ],
            "confused": [
                {"label": label, "guess": guess, "count": count}
                for label, guess, count in confused(confusion)
            ],
        }

    def chosen(self, choice: Choice) -> dict[str, Any]:
        wrong = self.guesses != self.labels
        if choice.label is not None:
            wrong &= self.labels == choice.label
        if choice.guess is not None:
            wrong &= self.guesses == choice.guess
        rows = np.flatnonzero(wrong)
        rows = rows[np.argsort(-self.shares[rows], kind="stable")]
        shown = rows[choice.start : choice.start + PAGE].tolist()
        with self.model_lock, setup.torch_settings(self.cfg):
            images = samples(self.predictor.model, self._seen(shown), self.manifest)
        return {"total": len(rows), "images": images}

    def _seen(self, rows: list[int]) -> list[Seen]:
        """The images of these numbers, each read as a batch of its own."""
        pipeline = validation_images(self.cfg, self.manifest, torch.device("cpu"), 1)
        images = (next(iter(pipeline.epoch(0, row))).images[0] for row in rows)
        device = self.predictor.device
        return [
            (float(self.shares[row]), image.to(device, copy=True), int(self.labels[row]))
            for row, image in zip(rows, images, strict=True)
        ]


@dataclass(frozen=True)
class Recorded:
    """The content of a run's errors.json, a `Source`."""

    errors: Errors
    pairs: Sequence[dict[str, int]]
    """The confused pairs, as the overview gives them."""

    def overview(self) -> dict[str, Any]:
        classes = [each._asdict() for each in self.errors.classes]
        return {"classes": classes, "confused": list(self.pairs)}

    def chosen(self, choice: Choice) -> dict[str, Any]:
        found = [each for each in self.errors.worst if self._fits(each, choice)]
        shown = found[choice.start : choice.start + PAGE]
        return {"total": len(found), "images": [_sample(each) for each in shown]}

    def _fits(self, mistake: Prediction, choice: Choice) -> bool:
        wanted = (choice.label, mistake.label), (choice.guess, mistake.predicted[0][0])
        names = dict(enumerate(each.name for each in self.errors.classes))
        return all(number is None or names.get(number) == name for number, name in wanted)


def _sample(mistake: Prediction) -> dict[str, Any]:
    predicted = [{"name": name, "probability": value} for name, value in mistake.predicted]
    return {"png": mistake.png, "label": mistake.label, "predicted": predicted}
