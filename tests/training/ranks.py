"""Two ranks of a training without processes: threads that meet where processes would."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch


class Rank:
    """Stands in for the `Accelerator` of one of several ranks on a CPU."""

    scaler = None
    device = torch.device("cpu")

    def __init__(self, rank: int, barrier: threading.Barrier, gathered: list[Any]) -> None:
        self.process_index, self.num_processes = rank, barrier.parties
        self.is_main_process = rank == 0
        self._barrier, self._gathered = barrier, gathered

    def wait_for_everyone(self) -> None:
        self._barrier.wait()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, concatenated along their first dimension."""
        self._gathered[self.process_index] = tensor.clone()
        self._barrier.wait()
        result = torch.cat(self._gathered)
        self._barrier.wait()  # before a rank overwrites its tensor
        return result

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The elementwise "sum" or "mean" over all ranks."""
        return getattr(self.gather(tensor[None]), how)(dim=0)


def on_ranks(call: Callable[[Any], Any], count: int = 2) -> list[Any]:
    """Run `call` on each rank, given its accelerator. Returns what each returned or raised."""
    barrier, gathered = threading.Barrier(count, timeout=60), [None] * count
    ranks = [Rank(rank, barrier, gathered) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(partial(_result, call), ranks))


def _result(call: Callable[[Any], Any], rank: Rank) -> Any:
    try:
        return call(rank)
    except (Exception, SystemExit) as error:
        return error
