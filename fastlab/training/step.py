"""A training step whose every input lies on the device, so that one CUDA graph can repeat it whole.

Python takes milliseconds to launch the hundreds of kernels of a step; at small batches a GPU runs
them in less. A captured step is launched at once. What differs from one step to the next (rows of
the images, keys of dropout, the learning rate) is computed on the device, from a counter of the
steps done.
"""

import itertools
from collections.abc import Callable, Iterable

import torch

from fastlab.compiling import compiled
from fastlab.console import first_line
from fastlab.models.dropout import DropoutKeys
from fastlab.training.failures import is_out_of_memory
from fastlab.training.optim import Rate, WeightAverage
from pipelines.base import Batch, DeviceEpoch, Pipeline

# Uncaptured steps before the capture: they compile, let cuDNN choose its algorithms and allocate
# what outlives a step.
_BEFORE_CAPTURE = 3


class CUDAGraph:
    """The kernels that `body` launches; capturing runs none of them."""

    def __init__(self, body: Callable[[], None]) -> None:
        """Raises RuntimeError where `body` does something that cannot be captured."""
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads, of a pipeline, may meanwhile pin memory, which a capture forbids.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                body()
        finally:
            torch.cuda.set_stream(stream)  # after an error torch leaves the capture's current

    def replay(self) -> None:
        self._graph.replay()


class Step:
    """A training step: launched kernel by kernel, or captured in its first steps and replayed."""

    def __init__(
        self,
        train: Callable[[Batch], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        dropout: DropoutKeys,
        rate: Rate,
        average: WeightAverage | None,
        steps_per_epoch: int,
        device: torch.device,
        *,
        compile: bool,
    ) -> None:
        """`train` trains on a batch and returns the loss (scalar), without reading the device."""
        self._train, self._optimizer, self._average = train, optimizer, average
        self._dropout, self._rate, self.steps_per_epoch = dropout, rate, steps_per_epoch
        self._begin = compiled(_begin) if compile else _begin
        self._end = compiled(_end) if compile else _end
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        """int64 [1]: steps of the run so far."""
        self._launched = 0  # the same number on the host, which does not wait for the device
        self.diverged = torch.zeros(1, dtype=torch.int64, device=device)
        """int64 [1]: number, from 1, of the epoch's first step whose loss was not finite, or 0."""
        self._source: DeviceEpoch | None = None
        self._fixed: Batch | None = None
        """Where a captured step reads a batch that comes from the host."""
        self._graph: CUDAGraph | None = None
        self._refused = False
        self._uncaptured: int | None = None
        """Steps left until the capture; None: no capture is wanted."""

    def batches(
        self, data: Pipeline, epoch: int, first: int, *, capture: bool
    ) -> Iterable[Batch | None]:
        """What to call the step with, from step `first` of `epoch` on. None stands for a batch that
        the step makes itself, from what lies on the device."""
        self._launched = epoch * data.steps() + first
        self.done.fill_(self._launched)
        self.diverged.zero_()
        if self._refused or not capture:
            self.release()
            return data.epoch(epoch, first)
        if self._uncaptured is None:
            self._uncaptured = _BEFORE_CAPTURE
        source = data.device_epoch(epoch)
        if source is None:
            return data.epoch(epoch, first)
        if self._source is None:
            self._source = source
        self._source.become(source)
        return itertools.repeat(None, data.steps() - first)

    def __call__(self, batch: Batch | None) -> None:
        self._dropout.seed_generators(self._launched)
        if self._uncaptured == 0 and self._graph is None:
            self._capture(batch)
        if self._graph is None:
            self._body(batch)
            self._uncaptured = self._uncaptured and self._uncaptured - 1
        else:
            self._replay(batch)
        self._launched += 1
        if self._average:
            self._average.update(self._launched, self.steps_per_epoch)

    def _replay(self, batch: Batch | None) -> None:
        assert self._graph is not None
        if batch is not None and self._fixed is not None:
            for fixed, part in zip(self._fixed, batch, strict=True):
                if fixed is not None and part is not None:  # a batch that is not mixed
                    fixed.copy_(part)
        self._graph.replay()

    def release(self) -> None:
        """Give up the capture, and the memory that belongs to it."""
        self._graph = self._source = self._fixed = self._uncaptured = None

    def _capture(self, batch: Batch | None) -> None:
        """Capture the step; where that fails, report why and continue without."""
        if batch is not None:
            self._fixed = batch.clone()
        self._set_capturable(True)
        try:
            self._graph = CUDAGraph(lambda: self._body(self._fixed))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._optimizer.zero_grad(set_to_none=True)
            self._refused, self._uncaptured = True, None
            print(
                f"the step cannot be captured ({first_line(_first_cause(error))}); its kernels "
                "are launched one by one",
                flush=True,
            )
        finally:
            self._set_capturable(False)

    def _set_capturable(self, capturable: bool) -> None:
        """Adam refuses a capture without this flag, and warns of it in uncaptured steps. What a
        fused Adam reads is on the device in any case."""
        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = capturable

    def _body(self, batch: Batch | None) -> None:
        self._begin(self.done, self._dropout, self._rate)
        if batch is None:
            assert self._source is not None, "`batches` gives None only with a source"
            batch = self._source.batch(self.done % self.steps_per_epoch)
        self._end(self.done, self.diverged, self._train(batch), self.steps_per_epoch)


def _begin(done: torch.Tensor, dropout: DropoutKeys, rate: Rate) -> None:
    dropout.set(done)
    rate.set(done)


def _end(done: torch.Tensor, diverged: torch.Tensor, loss: torch.Tensor, per_epoch: int) -> None:
    first = (diverged == 0) & ~loss.isfinite()
    diverged.copy_(torch.where(first, done % per_epoch + 1, diverged))
    done += 1


def _first_cause(error: BaseException) -> BaseException:
    """The error that a failed capture began with: leaving the capture raises another, which says
    less."""
    while error.__context__:
        error = error.__context__
    return error
