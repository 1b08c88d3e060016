"""The configuration's section [model]: a network by name, and its settings. Needs no torch."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from fastlab.console import UserError
from fastlab.fields import Arguments, Bound, Fraction, Positive, Section, show

ModelName = Literal[
    "cnn8", "cnn10", "cnn12", "resnet11", "resnet15", "resnet19", "resnet18", "speed8"
]  # fmt: skip
"""The built-in models: every name has an entry in `fastlab.models.MODELS`."""

# No FILE.py:NAME: a run names what another directory's prediction has to import.
_OTHER_MODEL = re.compile(r"timm:[\w.-]+|(?!.*\.py:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def _is_model(name: str) -> bool:
    return name in get_args(ModelName) or _OTHER_MODEL.fullmatch(name) is not None


AnyModelName = Annotated[
    str,
    Bound(
        "among " + ", ".join(get_args(ModelName)) + ', "timm:NAME" or "package.module:function"',
        _is_model,
        near=get_args(ModelName),
    ),
]

# What other models ignore.
_BUILT_IN_SETTINGS = (
    "width",
    "batch_norm",
    "shortcuts",
    "dropout_conv",
    "dropout_stem",
    "dropout_fc",
)


@dataclass(frozen=True)
class ModelConfig(Section):
    name: AnyModelName = "resnet11"
    """A built-in model; "timm:NAME", a model of timm; or "package.module:function", which is called
    with the number of classes as `num_classes` and with `arguments`, and returns a module that maps
    images [b, 3, H, W] to logits [b, classes]. Of the settings below, other models than the
    built-in ones take `sync_batch_norm` and `arguments` alone."""
    width: Positive = 64
    """Channels of the first layer; every other width is a multiple of it."""
    batch_norm: bool = True
    shortcuts: bool = True
    """False builds the same residual network without its shortcut branches."""
    dropout_conv: Fraction = 0.2
    """Dropout in the convolutional part."""
    dropout_stem: Fraction = 0.15
    """Dropout after the stem's convolution (all but the CNNs)."""
    dropout_fc: Fraction = 0.2
    """Dropout before the classifier, and before the hidden layer of a CNN."""
    sync_batch_norm: bool = False
    """Compute batch statistics over all processes."""
    arguments: Arguments = field(default_factory=dict, hash=False)
    """Keyword arguments of a model that is not built in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.built_in and self.arguments:
            names = ", ".join(sorted(self.arguments))
            raise UserError(f"model.arguments: the built-in {self.name} takes none; drop {names}")
        if "num_classes" in self.arguments:
            raise UserError("model.arguments.num_classes: the dataset says it; drop it")
        for each in () if self.built_in else dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in _BUILT_IN_SETTINGS and value != each.default:
                raise UserError(
                    f"model.{each.name} = {show(value)}: is a setting of the built-in models, and "
                    f"{self.name} has its own, under [model.arguments]; set it to "
                    f"{show(each.default)}, or drop it"
                )

    @property
    def built_in(self) -> bool:
        return self.name in get_args(ModelName)
