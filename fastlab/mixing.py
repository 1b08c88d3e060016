"""Pseudo-random words that are a pure function of counters: no generator, and no state to save.

All of fastlab's draws mix 32-bit words by "lowbias32" (Wellons, 2018), with the same results on the
host (`int`), in PyTorch (int32 tensors) and in the kernels of `pipelines.augment_cpu` and
`fastlab.models`.
"""

from collections.abc import Iterable

import torch

GOLDEN = 0x9E3779B9
M1, M2 = 0x7FEB352D, 0x846CA68B
WORD = 0xFFFFFFFF


def mix_int(x: int) -> int:
    """Map 32-bit words one to one onto 32-bit words."""
    x = (x ^ (x >> 16)) * M1 & WORD
    x = (x ^ (x >> 15)) * M2 & WORD
    return x ^ (x >> 16)


def mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`mix_int` for an int32 tensor: products wrap around, and masks clear the copies of the sign
    bit that a right shift brings in."""
    x = (x ^ (x >> 16 & 0xFFFF)) * signed(M1)
    x = (x ^ (x >> 15 & 0x1FFFF)) * signed(M2)
    return x ^ (x >> 16 & 0xFFFF)


def draw_offsets(numbers: Iterable[int], device: torch.device | str) -> torch.Tensor:
    """What distinguishes the words of the draws of these `numbers`: int32 [k]."""
    words = [signed(number * GOLDEN) for number in numbers]
    return torch.tensor(words, dtype=torch.int32, device=device)


def draw_tensor(
    base: torch.Tensor, offsets: torch.Tensor, spans: torch.Tensor | int
) -> torch.Tensor:
    """Whole numbers in [0, spans), int32 [b, k]; `base` is int32 [b], `offsets` int32 [k], `spans`
    [k] or [b, k]. They are a view of products in memory, so that no pixel computes them again."""
    words = mix_tensor(base[:, None] + offsets)
    products = (words.long() & WORD) * spans
    return products.view(torch.int32)[:, 1::2]  # the high halves, on a little-endian machine


def signed(word: int) -> int:
    """The int32 with the low 32 bits of `word`; torch takes no larger constant next to an int32."""
    return (word + (1 << 31) & WORD) - (1 << 31)
