"""The run directory, which a training leaves behind. No module but this, and `training.reruns` for
an existing run that is overwritten or changed, writes or reads its files.

`RunDir` holds the paths and writes the files; `read_run` reads and checks a run, finished or not,
for reports; `RunDir.progress` is a study's quick look at a run that is still being written.
"""

import base64
import json
import os
import shlex
import statistics
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError, printable
from fastlab.files import is_locked, process_lock, without_nan, write_atomically, write_json
from fastlab.machine import environment

EPOCH_KEYS = (
    *(f"{split}_{metric}" for split in ("train", "val") for metric in ("loss", "top1", "top5")),
    "images_per_second",
    "seconds",
)
"""What each epoch records."""
_MOST_THREADS = 4096  # OpenMP ends the process where it cannot start as many as it is asked for
_LARGEST = 1e300  # larger metrics might overflow when they are scaled to percent or subtracted

Epoch = dict[str, float | None]
"""The values of `EPOCH_KEYS`, None where they are not finite, and "epoch", which is never None."""


class NotYetARun(UserError):
    """A path that exists, but is no run directory, or one in which no epoch has ended yet."""


class RunDir:
    """The paths and records of one run. Only the main process writes."""

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.dataset = path / "dataset.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions.json"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.initial = path / "initial.safetensors"
        """The weights with which the run began; absent where these were random."""
        self.tensorboard = path / "tensorboard"
        self.traces = path / "traces"
        self.lock = path / "lock"

    def claim(self, overwrite: bool = False) -> None:
        """Make a new run's directory. Raises `UserError` where it is not writable, or not empty:
        with `overwrite`, it may be a run."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if self._unused() or (overwrite and self.exists()):
                return
        if self.exists():
            raise UserError(
                f"{self.path}: is not empty; {self.resume_hint()}, start it anew with --overwrite, "
                f"or choose another --out"
            )
        raise UserError(f"{self.path}: is not empty, and is not a run; choose another --out")

    def resume_hint(self) -> str:
        """The command that resumes the run, as a shell takes it."""
        options = f"--resume {printable(shlex.quote(str(self.path)))}"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return f"resume with the launcher as before, and {options}"
        return f"resume with: fastlab train {options}"

    def create(
        self,
        config: Config,
        dataset: dict[str, Any],
        processes: int,
        *,
        initial: bytes | None = None,
        overwrite: bool = False,
    ) -> None:
        """Turn a claimed and locked directory into a run. Raises `UserError` where it cannot be
        written or became a run before it was locked. `dataset` is the dataset's fingerprint,
        `initial` a safetensors file of the weights with which the run begins; None: random ones.
        With `overwrite`, it may be a run, of which `reruns.clear` has removed the rest."""
        self.claim(overwrite)
        with self.writing():
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self.environment, environment(processes))
            write_json(self.dataset, dataset)
            if initial is not None:
                write_atomically(self.initial, initial)
            # Written last, because a directory with a configuration counts as a run.
            write_atomically(self.config, configs.dump(config))

    @contextmanager
    def locked(self) -> Generator[None]:
        """Lock the run against other trainings. Raises `UserError` where another holds the lock, or
        where a link in the directory, which may come from somebody else, would have the training
        write elsewhere."""
        busy = f"{self.path}: another process trains this run; wait for it or stop it"
        with ExitStack() as held:
            with self.writing():
                self._refuse_links()
                held.enter_context(process_lock(self.lock, busy))
            yield

    def _refuse_links(self) -> None:
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink():
                    raise UserError(
                        f"{printable(str(path))}: is a link, and a training writes only into its "
                        f"own directory; put the file or directory itself in its place"
                    )

    @contextmanager
    def writing(self) -> Generator[None]:
        """A failure to write becomes a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _unused(self) -> bool:
        """Whether the directory is empty or holds only what a killed `create` leaves behind."""
        begun = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        written = (self.checkpoints, self.lock, self.environment, self.dataset, self.initial)
        present = {path for path in self.path.iterdir() if path.suffix != ".partial"}
        return not begun and present <= set(written)

    def exists(self) -> bool:
        """Whether this is a run, which is to say, whether it has a configuration."""
        return self.config.is_file()

    def load_config(self) -> Config:
        """The validated configuration. Raises `UserError` where it is missing or not valid."""
        self._check_exists()
        return configs.load(self.config)

    def _check_exists(self) -> None:
        if not self.exists():
            why, kind = "no such directory", UserError
            if self.path.exists():
                why, kind = "no config.toml" if self.path.is_dir() else "a file", NotYetARun
            raise kind(
                f"{self.path}: not a run directory ({why}); give a directory that training wrote"
            )

    def settings(self) -> dict[str, dict[str, Any]]:
        """The configuration, which another version may have written: section -> key -> value.
        Raises `UserError` where it is missing or does not consist of sections."""
        with _reading(self.config):
            self._check_exists()
            settings = configs.parse_toml(self.config)
            for name, section in settings.items():
                if not isinstance(section, dict):
                    raise TypeError(f"{name!r} is not a section")
            return settings

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the run's dataset. Raises `UserError` where it is missing or no JSON
        object."""
        return _read_object(self.dataset)

    def check_data_path(self, path: str) -> None:
        """Raises `UserError` where `path`, which is `data.path` of the run, does not exist."""
        if os.path.exists(path):
            return
        relative = "data.path is relative to where training was started; run the command there, or "
        raise UserError(
            f"{path}: no such directory; {'' if os.path.isabs(path) else relative}give the run's "
            f"dataset as --data DIR (train --resume: as --set data.path=DIR)"
        )

    def classes(self) -> list[str]:
        """The ids of the classes that the run tells apart, in the order of its outputs. Raises
        `UserError` where this is not a run, or the record of its dataset is damaged."""
        self._check_exists()
        with _reading(self.dataset):
            return [str(name) for name in self.fingerprint()["classes"]]

    def threads(self) -> int | None:
        """How many threads each process of the run computed with when it began; None where that
        was not recorded. Raises `UserError` where the record is damaged."""
        with _reading(self.environment):
            count = json.loads(self.environment.read_bytes()).get("threads")
            if count is not None and not (type(count) is int and 0 < count <= _MOST_THREADS):
                raise ValueError(f"threads = {count!r}")
            return count

    def check_dataset(self, now: dict[str, Any], form: str, path: str) -> None:
        """Raises `UserError` where `now`, the fingerprint of the dataset at `path`, differs from
        that of the run's own dataset. Only the files of the format `form` are compared."""
        with _reading(self.dataset):
            differing = _differences(json.loads(self.dataset.read_bytes()), now, form)
        if differing:
            raise UserError(
                f"{path}: is not the dataset that {self.path} was trained on (other "
                f"{', '.join(differing)}); convert that dataset again, or set data.path in "
                f"{self.config}"
            )

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append the line of an epoch and wait until it is on disk."""
        line = json.dumps(without_nan(record))
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines written after the checkpoint of `epochs` whole epochs. Raises `UserError`
        where the line of one of those epochs, which precedes its checkpoint, is missing."""
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines()[:epochs] if epochs else []
            numbers = [json.loads(line)["epoch"] for line in lines]
        except (OSError, ValueError, TypeError, KeyError):
            numbers = None
        if numbers != list(range(1, epochs + 1)):
            raise UserError(
                f"{self.metrics}: the epochs 1 to {epochs} before the checkpoint are not all there "
                f"or damaged; restore the file, or start again with another --out"
            )
        write_atomically(self.metrics, "".join(line + "\n" for line in lines))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)

    def write_predictions(self, predictions: list[dict[str, Any]]) -> None:
        write_json(self.predictions, predictions)

    def progress(self) -> tuple[str, dict[str, Any]]:
        """The status in the summary and the record of the last whole epoch; "" and {} where they
        are missing or damaged."""
        status, last = "", {}
        with suppress(OSError, ValueError, AttributeError):
            status = json.loads(self.summary.read_bytes()).get("status", "")
        with suppress(OSError, ValueError, IndexError):
            # What follows the last newline was cut short by a kill.
            last = json.loads(self.metrics.read_bytes().split(b"\n")[-2])
        return status, last


def _differences(before: dict[str, Any], now: dict[str, Any], form: str) -> list[str]:
    names = ("classes", "image_size", "images", "mean", "std")
    differing = [name for name in names if before[name] != now[name]]
    # Equal requests give equal images, though a later fastlab may lay out the files differently.
    # Equal files may result from another copy of the originals. Unused formats do not matter.
    same = before["request"] == now["request"] or form not in before["files"]
    if not same and before["files"][form] != now["files"].get(form):
        differing.append(f"files in {form}/")
    return differing


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


@dataclass(frozen=True)
class Run:
    """The content of one run directory."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    epochs: list[Epoch]
    predictions: list[Prediction]


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
        environment=_read_object(run.environment),
        summary=summary,
        epochs=_read_metrics(run.metrics),
        predictions=_read_predictions(run.predictions),
    )


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn whatever a missing or damaged file can raise into a `UserError` of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing: give a directory that training wrote") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(f"{path}:", error) from error


def _damaged(what: str, error: Exception) -> UserError:
    # Not its repr: that of a UnicodeDecodeError holds the whole file.
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{what} damaged ({reason}); restore or correct the file")


def _read_object(path: Path) -> dict[str, Any]:
    with _reading(path):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError("not a JSON object")
        return value


def _read_summary(path: Path) -> dict[str, Any]:
    """The summary with its numbers checked; empty where the run has not written one yet."""
    if not path.exists():
        return {}
    summary = _read_object(path)
    with _reading(path):
        dataset = summary.get("dataset", {})
        return {
            "parameters": _finite(summary.get("parameters")),
            "classes": _finite(dataset.get("classes")),
            "image_size": _finite(dataset.get("image_size")),
            "dataset": dataset.get("path"),
            "counts": {split: _finite(n) for split, n in dataset.get("counts", {}).items()},
            "skipped": _finite(dataset.get("skipped")),
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
    with _reading(path):
        *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    if last.endswith(b"}"):  # any other line was cut short by a kill
        lines.append(last)
    epochs: list[Epoch] = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(_parse_epoch(line, epoch_number(epochs[-1]) if epochs else 0))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _damaged(f"{path}: line {number} is", error) from error
    if not epochs:
        raise NotYetARun(f"{path}: no epoch is recorded yet; wait for one or leave this run out")
    return epochs


def _parse_epoch(line: bytes, before: int) -> Epoch:
    record = json.loads(line)
    number = _finite(record["epoch"])
    if type(number) is not int or number <= before:
        raise ValueError(f"'epoch' is not a whole number above {before}")
    return {"epoch": number, **{key: _finite(record[key]) for key in EPOCH_KEYS}}


def _read_predictions(path: Path) -> list[Prediction]:
    if not path.exists():
        return []
    with _reading(path):
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
