"""Whether a graph computes what the model computes, image by image."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastlab.console import UserError
from fastlab.dataset.manifest import ImageSpec
from fastlab.export.graphs import Call, Input

TOLERANCE = 1e-3
"""The largest difference of two logits, as a share of the largest logit: far above the rounding of
fp32, which differs between implementations, and far below what another function would give."""

Batches = Iterable[tuple[torch.Tensor, np.ndarray | None]]
"""Normalised images, fp32 [b, 3, S, S] on the CPU, with their labels, int64 [b], where known."""


@dataclass(frozen=True)
class Agreement:
    """How the logits of a graph compare with those of the model in fp32."""

    images: int
    correct: int | None
    """Images whose best class is the label, by the graph; None where the images have no labels."""
    expected: int | None
    """The same by the model."""
    others: int
    """Images whose best class differs: where not 0, two classes tie within the rounding."""
    difference: float
    """The largest absolute difference of two logits."""
    largest: float
    """The largest absolute logit of the model."""


@torch.inference_mode()
def compare(
    call: Call, takes: Input, model: nn.Module, spec: ImageSpec, data: Batches
) -> Agreement:
    """Compare a graph with the model from which it was made. Raises `UserError` where any logit
    differs by more than `TOLERANCE` allows."""
    theirs, ours, labels = [], [], []
    for images, truth in data:
        theirs.append(_call(call, takes, _as_input(images, takes, spec)))
        ours.append(model(images.contiguous()).numpy())
        labels.append(truth)
    logits, reference = np.concatenate(theirs), np.concatenate(ours)
    best, expected = logits.argmax(axis=1), reference.argmax(axis=1)
    known = np.concatenate(labels) if labels[0] is not None else None
    agreement = Agreement(
        images=len(logits),
        correct=None if known is None else int((best == known).sum()),
        expected=None if known is None else int((expected == known).sum()),
        others=int((best != expected).sum()),
        difference=float(np.abs(logits - reference).max()),
        largest=float(np.abs(reference).max()),
    )
    if not agreement.difference <= TOLERANCE * agreement.largest:  # nor where either is NaN
        raise UserError(
            f"export: the graph's logits differ from the model's by up to "
            f"{agreement.difference:.2g} (the largest logit is {agreement.largest:.2g}); nothing "
            f"was written"
        )
    return agreement


def _as_input(images: torch.Tensor, takes: Input, spec: ImageSpec) -> np.ndarray:
    if not takes.normalise:
        return images.contiguous().numpy()
    mean, std = (images.new_tensor(each)[:, None, None] for each in (spec.mean, spec.std))
    levels = ((images * std + mean) * 255).round().byte()
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def _call(call: Call, takes: Input, values: np.ndarray) -> np.ndarray:
    if takes.dynamic_batch:
        return call(values)
    return np.concatenate([call(values[row : row + 1]) for row in range(len(values))])
