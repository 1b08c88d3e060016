"""What the Triton kernels of batch norms share: dropout, statistics, sums. This imports Triton.

All kernels see channels-last tensors as rows of `C` channels. Their sizes are reasoned for an H100
(132 multiprocessors, 3.35 TB/s), which hides its latency with about 18 KB of loads under way in
each multiprocessor: a tile gives each thread 8 neighbouring channels (16 bytes of bfloat16), one
or two rows of them, and leaves it at most 128 registers, so that 512 threads or more are resident.
Blocks of 64 channels are whole cache lines of 128 bytes in bfloat16.

Sums are taken in a fixed order: each program writes its part to a buffer, and one further kernel
adds the parts. No kernel needs the host or its memory, so all can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from fastlab import mixing
from fastlab.models.dropout import threshold

M1, M2 = tl.constexpr(mixing.M1), tl.constexpr(mixing.M2)

CHANNELS = 64  # of a tile, at most
TILE, WARPS = 4096, 8  # elements of a tile of the kernels that only sum; 16 a thread
# Parts of a sum over rows. 8 programs a multiprocessor start in two rounds at most, and the kernel
# that adds the parts takes about 2 microseconds.
PARTS = 1024
# A kernel that adds parts takes 8 channels, one sector of 32 bytes, and so many parts at a time.
PARTS_TILE, PARTS_CHANNELS = 512, 8


@triton.jit
def folded_keys(key):
    """`kept` shifts the xor of a word and a key; the key's share is the same for all words. None is
    the key where nothing is dropped."""
    if key is None:
        return 0, 0
    else:
        first = tl.load(key).to(tl.uint32, bitcast=True)
        second = tl.load(key + 1).to(tl.uint32, bitcast=True)
        return first ^ (first >> 16), second ^ (second >> 15)


@triton.jit
def kept(number, key0, key1, least):
    """`fastlab.models.dropout.kept` of the elements with these numbers (uint32)."""
    word = (number ^ (number >> 16) ^ key0) * M1
    word = (word ^ (word >> 15) ^ key1) * M2
    return word.to(tl.int32, bitcast=True) >= least


@triton.jit
def _bias(bias, channel, known):
    if bias is None:
        return tl.full(channel.shape, 0.0, tl.float32)
    else:
        return tl.load(bias + channel, mask=known, other=0.0)


@triton.jit
def in_units_of_x(bias, mean, var, scale, eps, channel, known):
    """The x whose z is 0; the x whose z is the mean; and the factor of their difference that makes
    z of unit variance. Each is [1, channels]. z is scale * (x + bias), or 0 where it is dropped."""
    offset = _bias(bias, channel, known)
    centre = tl.load(mean + channel, mask=known, other=0.0) / scale - offset
    factor = tl.rsqrt(tl.load(var + channel, mask=known, other=1.0) + eps) * scale
    return 0.0 - offset[None, :], centre[None, :], factor[None, :]


@triton.jit
def part_of_rows(rows, rows_each, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program that goes down its part of the rows, tile by tile: channels, which of them there
    are, rows of a tile, and places in it; the part's first element, and its number of rows."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    place = row[:, None] * C + channel[None, :]
    start = tl.program_id(0).to(tl.int64) * rows_each
    count = tl.minimum(rows - start, rows_each).to(tl.int32)
    return channel, channel < C, row, place, start * C, count


@triton.jit
def _dropped_out(
    x, number, place, inside, offset, key0, key1, scale, least, DROP: tl.constexpr
):  # fmt: skip
    """z = dropout(x + bias) in float32 of the elements at `place`, counted from `x` and from the
    element with this number."""
    z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + offset
    if DROP:
        z = tl.where(kept(number + place.to(tl.uint32), key0, key1, least), z * scale, 0.0)
    return z


@triton.jit(do_not_specialize=["least"], do_not_specialize_on_alignment=["key"])
def partial_statistics(
    x,
    other,
    bias,
    key,
    means,
    squares,
    rows,
    rows_each,
    scale,
    least,
    C: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean of z and sum of its squared deviations from it over `rows_each` rows; on the grid's
    second plane, of `other`.

    Sums are of deviations from the mean of the first tile. Were it as far from the mean of all n
    tiles as can be, the squares would still lose no more than the factor n of their precision.
    """
    channel, known, row, place, first, count = part_of_rows(rows, rows_each, C, BLOCK_R, BLOCK_C)
    if tl.program_id(2) == 1:
        x = other
    part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    source = x + first
    number = first.to(tl.uint32)
    key0, key1 = folded_keys(key)
    offset = _bias(bias, channel, known)[None, :]

    inside = (row < count)[:, None] & known[None, :]
    z = _dropped_out(source, number, place, inside, offset, key0, key1, scale, least, DROP)
    tile_count = tl.minimum(count, BLOCK_R).to(tl.float32)
    pivot = tl.sum(tl.where(inside, z, 0.0), 0) / tile_count
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    square = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & known[None, :]
        z = _dropped_out(source, number, place, inside, offset, key0, key1, scale, least, DROP)
        deviation = tl.where(inside, z - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        source += BLOCK_R * C
        number += BLOCK_R * C
    mean = tl.sum(total, 0) / count.to(tl.float32)
    square = tl.sum(square, 0) - mean * mean * count.to(tl.float32)
    tl.store(means + part * C + channel, pivot + mean, mask=known)
    tl.store(squares + part * C + channel, square, mask=known)


@triton.jit
def combine_statistics(
    means,
    squares,
    mean,
    var,
    other_mean,
    other_var,
    parts,
    rows,
    rows_each,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of z from those of its parts (Chan, Golub and LeVeque, 1983); in the
    grid's second row, of the other tensor."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    if tl.program_id(1) == 1:
        mean, var = other_mean, other_var
    means += tl.program_id(1) * parts * C
    squares += tl.program_id(1) * parts * C
    pivot = tl.load(means + channel, mask=known, other=0.0)[None, :]
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part * rows_each, rows_each).to(tl.float32)[:, None]
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        deviation = tl.load(means + place, mask=inside, other=0.0) - pivot
        total += tl.where(inside, count * deviation, 0.0)
    whole = tl.load(means + channel, mask=known, other=0.0) + tl.sum(total, 0) / rows
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part * rows_each, rows_each).to(tl.float32)[:, None]
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        deviation = tl.load(means + place, mask=inside, other=0.0) - whole[None, :]
        square = tl.load(squares + place, mask=inside, other=0.0)
        total += tl.where(inside, square + count * deviation * deviation, 0.0)
    tl.store(mean + channel, whole, mask=known)
    tl.store(var + channel, tl.sum(total, 0) / rows, mask=known)


@triton.jit
def combine_sums(
    values,
    first,
    second,
    third,
    fourth,
    parts,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of each buffer of `values`, [up to four, parts, C], to its own target."""
    which = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    target = first
    if which == 1:
        target = second
    if which == 2:
        target = third
    if which == 3:
        target = fourth
    values += which * parts * C
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for begun in range(0, parts, BLOCK_P):
        part = begun + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & known[None, :]
        place = part[:, None] * C + channel[None, :]
        total += tl.load(values + place, mask=inside, other=0.0)
    tl.store(target + channel, tl.sum(total, 0), mask=known)


def statistics(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    key: torch.Tensor | None,
    p: float,
    targets: tuple[torch.Tensor, ...],
    other: torch.Tensor | None = None,
    other_targets: tuple[torch.Tensor, ...] = (),
) -> None:
    """Fill `targets`, the mean and variance of dropout(x + bias), and `other_targets`, those of
    `other` (then without bias and dropout) by the same launches."""
    c, rows = x.shape[1], x.numel() // x.shape[1]
    rows_each, parts, tile = split(rows, c, TILE)
    norms = 1 if other is None else 2
    means, squares = (buffers(norms, parts, x) for _ in range(2))
    partial_statistics[parts, blocks(c, CHANNELS), norms](
        x, x if other is None else other, bias, key, means, squares, rows, rows_each,
        1 / (1 - p), threshold(p), C=c, DROP=p > 0, **tile, num_warps=WARPS,
    )  # fmt: skip
    combine_statistics[blocks(c, PARTS_CHANNELS), norms](
        means, squares, *targets, *(other_targets or targets), parts, rows, rows_each,
        C=c, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def sum_parts(values: torch.Tensor, *targets: torch.Tensor) -> None:
    """Fill `targets`, [c] each, with the sums over the parts of `values`: [targets, parts, c]."""
    count, parts, c = values.shape
    combine_sums[blocks(c, PARTS_CHANNELS), count](
        values, *targets, *targets[:1] * (4 - count), parts,
        C=c, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def buffers(count: int, parts: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((count, parts, x.shape[1]), dtype=torch.float32)


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def channels_of_tile(c: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(c))


def split(rows: int, c: int, elements: int) -> tuple[int, int, dict[str, int]]:
    """Rows of each part but the last, the number of parts, and the tile of so many elements."""
    block_c = channels_of_tile(c)
    block_r = elements // block_c
    tiles_each = blocks(blocks(rows, block_r), max(1, PARTS // blocks(c, CHANNELS)))
    rows_each = tiles_each * block_r
    return rows_each, blocks(rows, rows_each), {"BLOCK_R": block_r, "BLOCK_C": block_c}
