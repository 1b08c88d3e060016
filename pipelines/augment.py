"""Batched augmentation: gather, crop, flip, translate, cutout and normalisation in one pass.

Two implementations of one definition. `augment_on_cpu`, in `pipelines.augment_cpu`, is a numba
kernel over the bytes; `augment_on_device` is index arithmetic that torch.compile fuses. All of it
is integer arithmetic on uint8 up to the normalisation, which looks each byte up, so both give the
same bits for the same (seed, epoch, index), in any batch, on any number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastlab.config import AugmentConfig
from fastlab.console import UserError
from fastlab.mixing import GOLDEN, WORD, mix_int, mix_tensor, signed
from fastlab.tracing import span

# Numbers of the random draws of an image. numba's cache of `pipelines.augment_cpu` does not see a
# change of any constant here or in `fastlab.mixing`: delete its files in __pycache__ after one.
FLIP, SHIFT_Y, SHIFT_X, HOLE_Y, HOLE_X, SIZE, TOP, LEFT = range(8)
_GRID = 32  # crop sizes are drawn from a grid of so many areas by so many aspect ratios
_RATIO = 4 / 3
UNIT = 256  # crop boxes are in 1/256 pixel


@dataclass(frozen=True)
class Augmenter:
    """An `AugmentConfig` made ready for images of one size and one dataset's statistics."""

    flip: bool
    translate: int
    reflect: bool
    cutout: int
    sizes: np.ndarray
    """int64 [K, 2]: heights and widths to crop, in 1/256 pixel; K = 0: no crop."""
    fill: np.ndarray
    """uint8 [3]: the channel mean."""
    sizes_tensor: torch.Tensor
    fill_tensor: torch.Tensor
    """The same on the device: a step has nothing to copy there, which would wait for it."""
    offsets: torch.Tensor
    """int32 [8], on the device: what tells the words of an image's draws apart."""
    spans: torch.Tensor
    """int64 [6], on the device: how many values each draw from FLIP to SIZE has."""
    table: torch.Tensor
    """[256, 3], compute dtype: the normalised value of each byte in each channel."""


def make_augmenter(
    config: AugmentConfig | None,
    side: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Augmenter:
    """`config` None: normalisation alone. `mean` and `std` are on a scale of 0 to 1.

    Raises `UserError` where a translation reaches half the `side`.
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
    fill = np.rint(np.array(mean) * 255).astype(np.uint8)
    offsets = [signed(number * GOLDEN) for number in range(8)]
    shifts = 2 * config.translate + 1
    return Augmenter(
        flip=config.flip,
        translate=config.translate,
        reflect=config.padding == "reflect",
        cutout=config.cutout,
        sizes=sizes,
        fill=fill,
        sizes_tensor=torch.from_numpy(sizes).int().to(device),
        fill_tensor=torch.from_numpy(fill).to(device),
        offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        spans=torch.tensor([2, shifts, shifts, side, side, len(sizes)], device=device),
        table=((levels - centre) / spread).to(dtype).to(device),
    )


def _crop_sizes(scale: float, side: int) -> np.ndarray:
    """Sizes of random resized crops (Szegedy et al., 2014): area uniform in [scale, 1] of the
    image, aspect ratio log-uniform in [3/4, 4/3], on a grid, so that drawing one needs no
    floating-point function whose last bit differs between devices."""
    if scale == 1:
        return np.zeros((0, 2), dtype=np.int64)
    middle = (np.arange(_GRID) + 0.5) / _GRID
    area = (scale + (1 - scale) * middle)[:, None] * side * side
    ratio = np.exp((2 * middle - 1) * np.log(_RATIO))[None, :]
    sizes = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1).reshape(-1, 2)
    return np.rint(np.minimum(sizes, side) * UNIT).astype(np.int64)


def epoch_key(seed: int, epoch: int) -> int:
    """The 32-bit key from which all draws of an epoch follow."""
    return mix_int(mix_int(seed) ^ (epoch & WORD))


def device_augmenter(compile: bool) -> Callable[..., torch.Tensor]:
    """`augment_on_device`, compiled if asked, as a range of its own in traces."""
    # Static: training and validation share the function, whose second batch size and number of
    # images would else be compiled as symbols.
    apply = torch.compile(augment_on_device, dynamic=False) if compile else augment_on_device

    def run(*arguments: Any) -> torch.Tensor:
        with span("augmentation"):
            return apply(*arguments)

    return run


def augment_on_device(
    augmenter: Augmenter,
    images: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """The same as `augment_on_cpu`, as tensor arithmetic on one device, the augmenter's too.

    `images` is uint8 [N, S, S, 3]; `rows` and `ids` are int64 [b], `ids` below 2^32; `key` is an
    int64 scalar. Returns [b, 3, S, S], channels-last, compute dtype. What is computed for each
    pixel is int32, the type that GPUs compute fast; only `rows` stays int64, so that addresses in
    more than 2^31 bytes of images do not wrap.
    """
    side, device = images.shape[1], images.device
    base = mix_tensor(key.int() ^ ids.int())
    draws = _draws(base, augmenter.offsets[:TOP], augmenter.spans)
    line = torch.arange(side, dtype=torch.int32, device=device)[None, :]
    y, x = line, line
    outside_y = outside_x = torch.zeros((1, 1), dtype=torch.bool, device=device)
    if augmenter.translate:
        y = y + draws[:, SHIFT_Y, None] - augmenter.translate
        x = x + draws[:, SHIFT_X, None] - augmenter.translate
        outside_y, outside_x = (y < 0) | (y >= side), (x < 0) | (x >= side)
        y, x = _reflect_tensor(y, side), _reflect_tensor(x, side)
    if augmenter.flip:
        x = torch.where(draws[:, FLIP, None] == 1, side - 1 - x, x)
    if len(augmenter.sizes):
        size = augmenter.sizes_tensor[draws[:, SIZE]]
        start = _draws(base, augmenter.offsets[TOP:], UNIT * side - size + 1)
        pixels = _crop_tensor(images, rows, start, size, y, x)
    else:
        pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    fill = augmenter.fill_tensor
    if augmenter.translate and not augmenter.reflect:
        outside = outside_y[:, :, None] | outside_x[:, None, :]
        pixels = torch.where(outside[..., None], fill, pixels)
    if augmenter.cutout:
        in_y = _in_hole(line, draws[:, HOLE_Y, None], augmenter.cutout)
        in_x = _in_hole(line, draws[:, HOLE_X, None], augmenter.cutout)
        pixels = torch.where((in_y[:, :, None] & in_x[:, None, :])[..., None], fill, pixels)
    channels = torch.arange(3, dtype=torch.int32, device=device)
    return augmenter.table[pixels.int(), channels].permute(0, 3, 1, 2)


def _draws(base: torch.Tensor, offsets: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Whole numbers in [0, spans), int32 [b, k], of `base` [b], `offsets` [k], `spans` [k] or
    [b, k]. A view of products in memory, so that no pixel draws anew."""
    words = mix_tensor(base[:, None] + offsets)
    products = (words.long() & WORD) * spans
    return products.view(torch.int32)[:, 1::2]  # the high halves, on a little-endian machine


def _reflect_tensor(at: torch.Tensor, side: int) -> torch.Tensor:
    at = at.abs()
    return torch.where(at >= side, 2 * side - 2 - at, at)


def _in_hole(line: torch.Tensor, centre: torch.Tensor, size: int) -> torch.Tensor:
    start = centre - size // 2
    return (line >= start) & (line < start + size)


def _crop_tensor(images, rows, start, size, y, x) -> torch.Tensor:
    """Bilinear samples of each crop box at output positions `y`, `x`: uint8 [b, H, W, 3].

    `start` and `size`, int32 [b, 2], are in 1/256 pixel. int32 holds all of it up to a side of
    2048 (a dataset's is 1024 at most): ``(2 * at + 1) * length`` is below ``2 * side * UNIT *
    side``, and `total` below 2^25.
    """
    side = images.shape[1]

    def axis(at: torch.Tensor, number: int):
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
    """``x // by`` where no `x` is negative, which the compiler does not know: a shift by powers of
    two, else C's division, which needs no correction of the sign."""
    if by & (by - 1):
        return torch.div(x, by, rounding_mode="trunc")
    return x >> (by.bit_length() - 1)
