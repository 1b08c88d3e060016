"""What the processes of a training agree on."""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import get_int_from_env, parse_flag_from_env

from fastlab.console import UserError, tell

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and the launchers of MPI say how many processes they started."""


def processes_asked_for() -> int:
    """How many processes the launcher started. Raises `UserError` where it was `accelerate launch`,
    was asked for several, and started one: on a CPU it leaves their number to MPI."""
    world = get_int_from_env(_WORLD_SIZES, 0)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    several = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if on_cpu and several and not world:
        raise UserError(
            "accelerate launch was asked for several processes, but started one on this CPU; "
            "start them with: torchrun --nproc_per_node N -m fastlab.train"
        )
    return world or 1


@contextmanager
def agreed(accelerator: Accelerator) -> Generator[None]:
    """Collective: a `UserError` on any rank ends every process with status 2, and the first rank
    that has one reports it. The block itself must not wait for other ranks."""
    if accelerator.num_processes == 1:
        yield
        return
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    flag = torch.tensor([int(failure is not None)], device=accelerator.device)
    failed = accelerator.gather(flag).tolist()
    if not any(failed):
        return
    if failed.index(1) == accelerator.process_index:
        tell(failure)
    accelerator.wait_for_everyone()  # the launcher ends the others as soon as one has left
    raise SystemExit(2)


def largest(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Collective: the elementwise maximum of `values` [n], on the device, over all ranks."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.gather(values[None]).amax(dim=0)


def largest_int(accelerator: Accelerator, value: int) -> int:
    """Collective: the maximum of `value` over all ranks. One process alone does not wait for its
    device."""
    if accelerator.num_processes == 1:
        return value
    return int(largest(accelerator, torch.tensor([value], device=accelerator.device)))


def average_over_ranks(accelerator: Accelerator, buffers: Iterable[torch.Tensor]) -> None:
    """Collective: replace every floating-point buffer by its mean over the ranks."""
    if accelerator.num_processes == 1:
        return
    for buffer in buffers:
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))
