"""Pseudo-random words that are a pure function of counters: no generator, and no state to save.

All of fastlab's draws mix 32-bit words by "lowbias32" (Wellons, 2018), with the same results on the
host (`int`), in PyTorch (int32 tensors) and in the kernels of `pipelines.augment_cpu` and
`fastlab.models`.
"""

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


def signed(word: int) -> int:
    """The int32 with the low 32 bits of `word`; torch takes no larger constant next to an int32."""
    return (word + (1 << 31) & WORD) - (1 << 31)
