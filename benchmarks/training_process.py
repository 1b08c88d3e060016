"""What `benchmarks.training` runs for a configuration and a batch size: it trains all variants.

It answers each request, a line of JSON on standard input, by a line of JSON on standard output, and
ends with the first that fails or when its input does. What is printed meanwhile goes to standard
error.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import wait
from benchmarks.measurements import public_config
from benchmarks.savings import changed
from benchmarks.training import VARIANTS
from fastlab import config as configs
from fastlab import models
from fastlab.config import Config, ProfileConfig
from fastlab.console import UserError, first_line, run_command
from fastlab.files import write_atomically
from fastlab.processes import die_with_parent
from fastlab.runs import RunDir
from fastlab.tracing import Tracer
from fastlab.train import Trainer
from fastlab.training.setup import make_accelerator, torch_settings
from fastlab.training.step import Step
from pipelines.base import Batch

# Steps of either kind before any that is timed: the fourth is captured.
_UNTIMED = 5
# Of a round, at least, on the held batch.
_LEAST_HELD = 20
_TRACE = ProfileConfig(enabled=True, wait=0, warmup=2, active=5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--traces", type=Path)
    return run_command(serve, parser.parse_args(argv))


def serve(args: argparse.Namespace) -> int:
    die_with_parent()
    torch._dynamo.config.recompile_limit = 64  # of the same function, for all variants together
    answers = sys.stdout
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        answer = Answers(args, RunDir(Path(scratch)))
        for line in sys.stdin:
            try:
                found = answer(**json.loads(line))
            except Exception as error:
                if not isinstance(error, UserError):
                    traceback.print_exc()
                found = {"problem": first_line(error)}
            print(json.dumps(found), file=answers, flush=True)
            if "problem" in found:
                return 1
    return 0


class Answers:
    def __init__(self, args: argparse.Namespace, run: RunDir) -> None:
        self._args, self._run = args, run
        self._variants: dict[str, Measured] = {}

    def __call__(self, what: str, variant: str, folder: str) -> dict[str, Any]:
        found = self._variants.get(variant) or self._start(variant)
        if what == "trace":
            found.trace(RunDir(self._args.traces / folder))
            return {}
        if what == "compile":
            return {"seconds": found.compile_seconds}
        return found.measure(self._args.epochs)

    def _start(self, name: str) -> "Measured":
        size = f"train.batch_size={self._args.batch}"
        variant = VARIANTS[name]
        overrides = [*self._args.overrides, *variant.overrides(), size]
        cfg = configs.load(self._args.config, overrides)
        with changed(variant.change):
            self._variants[name] = Measured(cfg, self._run, self._args.steps)
        return self._variants[name]


class Held(NamedTuple):
    """A pipeline that gives one batch again and again: what a captured step repeats without a copy,
    as an infinitely fast input path would."""

    held: Batch

    def steps(self) -> int:
        return sys.maxsize

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return itertools.repeat(self.held)

    def device_epoch(self, epoch: int) -> "Held":
        return self

    def become(self, other: "Held") -> None:
        pass

    def batch(self, step: torch.Tensor) -> Batch:
        return self.held


class Measured:
    """A variant of a configuration, which is trained."""

    def __init__(self, cfg: Config, run: RunDir, steps: int | None) -> None:
        """`steps`: of each epoch; None: all."""
        self._cfg = cfg
        # Accelerate allows one precision a process. Each model keeps the autocast that it was
        # prepared with, which is all that a step needs of it.
        AcceleratorState._reset_state()
        with torch_settings(cfg):
            self.trainer = Trainer(cfg, run, make_accelerator(cfg))
            self.trainer.net.train()
            self._device, self._epoch = self.trainer.device, 0
            self._steps = min(self.trainer.train_data.steps(), steps or sys.maxsize)
            self._own = sum(t.nbytes for t in self.trainer.model.state_dict().values())
            self._peak = 0
            with self._memory_watched():
                self._warm_up()
        classes = len(self.trainer.manifest.classes)
        self._flop = flop_per_image(cfg, classes, self.trainer.manifest.image_size)

    def measure(self, epochs: int) -> dict[str, Any]:
        """A round. Raises `UserError` where the training has diverged."""
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
        """Record a few steps into `run`, a new directory that gets nothing else but config.toml."""
        run.path.mkdir(parents=True)
        write_atomically(run.config, public_config(self._cfg))
        steps = _TRACE.warmup + _TRACE.active
        with torch_settings(self._cfg), Tracer(_TRACE, run.traces, 0, self._device) as tracer:
            for batch in itertools.islice(tracer.steps(self._batches(), 0), steps):
                self.trainer.step(batch)

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._batch = _copy(next(iter(self.trainer.train_data.epoch(self._epoch))))
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
        """Of one epoch after the other, from the beginning of the next on."""
        while True:
            self._epoch += 1
            yield from itertools.islice(self.trainer.batches(self._epoch - 1), self._steps)

    def _seconds(self, step: Step, batches: Iterable[Batch | None], steps: int) -> float:
        """A step. The losses are looked at when the clock has stopped."""
        wait(self._device)
        started = time.perf_counter()
        for batch in itertools.islice(batches, steps):
            step(batch)
        wait(self._device)
        seconds = time.perf_counter() - started
        if int(step.diverged):
            raise UserError("diverged: a loss is not a finite number; take a lower optim.lr")
        return seconds / steps

    def _refuse_divergence(self) -> None:
        finite = [weight.isfinite().all() for weight in self.trainer.model.parameters()]
        if not bool(torch.stack(finite).all()):
            raise UserError("diverged: a weight is not a finite number; take a lower optim.lr")

    @contextmanager
    def _memory_watched(self) -> Iterator[None]:
        """Largest number of bytes that this variant has taken of the device, with its weights and
        without the images, which all share. On a CPU 0: there is no such counter."""
        if self._device.type == "cpu":
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        self._peak = max(self._peak, self._own + torch.cuda.max_memory_allocated() - before)
        self._own += torch.cuda.memory_allocated() - before


def _copy(batch: Batch) -> Batch:
    return Batch(*(part.clone(memory_format=torch.preserve_format) for part in batch))


def flop_per_image(cfg: Config, classes: int, side: int) -> float:
    """Of forward and backward, counted by torch over the operators of an eager step."""
    model = models.build(cfg.model, classes)
    images = torch.zeros((2, 3, side, side))
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    raise SystemExit(main())
