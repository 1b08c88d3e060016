"""Batched augmentation: gather, crop, flip, translate, cutout and normalisation in one pass.
Random erasing, MixUp and CutMix are in `pipelines.erasing` and `pipelines.pairs`.

There are two implementations of one definition: `augment_on_cpu`, in `pipelines.augment_cpu`, is a
numba kernel over the bytes, and `augment_on_device` is index arithmetic that torch.compile fuses.
Both compute in integers up to the normalisation, which looks each byte up in a table. So they give
the same bits for the same (seed, epoch, image), in any batch, on any number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastlab.compiling import compiled
from fastlab.config import AugmentConfig
from fastlab.console import UserError
from fastlab.mixing import WORD, draw_offsets, draw_tensor, mix_int, mix_tensor
from fastlab.tracing import span
from pipelines.erasing import Erasing, erase, in_boxes, make_erasing
from pipelines.pairs import Pairs, make_pairs, mix_pairs
from pipelines.stages import Stages, apply_stages, draw_stages, make_stages

# Each random draw of an image has a number; `pipelines.erasing` continues them. After a change of a
# constant here, or of what several files of kernels use, delete what numba cached in __pycache__
# (*.nbi, *.nbc): it does not notice the change.
FLIP, SHIFT_Y, SHIFT_X, HOLE_Y, HOLE_X, SIZE, TOP, LEFT = range(8)
UNIT = 256  # crop boxes are in 1/256 pixel
_GRID = 32  # areas, and aspect ratios, of the grid from which a crop's size is drawn
_RATIO = 4 / 3  # the largest aspect ratio of a crop


@dataclass(frozen=True)
class Augmenter:
    """An `AugmentConfig` prepared for images of one size and the statistics of one dataset.

    All tensors lie on the device: a step copies nothing there, for which it would have to wait.
    """

    config: AugmentConfig
    sizes: torch.Tensor
    """int32 [K, 2]: heights and widths to crop, in 1/256 pixel; K = 0: no crop."""
    fill: torch.Tensor
    """uint8 [3]: the channel mean."""
    offsets: torch.Tensor
    """int32 [8]: what distinguishes the words of an image's draws."""
    spans: torch.Tensor
    """int64 [6]: how many values each draw from FLIP to SIZE has."""
    table: torch.Tensor
    """[256, 3], compute dtype: the normalised value of each byte in each channel."""
    erasing: Erasing
    pairs: Pairs
    stages: Stages | None
    """Rotation, colour jitter and TrivialAugment; None where they are off."""


Augment = Callable[
    [Augmenter, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
"""The signature of `augment_on_device`."""


def make_augmenter(
    config: AugmentConfig | None,
    side: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Augmenter:
    """An augmenter for images of `side` pixels; without a `config` it only normalises.

    `mean` and `std` of the channels are on a scale of 0 to 1. Raises `UserError` where a
    translation reaches half the side.
    """
    config = config or AugmentConfig()
    if 2 * config.translate >= side:
        raise UserError(
            f"augment.translate = {config.translate}: expected less than half of the {side} pixels"
        )
    centre = torch.tensor(mean, dtype=torch.float64)
    spread = torch.tensor(std, dtype=torch.float64).clamp(min=1e-6)
    levels = torch.arange(256, dtype=torch.float64)[:, None] / 255
    sizes = _crop_sizes(config.crop_scale, side)
    shifts = 2 * config.translate + 1
    return Augmenter(
        config=config,
        sizes=torch.from_numpy(sizes).int().to(device),
        fill=(centre * 255).round().byte().to(device),
        offsets=draw_offsets(range(8), device),
        spans=torch.tensor([2, shifts, shifts, side, side, len(sizes)], device=device),
        table=((levels - centre) / spread).to(dtype).to(device),
        erasing=make_erasing(config.erasing, side, device),
        pairs=make_pairs(config, side, device),
        stages=make_stages(config, side, device),
    )


def _crop_sizes(scale: float, side: int) -> np.ndarray:
    """Sizes of random resized crops (Szegedy et al., 2014), int64 [K, 2], in 1/256 pixel.

    The area is uniform in [scale, 1] of the image's, the aspect ratio log-uniform in [3/4, 4/3].
    Both come from a grid: drawing a size then takes no floating-point function, whose last bit may
    differ between devices.
    """
    if scale == 1:
        return np.zeros((0, 2), dtype=np.int64)
    middle = (np.arange(_GRID) + 0.5) / _GRID
    area = (scale + (1 - scale) * middle)[:, None] * side * side
    ratio = np.exp((2 * middle - 1) * np.log(_RATIO))[None, :]
    sizes = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1).reshape(-1, 2)
    return np.rint(np.minimum(sizes, side) * UNIT).astype(np.int64)


def epoch_key(seed: int, epoch: int) -> int:
    """The 32-bit key that decides all draws of an epoch."""
    return mix_int(mix_int(seed) ^ (epoch & WORD))


def device_augmenter(compile: bool) -> Augment:
    """`augment_on_device`, compiled on request, as a named range in traces."""
    # Static shapes: training and validation share the function, and the second batch size and
    # number of images would otherwise be compiled as symbols.
    apply = compiled(augment_on_device, dynamic=False) if compile else augment_on_device

    def augment(augmenter: Augmenter, *tensors: torch.Tensor) -> torch.Tensor:
        with span("augmentation"):
            return apply(augmenter, *tensors)

    return augment


def augment_on_device(
    augmenter: Augmenter,
    images: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """``images[rows]`` augmented, as `augment_on_cpu` does it, in tensor arithmetic on one device.

    `images` is uint8 [N, S, S, 3]; `rows` is int64 [b]; `ids` (int64 [b], below 2^32) and `key` (an
    int64 scalar) decide the draws. Returns [b, 3, S, S], channels-last, compute dtype.

    Each pixel is computed in int32, the type that GPUs compute fast. Only `rows` stays int64, so
    that addresses in more than 2^31 bytes of images do not wrap.
    """
    config, fill, side = augmenter.config, augmenter.fill, images.shape[1]
    base = mix_tensor(key.int() ^ ids.int())
    draws = draw_tensor(base, augmenter.offsets[:TOP], augmenter.spans)
    line = torch.arange(side, dtype=torch.int32, device=images.device)[None, :]
    y, x, outside = _sources(config, draws, line)
    if len(augmenter.sizes):
        size = augmenter.sizes[draws[:, SIZE]]
        start = draw_tensor(base, augmenter.offsets[TOP:], UNIT * side - size + 1)
        pixels = _crop(images, rows, start, size, y, x)
    else:
        pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    if outside is not None:
        pixels = torch.where(outside[..., None], fill, pixels)
    if stages := augmenter.stages:
        pixels = apply_stages(stages, draw_stages(base, stages), pixels, fill)
    if config.cutout:
        start = draws[:, HOLE_Y : HOLE_X + 1] - config.cutout // 2
        hole = in_boxes(start, start + config.cutout, side)
        pixels = torch.where(hole, fill, pixels)
    if config.erasing:
        pixels = erase(augmenter.erasing, base, pixels, fill)
    if config.mixup or config.cutmix:
        pixels = mix_pairs(augmenter.pairs, base, pixels)
    channels = torch.arange(3, dtype=torch.int32, device=images.device)
    return augmenter.table[pixels.int(), channels].permute(0, 3, 1, 2)


def _sources(
    config: AugmentConfig, draws: torch.Tensor, line: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(y, x, outside): where a translation and then a flip take each output pixel from, int32
    [b, S] or [1, S], and which pixels to fill with the mean since that is outside the image, bool
    [b, S, S]. `draws` is int32 [b, 6]; `line` counts the pixels of a side, int32 [1, S]."""
    side, y, x, outside = line.shape[1], line, line, None
    if config.translate:
        y = y + draws[:, SHIFT_Y, None] - config.translate
        x = x + draws[:, SHIFT_X, None] - config.translate
        if config.padding == "mean":
            outside_y, outside_x = (y < 0) | (y >= side), (x < 0) | (x >= side)
            outside = outside_y[:, :, None] | outside_x[:, None, :]
        y, x = _reflect(y, side), _reflect(x, side)
    if config.flip:
        x = torch.where(draws[:, FLIP, None] == 1, side - 1 - x, x)
    return y, x, outside


def _reflect(at: torch.Tensor, side: int) -> torch.Tensor:
    at = at.abs()
    return torch.where(at >= side, 2 * side - 2 - at, at)


def _crop(
    images: torch.Tensor,
    rows: torch.Tensor,
    start: torch.Tensor,
    size: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
) -> torch.Tensor:
    """Bilinear samples of each crop box at output positions `y`, `x`: uint8 [b, H, W, 3].

    `start` and `size`, int32 [b, 2], are in 1/256 pixel. int32 holds all of it up to a side of
    2048 (a dataset's is 1024 at most): ``(2 * at + 1) * length`` is below ``2 * side * UNIT *
    side``, and `total` below 2^25.
    """
    side = images.shape[1]

    def axis(at: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The two pixels beside each sample, and the weight of the second in 1/256."""
        stretched = _divide((2 * at + 1) * size[:, number, None], 2 * side)
        fixed = (start[:, number, None] + stretched - UNIT // 2).clamp(min=0)
        low = _divide(fixed, UNIT)
        return low, (low + 1).clamp(max=side - 1), fixed & (UNIT - 1)

    y0, y1, wy = axis(y, 0)
    x0, x1, wx = axis(x, 1)
    wy, wx = wy[:, :, None, None], wx[:, None, :, None]
    image = rows[:, None, None]

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return images[image, row[:, :, None], column[:, None, :]].int()

    above = (UNIT - wx) * at(y0, x0) + wx * at(y0, x1)
    below = (UNIT - wx) * at(y1, x0) + wx * at(y1, x1)
    total = (UNIT - wy) * above + wy * below + UNIT * UNIT // 2
    return _divide(total, UNIT * UNIT).to(torch.uint8)


def _divide(x: torch.Tensor, by: int) -> torch.Tensor:
    """``x // by`` for an `x` that is never negative, which the compiler does not know.

    A power of two becomes a shift; any other divisor C's division, which corrects no sign.
    """
    if by & (by - 1):
        return torch.div(x, by, rounding_mode="trunc")
    return x >> (by.bit_length() - 1)
