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
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import wait
from benchmarks.measurements import public_config
from benchmarks.training import VARIANTS
from fastlab import config as configs
from fastlab import models
from fastlab.cli import run_command
from fastlab.config import Config, ProfileConfig
from fastlab.errors import UserError, first_line
from fastlab.processes import die_with_parent
from fastlab.rundir import RunDir, write_atomically
from fastlab.tracing import Tracer
from fastlab.train import Trainer, make_accelerator, torch_settings, train_step
from pipelines.base import Batch

# Steps of either kind before any that is timed: CUDA graphs warm up, and are recorded in the next.
_UNTIMED = 3
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
        self._variants: dict[str, Variant] = {}

    def __call__(self, what: str, variant: str, folder: str) -> dict[str, Any]:
        found = self._variants.get(variant) or self._start(variant)
        if what == "trace":
            found.trace(RunDir(self._args.traces / folder))
            return {}
        if what == "compile":
            return {"seconds": found.compile_seconds}
        return found.measure(self._args.epochs)

    def _start(self, name: str) -> "Variant":
        size = f"train.batch_size={self._args.batch}"
        overrides = [*self._args.overrides, *VARIANTS[name], size]
        cfg = configs.load(self._args.config, overrides)
        found = self._variants[name] = Variant(cfg, self._run, self._args.steps)
        return found


class Variant:
    """A configuration that is trained, compiled as far as it goes."""

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
            fed = self._seconds(self._batches(), steps)
            held = self._seconds(itertools.repeat(self._held), held_steps)
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
                train_step(self.trainer, batch)

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._held = _copy(next(self._batches()))
        self._seconds([self._held], 1)
        first = time.perf_counter() - started
        self._seconds(self._batches(), _UNTIMED)
        self._seconds(itertools.repeat(self._held), _UNTIMED)
        step = self._seconds(itertools.repeat(self._held), _UNTIMED)
        self.compile_seconds = max(0.0, first - step)

    def _batches(self) -> Iterator[Batch]:
        """Of one epoch after the other, from the beginning of the next on."""
        while True:
            self._epoch += 1
            yield from itertools.islice(self.trainer.train_data.epoch(self._epoch - 1), self._steps)

    def _seconds(self, batches: Iterable[Batch], steps: int) -> float:
        """A step. The losses are looked at when the clock has stopped."""
        losses = torch.zeros(steps, device=self._device)
        wait(self._device)
        started = time.perf_counter()
        for number, batch in enumerate(itertools.islice(batches, steps)):
            losses[number] = train_step(self.trainer, batch)
        wait(self._device)
        seconds = time.perf_counter() - started
        if not bool(losses.isfinite().all()):
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
