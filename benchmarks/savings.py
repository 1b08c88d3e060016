"""The savings of a training step, each of which can be undone to be measured."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch._inductor.config as inductor
from torch import nn

from fastlab.models import cnn, layers, norm_pool, norm_relu, resnet, speed


class _Patch(NamedTuple):
    place: Any
    """A module or a class."""
    name: str
    value: object


def _in_models(name: str, value: object) -> list[_Patch]:
    modules = (module for module in (cnn, resnet, speed) if hasattr(module, name))
    return [_Patch(module, name, value) for module in modules]


_POOL = _Patch(norm_pool, "supported", lambda x: False)
_BLOCKS = _Patch(norm_relu, "supported", lambda x: False)
_UNFUSED = [_POOL, _BLOCKS]

CHANGES: dict[str, list[_Patch]] = {
    "pool not fused": [_POOL],
    "blocks not fused": [_BLOCKS],
    "nothing fused": _UNFUSED,
    "nothing fused, cancelled biases added": [
        *_UNFUSED,
        *_in_models("freeze_cancelled", lambda *_: None),
    ],
    "nothing fused, torch's dropout": [*_UNFUSED, *_in_models("Dropout", nn.Dropout)],
    "nothing fused, batches counted": [
        *_UNFUSED,
        _Patch(layers.BatchNorm, "forward", nn.BatchNorm2d.forward),
    ],
    "8 input channels": [_Patch(layers, "STEM_INPUTS", 8)],
    "combo kernels": [_Patch(inductor, "combo_kernels", True)],
}
"""What each variant does differently from fastlab: savings undone, and two that fastlab does not
use."""


@contextmanager
def changed(name: str | None) -> Generator[None]:
    """Build, compile and capture models with the change `name`; None: without any.

    A launch by Python after the block compiles anew without the change, so only a captured step
    can be measured there.
    """
    with ExitStack() as stack:
        for patch in CHANGES[name] if name else []:
            stack.enter_context(mock.patch.object(*patch))
        yield
