"""Dropout from a counter: whether an element is dropped is a pure function of (seed, rank, step,
layer, element), the same on every device.

The state of a random generator would have to be saved, and on a CPU it takes longer than the
arithmetic of the convolution that follows; mixing a counter takes a tenth of that once compiled.
"""

import torch
from torch import nn

from fastlab.mixing import M1, M2, WORD, draw_offsets, mix_int, mix_tensor, signed

# Elements that a CPU draws at a time, so that their words stay in its cache between operations.
_BLOCK = 1 << 17


class Dropout(nn.Module):
    """In training, set each element to zero with probability `p`, and divide the others by 1 - p
    (Srivastava et al., 2014)."""

    keys: torch.Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0  # this layer's row of `keys`
        self.register_buffer("keys", torch.zeros(1, 2, dtype=torch.int32), persistent=False)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def key(self) -> torch.Tensor:
        """int32 [2], different for each layer and step."""
        return self.keys[self.layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return x
        mask = kept(x.shape, self.key(), self.p, x.device)
        # The mask is cast because a CPU multiplies mixed types slowly, and does so again in the
        # backward pass. (`torch.where` would give the result the memory layout of the mask.)
        return (x * mask.to(x.dtype)).div_(1 - self.p)


def threshold(p: float) -> int:
    """The lowest int32 word whose element is kept."""
    return min(round(p * (WORD + 1)), WORD) - (1 << 31)


def kept(shape: torch.Size, key: torch.Tensor, p: float, device: torch.device) -> torch.Tensor:
    """A bool mask of `shape`, [b, c] or [b, c, h, w], that is False with probability `p`. Elements
    are numbered in channels-last order."""
    count = shape.numel()
    if device.type == "cpu" and not torch.compiler.is_compiling():
        mask = torch.empty(count, dtype=torch.bool)
        for number, block in enumerate(mask.split(_BLOCK)):
            block.copy_(_kept(number * _BLOCK, len(block), key, p, device))
    else:
        mask = _kept(0, count, key, p, device)
    if len(shape) == 2:
        return mask.view(shape)
    b, c, h, w = shape
    return mask.view(b, h, w, c).permute(0, 3, 1, 2)


def _kept(
    first: int, count: int, key: torch.Tensor, p: float, device: torch.device
) -> torch.Tensor:
    """The mask of `count` elements from number `first` on: bool [count]."""
    large = first + count > torch.iinfo(torch.int32).max
    dtype = torch.int64 if large else torch.int32
    word = torch.arange(first, first + count, dtype=dtype, device=device).int()
    # In place, because allocating memory for each operation would take longer than the operations.
    word ^= key[0]
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    word *= signed(M1)
    # The second key comes in here: with the first alone, the masks of two steps would be
    # permutations of each other.
    word ^= key[1]
    word ^= (word >> 15).bitwise_and_(0x1FFFF)
    word *= signed(M2)  # its high bits are well mixed by now
    return word >= threshold(p)


class DropoutKeys:
    """Sets the keys of all `Dropout` layers of a model, which share one tensor on its device; and
    seeds the generators of torch, from which the layers of other models draw."""

    def __init__(self, model: nn.Module, seed: int, rank: int, device: torch.device) -> None:
        layers = [module for module in model.modules() if isinstance(module, Dropout)]
        self._rank = rank
        self._generators = [torch.random.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._offsets = draw_offsets(range(2 * len(layers)), device).view(len(layers), 2)
        self._stream = torch.zeros((), dtype=torch.int32, device=device)
        self._keys = torch.zeros_like(self._offsets)
        self.reseed(seed)
        for number, layer in enumerate(layers):
            layer.layer, layer.keys = number, self._keys

    def reseed(self, seed: int) -> None:
        self._number = mix_int(mix_int(seed) ^ self._rank)
        self._stream.fill_(signed(self._number))

    def set(self, step: torch.Tensor) -> None:
        """Set the keys for step number `step` of the run: int64 [1] on the device."""
        self._keys.copy_(mix_tensor(mix_tensor(step.int() ^ self._stream) + self._offsets))

    def seed_generators(self, step: int) -> None:
        """Seed torch's generators for step number `step` of the run, so that what they draw is also
        a function of (seed, rank, step). A captured step reads the seed when it is replayed."""
        for generator in self._generators:
            generator.manual_seed(mix_int(step ^ self._number))
