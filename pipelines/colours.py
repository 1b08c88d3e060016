"""Colour jitter and the colours of TrivialAugment in tensor arithmetic: int32, no branch on data.

The operations are torchvision's on bytes, to within a level (hue: two). `pipelines.stages_cpu`
computes the same bits. Images are [b, S, S, 3], as uint8 or as levels in int32; a factor is int32
[b], in 1/`ONE`.
"""

import torch

from pipelines.trivial import AUTO_CONTRAST, CONTRAST, EACH, EQUALIZE, ONE, SHARPNESS

RED, GREEN, BLUE = 313_419, 615_514, 119_538  # their shares of grey (ITU-R 601-2), in 1/2^20
HUE_UNIT = 1 << 14  # a sixth of the circle of hues
CIRCLE = 6 * HUE_UNIT


def stored(pixels: torch.Tensor) -> torch.Tensor:
    """`pixels` (uint8 [b, H, W, 3]), four bytes each in memory: torch.compile would otherwise
    compute them anew for each use. It needs a little-endian machine."""
    red, green, blue = pixels.int().unbind(-1)
    words = red | green << 8 | blue << 16
    return words.view(torch.uint8).unflatten(-1, (words.shape[-1], 4))[..., :3]


def blend(levels: torch.Tensor, product: torch.Tensor | int, factor: torch.Tensor) -> torch.Tensor:
    """``levels * factor + product``, rounded down and clamped to a byte's range. `product` is that
    of what the levels are blended with and ``ONE - factor``."""
    factor = factor[:, None, None, None]
    return ((levels * factor + product) >> 20).clamp(0, 255)


def grey(levels: torch.Tensor) -> torch.Tensor:
    """[b, S, S] from int32 [b, S, S, 3]."""
    red, green, blue = levels.unbind(-1)
    return (RED * red + GREEN * green + BLUE * blue) >> 20


def mean_product(levels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The mean of the grey values times ``ONE - factor``, rounded down: int32 [b, 1, 1, 1]."""
    total = grey(levels).sum(dim=(1, 2), dtype=torch.int32).long()
    pixels = levels.shape[1] * levels.shape[2]
    product = torch.div(total * (ONE - factor), pixels, rounding_mode="floor")
    return product.int()[:, None, None, None]


def turn_hue(levels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Add `shift` (int32 [b], from 0 to below `CIRCLE`) to the hue of `levels`, int32.

    A channel follows from the hue h, the largest value and the range of the three: it is the
    largest less the range times a weight, which is 0 within a sixth of the circle on either side
    of the channel's own hue, 1 opposite of it and linear between.
    """
    red, green, blue = levels.unbind(-1)
    high, low = levels.amax(-1), levels.amin(-1)
    extent = high - low
    is_red, is_green = high == red, high == green
    ahead = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    # The extent, and six sixths less the one it adds, keep what is divided from being negative.
    part = torch.div((ahead + extent) * HUE_UNIT, extent.clamp(min=1), rounding_mode="trunc")
    other = torch.where(is_green, part + 7 * HUE_UNIT, part + 9 * HUE_UNIT)
    hue = torch.where(is_red, part + 5 * HUE_UNIT, other) + shift[:, None, None]
    own = (5 - 2 * torch.arange(3, dtype=torch.int32, device=levels.device)) * HUE_UNIT
    at = hue[..., None] + own
    at = at - torch.div(at, CIRCLE, rounding_mode="trunc") * CIRCLE
    weight = torch.minimum(at, 4 * HUE_UNIT - at).clamp(0, HUE_UNIT)
    # 257/256: torchvision multiplies floats by 255.999 and rounds down.
    return ((high * HUE_UNIT)[..., None] - extent[..., None] * weight) * 257 >> 22


def smooth(levels: torch.Tensor) -> torch.Tensor:
    """Weighted means of 3x3 pixels, the middle one counted five times; the edge stays as it is."""
    side = levels.shape[1]
    middle = levels[:, 1:-1, 1:-1]
    total = 4 * middle
    for y in range(3):
        for x in range(3):
            total = total + levels[:, y : side - 2 + y, x : side - 2 + x]
    inside = torch.div(total + 6, 13, rounding_mode="trunc")
    out = levels.clone()
    out[:, 1:-1, 1:-1] = inside
    return out


def apply_choice(
    pixels: torch.Tensor, choice: torch.Tensor, tables: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """Each image of `pixels` (uint8) after the operation on colours that it drew: `choice` is int32
    [b], `tables` and `factors` are those of `level_tables` and `blend_factors`.

    All images take all steps, which change nothing where another operation was drawn.
    """
    operation, factor = torch.div(choice, EACH, rounding_mode="trunc"), factors[choice]
    pixels = stored(pixels)
    levels = pixels.int()
    image = torch.arange(len(pixels), dtype=torch.int32, device=pixels.device)
    channels = torch.arange(3, dtype=torch.int32, device=pixels.device)
    table = stored(_fitted(pixels, tables[choice].int(), operation)[:, None])[:, 0]
    mapped = table[image[:, None, None, None], levels, channels].int()
    operation = operation[:, None, None, None]
    degenerate = torch.where(operation == SHARPNESS, smooth(levels), grey(levels)[..., None])
    product = degenerate * (ONE - factor)[:, None, None, None]
    product = torch.where(operation == CONTRAST, mean_product(levels, factor), product)
    return blend(mapped, product, factor).to(torch.uint8)


def _fitted(pixels: torch.Tensor, table: torch.Tensor, operation: torch.Tensor) -> torch.Tensor:
    """`table` (int32 [b, 256]) for each channel, or the one that stretches or equalises the image:
    uint8 [b, 256, 3]."""
    levels = torch.arange(256, dtype=torch.int32, device=pixels.device)[:, None]
    low, high = pixels.int().amin(dim=(1, 2)), pixels.int().amax(dim=(1, 2))
    operation = operation[:, None, None]
    stretch = (operation == AUTO_CONTRAST) & (high > low)[:, None]
    extent = (high - low).clamp(min=1)[:, None]
    stretched = torch.div((levels - low[:, None]) * 255, extent, rounding_mode="trunc")
    below = _counts_below(pixels)
    step = below.gather(1, high.long()[:, None])  # all pixels but the brightest
    step = torch.div(step, 255, rounding_mode="trunc")
    equal = torch.div(below + (step >> 1), step.clamp(min=1), rounding_mode="trunc")
    fitted = torch.where(stretch, stretched, table[..., None])
    equalise = (operation == EQUALIZE) & (step > 0)
    return torch.where(equalise, equal, fitted).clamp(0, 255).to(torch.uint8)


def _counts_below(pixels: torch.Tensor) -> torch.Tensor:
    """How many pixels of each channel are below each level: int32 [b, 256, 3].

    They are counted in one dimension: in two, deterministic algorithms of some versions of torch
    copy strides from the host.
    """
    count = len(pixels)
    image = torch.arange(count, device=pixels.device)[:, None, None, None]
    channels = torch.arange(3, device=pixels.device)
    index = ((image * 256 + pixels) * 3 + channels).flatten()
    zeros = torch.zeros(count * 256 * 3, dtype=torch.int32, device=pixels.device)
    ones = torch.ones((), dtype=torch.int32, device=pixels.device).expand(index.shape)
    counts = zeros.scatter_add(0, index, ones).view(count, 256, 3)
    return counts.cumsum(1, dtype=torch.int32) - counts
