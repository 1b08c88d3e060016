"""The run directory: what a training leaves behind, and all that reports read."""

import errno
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from fastlab import config as configs
from fastlab.config import Config
from fastlab.doctor import has_bf16
from fastlab.errors import UserError
from fastlab.public import public_command

_PACKAGES = (
    "accelerate",
    "ffcv",
    "numba",
    "numpy",
    "nvidia-dali-cuda130",
    "pillow",
    "safetensors",
    "simplejpeg",
    "torch",
    "torchvision",
    "triton",
)


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
        """Make a claimed directory, which is locked, a run. `dataset` is a fingerprint. Raises
        `UserError` where it cannot be written, or was made a run before it was locked."""
        self.claim()
        with self._writing():
            self.checkpoints.mkdir(exist_ok=True)
            _write_json(self.environment, environment(processes))
            _write_json(self.dataset, dataset)
            # Last: a directory with a configuration is a run.
            write_atomically(self.config, configs.dump(config))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold on to the run against other trainings. Raises `UserError` where one has it."""
        with self._writing():
            file = self.lock.open("w")
        with file:
            if not _try_lock(file):
                raise UserError(
                    f"{self.path}: another process trains this run; wait for it or stop it"
                )
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _unused(self) -> bool:
        """Empty, or with no more than what a `create` that was killed leaves."""
        started = (self.environment.name, self.dataset.name, self.config.name)
        left = {self.checkpoints.name, self.lock.name, *started[:-1]}
        left |= {f"{name}.partial" for name in started}
        begun = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        return not begun and {path.name for path in self.path.iterdir()} <= left

    def load_config(self) -> Config:
        if not self.config.is_file():
            raise UserError(f"{self.path}: not a run directory (no config.toml)")
        return configs.load(self.config)

    def read_dataset(self) -> Any:
        """The fingerprint of the run's dataset. Raises `UserError` where it cannot be read."""
        try:
            return json.loads(self.dataset.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.dataset}: damaged ({error}); put the file back") from None

    def append_metrics(self, record: dict[str, Any]) -> None:
        line = json.dumps(_finite(record))
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
            found = [json.loads(line)["epoch"] for line in lines[:epochs]]
        except OSError as error:
            raise self._metrics_lost(epochs, error.strerror) from None
        except (ValueError, TypeError, KeyError, RecursionError):  # also bad UTF-8
            raise self._metrics_lost(epochs, "damaged") from None
        if found != list(range(1, epochs + 1)):
            raise self._metrics_lost(epochs, f"holds {len(found)}")
        write_atomically(self.metrics, "".join(line + "\n" for line in lines[:epochs]))

    def _metrics_lost(self, epochs: int, reason: str) -> UserError:
        return UserError(
            f"{self.metrics}: the epochs 1 to {epochs} before the checkpoint are not all there "
            f"({reason}); put the file back, or train anew with another --out"
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        _write_json(self.summary, summary)

    def write_predictions(self, predictions: list[dict[str, Any]]) -> None:
        _write_json(self.predictions, predictions)


def environment(processes: int) -> dict[str, Any]:
    """Date, command, machine and versions: what a figure must carry to be believed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": public_command(sys.argv),
        "machine": {
            "cpu": _cpu_name(),
            "instructions": _instructions(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
            ),
            "gpus": gpus,
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "processes": processes,
        "git": _git_revision(),
    }


def _try_lock(file: IO[str]) -> bool:
    """Until the file is closed or this process ends. Not flock: decoding workers, which are forked
    and may outlive their parent by seconds, would hold on to that."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks: as well as without
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _instructions() -> str:
    """What of the CPU torch uses: the same name stands for CPUs with and without them."""
    bf16 = ", bf16" if has_bf16() else ""
    return torch.backends.cpu.get_cpu_capability() + bf16


def _git_revision() -> str | None:
    """Of the checkout that holds this package; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
