"""What must accompany the weights of a run for others to use them, and the file that holds both."""

from dataclasses import asdict
from typing import Any

from safetensors.torch import save
from torch import nn

import fastlab
from fastlab.console import public_value
from fastlab.predict import Predictor
from fastlab.report.texts import setting_text

Facts = dict[str, Any]
"""In JSON's types: model (the section of the configuration), classes (id and name of each output),
image_size (pixels a side), mean and std (of the channels, on a scale of 0 to 1), fit (how images of
another size are fitted), input, weights ("best" or "last") and the version of fastlab."""


def facts_of(predictor: Predictor, which: str, takes: str) -> Facts:
    """The facts of a run's weights. `takes` describes the input of what they accompany."""
    spec = predictor.spec
    facts = {
        "model": asdict(predictor.cfg.model),
        "classes": [{"id": each.id, "name": each.words} for each in spec.classes],
        "image_size": spec.image_size,
        "mean": spec.mean,
        "std": spec.std,
        "fit": spec.fit,
        "input": takes,
        "weights": which,
        "fastlab": fastlab.__version__,
    }
    return public_value(facts)


def as_metadata(facts: Facts) -> dict[str, str]:
    """The facts as formats hold them that know only texts: what is no text is JSON."""
    return {key: setting_text(value) for key, value in facts.items()}


def weights_file(model: nn.Module, facts: Facts) -> bytes:
    """A safetensors file of the model's state in fp32, under the names of its `state_dict`."""
    tensors = {name: each.cpu().contiguous() for name, each in model.float().state_dict().items()}
    return save(tensors, {"format": "pt", **as_metadata(facts)})
