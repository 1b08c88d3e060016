"""What ends a training early: a signal, or numbers that are not finite."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from fastlab.console import UserError
from fastlab.processes import leave_terminal, signals_to_stop
from fastlab.runs import RunDir
from fastlab.training import checkpoint
from fastlab.training.delayed import DelayedRead
from fastlab.training.distributed import agreed, largest, largest_int
from fastlab.training.journal import Journal
from fastlab.training.metrics import Sums
from fastlab.training.state import State
from fastlab.training.step import Step


class StopRequested(Exception):
    """A signal asked for a clean end; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Diverged(Exception):
    """A loss or the weights are not finite. The message says which, and at which step."""


class Look(NamedTuple):
    """What one look found, all of it as of the look before."""

    checkpoint_due: bool
    sums: list[float]
    """This rank's `Sums.values` of the epoch; empty at the first look of an epoch."""


class Watch:
    """Looks, every `train.log_every` steps, at what may end or save a training.

    The answers come from the look before, so that no look waits for the device.
    """

    def __init__(self, accelerator: Accelerator, step: Step, sums: Sums) -> None:
        self._accelerator, self._step, self._sums = accelerator, step, sums
        self._delayed = DelayedRead(3 + len(sums.values), accelerator.device)
        self.signal = 0
        """The signal that reached this process; 0: none."""

    @contextmanager
    def signals(self) -> Generator[None]:
        """The first SIGINT, SIGTERM or SIGHUP asks for a clean end. A second SIGINT or SIGTERM acts
        at once; SIGHUP never does, since a closed terminal may send it twice. Python lets
        only the main thread handle signals: a training in another has none of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            self.signal = number
            if number == signal.SIGHUP:
                leave_terminal()
                return
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, before[name])

        before = {name: signal.getsignal(name) for name in signals_to_stop()}
        for name in before:
            signal.signal(name, ask)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def look(self, checkpoint_due: bool) -> Look:
        """Collective: every rank calls this, with its own wish for a checkpoint. Raises `Diverged`
        and `StopRequested` on all ranks."""
        wishes = torch.tensor([self.signal, checkpoint_due], dtype=torch.float64)
        wishes = wishes.to(self._accelerator.device, non_blocking=True)
        values = torch.cat([self._steps_since_divergence().double(), wishes])
        values = largest(self._accelerator, values)
        before = self._delayed.exchange(torch.cat([values, self._sums.values]))
        if not before:
            return Look(False, [])
        diverged, stop, due, *sums = before
        self._refuse_loss(int(diverged))
        if stop:
            raise StopRequested(int(stop))
        return Look(bool(due), sums)

    def forget(self) -> None:
        """Drop the last look's values: they are of another epoch, or asked for a checkpoint that
        has been written."""
        self._delayed.forget()

    def agree_to_stop(self) -> None:
        """Collective: raises `StopRequested` where a signal reached any rank."""
        if number := largest_int(self._accelerator, self.signal):
            raise StopRequested(number)

    def refuse_divergence(self, model: nn.Module) -> None:
        """Collective: raises `Diverged` where a loss of the epoch, or a weight or buffer of `model`
        now, is not finite. Waits for the device."""
        broken = ~all_finite(model)
        values = torch.cat([self._steps_since_divergence(), broken.long()[None]])
        diverged, weights = largest(self._accelerator, values).tolist()
        self._refuse_loss(diverged)
        if weights:
            step = int(self._step.done - 1) % self._step.steps_per_epoch + 1
            raise Diverged(f"the weights are not finite numbers after step {step}")

    def _steps_since_divergence(self) -> torch.Tensor:
        """int64 [1]: 0, or one more the earlier the loss was not finite, so that the maximum over
        the ranks is the first of them."""
        number = self._step.diverged
        return torch.where(number > 0, self._step.steps_per_epoch + 1 - number, 0)

    def _refuse_loss(self, steps_since_divergence: int) -> None:
        if steps_since_divergence:
            step = self._step.steps_per_epoch + 1 - steps_since_divergence
            raise Diverged(f"the loss is not a finite number at step {step}")


@torch.no_grad()
def all_finite(model: nn.Module) -> torch.Tensor:
    """bool scalar on the device: whether all parameters and floating-point buffers are finite."""
    tensors = [t.detach() for t in model.state_dict().values() if t.is_floating_point()]
    return torch.stack(torch._foreach_norm(tensors, ord=float("inf"))).isfinite().all()


@contextmanager
def divergence_explained(
    run: RunDir, state: State, journal: Journal, accelerator: Accelerator
) -> Generator[None]:
    """Collective: `Diverged` becomes a `UserError` that names the last good checkpoint."""
    try:
        yield
    except Diverged as error:
        journal.summarise("diverged")
        last = checkpoint.last(run.checkpoints)
        kept = f"{last} is whole" if last else "there was no checkpoint yet"
        with agreed(accelerator):
            lower = run.load_config().optim.lr / 10
            raise UserError(
                f"{run.path}: {error} of epoch {state.progress.epoch + 1}; {kept}; with a tenth "
                f"of the rate, {run.resume_hint()} --set optim.lr={lower:g}"
            ) from None
