"""The savings of a training step, each of which can be undone to be measured."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import nn

from fastlab.models import cnn, layers, norm_pool, norm_relu, resnet


def _pool_unfused(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(norm_pool, "supported", lambda x: False))


def _blocks_unfused(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(norm_relu, "supported", lambda x: False))


def _unfused(stack: ExitStack) -> None:
    _pool_unfused(stack)
    _blocks_unfused(stack)


def _with_biases(stack: ExitStack) -> None:
    _unfused(stack)
    for module in (cnn, resnet):
        stack.enter_context(mock.patch.object(module, "freeze_cancelled", lambda *_: None))


def _torchs_dropout(stack: ExitStack) -> None:
    _unfused(stack)
    for module in (cnn, resnet):
        stack.enter_context(mock.patch.object(module, "Dropout", nn.Dropout))


def _counted_batches(stack: ExitStack) -> None:
    _unfused(stack)
    stack.enter_context(mock.patch.object(layers.BatchNorm, "forward", nn.BatchNorm2d.forward))


def _eight_channels(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(layers, "STEM_INPUTS", 8))


def _combo_kernels(stack: ExitStack) -> None:
    import torch._inductor.config as inductor

    stack.enter_context(inductor.patch(combo_kernels=True))


CHANGES: dict[str, Callable[[ExitStack], None]] = {
    "pool not fused": _pool_unfused,
    "blocks not fused": _blocks_unfused,
    "nothing fused": _unfused,
    "nothing fused, cancelled biases added": _with_biases,
    "nothing fused, torch's dropout": _torchs_dropout,
    "nothing fused, batches counted": _counted_batches,
    "8 input channels": _eight_channels,
    "combo kernels": _combo_kernels,
}
"""What a variant does otherwise than fastlab: savings undone, and two that are not taken."""


@contextmanager
def changed(name: str | None) -> Iterator[None]:
    """Inside, models are built, compiled and captured with the change `name`; None: as they are.
    Outside, what is launched by Python is compiled anew as it was before: measure captured steps.
    """
    with ExitStack() as stack:
        if name:
            CHANGES[name](stack)
        yield
