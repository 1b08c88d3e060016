"""What a checkpoint holds: with the configuration, all that resuming needs."""

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from fastlab.config import Config
from fastlab.console import UserError
from fastlab.processes import STARTED
from fastlab.runs import RunDir
from fastlab.training import checkpoint
from fastlab.training.distributed import agreed, average_over_ranks
from fastlab.training.failures import failures_explained
from fastlab.training.metrics import Sums
from fastlab.training.optim import Rate, WeightAverage
from fastlab.training.setup import keep_threads
from pipelines import FORMATS


@dataclass
class Progress:
    """Where a training stands."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Steps done in the current epoch."""
    best_top1: float = -1.0
    best_epoch: int = 0
    lr: float = 0.0
    """Learning rate of the current epoch's first step."""
    seconds: float = 0.0
    """Training and evaluation, over all processes that continued this run."""
    wall: float = 0.0
    """Seconds from start to last checkpoint of the processes before this one."""


class State:
    """The parts of a training that are saved and restored together."""

    def __init__(
        self,
        run: RunDir,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        rate: Rate,
        average: WeightAverage | None,
        sums: Sums,
    ) -> None:
        self._run, self._accelerator = run, accelerator
        self._model, self._optimizer, self._rate = model, optimizer, rate
        self._average, self._sums = average, sums
        self._best: dict[str, torch.Tensor] = {}  # to be written with the next checkpoint
        self.progress = Progress()
        self.epoch_started: float | None = None
        """`time.perf_counter()` then; None between two epochs."""
        self._saved = time.perf_counter()  # when the last checkpoint was written

    def checkpoint_due(self, seconds: float) -> bool:
        """Whether the last checkpoint was written so many seconds ago or earlier."""
        return time.perf_counter() - self._saved >= seconds

    def average_buffers(self) -> None:
        """Collective: running statistics, and their moving averages, become the mean over ranks."""
        averaged = self._average.buffers if self._average else ()
        average_over_ranks(self._accelerator, (*self._model.buffers(), *averaged))

    def keep_best(self) -> None:
        """Note the weights that the model holds now as the best; `save` writes them."""
        weights = self._model.state_dict()
        self._best = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def seconds(self) -> float:
        """Seconds of training and evaluation, over all processes that continued this run."""
        now = time.perf_counter()
        current = now - self.epoch_started if self.epoch_started is not None else 0.0
        return self.progress.seconds + current

    def wall(self) -> float:
        """Seconds from the start of the first process of this run, without the breaks."""
        return self.progress.wall + time.perf_counter() - STARTED

    def save(self, steps: int) -> None:
        """Collective: write a checkpoint after `steps` steps of the run. Raises OSError."""
        if self._best and self._accelerator.is_main_process:
            checkpoint.save_weights(self._best, self._run.best)
        self._best = {}
        buffers = self._average.buffers if self._average else ()
        state = self._main_state(steps)
        checkpoint.save(
            self._run.checkpoints, steps, self._model, state, self._accelerator, buffers
        )
        self._saved = time.perf_counter()

    def _main_state(self, steps: int) -> dict[str, Any]:
        optimizer = self._optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self._rate.at(steps)  # a number, as exact as the schedule's
        scaler = self._accelerator.scaler
        return {
            "progress": {**asdict(self.progress), "seconds": self.seconds(), "wall": self.wall()},
            "optimizer": optimizer,
            "schedule": self._rate.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "scaler": scaler.state_dict() if scaler else None,
            # Over all ranks: a resumed run gives them to its main process.
            "sums": self._accelerator.reduce(self._sums.values.clone(), "sum").cpu(),
        }

    @contextmanager
    def held(self, cfg: Config, dataset: dict[str, Any], resume: bool) -> Generator[None]:
        """Collective: the run's directory, new or restored, locked by the main process until the
        end of the block. `dataset` is the dataset's fingerprint. Raises `UserError` on all ranks.
        """
        run, accelerator = self._run, self._accelerator
        with ExitStack() as locks:
            with agreed(accelerator), failures_explained(run.path):
                if accelerator.is_main_process:
                    if not resume:
                        run.claim()
                    locks.enter_context(run.locked())
                    if not resume:
                        run.create(cfg, dataset, accelerator.num_processes)
                if resume:
                    run.check_dataset(dataset, FORMATS[cfg.data.pipeline], cfg.data.path)
                    keep_threads(run, accelerator)
                    self.restore()
            with agreed(accelerator):
                if not run.exists():
                    raise UserError(
                        f"{run.path}: is not the same directory on every machine; put it into a "
                        f"file system that they share"
                    )
            yield

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one, and cut the metrics to its epoch. Raises
        `UserError` where either is damaged."""
        path = checkpoint.last(self._run.checkpoints)
        if path is not None:
            state, buffers = checkpoint.load(path, self._model, self._accelerator.process_index)
            self._load(state, buffers)
        if self._accelerator.is_main_process:
            self._run.keep_metrics(self.progress.epoch)

    def _load(self, state: dict[str, Any], buffers: Sequence[torch.Tensor]) -> None:
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["schedule"], self._optimizer.param_groups[0]["lr"])
        self._rate.attach(self._optimizer)
        if self._average:
            self._average.load_state_dict(state["average"])
            for buffer, value in zip(self._average.buffers, buffers, strict=False):
                buffer.copy_(value)
        if self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        if self._accelerator.is_main_process:
            self._sums.values.copy_(state["sums"])
