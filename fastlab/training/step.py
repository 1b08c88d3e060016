"""A training step whose every input lies on the device, so that one CUDA graph can repeat it whole.

Python takes milliseconds to launch the hundreds of kernels of a step: at small batches longer than
a GPU takes to run them. A captured step is launched at once. What differs from one step to the next
(rows of the images, keys of dropout, learning rate, where the loss goes) is computed on the device,
from a counter of the steps done.
"""

import itertools
from collections.abc import Callable, Iterable

import torch

from fastlab.console import first_line
from fastlab.models.dropout import DropoutKeys
from fastlab.training import guards as memory
from fastlab.training.optim import Rate
from pipelines.base import Batch, DeviceEpoch, Pipeline

# Real steps of the process before the capture: they compile, let cuDNN choose its algorithms and
# allocate what outlives a step.
_BEFORE_CAPTURE = 3


class CUDAGraph:
    """The kernels that `body` launches; capturing runs none of them."""

    def __init__(self, body: Callable[[], None]) -> None:
        """Raises RuntimeError where `body` does something that cannot be captured."""
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Threads of a pipeline may go on with what is forbidden meanwhile: pinning memory.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                body()
        finally:
            torch.cuda.set_stream(stream)  # after an error torch leaves its own one current

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
        losses: torch.Tensor,
        *,
        compile: bool,
    ) -> None:
        """`train` trains on a batch and gives the loss (scalar), without reading the device.
        `losses` holds one for each step of an epoch and the next weights' own."""
        self._train, self._optimizer = train, optimizer
        self._dropout, self._rate, self._losses = dropout, rate, losses
        self._begin, self._end = (torch.compile(f) if compile else f for f in (_begin, _end))
        self.done = torch.zeros(1, dtype=torch.int64, device=losses.device)
        """Steps of the run so far."""
        self.batch: Batch | None = None
        """The last one. In a captured step the next replay overwrites it."""
        self._source: DeviceEpoch | None = None
        self._fixed: Batch | None = None
        """Where a captured step finds a batch that it does not make itself."""
        self._graph: CUDAGraph | None = None
        self._refused = False
        self._uncaptured: int | None = None
        """Steps to go until the capture; None: no capture is wanted."""

    def batches(
        self, data: Pipeline, epoch: int, first: int, *, capture: bool
    ) -> Iterable[Batch | None]:
        """What to call the step with, from step `first` of `epoch` on: None stands for a batch that
        the step makes itself, from what lies on the device."""
        self.done.fill_(epoch * data.steps() + first)
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
        if self._uncaptured == 0 and self._graph is None:
            self._capture(batch)
        if self._graph is None:
            self._body(batch)
            self._uncaptured = self._uncaptured and self._uncaptured - 1
            return
        if batch is not None:
            for fixed, part in zip(self._fixed, batch, strict=True):
                fixed.copy_(part)
        self._graph.replay()

    def release(self) -> None:
        """Give up a capture, and the memory that belongs to it."""
        self._graph = self._source = self._fixed = self.batch = self._uncaptured = None

    def _capture(self, batch: Batch | None) -> None:
        """Where that fails, say why, and go on without."""
        if batch is not None:
            parts = (part.clone(memory_format=torch.preserve_format) for part in batch)
            self._fixed = Batch(*parts)
        self._set_capturable(True)
        try:
            self._graph = CUDAGraph(lambda: self._body(self._fixed))
        except RuntimeError as error:
            if memory.is_out_of_memory(error):
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
        """Adam's own check. What a fused one reads is on the device in any case; uncaptured steps
        would warn of it."""
        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = capturable

    def _body(self, batch: Batch | None) -> None:
        self._begin(self.done, self._dropout, self._rate)
        self.batch = batch if batch is not None else self._source.batch(self._number())
        self._end(self.done, self._number(), self._losses, self._train(self.batch))

    def _number(self) -> torch.Tensor:
        """Of the step in its epoch: int64 [1]."""
        return self.done % (len(self._losses) - 1)


def _begin(done: torch.Tensor, dropout: DropoutKeys, rate: Rate) -> None:
    dropout.set(done)
    rate.set(done)


def _end(
    done: torch.Tensor, number: torch.Tensor, losses: torch.Tensor, loss: torch.Tensor
) -> None:
    losses.index_copy_(0, number, loss[None].to(losses.dtype))
    done += 1


def _first_cause(error: BaseException) -> BaseException:
    """Leaving a capture that failed raises a second error, which says less."""
    while error.__context__:
        error = error.__context__
    return error
