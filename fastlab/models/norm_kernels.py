"""What the Triton kernels of the fused batch norms share: dropout, statistics and sums.

All kernels see a channels-last tensor as rows of `C` channels. Their sizes are chosen for an H100
(132 multiprocessors, 3.35 TB/s), which needs about 18 KB of loads in flight per multiprocessor to
hide its latency: a tile gives each thread 8 neighbouring channels (16 bytes of bfloat16) of one or
two rows, and leaves it at most 128 registers, so that 512 threads or more are resident. A block of
64 channels in bfloat16 is a whole cache line of 128 bytes.

Sums are taken in a fixed order: each program writes its partial sum to a buffer, and one further
kernel adds these parts. No kernel waits for the host, so all can be captured in a CUDA graph.

Only this module and the other modules of kernels import Triton, which an installation for CPUs
lacks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlab import mixing
from fastlab.models.dropout import threshold

M1, M2 = tl.constexpr(mixing.M1), tl.constexpr(mixing.M2)

CHANNELS = 64  # the most channels of a tile
TILE, WARPS = 4096, 8  # elements of a tile in kernels that only sum: 16 per thread
# Parts of a sum over rows. 8 programs per multiprocessor start in at most two rounds, and the
# kernel that adds the parts takes about 2 microseconds.
PARTS = 1024
# A kernel that adds parts takes 8 channels, one sector of 32 bytes, and this many parts at a time.
PARTS_TILE, PARTS_CHANNELS = 512, 8


@triton.jit
def folded_keys(key):
    """The two keys of `kept` at `key` (int32 [2]) as uint32, each xored with its own shift: `kept`
    shifts the xor of a word and a key, and the key's share is the same for all words. Where nothing
    is dropped, `key` may be None."""
    if key is None:
        return 0, 0
    else:
        first = tl.load(key).to(tl.uint32, bitcast=True)
        second = tl.load(key + 1).to(tl.uint32, bitcast=True)
        return first ^ (first >> 16), second ^ (second >> 15)


@triton.jit
def kept(index, keys, drop_below):
    """Whether `fastlab.models.dropout.kept` keeps the elements numbered `index` (uint32, any
    shape)."""
    first, second = keys
    word = (index ^ (index >> 16) ^ first) * M1
    word = (word ^ (word >> 15) ^ second) * M2
    return word.to(tl.int32, bitcast=True) >= drop_below


@triton.jit
def vector(values, channel, valid):
    """Load the float32 values of these channels, as [1, channels]."""
    return tl.load(values + channel, mask=valid, other=0.0)[None, :]


@triton.jit
def _bias(bias, channel, valid):
    """Load the bias of these channels, zeros where there is none, as [channels]."""
    if bias is None:
        return tl.full(channel.shape, 0.0, tl.float32)
    else:
        return tl.load(bias + channel, mask=valid, other=0.0)


@triton.jit
def in_units_of_x(bias, mean, var, scale, eps, channel, valid):
    """Express the normalisation of z in units of x, where z = scale * (x + bias), or 0 if dropped.

    Returns the x at which z is 0, the x at which z is its mean, and the factor that turns a
    difference of two x into one of normalised z: float32 [1, channels] each.
    """
    added = _bias(bias, channel, valid)
    centre = tl.load(mean + channel, mask=valid, other=0.0) / scale - added
    factor = tl.rsqrt(tl.load(var + channel, mask=valid, other=1.0) + eps) * scale
    return 0.0 - added[None, :], centre[None, :], factor[None, :]


@triton.jit
def part_of_rows(rows, part_rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The part of the rows that this program goes down, tile by tile.

    Returns the channels of a tile, whether each exists, the rows of a tile, the offsets of its
    elements [BLOCK_R, BLOCK_C], the offset of the part's first row, and the part's number of rows.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    offsets = row[:, None] * C + channel[None, :]
    start = tl.program_id(0).to(tl.int64) * part_rows
    count = tl.minimum(rows - start, part_rows).to(tl.int32)
    return channel, channel < C, row, offsets, start * C, count


@triton.jit
def store_part(parts, number, value, channel, valid, C: tl.constexpr):
    """Store `value` [1, channels] as this program's part of sum `number`: parts is [sums, programs,
    C]."""
    part = number * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + part * C + channel[None, :], value, mask=valid[None, :])


@triton.jit
def _dropped_out(
    x, first, offsets, inside, added, keys, scale, drop_below, DROP: tl.constexpr
):  # fmt: skip
    """Load z = dropout(x + bias) as float32, at `offsets` from the element numbered `first`, to
    which `x` points."""
    z = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + added
    if DROP:
        z = tl.where(kept(first + offsets.to(tl.uint32), keys, drop_below), z * scale, 0.0)
    return z


@triton.jit(do_not_specialize=["drop_below"], do_not_specialize_on_alignment=["key"])
def partial_statistics(
    x, other, bias, key, means, squares, rows, part_rows, scale, drop_below,
    C: tl.constexpr, DROP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the mean of z and its sum of squared deviations over a part of the rows; the programs
    with third index 1 do so for `other`.

    Sums are of deviations from the mean of the first tile. Even if that is as far as possible from
    the mean of all n tiles, the squares lose no more than a factor n of their precision.
    """
    channel, valid, row, offsets, first, count = part_of_rows(rows, part_rows, C, BLOCK_R, BLOCK_C)
    if tl.program_id(2) == 1:
        x = other
    source, index, keys = x + first, first.to(tl.uint32), folded_keys(key)
    added = _bias(bias, channel, valid)[None, :]
    inside = (row < count)[:, None] & valid[None, :]
    z = _dropped_out(source, index, offsets, inside, added, keys, scale, drop_below, DROP)
    pivot = tl.sum(tl.where(inside, z, 0.0), 0) / tl.minimum(count, BLOCK_R).to(tl.float32)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    square = total
    for done in range(0, count, BLOCK_R):
        inside = (row < count - done)[:, None] & valid[None, :]
        z = _dropped_out(source, index, offsets, inside, added, keys, scale, drop_below, DROP)
        deviation = tl.where(inside, z - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        source += BLOCK_R * C
        index += BLOCK_R * C
    mean = tl.sum(total, 0) / count.to(tl.float32)
    square = tl.sum(square, 0) - mean * mean * count.to(tl.float32)
    part = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + part * C + channel, pivot + mean, mask=valid)
    tl.store(squares + part * C + channel, square, mask=valid)


@triton.jit
def _tile_of_parts(first, parts, channel, valid, C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Number the parts from `first` on [BLOCK_P]; the offsets of their elements, and whether each
    exists [BLOCK_P, channels]."""
    part = first + tl.arange(0, BLOCK_P)
    inside = (part < parts)[:, None] & valid[None, :]
    return part, part[:, None] * C + channel[None, :], inside


@triton.jit
def _row_counts(part, rows, part_rows):
    """The number of rows in each part, as float32 [BLOCK_P, 1]."""
    return tl.minimum(rows - part * part_rows, part_rows).to(tl.float32)[:, None]


@triton.jit
def combine_statistics(
    means, squares, mean, var, other_mean, other_var, parts, rows, part_rows,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the mean and biased variance of z, combined from those of its parts (Chan, Golub and
    LeVeque, 1983); the programs with second index 1 do so for the other tensor."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    if tl.program_id(1) == 1:
        mean, var = other_mean, other_var
    means += tl.program_id(1) * parts * C
    squares += tl.program_id(1) * parts * C
    pivot = vector(means, channel, valid)
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part, offsets, inside = _tile_of_parts(first, parts, channel, valid, C, BLOCK_P)
        count = _row_counts(part, rows, part_rows)
        deviation = tl.load(means + offsets, mask=inside, other=0.0) - pivot
        total += tl.where(inside, count * deviation, 0.0)
    whole = tl.load(means + channel, mask=valid, other=0.0) + tl.sum(total, 0) / rows
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part, offsets, inside = _tile_of_parts(first, parts, channel, valid, C, BLOCK_P)
        count = _row_counts(part, rows, part_rows)
        deviation = tl.load(means + offsets, mask=inside, other=0.0) - whole[None, :]
        square = tl.load(squares + offsets, mask=inside, other=0.0)
        total += tl.where(inside, square + count * deviation * deviation, 0.0)
    tl.store(mean + channel, whole, mask=valid)
    tl.store(var + channel, tl.sum(total, 0) / rows, mask=valid)


@triton.jit
def combine_sums(
    values, first, second, third, fourth, parts,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the parts of each sum in `values` [up to 4 sums, parts, C] into its own target [C]."""
    number = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    target = first
    if number == 1:
        target = second
    if number == 2:
        target = third
    if number == 3:
        target = fourth
    values += number * parts * C
    total = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
    for done in range(0, parts, BLOCK_P):
        _, offsets, inside = _tile_of_parts(done, parts, channel, valid, C, BLOCK_P)
        total += tl.load(values + offsets, mask=inside, other=0.0)
    tl.store(target + channel, tl.sum(total, 0), mask=valid)


def statistics(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    key: torch.Tensor | None,
    p: float,
    targets: tuple[torch.Tensor, torch.Tensor],
    other: torch.Tensor | None = None,
    other_targets: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill `targets` with the mean and biased variance of dropout(x + bias), and `other_targets`
    with those of `other`, by the same launches: float32 [c] each. With `other`, there must be
    neither bias nor dropout."""
    c, rows = x.shape[1], x.numel() // x.shape[1]
    part_rows, parts, tile = split(rows, c, TILE)
    tensors = 1 if other is None else 2
    means, squares = (buffers(tensors, parts, x) for _ in range(2))
    partial_statistics[parts, triton.cdiv(c, CHANNELS), tensors](
        x, x if other is None else other, bias, key, means, squares, rows, part_rows,
        1 / (1 - p), threshold(p), C=c, DROP=p > 0, **tile, num_warps=WARPS,
    )  # fmt: skip
    combine_statistics[triton.cdiv(c, PARTS_CHANNELS), tensors](
        means, squares, *targets, *(other_targets or targets), parts, rows, part_rows,
        C=c, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def sum_parts(values: torch.Tensor, *targets: torch.Tensor) -> None:
    """Fill each of up to four `targets`, [c], with the sum over the parts of its share of `values`,
    [targets, parts, c]."""
    count, parts, c = values.shape
    combine_sums[triton.cdiv(c, PARTS_CHANNELS), count](
        values, *targets, *targets[:1] * (4 - count), parts,
        C=c, BLOCK_P=PARTS_TILE, BLOCK_C=PARTS_CHANNELS, num_warps=WARPS,
    )  # fmt: skip


def buffers(count: int, parts: int, x: torch.Tensor) -> torch.Tensor:
    """Allocate float32 [count, parts, c] for the parts of sums over x, [b, c, h, w]."""
    return x.new_empty((count, parts, x.shape[1]), dtype=torch.float32)


def channels_of_tile(c: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(c))


class Split(NamedTuple):
    """How the rows of a tensor are divided among programs."""

    part_rows: int  # the last part may have fewer
    parts: int
    tile: dict[str, int]  # BLOCK_R and BLOCK_C


def split(rows: int, c: int, elements: int) -> Split:
    """Divide rows of `c` channels into about `PARTS` programs, with tiles of `elements`."""
    block_c = channels_of_tile(c)
    block_r = elements // block_c
    programs_per_block = max(1, PARTS // triton.cdiv(c, CHANNELS))
    part_rows = triton.cdiv(triton.cdiv(rows, block_r), programs_per_block) * block_r
    tile = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    return Split(part_rows, triton.cdiv(rows, part_rows), tile)
