"""Random erasing on a CPU, bit for bit equal to `pipelines.erasing.erase`."""

from pipelines.erasing import CHANCES, ERASE, ERASED_LEFT, ERASED_SIZE, ERASED_TOP
from pipelines.kernels import draw, fill_row, kernel


@kernel
def erase_one(image, base, chance, sizes, fill):
    """Set the rectangle of the draws of `base`, if any, to `fill`; `image` is uint8 [S, S * 3]."""
    if draw(base, ERASE, CHANCES) < chance:
        side = len(image)
        size = sizes[draw(base, ERASED_SIZE, len(sizes))]
        top = draw(base, ERASED_TOP, side + 1 - size[0])
        left = draw(base, ERASED_LEFT, side + 1 - size[1])
        for y in range(top, top + size[0]):
            fill_row(image, y, left, left + size[1], fill)
