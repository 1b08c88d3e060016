"""When a device's memory is not enough: which setting to change, and to what."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlab.console import UserError

if TYPE_CHECKING:
    from fastlab.train import Trainer


@contextmanager
def explained(trainer: "Trainer") -> Iterator[None]:
    """Running out of memory becomes a `UserError` that names a batch size that fits."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Their variables hold the memory of the failed step, and `contextlib` the traceback.
        traceback.clear_frames(error.__traceback__)
    raise UserError(_advice(trainer))


@contextmanager
def fitting(advice: str) -> Iterator[None]:
    """What is too large whatever the batch becomes a `UserError` with this `advice`."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The second: more bytes than a number of 64 bits counts.
        if not is_out_of_memory(error) and "size calculation overflowed" not in str(error):
            raise
        raise UserError(advice) from None


def is_out_of_memory(error: Exception) -> bool:
    """Also of the host's allocator, which has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def largest(fits: Callable[[int], bool], failed: int) -> int:
    """The largest size below `failed` that `fits`, to within an eighth of it; 0: none does."""
    low, high = failed // 2, failed
    while low and not fits(low):
        low, high = low // 2, low
    while low and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _advice(trainer: "Trainer") -> str:
    trainer.step.release()
    key = "batch_size" if trainer.model.training else "eval_batch_size"
    size = getattr(trainer.cfg.train, key)
    world = trainer.accelerator.num_processes
    found = world * largest(lambda each: _fits(trainer, each), max(1, size // world))
    start = f"out of memory on {trainer.device} with train.{key} = {size}"
    if not found:
        return f"{start}: not even one image fits; take a smaller model.width or another device"
    return f"{start}: {found} was tried and fits; add --set train.{key}={found}"


def _fits(trainer: "Trainer", images: int) -> bool:
    """Whether a forward (and in training a backward) pass of so many images goes through."""
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        _passes(trainer, images)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _passes(trainer: "Trainer", images: int) -> None:
    model, side = trainer.model, trainer.manifest.image_size
    dtype = next(model.parameters()).dtype
    batch = torch.zeros((images, 3, side, side), device=trainer.device, dtype=dtype)
    if trainer.cfg.train.channels_last:
        batch = batch.to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # What the optimizer has not allocated yet if the very first step failed.
    states = 0 if trainer.optimizer.state_dict()["state"] else 2
    extra = [torch.empty_like(p) for p in parameters for _ in range(states)]
    # Eagerly: compiling anew for each size takes longer than it is worth.
    with trainer.accelerator.autocast(), torch.set_grad_enabled(model.training):
        logits = type(model).forward(model, batch).float()
        if model.training:
            labels = torch.zeros(images, dtype=torch.long, device=trainer.device)
            loss = nn.functional.cross_entropy(logits, labels)
            # Not `backward`: it would wait for the other processes.
            torch.autograd.grad(loss, parameters, allow_unused=True)
    del extra
