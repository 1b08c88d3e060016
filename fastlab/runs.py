"""The run directory, which a training leaves behind: `RunDir` holds its paths and writes its files.

Besides this module, `run_records` reads a run, finished or not, for reports, and `training.reruns`
overwrites or changes an existing one. `RunDir.progress` is a study's quick look at a run that is
still being written.
"""

import json
import os
import shlex
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError, printable
from fastlab.files import process_lock, without_nan, write_atomically, write_json
from fastlab.machine import environment

COMPARED = ("classes", "image_size", "images", "mean", "std", "request", "files")
"""What the fingerprints of two datasets are compared by."""
_MOST_THREADS = 4096  # OpenMP ends the process where it cannot start as many as it is asked for


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
        self.errors = path / "errors.json"
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.safetensors"
        self.initial = path / "initial.safetensors"
        """The weights with which the run began; absent where these were random."""
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.mlruns = path / "mlruns"
        self.trackers = path / "trackers.json"
        """The name or id under which each tracker knows the run."""
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
        # W&B's service puts a link to its own log there, which nothing writes through.
        logs = {folder / "debug-core.log" for folder in self.wandb.glob("*/logs")}
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink() and path not in logs:
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
        with reading(self.config):
            self._check_exists()
            settings = configs.parse_toml(self.config)
            for name, section in settings.items():
                if not isinstance(section, dict):
                    raise TypeError(f"{name!r} is not a section")
            return settings

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the run's dataset. Raises `UserError` where it is missing or no JSON
        object."""
        return read_object(self.dataset)

    def check_data_path(self, path: str) -> None:
        """Raises `UserError` where `path`, which is `data.path` of the run, does not exist; whether
        a URL does, reading it shows."""
        if "://" in path or os.path.exists(path):
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
        with reading(self.dataset):
            return [str(name) for name in self.fingerprint()["classes"]]

    def threads(self) -> int | None:
        """How many threads each process of the run computed with when it began; None where that
        was not recorded. Raises `UserError` where the record is damaged."""
        with reading(self.environment):
            count = json.loads(self.environment.read_bytes()).get("threads")
            if count is not None and not (type(count) is int and 0 < count <= _MOST_THREADS):
                raise ValueError(f"threads = {count!r}")
            return count

    def check_dataset(self, now: dict[str, Any], form: str, path: str) -> None:
        """Raises `UserError` where `now`, the fingerprint of the dataset at `path`, differs from
        that of the run's own dataset. Only the files of the format `form` are compared."""
        with reading(self.dataset):
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

    def write_predictions(self, predictions: list[dict[str, Any]], errors: dict[str, Any]) -> None:
        write_json(self.predictions, predictions)
        write_json(self.errors, errors)

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


def same_images(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the datasets with these fingerprints hold the same images, in whichever formats. An
    empty fingerprint, which stands for a dataset of which nothing is known, equals its like."""
    if not (one and other):
        return one == other
    formats = one["files"].keys() & other["files"].keys() or {""}
    return any(not _differences(one, other, form) for form in formats)


def _differences(before: dict[str, Any], now: dict[str, Any], form: str) -> list[str]:
    differing = [name for name in COMPARED[:5] if before[name] != now[name]]
    # Equal requests give equal images, though a later fastlab may lay out the files differently.
    # Equal files may result from another copy of the originals. Unused formats do not matter.
    same = before["request"] == now["request"] or form not in before["files"]
    if not same and before["files"][form] != now["files"].get(form):
        differing.append(f"files in {form}/")
    return differing


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn whatever a missing or damaged file can raise into a `UserError` of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing: give a directory that training wrote") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"{path}:", error) from error


def damaged(what: str, error: Exception) -> UserError:
    # Not its repr: that of a UnicodeDecodeError holds the whole file.
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{what} damaged ({reason}); restore or correct the file")


def read_object(path: Path) -> dict[str, Any]:
    with reading(path):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError("not a JSON object")
        return value
