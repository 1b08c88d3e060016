"""The process in which `benchmarks.training` trains all variants of a configuration and batch size.

Everything that it prints goes to standard error.
"""

import argparse
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch._dynamo import config as dynamo
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measurements import WHOLE_IMAGES, public_config
from benchmarks.savings import changed
from benchmarks.timing import step_seconds
from benchmarks.training import VARIANTS, Request, Variant
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config, ProfileConfig
from fastlab.console import UserError, first_line
from fastlab.files import write_atomically
from fastlab.processes import die_with_parent
from fastlab.runs import RunDir
from fastlab.tracing import Tracer
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator, torch_settings
from fastlab.training.step import Step
from pipelines.base import Batch, DeviceEpoch

# Steps before any that is timed, of each of a variant's two steps: the fourth is captured.
_UNTIMED = 5
_LEAST_HELD = 20  # steps of a round on the held batch, at least
_TRACE = ProfileConfig(enabled=True, wait=0, warmup=2, active=5)


def serve(requests: Connection, args: argparse.Namespace, config: Path, batch: int) -> None:
    """Answer requests until the other end is closed. `args` are the options of
    `benchmarks.training`."""
    die_with_parent()
    # torch counts the compilations of a function for all variants together.
    with (
        dynamo.patch(recompile_limit=64),
        redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory() as scratch,
        suppress(EOFError, KeyboardInterrupt),
    ):
        answers = Answers(args, config, batch, RunDir(Path(scratch)))
        while True:
            request = requests.recv()
            try:
                answer = answers(*request)
            except Exception as error:
                if not isinstance(error, UserError):
                    traceback.print_exc()
                answer = {"problem": first_line(error)}
            requests.send(answer)


class Answers:
    """Answers requests, and keeps the variants that they name."""

    def __init__(self, args: argparse.Namespace, config: Path, batch: int, run: RunDir) -> None:
        self._args, self._config, self._batch, self._run = args, config, batch, run
        self._variants: dict[str, Measured] = {}

    def __call__(self, what: Request, variant: str, folder: str) -> dict[str, Any]:
        if variant not in self._variants:
            self._variants[variant] = self._start(VARIANTS[variant])
        measured = self._variants[variant]
        if what == "trace":
            measured.trace(RunDir(self._args.traces / folder))
            return {}
        if what == "compile":
            return {"seconds": measured.compile_seconds}
        return measured.measure(self._args.epochs)

    def _start(self, variant: Variant) -> "Measured":
        size = f"train.batch_size={self._batch}"
        overrides = [WHOLE_IMAGES, *self._args.overrides, *variant.overrides(), size]
        with changed(variant.change):
            return Measured(configs.load(self._config, overrides), self._run, self._args.steps)


class Held(NamedTuple):
    """A pipeline that gives one batch again and again: what a captured step repeats without a copy,
    as with an infinitely fast input path."""

    held: Batch

    def steps(self) -> int:
        return sys.maxsize

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self.held)

    def device_epoch(self, epoch: int) -> "Held":
        return self

    def become(self, other: DeviceEpoch) -> None:
        pass

    def batch(self, step: torch.Tensor) -> Batch:
        return self.held


class Measured:
    """The training of one variant of a configuration."""

    def __init__(self, cfg: Config, run: RunDir, steps: int | None) -> None:
        """`steps` is how many steps of each epoch are done; None: all."""
        self._cfg = cfg
        # Accelerate allows one precision a process. Each model keeps the autocast that it was
        # prepared with, which is all that a step needs of it.
        AcceleratorState._reset_state()
        with torch_settings(cfg):
            self.trainer = Trainer(cfg, run, make_accelerator(cfg))
            self.trainer.net.train()
            self._device, self._epoch = self.trainer.device, 0
            self._steps = min(self.trainer.train_data.steps(), steps or sys.maxsize)
            self._allocated = sum(t.nbytes for t in self.trainer.model.state_dict().values())
            self._peak = 0
            with self._memory_watched():
                self._warm_up()
        classes = len(self.trainer.manifest.classes)
        self._flop = flop_per_image(cfg, classes, self.trainer.manifest.image_size)

    def measure(self, epochs: int) -> dict[str, Any]:
        """Do a round: the rate in images/s, and the details that `Results.add` takes. Raises
        `UserError` where the training has diverged."""
        steps = epochs * self._steps
        held_steps = max(steps // 4, min(steps, _LEAST_HELD))
        with torch_settings(self._cfg), self._memory_watched():
            fed = self._seconds(self.trainer.step, self._batches(), steps)
            held = self._seconds(self._held_step, self._held(), held_steps)
        self._refuse_divergence()
        batch = self._cfg.train.batch_size
        once = {
            "flop": self._flop,
            "memory": self._peak or None,
            "compile": self.compile_seconds,
            "epochs": epochs,
            "steps": self._steps,
            "steps_of_epoch": self.trainer.train_data.steps(),
            "held_steps": held_steps,
        }
        each = {"held": batch / held, "stall": 1 - held / fed}
        return {"rate": batch / fed, "each": each, "once": once}

    def trace(self, run: RunDir) -> None:
        """Record a trace of a few steps into `run`, a new directory, beside config.toml."""
        run.path.mkdir(parents=True)
        write_atomically(run.config, public_config(self._cfg))
        steps = _TRACE.warmup + _TRACE.active
        with torch_settings(self._cfg), Tracer(_TRACE, run.traces, 0, self._device) as tracer:
            for batch in itertools.islice(tracer.steps(self._batches(), 0), steps):
                self.trainer.step(batch)

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._batch = next(iter(self.trainer.train_data.epoch(self._epoch))).clone()
        self._epoch += 1
        self._held_step = self.trainer.make_step()
        self._seconds(self._held_step, self._held(), 1)
        first = time.perf_counter() - started
        self._seconds(self.trainer.step, self._batches(), _UNTIMED)
        self._seconds(self._held_step, self._held(), _UNTIMED)
        step = self._seconds(self._held_step, self._held(), _UNTIMED)
        self.compile_seconds = max(0.0, first - step)

    def _held(self) -> Iterable[Batch | None]:
        capture = self.trainer.captures
        return self._held_step.batches(Held(self._batch), 0, 0, capture=capture)

    def _batches(self) -> Iterator[Batch | None]:
        """Batches of one epoch after the other, from the beginning of the next epoch on."""
        while True:
            self._epoch += 1
            yield from itertools.islice(self.trainer.batches(self._epoch - 1), self._steps)

    def _seconds(self, step: Step, batches: Iterable[Batch | None], steps: int) -> float:
        """Seconds of one step. Losses are read after the clock has stopped."""
        seconds = step_seconds(step, batches, steps, self._device)
        if int(step.diverged):
            raise UserError("diverged: a loss is not a finite number; take a lower optim.lr")
        return seconds

    def _refuse_divergence(self) -> None:
        finite = [weight.isfinite().all() for weight in self.trainer.model.parameters()]
        if not bool(torch.stack(finite).all()):
            raise UserError("diverged: a weight is not a finite number; take a lower optim.lr")

    @contextmanager
    def _memory_watched(self) -> Generator[None]:
        """Note the most bytes that this variant has taken on the device, with its weights and
        without the images, which all variants share. On a CPU, which has no such counter, 0."""
        if self._device.type == "cpu":
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        self._peak = max(self._peak, self._allocated + torch.cuda.max_memory_allocated() - before)
        self._allocated += torch.cuda.memory_allocated() - before


def flop_per_image(cfg: Config, classes: int, side: int) -> float:
    """FLOP of forward and backward, counted by torch over the operators of an eager step. `side` is
    that of the images, in pixels."""
    model = models.build(cfg.model, classes)
    images = torch.zeros((2, 3, side, side))
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / 2
