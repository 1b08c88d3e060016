"""Images of another size, fitted to a square: one kernel for the converter and for the engines.

It is torch's antialiased bicubic resampling of bytes (a = -0.5, as in Pillow), by SIMD on a CPU.
Where both resize the same pixels, those of Pillow's `Image.resize` are at most a level away in an
image made smaller, two in one made larger, 0.02 on average. Three cases differ more. Where one side
is made smaller and the other larger, Pillow may take the sides in another order, and clips what
overshoots in between: up to 20 levels, 0.5 on average, for noise. By "crop", `ImageOps.fit` also
takes in what lies beside the square, at its border; and where the longer side exceeds the shorter
by an odd number, Pillow's square begins half a pixel later.
"""

import numpy as np
import torch
from torch.nn.functional import interpolate


def fitted(image: torch.Tensor, side: int, fit: str) -> torch.Tensor:
    """`image` (uint8 [H, W, 3]) as uint8 [side, side, 3], in the way of `decode.decode_into`."""
    height, width = image.shape[:2]
    if fit == "squash":
        return _resized(image, side, side)
    if fit == "crop":
        shorter = min(height, width)
        top, left = (height - shorter) // 2, (width - shorter) // 2
        return _resized(image[top : top + shorter, left : left + shorter], side, side)
    height, width = padded_size(height, width, side)
    top, left = (side - height) // 2, (side - width) // 2
    square = image.new_zeros((side, side, 3))
    square[top : top + height, left : left + width] = _resized(image, height, width)
    return square


def _resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    on_cpu = image.device.type == "cpu"
    if on_cpu:
        # Copied by NumPy: torch would take all cores, which decode other images at that moment.
        image = torch.from_numpy(np.ascontiguousarray(image.numpy()))
    # A batch of one in channels-last strides, which the kernel takes without repacking.
    batch = image.unsqueeze(0).permute(0, 3, 1, 2)
    if on_cpu:
        resized = interpolate(batch, (height, width), mode="bicubic", antialias=True)
    else:  # no other device resizes bytes
        pixels = interpolate(batch.float(), (height, width), mode="bicubic", antialias=True)
        resized = pixels.round().clamp(0, 255).byte()
    return resized[0].permute(1, 2, 0)


def padded_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width, in pixels, whose longer one is `side`; by "pad", black surrounds them."""
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))
