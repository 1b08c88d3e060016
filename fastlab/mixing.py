"""Pseudo-random words that are a pure function of counters: no generator, no state to save.

All draws of fastlab mix 32-bit words by "lowbias32" (Wellons, 2018), the same on the host (`int`),
in PyTorch (int32 tensors) and in the kernels of `pipelines.augment_cpu` and `fastlab.models`.
"""

import torch

GOLDEN = 0x9E3779B9
M1, M2 = 0x7FEB352D, 0x846CA68B
WORD = 0xFFFFFFFF


def mix_int(x: int) -> int:
    """A bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * M1 & WORD
    x = (x ^ (x >> 15)) * M2 & WORD
    return x ^ (x >> 16)


def mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`mix_int` in int32: products wrap, and masks clear what a shift copies from the sign."""
    x = (x ^ (x >> 16 & 0xFFFF)) * signed(M1)
    x = (x ^ (x >> 15 & 0x1FFFF)) * signed(M2)
    return x ^ (x >> 16 & 0xFFFF)


def signed(word: int) -> int:
    """The int32 with the low 32 bits of `word`: torch takes no larger constant beside an int32."""
    return (word + (1 << 31) & WORD) - (1 << 31)
