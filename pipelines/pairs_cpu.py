"""MixUp and CutMix on a CPU, bit for bit equal to `pipelines.pairs.mix_pairs`."""

import numpy as np

from pipelines.kernels import draw, kernel, mix_word
from pipelines.pairs import BOX_X, BOX_Y, OUTCOME, WHOLE


@kernel
def mix_pairs_on_cpu(pixels, ids, key, outcomes):
    """Mix each two neighbours of `pixels`, uint8 [b, S, S * 3], in place. Of an odd number of
    images, the last remains as it is."""
    before = np.empty((2, *pixels.shape[1:]), np.uint8)
    for first in range(0, len(ids) - 1, 2):
        before[:] = pixels[first : first + 2]
        for k in range(2):
            base = mix_word(np.uint64(key) ^ np.uint64(ids[first + k]))
            _mix(before[k], before[1 - k], base, outcomes, pixels[first + k])


@kernel
def _mix(own, partner, base, outcomes, out):
    side = len(own)
    weight, half = outcomes[draw(base, OUTCOME, len(outcomes))]
    if weight < WHOLE:
        _blend(own.ravel(), partner.ravel(), weight, out.ravel())
    y, x = draw(base, BOX_Y, side), draw(base, BOX_X, side)
    left, right = 3 * max(0, x - half), 3 * min(side, x + half)
    for row in range(max(0, y - half), min(side, y + half)):
        for i in range(left, right):
            out[row, i] = partner[row, i]


@kernel
def _blend(own, partner, weight, out):
    for i in range(len(out)):
        total = weight * own[i] + (WHOLE - weight) * partner[i] + WHOLE // 2
        out[i] = np.uint8(total >> 8)
