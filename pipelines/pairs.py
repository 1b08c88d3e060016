"""MixUp and CutMix: each image of a batch is mixed with its partner, and the labels with it.

The partner of the image at position p of a process's batch is the image at position p XOR 1: so it
depends on (seed, epoch) alone on any number of processes, as each takes an even number of images.
Both images are augmented before, by their own draws. Each draws its own weight, in 1/256, and its
own box; the mixture is computed in integers, so a CPU and a GPU get the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fastlab.compiling import compiled
from fastlab.config import AugmentConfig
from fastlab.mixing import draw_offsets, draw_tensor, mix_tensor
from pipelines.erasing import in_boxes

# Numbers of an image's draws, which continue those of `pipelines.erasing`.
OUTCOME, BOX_Y, BOX_X = range(12, 15)
WHOLE = 256  # the weight of an image that is not mixed
_QUANTILES = 4096  # of a Beta distribution, all of which are equally probable
_CELLS = 1 << 16  # of the grid on which the density of a Beta distribution is integrated


@dataclass(frozen=True)
class Pairs:
    """MixUp and CutMix prepared for images of one size. All tensors lie on the device."""

    side: int
    """Of the images, pixels."""
    outcomes: torch.Tensor
    """int32 [K, 2]: what an image may draw, all equally probable: its weight outside the box, in
    1/256, and half the side of the box that it takes from its partner, pixels. MixUp has no box,
    and CutMix keeps the image outside it. K = 0: images are not mixed."""
    offsets: torch.Tensor
    """int32 [3]: what distinguishes the words of the draws."""
    spans: torch.Tensor
    """int64 [3]: how many values each draw has."""


Mixing = tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
"""`Batch.partners` and `Batch.weights`."""


def make_pairs(config: AugmentConfig, side: int, device: torch.device | str) -> Pairs:
    outcomes = outcome_table(config, side)
    return Pairs(
        side=side,
        outcomes=torch.from_numpy(outcomes).int().to(device),
        offsets=draw_offsets(range(OUTCOME, BOX_X + 1), device),
        spans=torch.tensor([len(outcomes), side, side], device=device),
    )


def outcome_table(config: AugmentConfig, side: int) -> np.ndarray:
    """`Pairs.outcomes`, int64 [K, 2]. Weights of MixUp (Zhang et al., 2018) and shares that CutMix
    (Yun et al., 2019) keeps are quantiles of Beta(alpha, alpha)."""
    table = np.zeros((0, 2), dtype=np.int64)
    if config.mixup:
        weights = np.rint(beta_quantiles(config.mixup) * WHOLE)
        table = np.append(table, np.stack([weights, np.zeros_like(weights)], axis=1), axis=0)
    if config.cutmix:
        halves = np.floor(0.5 * np.sqrt(1 - beta_quantiles(config.cutmix)) * side)
        table = np.append(table, np.stack([np.full_like(halves, WHOLE), halves], axis=1), axis=0)
    return table.astype(np.int64)


def beta_quantiles(alpha: float) -> np.ndarray:
    """The values of Beta(alpha, alpha) at 4096 probabilities, the middles of as many equal parts of
    [0, 1]; float64, ascending.

    The density t^(alpha - 1) (1 - t)^(alpha - 1) is integrated from 0 to 1/2, and mirrored. Where
    alpha < 1, it is infinite at 0: the substitution t = s^(1 / alpha) / 2 cancels the first factor.
    """
    power = max(1.0, 1 / alpha)
    s = (np.arange(_CELLS) + 0.5) / _CELLS
    rest = (2 - s**power) * (s if alpha > 1 else 1)
    mass = np.append(0, np.cumsum((rest / rest[-1]) ** (alpha - 1)))
    half = 2 * (np.arange(_QUANTILES // 2) + 0.5) / _QUANTILES
    low = 0.5 * np.interp(half * mass[-1], mass, np.linspace(0, 1, _CELLS + 1)) ** power
    return np.append(low, 1 - low[::-1])


def pairing(pairs: Pairs, compile: bool) -> Callable[..., Mixing]:
    """A function of the arguments of `pair_up` but `pairs`, which gives (None, None) where images
    are not mixed; compiled on request."""
    if not len(pairs.outcomes):
        return lambda labels, ids, key: (None, None)
    return partial(compiled(pair_up, dynamic=False) if compile else pair_up, pairs)


def pair_up(
    pairs: Pairs, labels: torch.Tensor, ids: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(partners, weights) of a batch: the labels of the partners, int64 [b], and the share of each
    image's own label, float32 [b]. `labels` and `ids` are int64 [b], `key` is an int64 scalar; for
    what they mean, see `augment_on_device`."""
    weight, start, stop = _mixtures(pairs, mix_tensor(key.int() ^ ids.int()))
    pixels = pairs.side * pairs.side
    kept = weight * (pixels - (stop - start).prod(dim=1))
    # A product of doubles is the same on every device, and here as exact as the quotient.
    partners = labels.view(-1, 2).flip(1).flatten()
    return partners, (kept.double() * (1 / (WHOLE * pixels))).float()


def mix_pairs(pairs: Pairs, base: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """`pixels` (uint8 [b, S, S, 3]) mixed as the draws of `base` (int32 [b]) say: int32, the same
    shape, from 0 to 255."""
    weight, start, stop = _mixtures(pairs, base)
    # Strides need bytes in memory: so no pixel is augmented a second time, for its partner.
    size = pixels[0].numel()
    own = pixels.contiguous().as_strided((len(pixels) // 2, 2, size), (2 * size, size, 1))
    partner = own.flip(1).view(pixels.shape).int()
    weight = torch.where(in_boxes(start, stop, pairs.side), 0, weight[:, None, None, None])
    total = weight * own.view(pixels.shape).int() + (WHOLE - weight) * partner
    return (total + WHOLE // 2) >> 8


def _mixtures(pairs: Pairs, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, start, stop): the weight of each image outside its box, int32 [b], and the corners
    of that box, clipped to the image, int32 [b, 2]."""
    draws = draw_tensor(base, pairs.offsets, pairs.spans)
    outcome = pairs.outcomes[draws[:, 0]]
    centre, half = draws[:, 1:], outcome[:, 1:]
    return outcome[:, 0], (centre - half).clamp(min=0), (centre + half).clamp(max=pairs.side)
