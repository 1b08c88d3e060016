"""What a checkpoint holds: with the configuration, all that resuming needs."""

import json
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from fastlab import processes
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.fields import AboveZero, Bound, Count, NotNegative, Positive, field_types
from fastlab.runs import RunDir
from fastlab.training import checkpoint, reruns
from fastlab.training.distributed import agreed, average_over_ranks
from fastlab.training.failures import failures_explained
from fastlab.training.metrics import Sums
from fastlab.training.optim import Rate, WeightAverage, optimizer_tensors, schedule_kinds
from fastlab.training.setup import keep_threads
from pipelines import FORMATS


@dataclass
class Progress:
    """Where a training stands."""

    epoch: Count = 0
    """Whole epochs done."""
    step: Count = 0
    """Steps done in the current epoch."""
    best_top1: Annotated[float, Bound("from -1 to 1", lambda v: -1 <= v <= 1)] = -1.0
    best_epoch: Count = 0
    lr: NotNegative = 0.0
    """Learning rate of the current epoch's first step."""
    seconds: NotNegative = 0.0
    """Training and evaluation, over all processes that continued this run."""
    wall: NotNegative = 0.0
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
        self._settings: dict[str, Any] = {}
        self.progress = Progress()
        self.epoch_started: float | None = None
        """`time.perf_counter()` then; None between two epochs."""
        self._saved = time.perf_counter()  # when the last checkpoint was written

    def checkpoint_due(self, seconds: float) -> bool:
        """Whether the last checkpoint was written so many seconds ago or earlier."""
        return time.perf_counter() - self._saved >= seconds

    def over(self, cfg: Config) -> bool:
        """Whether the training has no epoch left, or ends before as `schedule.floor_patience` says.
        Equal on all ranks."""
        progress, patience = self.progress, cfg.schedule.floor_patience
        idle = progress.epoch - progress.best_epoch
        at_end = progress.epoch >= cfg.train.epochs
        return at_end or (0 < patience <= idle and self._rate.at_floor())

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
        return self.progress.wall + time.perf_counter() - processes.STARTED

    def save(self, steps: int) -> None:
        """Collective: write a checkpoint after `steps` steps of the run. Raises OSError."""
        buffers = self._average.buffers if self._average else ()
        checkpoint.save(
            self._run.checkpoints,
            steps,
            self._model,
            self._main_state(steps),
            self._accelerator,
            buffers,
            self._best,
        )
        self._best = {}
        self._saved = time.perf_counter()

    def _main_state(self, steps: int) -> dict[str, Any]:
        optimizer = self._optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self._rate.at(steps)  # a number, as exact as the schedule's
        scaler = self._accelerator.scaler
        return {
            "settings": self._settings,
            "progress": {**asdict(self.progress), "seconds": self.seconds(), "wall": self.wall()},
            "optimizer": optimizer,
            "schedule": self._rate.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "scaler": scaler.state_dict() if scaler else None,
            # Over all ranks: a resumed run gives them to its main process.
            "sums": self._accelerator.reduce(self._sums.values.clone(), "sum").cpu(),
        }

    @contextmanager
    def held(
        self,
        cfg: Config,
        dataset: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        origin: str = "",
    ) -> Generator[None]:
        """Collective: the run's directory, new or restored, locked by the main process until the
        end of the block. `dataset` is the dataset's fingerprint, and `origin` what
        `setup.build` says of the first weights; the others are the options of `fastlab train`.
        Raises `UserError` on all ranks."""
        run, accelerator = self._run, self._accelerator
        self._settings = checkpoint.recorded_settings(cfg)
        with ExitStack() as locks:
            with agreed(accelerator), failures_explained(run):
                if accelerator.is_main_process:
                    if not resume:
                        run.claim(overwrite)
                    locks.enter_context(run.locked())
                    if not resume:
                        self._create(cfg, dataset, overwrite, origin)
                if resume:
                    run.check_dataset(dataset, FORMATS[cfg.data.pipeline], cfg.data.path)
                    keep_threads(run, accelerator)
                    steps = dataset["images"]["train"] // cfg.train.batch_size
                    self.restore(cfg, steps)
                    self._take(cfg)
            with agreed(accelerator):
                if not run.exists():
                    raise UserError(
                        f"{run.path}: is not the same directory on every machine; put it into a "
                        f"file system that they share"
                    )
            yield

    def _create(self, cfg: Config, dataset: dict[str, Any], overwrite: bool, origin: str) -> None:
        weights = checkpoint.weights_file(self._model.state_dict()) if origin else None
        if overwrite:
            reruns.clear(self._run)
        processes = self._accelerator.num_processes
        self._run.create(cfg, dataset, processes, initial=weights, overwrite=overwrite)

    def _take(self, cfg: Config) -> None:
        """Record the configuration under which the restored run continues. Raises `UserError` where
        the run is beyond the end that it sets."""
        epoch, step = self.progress.epoch, self.progress.step
        if epoch + (step > 0) > cfg.train.epochs:
            raise UserError(
                f"{self._run.path}: train.epochs = {cfg.train.epochs}, but its checkpoint is from "
                f"epoch {epoch + (step > 0)}; give a larger number"
            )
        if self._accelerator.is_main_process:
            until = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
            for name, value in reruns.change_config(self._run, cfg, until).items():
                print(f"{name} is changed from here on; it was {json.dumps(value)}")

    def restore(self, cfg: Config, steps: int) -> None:
        """Load the newest checkpoint, or where there is none the weights with which the run began,
        and cut the metrics to its epoch; `steps` is the number of an epoch's steps. Raises
        `UserError` where either is damaged or of other settings than `cfg`, before anything is
        loaded."""
        path = checkpoint.last(self._run.checkpoints)
        if path is not None:
            saved = checkpoint.load_state(path)
            with checkpoint.misfits_reported(path):
                kinds = checkpoint.settings_kinds() if saved.get("settings") else {}
                settings = checkpoint.conforming(saved, {"settings": kinds})["settings"]
            checkpoint.refuse_other_settings(path, settings, cfg)
            with checkpoint.misfits_reported(path, "damaged, or config.toml was changed"):
                done = checkpoint.step_of(path)
                state = checkpoint.conforming(saved, self._kinds(saved, cfg, done, done >= steps))
                _refuse_impossible(state, done, steps)
            buffers = self._average.buffers if self._average else []
            rank = self._accelerator.process_index
            own = checkpoint.load(path, self._model, rank, state["processes"], buffers)
            self._load(state, own)
        elif self._run.initial.exists():
            checkpoint.load_weights(self._model, self._run.initial)
            if self._average:
                self._average.restart()
        if self._accelerator.is_main_process:
            if path is not None:
                checkpoint.promote_best(path)
            self._run.keep_metrics(self.progress.epoch)

    def _kinds(self, saved: Any, cfg: Config, done: int, validated: bool) -> dict[str, Any]:
        """What the state must hold after `done` steps, as `checkpoint.conforming` takes it;
        `validated`: after a whole epoch or more."""
        scaler = self._accelerator.scaler
        updated = saved["optimizer"]["state"].keys()
        # Before the first step there are none; with a scaler, all steps so far may have overflowed.
        begun = done > 0 and not (scaler and not updated)
        return {
            "progress": field_types(Progress),
            "optimizer": {
                "state": optimizer_tensors(cfg.optim, self._optimizer, updated) if begun else {},
                "param_groups": [{"lr": NotNegative}] * len(self._optimizer.param_groups),
            },
            "schedule": schedule_kinds(cfg.schedule, saved["schedule"]) if validated else {},
            "average": self._average.state_dict() if self._average else None,
            "scaler": {"scale": AboveZero, "_growth_tracker": Count} if scaler else None,
            "sums": self._sums.values,
            "processes": Positive,
        }

    def _load(self, state: dict[str, Any], own: list[torch.Tensor]) -> None:
        """`own` are this rank's running statistics of the average."""
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        # The settings of the groups, such as weight decay, are the configuration's.
        optimizer = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**optimizer, "state": state["optimizer"]["state"]})
        if schedule := state["schedule"]:  # empty before the first validation
            self._rate.load_state_dict(schedule, state["optimizer"]["param_groups"][0]["lr"])
        self._rate.attach(self._optimizer)
        if self._average:
            self._average.load_state_dict(state["average"])
            for buffer, value in zip(self._average.buffers, own, strict=False):
                buffer.copy_(value)
        if scaler := self._accelerator.scaler:
            scaler.load_state_dict({**scaler.state_dict(), **state["scaler"]})
        if self._accelerator.is_main_process:
            self._sums.values.copy_(state["sums"])


def _refuse_impossible(state: dict[str, Any], done: int, steps: int) -> None:
    """Raises ValueError where values, each of the right kind, cannot be those of a run after `done`
    steps, `steps` in an epoch."""
    progress, (epoch, step) = Progress(**state["progress"]), divmod(done, steps)
    lr, seen = state["optimizer"]["param_groups"][0]["lr"], state["schedule"]
    loss, top1, top5, images = state["sums"].tolist()
    moments = state["optimizer"]["state"].values()
    possible = {
        "progress": (progress.epoch, progress.step) == (epoch, step),
        "progress.best_epoch": progress.best_epoch <= epoch
        and (progress.best_epoch > 0) == (progress.best_top1 >= 0) == (epoch > 0),
        "sums": loss >= 0 and 0 <= top1 <= top5 <= images,
        "optimizer": all(1 <= held["step"] <= done for held in moments if "step" in held),
        "schedule": not seen
        or (0 < lr <= seen.get("initial_lr", lr) and seen["num_bad_epochs"] < epoch),
    }
    if wrong := [name for name in possible if not possible[name]]:
        raise ValueError(f"{wrong[0]}: impossible after {done} steps")
